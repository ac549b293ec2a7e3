"""The bytes of one stored object, kept for as long as any destination may still want them.

Up to 32 MB stay in memory. What is larger goes into a temporary file that has no name: nobody else can find it, and it
is gone with the process however that ends. It lies in the system's folder for temporary files (``TMPDIR``), which
therefore needs room for as many of the largest objects as are under way at once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from pipeline.contracts import Body, Buffer
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody

#: Bytes of one body that are kept in memory; beyond that it spills to a file.
SPILL_AT = 32 << 20
#: Bytes of the pieces that a file is read in.
CHUNK = 1 << 20


class FileBody:
    """A body in an open file, which it owns: ``close`` closes the file. ``chunks`` reads the disk.

    It reads at positions of its own, so that several readers can go over it at once.
    """

    __slots__ = ("_file", "_start", "size")

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file = file
        self._start = start
        self.size = size

    def chunks(self) -> Iterator[bytes]:
        """The bytes in pieces of at most 1 MiB. Raises StoreError when the file turns out to be shorter."""
        at, end = self._start, self._start + self.size
        while at < end:
            chunk = os.pread(self._file.fileno(), min(CHUNK, end - at), at)
            if not chunk:
                raise StoreError(f"a file of {self.size} bytes ends after {at - self._start} bytes", passing=True)
            at += len(chunk)
            yield chunk

    def close(self) -> None:
        self._file.close()


class Collector:
    """Takes pieces one by one and makes a Body of them. ``discard`` what is not finished."""

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[bytes] = []
        self._file: BinaryIO | None = None

    def add(self, piece: Buffer) -> None:
        """Copy the piece, because whoever made it may reuse its buffer. May write to a file: call it from a thread."""
        self.size += len(piece)
        if self._file is None:
            self._pieces.append(bytes(piece))
            if self.size > SPILL_AT:
                self._spill()
        else:
            self._write(piece)

    def finish(self) -> Body:
        """The body of all pieces; the collector must not be used any more."""
        if self._file is None:
            return MemoryBody(self._pieces)
        return FileBody(self._file, 0, self.size)

    def discard(self) -> None:
        """Free what was collected so far."""
        self._pieces.clear()
        if self._file is not None:
            self._file.close()

    def _spill(self) -> None:
        try:
            # Unbuffered: pieces are large, and FileBody reads past any buffer.
            self._file = tempfile.TemporaryFile(buffering=0, prefix="walship-")  # noqa: SIM115 - closed by FileBody
        except OSError as error:
            raise _no_room(self.size, error) from error
        for piece in self._pieces:
            self._write(piece)
        self._pieces.clear()

    def _write(self, piece: Buffer) -> None:
        assert self._file is not None
        rest = memoryview(piece)
        try:
            while rest:  # a raw file may take only a part, on a full disk for one
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise _no_room(self.size, error) from error


def collect(pieces: Iterable[Buffer]) -> Body:
    """Keep all pieces, each copied: in memory up to 32 MB, above that in an unlinked temporary file.

    Call it from a thread. Raises StoreError if the temporary file cannot be written.
    """
    collector = Collector()
    try:
        for piece in pieces:
            collector.add(piece)
        return collector.finish()
    except BaseException:
        collector.discard()
        raise


def joined(body: Body) -> bytes:
    """All bytes of a body at once, for what is known to be small."""
    return b"".join(body.chunks())


def _no_room(size: int, error: OSError) -> StoreError:
    return StoreError(
        f"an object of more than {size - 1} bytes cannot be kept in {tempfile.gettempdir()}: {error.strerror}",
        hint="objects above 32 MB are kept in a temporary file: make room there, or set TMPDIR to another folder",
        passing=True,
    )
