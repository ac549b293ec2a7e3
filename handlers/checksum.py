"""Checksum: the last station of every object. Its SHA-256 trailer lets anybody check an object without any key.

The trailer finds damage, not malice: whoever can write to a store can make a trailer that fits. Malice is found by the
encryption stage, and by ``backup_info`` for the parts of a backup.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator

from pipeline.contracts import Buffer
from pipeline.errors import IntegrityError
from pipeline.objects import TRAILER_SIZE, Header, begin_reading


class Checksum:
    """The stage: appends SHA-256 over all that comes before it, and verifies and removes it."""

    def describe(self, header: Header) -> Header:
        return header

    def forward(self, header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        digest = hashlib.sha256(header.encoded())
        for piece in pieces:
            digest.update(piece)
            yield piece
        yield digest.digest()

    def backward(self, header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        """The frames, without the trailer. What it yields is trustworthy only once it ends without an error."""
        yield from _strip(header, pieces)


def _strip(header: Header, pieces: Iterable[Buffer]) -> Generator[Buffer, None, str]:
    """Yields the frames and returns the trailer as hex, once it was found to be right."""
    digest = hashlib.sha256(header.encoded())
    held = b""  # the last bytes seen: the trailer, once nothing more comes
    for piece in pieces:
        ready: tuple[Buffer, ...]
        if len(piece) >= TRAILER_SIZE:
            view = memoryview(piece)
            ready = (held, view[:-TRAILER_SIZE])
            held = bytes(view[-TRAILER_SIZE:])
        else:
            joined = held + piece
            ready = (joined[:-TRAILER_SIZE],)
            held = joined[-TRAILER_SIZE:]
        for frame in ready:
            if len(frame):
                digest.update(frame)
                yield frame
    if len(held) < TRAILER_SIZE:
        raise IntegrityError(f"{header.name} is cut: it ends before its checksum")
    if held != digest.digest():
        raise IntegrityError(
            f"{header.name} is damaged or cut: its bytes do not match its SHA-256 trailer",
            hint="read it from another destination, and check the disk or the store that holds this one",
        )
    return held.hex()


def check_stored(name: str, chunks: Iterable[Buffer]) -> tuple[Header, str]:
    """Check a whole stored object without any key: its header, and its trailer as hex. Raises IntegrityError.

    ``name`` is the key it was found under; an object that says another name of itself is refused. Holds one chunk.
    """
    header, pieces = begin_reading(name, chunks)
    if header.name != name:
        raise IntegrityError(
            f"{name} holds an object named {header.name}",
            hint="it was copied or moved there; restore the original, or read from another destination",
        )
    frames = _strip(header, pieces)
    while True:
        try:
            next(frames)
        except StopIteration as end:
            return header, str(end.value)


class Trailing:
    """Pieces as they are, with the last 32 bytes remembered: the trailer of a stored object."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self.trailer = b""

    def __iter__(self) -> Iterator[Buffer]:
        for piece in self._pieces:
            self.trailer = (self.trailer + piece[-TRAILER_SIZE:])[-TRAILER_SIZE:]
            yield piece
