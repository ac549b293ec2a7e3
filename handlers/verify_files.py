"""The files of a backup against its backup_manifest: sizes and checksums, from the parts as they are stored.

The archives flow by, part by part. Of each file 16 bytes are kept, so that a million files are 16 MB; the manifest is
held as a whole. What PostgreSQL's own pg_verifybackup passes over is passed over here: files that the manifest does not
list, and those that pg_basebackup writes into an archive behind the server's back.
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Protocol

from crc32c import crc32c

from handlers.to_the_end import ended, in_thread
from pipeline.backup import ArchiveInfo, BackupInfo
from pipeline.catalog import manifest_key, part_key
from pipeline.contracts import Buffer
from pipeline.errors import IntegrityError
from pipeline.layout import prefix_of
from pipeline.manifest import files_of, read_manifest
from pipeline.tar import Content, Entry, EntryKind, TarReader

#: Files that are named of those that differ.
_NAMED = 5
_IGNORED = frozenset({"postgresql.auto.conf", "recovery.signal", "standby.signal"})
_SHA = {"SHA224": "sha224", "SHA256": "sha256", "SHA384": "sha384", "SHA512": "sha512"}

#: The plaintext of an object of the backup, from wherever it is good; None if it is nowhere. Name and digest.
Read = Callable[[str, str], Awaitable[bytearray | None]]


class _Sum(Protocol):
    def update(self, data: Buffer, /) -> object: ...
    def hexdigest(self) -> str: ...


class _Crc:
    """CRC-32C as a manifest writes it: the bytes as they lie in the server's memory, the lowest first."""

    def __init__(self) -> None:
        self._crc = 0

    def update(self, data: Buffer, /) -> None:
        self._crc = crc32c(data, self._crc)

    def hexdigest(self) -> str:
        return self._crc.to_bytes(4, "little").hex()


async def compare_files(info: BackupInfo, read: Read, *, width: int) -> str | None:
    """How the files in the archives differ from the manifest, in a sentence; empty if they do not.

    None if it cannot be told: something of it is good nowhere, which ``read`` has noted. ``width``: parts that are read
    at the same time.
    """
    content = await read(manifest_key(info.name), info.manifest)
    if content is None:
        return None
    comparison = _Comparison()
    try:
        await in_thread(partial(comparison.begin, content, info.system_id))
        for archive in info.archives:
            if not await _archive(info, archive, read, comparison, width):
                return None
        return await in_thread(partial(comparison.verdict, content))
    except IntegrityError as error:
        return error.fact


async def _archive(info: BackupInfo, archive: ArchiveInfo, read: Read, comparison: _Comparison, width: int) -> bool:
    """False if a part is good nowhere. Raises IntegrityError."""
    reader = TarReader(archive.name)
    todo = iter(enumerate(archive.parts, 1))
    ahead: deque[asyncio.Task[bytearray | None]] = deque()

    def more() -> None:
        for number, digest in todo:
            work = read(part_key(info.name, archive.name, number), digest)
            ahead.append(asyncio.ensure_future(work))
            if len(ahead) >= width:
                return

    try:
        more()
        while ahead:
            plain = await ahead.popleft()
            more()
            if plain is None:
                return False
            await in_thread(partial(comparison.feed, reader, prefix_of(archive.name), plain))
    finally:
        for task in ahead:
            task.cancel()
        await ended(ahead)
    reader.finish()
    if reader.size != archive.size:
        raise IntegrityError(f"the archive {archive.name} has {reader.size} bytes, not the {archive.size} it should")
    return True


class _Comparison:
    """Blocking: its methods run in threads, one after another."""

    def __init__(self) -> None:
        self._algorithms: list[str] = []
        self._paths = array("Q")
        self._files = array("Q")
        self._path = ""
        self._size = self._left = 0
        self._sums: dict[str, _Sum] = {}

    def begin(self, content: bytearray, system_id: str) -> None:
        """Look at the manifest. Raises IntegrityError if it is not whole, or another cluster's."""
        manifest = read_manifest(content)
        if manifest.system_id not in ("", system_id):
            raise IntegrityError(f"the backup_manifest belongs to {manifest.system_id}, the backup to {system_id}")
        # One is chosen for a whole backup; files that are listed without a checksum are not looked at.
        self._algorithms = sorted({line.algorithm for line in files_of(content)} & {"CRC32C", *_SHA})

    def feed(self, reader: TarReader, prefix: str, plain: Buffer) -> None:
        """The next bytes of an archive."""
        for item in reader.feed(plain):
            if isinstance(item, Content):
                for each in self._sums.values():
                    each.update(item.data)
                self._left -= len(item.data)
            else:
                self._open(item, prefix)
            if self._sums and not self._left:
                self._close()

    def _open(self, entry: Entry, prefix: str) -> None:
        if entry.kind is EntryKind.FILE:
            self._path, self._size, self._left = prefix + entry.path, entry.size, entry.size
            self._sums = {name: hashlib.new(_SHA[name]) if name in _SHA else _Crc() for name in self._algorithms}

    def _close(self) -> None:
        self._paths.append(_mark(self._path))
        for algorithm, made in self._sums.items():
            self._files.append(_mark(self._path, str(self._size), algorithm, made.hexdigest()))
        self._sums = {}

    def verdict(self, content: bytearray) -> str:
        """Compare, once all archives have gone by."""
        self._files = array("Q", sorted(self._files))
        self._paths = array("Q", sorted(self._paths))
        wrong, count = list[str](), 0
        for path, fact in self._wrong(content):
            count += 1
            if count <= _NAMED:
                wrong.append(f"{path!r} {fact}")
        if not count:
            return ""
        more = f", and {count - _NAMED} more" if count > _NAMED else ""
        return f"what is stored differs from its backup_manifest: {', '.join(wrong)}{more}"

    def _wrong(self, content: bytearray) -> Iterator[tuple[str, str]]:
        for line in files_of(content):
            if line.algorithm not in self._algorithms or line.path in _IGNORED:
                continue
            mark = _mark(line.path, str(line.size), line.algorithm, line.checksum.lower())
            if not _has(self._files, mark):
                yield line.path, "has another size or checksum" if _has(self._paths, _mark(line.path)) else "is missing"


def _has(marks: array[int], mark: int) -> bool:
    at = bisect_left(marks, mark)
    return at < len(marks) and marks[at] == mark


def _mark(*words: str) -> int:
    told = "\0".join(words).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big")
