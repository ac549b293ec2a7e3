"""Tails: the bytes of an open segment, stored as objects of their own, and how they are joined again.

    tail/<segment, 24 hex>/<epoch>-<start>-<end>       epoch, start and end as 8 hex digits each

The plaintext is the SHA-256 of the segment's bytes before ``start`` (32 bytes), then the bytes ``[start, end)``. A tail
is joined only where that equals the hash of what is there already, so any cut points, any number of writers and any
fork are safe: bytes that do not belong together never meet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from pipeline.contracts import Buffer
from pipeline.wal import WalFile, WalKind

#: Bytes of the hash in front.
HASH_SIZE = 32

_KEY = re.compile(r"tail/(?P<file>[0-9A-F]{24})/(?P<epoch>[0-9a-f]{8})-(?P<start>[0-9a-f]{8})-(?P<end>[0-9a-f]{8})")


@dataclass(frozen=True, slots=True, order=True)
class TailName:
    """What a tail's key says of it."""

    file: WalFile
    #: Number of the writer's lease.
    epoch: int
    #: Offsets in the segment: the bytes ``[start, end)``.
    start: int
    end: int

    @property
    def key(self) -> str:
        return f"{tail_folder(self.file)}{self.epoch:08x}-{self.start:08x}-{self.end:08x}"

    @classmethod
    def parse(cls, key: str) -> Self | None:
        """The tail of that key, or None if walship names no tail so."""
        match = _KEY.fullmatch(key)
        file = WalFile.parse(match["file"]) if match else None
        if match is None or file is None or file.kind is not WalKind.SEGMENT:
            return None
        start, end = int(match["start"], 16), int(match["end"], 16)
        return cls(file, int(match["epoch"], 16), start, end) if start < end else None


def tail_folder(file: WalFile) -> str:
    """Where the tails of a segment lie; ends in ``/``."""
    return f"tail/{file.name}/"


@dataclass(frozen=True, slots=True)
class TailPart:
    """A tail as it was read."""

    name: TailName
    #: SHA-256 of what comes before ``name.start``.
    before: bytes
    #: The bytes of the range.
    data: Buffer


@dataclass(frozen=True, slots=True)
class Stitched:
    """The beginning of a segment, joined from tails."""

    file: WalFile
    #: As long as a segment; zeros from ``reach`` on.
    content: bytearray
    #: So many bytes are there.
    reach: int
    #: What people have to know: tails that do not fit, and why. One sentence each.
    notices: tuple[str, ...] = ()


def stitch(file: WalFile, parts: Iterable[TailPart], segment_size: int) -> Stitched:
    """Join what fits, from offset 0 on. Pure.

    Parts may overlap, leave holes, come twice, from several writers, or from another fork. Of two that fit and
    disagree, the one of the higher epoch counts, and a notice says so.
    """
    raise NotImplementedError
