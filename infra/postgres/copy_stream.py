"""One worker of a local base backup: files in, a tar stream out, in pieces of a few MiB. Blocking: for a thread.

Nothing stops because a file changes while it is read: the WAL repairs it. What a file has grown by since its header is
left out, what it has lost is filled with zeros, and one that is gone before it was opened was dropped.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from crc32c import crc32c

from handlers.pages import PAGE, bad_pages
from infra.postgres.damage import Damage
from infra.postgres.datadir import Found
from pipeline.errors import SourceError
from pipeline.make_manifest import ManifestMaker
from pipeline.tar import BLOCK, EntryKind, header
from pipeline.wal import Lsn

#: Most bytes that are read at a time, whole pages.
_READ = 1 << 20


@dataclass(slots=True)
class Copy:
    """What the workers share."""

    #: Where the backup began.
    start: Lsn
    manifest: ManifestMaker
    #: Whether pages have checksums, and how many make a segment file of a relation.
    checksums: bool
    blocks: int
    damaged: list[Damage] = field(default_factory=list)
    #: Waits until so many bytes may be read, or it was stopped.
    pace: Callable[[int, threading.Event], None] = lambda _size, _stop: None
    #: Bytes of a piece, about; whole pages.
    piece: int = 4 << 20
    #: Set when nobody wants more of it: a thread cannot be cancelled.
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, path: str, size: int, mtime: int, crc: int) -> None:
        """A file has been read."""
        with self._lock:
            self.manifest.add(os.fsencode(path), size, mtime, crc)

    def report(self, damage: Damage) -> None:
        with self._lock:
            self.damaged.append(damage)


class Shared:
    """An iterator that several threads take from."""

    def __init__(self, files: Iterator[Found]) -> None:
        self._files = files
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Found]:
        return self

    def __next__(self) -> Found:
        with self._lock:
            return next(self._files)


class Stream:
    """The tar stream ``archive``, of whatever files it gets hold of. ``prefix``: of their paths in the manifest."""

    def __init__(self, archive: str, files: Shared, copy: Copy, prefix: str = "") -> None:
        self.archive = archive
        self._files = files
        self._copy = copy
        self._prefix = prefix
        self._pieces = self._all()

    def next(self) -> bytes:
        """The next piece; empty when there are no more files. Raises SourceError for a file that cannot be read."""
        gathered: list[bytes] = []
        size = 0
        for piece in self._pieces:
            gathered.append(piece)
            size += len(piece)
            if size >= self._copy.piece:
                break
        return b"".join(gathered)

    def content(self, path: str, data: bytes, like: os.stat_result, mtime: int) -> bytes:
        """A file that is no file yet, as a piece: with the owner and mode of another one."""
        self._copy.add(path, len(data), mtime, crc32c(data))
        front = header(path, EntryKind.FILE, size=len(data), mode=0o600, mtime=mtime, uid=like.st_uid, gid=like.st_gid)
        return front + data + bytes(-len(data) % BLOCK)

    def _all(self) -> Iterator[bytes]:
        try:
            for found in self._files:
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

    def _folder(self, found: Found) -> Iterator[bytes]:
        yield header(
            found.path, EntryKind.DIRECTORY, size=0, mode=found.mode, mtime=found.mtime, uid=found.uid, gid=found.gid
        )

    def _file(self, found: Found) -> Iterator[bytes]:
        # Not blocking: what was a file when it was listed may be a pipe by now, and nobody writes to that.
        handle = os.open(found.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            seen = os.fstat(handle)
            if not stat.S_ISREG(seen.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file", str(found.source))
            size, mtime = seen.st_size, int(seen.st_mtime)
            yield header(
                found.path, EntryKind.FILE, size=size, mode=found.mode, mtime=mtime, uid=found.uid, gid=found.gid
            )
            crc = 0
            for piece in self._content(handle, size, found):
                crc = crc32c(piece, crc)
                yield piece
            if size % BLOCK:
                yield bytes(-size % BLOCK)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # the page cache is not ours to fill
        finally:
            os.close(handle)
        self._copy.add(self._prefix + found.path, size, mtime, crc)

    def _content(self, handle: int, size: int, found: Found) -> Iterator[bytes]:
        damaged: list[int] = []
        most = min(_READ, self._copy.piece)
        for offset in range(0, size, most):
            length = min(most, size - offset)
            self._copy.pace(length, self._copy.stop)
            if self._copy.stop.is_set():
                return
            try:
                piece = _read(handle, length, offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(found.source)) from None  # pread knows no name
            if self._copy.checksums and found.segment is not None:
                damaged += self._check(handle, piece, offset, found.segment)
            yield piece + bytes(length - len(piece))
        if damaged:
            self._copy.report(Damage(self._prefix + found.path, tuple(damaged)))

    def _check(self, handle: int, piece: bytes, offset: int, segment: int) -> list[int]:
        """Blocks that are damaged at a second look too: the server may have been writing at the first."""
        whole = len(piece) // PAGE * PAGE
        first = segment * self._copy.blocks
        bad = bad_pages(memoryview(piece)[:whole], first + offset // PAGE, self._copy.start) if whole else []
        again = []
        for number in bad:
            page = os.pread(handle, PAGE, (number - first) * PAGE)
            if len(page) == PAGE and bad_pages(page, number, self._copy.start):
                again.append(number)
        return again


def _read(handle: int, length: int, offset: int) -> bytes:
    """So many bytes, or all there are: some file systems, and signals, cut a read short before the end of a file."""
    piece = os.pread(handle, length, offset)
    while piece and len(piece) < length:
        more = os.pread(handle, length - len(piece), offset + len(piece))
        if not more:
            break
        piece += more
    return piece
