"""One worker of a local base backup: files in, a tar stream out, in pieces of 16 MiB. Blocking: for a thread.

Nothing stops because a file changes while it is read: the WAL repairs it. What a file has grown by since its header is
left out, what it has lost is filled with zeros, and one that is gone before it was opened was dropped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import stat
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from crc32c import crc32c

from handlers.pages import FEW, PAGE, Few, bad_pages
from infra.postgres.damage import Damage
from infra.postgres.datadir import Found
from pipeline.backup import ArchiveData
from pipeline.catalog import PART_SIZE
from pipeline.errors import SourceError
from pipeline.make_manifest import ManifestMaker
from pipeline.tar import BLOCK, EntryKind, header
from pipeline.wal import Lsn

#: Most bytes that are read at a time, whole pages. Less makes the page checksums slower, more leaves the cache.
_READ = 2 << 20
#: Two blocks of zeros end a tar.
_END = bytes(1024)
#: Files of one kind that are remembered while one of the other kind is looked for.
_PASSED_OVER = 10_000
#: Seconds between looks whether it was stopped, while there is no room.
_LOOK = 0.1


@dataclass(slots=True)
class Copy:
    """What the workers share."""

    #: Where the backup began.
    start: Lsn
    manifest: ManifestMaker
    #: Whether pages have checksums, and how many make a segment file of a relation.
    checksums: bool
    blocks: int
    #: Waits until so many bytes may be read, or it was stopped.
    pace: Callable[[int, threading.Event], None] = lambda _size, _stop: None
    #: Bytes of a piece; whole pages. By default what becomes a part as it is.
    piece: int = PART_SIZE
    #: Pieces that there may be at a time: being filled, and with whoever takes them.
    pieces: int = 4
    #: Set when nobody wants more of it: a thread cannot be cancelled.
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _spare: queue.SimpleQueue[bytearray] = field(default_factory=queue.SimpleQueue)
    _made: int = 0
    #: Path → numbers of the damaged blocks.
    _bad: dict[str, list[int]] = field(default_factory=dict)

    def room(self) -> bytearray | None:
        """For one piece, to be given back with ``free``. Waits for it; None if it was stopped meanwhile."""
        with self._lock:
            new = self._spare.empty() and self._made < self.pieces
            self._made += new
        if new:
            return bytearray(self.piece)
        while not self.stop.is_set():
            with contextlib.suppress(queue.Empty):
                return self._spare.get(timeout=_LOOK)
        return None

    def keep(self) -> None:
        """One room is kept until the end: those who still read may have another one for it."""
        with self._lock:
            self.pieces += 1

    def free(self, room: bytearray) -> None:
        self._spare.put(room)

    def add(self, path: str, size: int, mtime: int, crc: int) -> None:
        """A file has been read."""
        with self._lock:
            self.manifest.add(os.fsencode(path), size, mtime, crc)

    def report(self, path: str, block: int) -> None:
        """A block is damaged."""
        with self._lock:
            self._bad.setdefault(path, []).append(block)

    @property
    def damaged(self) -> list[Damage]:
        """What was reported, once all has been read."""
        return [Damage(path, tuple(sorted(blocks))) for path, blocks in sorted(self._bad.items())]


@dataclass(frozen=True, slots=True)
class _Relation:
    """A file of pages."""

    source: Path
    #: As in the manifest.
    path: str
    #: Number of its first block.
    first: int


class Shared:
    """Files that several threads take: one of them the large ones first, and the others the small ones.

    Of small files each thread's work is Python's mostly, which does one thing at a time: with large ones beside them,
    those who compress need not wait for all the catalogs.
    """

    def __init__(self, files: Iterator[Found]) -> None:
        self._files = files
        self._lock = threading.Lock()
        #: Found, and passed over so far by whoever looked for the others.
        self._large: deque[Found] = deque()
        self._small: deque[Found] = deque()

    def take(self, *, large: bool) -> Found | None:
        """The next one, of those that are wanted if there are any; None: there are no more."""
        with self._lock:
            wanted, others = (self._large, self._small) if large else (self._small, self._large)
            while not wanted and len(others) < _PASSED_OVER and (found := next(self._files, None)) is not None:
                (self._large if found.size >= PART_SIZE and not found.folder else self._small).append(found)
            chosen = wanted or others
            return chosen.popleft() if chosen else None


class Stream:
    """The tar stream ``archive``, of whatever files it gets hold of. ``prefix``: of their paths in the manifest.

    ``large``: whether it takes large files first. Where it does not, a folder comes before what is in it. ``ends``:
    whether the archive ends with the last file; else ``end`` has to be called for it.
    """

    def __init__(
        self, archive: str, files: Shared, copy: Copy, prefix: str = "", *, large: bool = False, ends: bool = True
    ) -> None:
        self.archive = archive
        self.ends = ends
        self._large = large
        self._files = files
        self._copy = copy
        self._prefix = prefix
        self._pieces = self._all()
        self._few: Few[_Relation] = Few(copy.start)
        #: The piece that is gathered, if any is, and how much of it is there.
        self._room: bytearray | None = None
        self._filled = 0

    def next(self) -> ArchiveData | None:
        """The next piece; None when there are no more files. Raises SourceError for a file that cannot be read."""
        return next(self._pieces, None)

    def end(self, content: bytes = b"") -> Iterator[ArchiveData]:
        """What is left, with ``content`` behind it, and the end of the tar."""
        yield from self._write(content + _END)
        if self._filled:
            yield self._piece(last=True)

    def content(self, path: str, data: bytes, like: os.stat_result, mtime: int) -> bytes:
        """A file that is no file yet, as a piece: with the owner and mode of another one."""
        self._copy.add(path, len(data), mtime, crc32c(data))
        front = header(path, EntryKind.FILE, size=len(data), mode=0o600, mtime=mtime, uid=like.st_uid, gid=like.st_gid)
        return front + data + bytes(-len(data) % BLOCK)

    def _all(self) -> Iterator[ArchiveData]:
        try:
            while (found := self._files.take(large=self._large)) is not None:
                if self._copy.stop.is_set():
                    return
                try:
                    yield from self._folder(found) if found.folder else self._file(found)
                except FileNotFoundError:
                    continue
        except OSError as error:
            raise SourceError(
                f"{error.filename or self.archive} cannot be read: {error.strerror}",
                hint="walship has to run as the server's user to read the data directory; the disk's log may tell"
                " more. WALSHIP_DATA_DIR unset takes the backup through the server instead",
            ) from None
        for relation, number in self._few.check():
            self._look_again(relation, number)
        if self.ends:
            yield from self.end()
        elif self._room is not None:
            self._copy.keep()

    def _piece(self, *, last: bool = False) -> ArchiveData:
        """What was gathered."""
        room, filled = self._room, self._filled
        assert room is not None
        self._room, self._filled = None, 0
        return ArchiveData(memoryview(room)[:filled], self.archive, lambda: self._copy.free(room), last)

    def _rest(self) -> memoryview:
        """Where the next bytes belong: never empty, unless it was stopped."""
        if self._room is None:
            self._room = self._copy.room()
        return memoryview(self._room or b"")[self._filled :]

    def _took(self, size: int) -> Iterator[ArchiveData]:
        """So many bytes more are there."""
        self._filled += size
        if self._filled == self._copy.piece:
            yield self._piece()

    def _write(self, data: bytes) -> Iterator[ArchiveData]:
        while data and (rest := self._rest()):
            size = min(len(rest), len(data))
            rest[:size] = data[:size]
            data = data[size:]
            yield from self._took(size)

    def _folder(self, found: Found) -> Iterator[ArchiveData]:
        yield from self._write(
            header(
                found.path, EntryKind.DIRECTORY, size=0, mode=found.mode, mtime=found.mtime, uid=found.uid,
                gid=found.gid,
            )
        )  # fmt: skip

    def _file(self, found: Found) -> Iterator[ArchiveData]:
        handle = _open(found.source)
        try:
            seen = os.fstat(handle)
            if not stat.S_ISREG(seen.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file", str(found.source))
            size, mtime = seen.st_size, int(seen.st_mtime)
            yield from self._write(
                header(
                    found.path, EntryKind.FILE, size=size, mode=found.mode, mtime=mtime, uid=found.uid, gid=found.gid
                )
            )
            crc = yield from self._content(handle, size, found)
            if self._copy.stop.is_set():
                return
            yield from self._write(bytes(-size % BLOCK))
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # the page cache is not ours to fill
        finally:
            os.close(handle)
        self._copy.add(self._prefix + found.path, size, mtime, crc)

    def _content(self, handle: int, size: int, found: Found) -> Generator[ArchiveData, None, int]:
        """Gives the CRC-32C of what was written."""
        crc = offset = 0
        relation = None
        if self._copy.checksums and found.segment is not None:
            relation = _Relation(found.source, self._prefix + found.path, found.segment * self._copy.blocks)
        while offset < size:
            rest = self._rest()[: min(_READ, size - offset)]
            self._copy.pace(len(rest), self._copy.stop)
            if self._copy.stop.is_set():
                break
            try:
                there = _read(handle, rest, offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(found.source)) from None  # it knows no name
            rest[there:] = bytes(len(rest) - there)
            crc = crc32c(rest, crc)
            if relation is not None:
                self._check(handle, rest[:there], offset, relation)
            offset += len(rest)
            yield from self._took(len(rest))
        return crc

    def _check(self, handle: int, data: memoryview, offset: int, relation: _Relation) -> None:
        """Look for damaged pages in what was just read; a few are looked at later, with those of other files."""
        # A page that lies across the end of a piece was not seen whole: it is read once more.
        front = -offset % PAGE
        whole = data[front : front + (len(data) - front) // PAGE * PAGE]
        number = relation.first + offset // PAGE
        bad: list[tuple[_Relation, int]] = []
        if front and len(page := os.pread(handle, PAGE, offset // PAGE * PAGE)) == PAGE:
            bad += self._few.add(page, number, relation)
        number += front > 0
        if len(whole) > FEW * PAGE:
            bad += [(relation, found) for found in bad_pages(whole, number, self._copy.start)]
        elif whole:
            bad += self._few.add(whole, number, relation)
        for each in bad:
            self._look_again(*each)

    def _look_again(self, relation: _Relation, number: int) -> None:
        """A block counts as damaged if it is so at a second look: the server may have been writing at the first."""
        try:
            handle = _open(relation.source)
        except FileNotFoundError:
            return  # dropped meanwhile
        try:
            page = os.pread(handle, PAGE, (number - relation.first) * PAGE)
        finally:
            os.close(handle)
        if len(page) == PAGE and bad_pages(page, number, self._copy.start):
            self._copy.report(relation.path, number)


def _open(path: Path) -> int:
    """Not blocking: what was a file when it was listed may be a pipe by now, and nobody writes to that."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _read(handle: int, room: memoryview, offset: int) -> int:
    """Fill the room, or as far as the file goes: some file systems, and signals, cut a read short before its end."""
    there = 0
    while there < len(room) and (more := os.preadv(handle, [room[there:]], offset + there)):
        there += more
    return there
