"""A base backup that somebody made with ``pg_basebackup -Ft`` and dropped into the spool, read as if it were streamed.

The folder holds ``base.tar``, ``<oid>.tar`` for each tablespace, ``pg_wal.tar``, any of them compressed, and
``backup_manifest``, which is renamed into place last. Where it begins and ends stands in the manifest; the tablespaces
in ``tablespace_map``, one of the first two files of base.tar; whose it is in the manifest (17 and later), in the WAL
beside it, or in ``global/pg_control``.
"""

from __future__ import annotations

import asyncio
import gzip
import re
import sys
import tarfile
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, cast

import lz4.frame  # type: ignore[import-untyped]  # has neither stubs nor a py.typed

from infra.sources.sweep import ARCHIVE, MANIFEST
from pipeline.backup import (
    ArchiveBegan,
    ArchiveData,
    BackupMessage,
    BackupStarted,
    BackupStopped,
    ManifestData,
    Tablespace,
)
from pipeline.errors import IntegrityError, SourceError
from pipeline.manifest import Manifest, last_modified, read_manifest
from pipeline.objects import MAX_PLAIN
from pipeline.tar import TarReader
from pipeline.wal import Lsn, WalFile, WalKind, parse_history
from pipeline.walpages import LONG_HEADER, PageHeader, check_segment, read_first_page

if sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

_CHUNK = 1 << 20
#: What the readers raise for bytes that are not theirs; RuntimeError is lz4's.
_DAMAGED = (OSError, EOFError, zlib.error, zstd.ZstdError, RuntimeError)
_UNREADABLE = (*_DAMAGED, tarfile.TarError, IntegrityError)
_FIRST_FILES = ("backup_label", "tablespace_map")


@dataclass(frozen=True, slots=True)
class DroppedBackup:
    """What is known of the backup before its archives are read."""

    folder: Path
    #: Decimal digits.
    system_id: str
    #: Major version of the server; 0 if only newer versions could tell.
    major: int
    #: Bytes.
    segment_size: int
    start_lsn: Lsn
    start_timeline: int
    stop_lsn: Lsn
    stop_timeline: int
    #: When it began and ended; None if that cannot be told.
    started: datetime | None
    stopped: datetime | None
    tablespaces: tuple[Tablespace, ...]
    #: The LABEL line of backup_label.
    label: str
    #: Archive (``base`` or an oid) → its file; tablespaces first, as the server streams them.
    archives: dict[str, Path]


def open_dropped(folder: Path, *, system_id: str, segment_size: int) -> DroppedBackup:
    """Look at the backup in ``folder``. Blocking. Raises SourceError if it is incomplete, damaged or another cluster's.

    Reads all of it: what is wrong only at the end would else be found when nearly all of it is shipped, again at each
    attempt.
    """
    try:
        return _open(folder, system_id, segment_size)
    except _UNREADABLE as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: Exception) -> SourceError:
    words = error.fact if isinstance(error, IntegrityError) else str(error)
    return SourceError(
        f"the base backup in {folder} cannot be read: {words}",
        hint="it may be damaged; take it again, or use walship backup",
    )


def _open(folder: Path, system_id: str, segment_size: int) -> DroppedBackup:
    archives = _archives(folder)
    if "base" not in archives:
        raise SourceError(f"the base backup in {folder} has no base.tar", hint="pg_basebackup -Ft writes one")
    manifest, modified = _read_manifest(folder / MANIFEST)
    found_id = manifest.system_id
    page = _first_wal_page(archives.get("pg_wal"))
    if not found_id:
        found_id = str(page.system_id) if page else _control_system_id(archives["base"])
    if found_id != system_id:
        raise SourceError(
            f"the base backup in {folder} belongs to the cluster {found_id}, not to {system_id}",
            hint="move it to the spool of its own cluster",
        )
    texts, started = _first_files(archives["base"])
    tablespaces = _parse_map(texts.get("tablespace_map", b""))
    missing = [str(t.oid) for t in tablespaces if str(t.oid) not in archives]
    if missing:
        raise SourceError(
            f"the base backup in {folder} lacks the archive of tablespace {', '.join(missing)}",
            hint="keep all files that pg_basebackup wrote together",
        )
    for path in archives.values():
        _check_archive(path)
    label = re.search(rb"^LABEL: (.*)$", texts.get("backup_label", b""), re.MULTILINE)
    return DroppedBackup(
        folder=folder,
        system_id=found_id,
        major=page.major if page else 0,
        segment_size=page.segment_size if page else segment_size,
        start_lsn=manifest.first.start,
        start_timeline=manifest.first.timeline,
        stop_lsn=manifest.last.end,
        stop_timeline=manifest.last.timeline,
        started=started,
        stopped=_stopped_at(folder, archives.values(), [m for m in (started, modified) if m]),
        tablespaces=tablespaces,
        label=label[1].decode("utf-8", "replace") if label else "",
        archives={name: archives[name] for name in [*(str(t.oid) for t in tablespaces), "base"]},
    )


async def dropped_messages(backup: DroppedBackup) -> AsyncIterator[BackupMessage]:
    """The backup as the messages of a stream, uncompressed. Each step reads in a thread. Raises SourceError."""
    yield BackupStarted(backup.start_lsn, backup.start_timeline, backup.tablespaces, at=backup.started)
    for name, path in backup.archives.items():
        yield ArchiveBegan(name)
        async for piece in _pieces(path):
            yield ArchiveData(piece)
    async for piece in _pieces(backup.folder / MANIFEST):
        yield ManifestData(piece)
    yield BackupStopped(backup.stop_lsn, backup.stop_timeline, at=backup.stopped)


def dropped_wal(backup: DroppedBackup) -> Iterator[tuple[WalFile, bytes]]:
    """The finished segments and history files of pg_wal.tar, in the archive's order; what is not whole is left out.

    Blocking; a segment is held in memory while it is looked at. Raises SourceError.
    """
    path = _archives(backup.folder).get("pg_wal")
    if path is None:
        return
    try:
        with _opened(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                file = WalFile.parse(member.name)
                content = archive.extractfile(member)
                if file is None or content is None or member.size > backup.segment_size:
                    continue
                data = content.read()
                if _is_whole(file, data, backup):
                    yield file, data
    except _UNREADABLE as error:
        raise _unreadable(backup.folder, error) from None


def _is_whole(file: WalFile, data: bytes, backup: DroppedBackup) -> bool:
    try:
        if file.kind is WalKind.SEGMENT:
            check_segment(file, data, system_id=int(backup.system_id), segment_size=backup.segment_size)
            return True
        return file.kind is WalKind.HISTORY and bool(parse_history(file.name, data))
    except IntegrityError:  # the last segment of a streamed pg_wal.tar may be open: it is archived by the server later
        return False


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    try:
        stream = await asyncio.to_thread(_opened, path)
        try:
            while piece := await asyncio.to_thread(stream.read, _CHUNK):
                yield piece
        finally:
            await asyncio.to_thread(stream.close)
    except _DAMAGED as error:
        raise SourceError(
            f"{path} cannot be read to its end: {error}", hint="it is damaged; take the backup again"
        ) from None


def _archives(folder: Path) -> dict[str, Path]:
    return {path.name.split(".")[0]: path for path in sorted(folder.iterdir()) if ARCHIVE.fullmatch(path.name)}


def _opened(path: Path) -> IO[bytes]:
    """The archive, uncompressed as it is read."""
    match path.suffix:
        case ".gz":
            return cast("IO[bytes]", gzip.open(path, "rb"))
        case ".lz4":
            return cast("IO[bytes]", lz4.frame.open(path, "rb"))
        case ".zst":
            return cast("IO[bytes]", zstd.open(path, "rb"))
        case _:
            return path.open("rb")


def _read_manifest(path: Path) -> tuple[Manifest, datetime | None]:
    """What it says, and the change of the youngest file in it."""
    size = path.stat().st_size
    if size > MAX_PLAIN:
        raise IntegrityError(f"{path} is {size} bytes; an object holds at most {MAX_PLAIN}")
    content = path.read_bytes()
    return read_manifest(content), last_modified(content)


def _check_archive(path: Path) -> None:
    """It can be read to its end, and is a tar as PostgreSQL writes it. Raises IntegrityError, or one of _DAMAGED."""
    tar = TarReader(path.name)
    with _opened(path) as stream:
        while piece := stream.read(_CHUNK):
            for _ in tar.feed(piece):
                pass
    tar.finish()


def _stopped_at(folder: Path, archives: Iterable[Path], earliest: list[datetime]) -> datetime | None:
    """When the backup had ended: the server sends the manifest last, and pg_basebackup then closes what is still open.

    None, which stands for now, if that lies before what the server says: then the clocks differ, or a copy has put
    other times on the files.
    """
    written = max(map(_mtime, (folder / MANIFEST, *archives)))
    return None if any(written < moment for moment in earliest) else written


def _mtime(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _first_wal_page(path: Path | None) -> PageHeader | None:
    """Header of the first segment in pg_wal.tar."""
    if path is None:
        return None
    with _opened(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            file = WalFile.parse(member.name)
            content = archive.extractfile(member)
            if file and content and file.kind is WalKind.SEGMENT:
                return read_first_page(f"{path.name}/{file}", content.read(LONG_HEADER))
    return None


def _first_files(base: Path) -> tuple[dict[str, bytes], datetime | None]:
    """backup_label and tablespace_map, which the server puts in front of everything else; and when it began to.

    The label's own START TIME stands in the server's time zone, by an abbreviation that several zones share. But its
    tar header has the seconds since 1970 at which the server sent it, right after that (``basebackup.c``).
    """
    texts: dict[str, bytes] = {}
    started = None
    with _opened(base) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if member.name not in _FIRST_FILES:
                break
            content = archive.extractfile(member)
            texts[member.name] = content.read() if content else b""
            if member.name == "backup_label":
                started = datetime.fromtimestamp(member.mtime, UTC)
    return texts, started


def _control_system_id(base: Path) -> str:
    """The first eight bytes of global/pg_control, which the server sends last: all of the archive is passed over."""
    with _opened(base) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name == "global/pg_control" else None
            if content:
                return str(int.from_bytes(content.read(8), "little"))
    raise IntegrityError(f"{base} holds no global/pg_control")


def _parse_map(content: bytes) -> tuple[Tablespace, ...]:
    """Lines of ``<oid> <path>``; a line end or backslash in the path has a backslash before it (``xlogrecovery.c``)."""
    found = re.findall(rb"^([0-9]+) ((?:[^\\\n]|\\[\s\S])*)$", content, re.MULTILINE)
    return tuple(
        Tablespace(int(oid), re.sub(rb"\\([\s\S])", rb"\1", path).decode("utf-8", "surrogateescape"))
        for oid, path in found
    )
