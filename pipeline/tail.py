"""Tails: the bytes of an open segment, stored as objects of their own, and how they are joined again.

    tail/<segment, 24 hex>/<epoch>-<start>-<end>       epoch, start and end as 8 hex digits each

The plaintext is the SHA-256 of the segment's bytes before ``start`` (32 bytes), then the bytes ``[start, end)``. A tail
is joined only where that equals the hash of what is there already, so any cut points, any number of writers and any
fork are safe: bytes that do not belong together never meet.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from pipeline.wal import WalFile, WalKind

if TYPE_CHECKING:  # the contracts name ``Stitched``
    from pipeline.contracts import Buffer

#: Bytes of the hash in front.
HASH_SIZE = 32
#: Bytes of the header of a segment's first page (``XLogLongPageHeaderData``).
_FIRST_HEADER = 40

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

    @property
    def usable(self) -> int:
        """``reach``, or 0 if not even the first page's header is there: no recovery can begin to read that."""
        return self.reach if self.reach >= _FIRST_HEADER else 0


def stitch(file: WalFile, parts: Iterable[TailPart], segment_size: int) -> Stitched:
    """Join what fits, from offset 0 on. Pure.

    Parts may overlap, leave holes, come twice, from several writers, or from another fork. Where two that fit disagree,
    the one of the higher epoch counts from the first byte on in which they differ, and a notice says so.
    """
    pool = sorted(
        (part for part in parts if part.name.file == file and part.name.end <= segment_size),
        key=lambda part: (part.name, part.before),
    )
    notices: list[str] = []
    while True:
        joined = _Joined(pool, segment_size)
        joined.join()
        if joined.overruled is None:
            break
        # A higher epoch has other bytes: what the lower ones have from there on is cut away, and all is joined anew.
        notices.append(joined.overruled.notice(file))
        pool = joined.overruled.cut(pool)
    return Stitched(file, joined.content, joined.reach, (*notices, *joined.notices(file)))


@dataclass(frozen=True, slots=True)
class _Overruled:
    """A part that fits and has other bytes than parts of lower epochs, which were joined before it."""

    part: TailPart
    #: The first byte that differs.
    offset: int
    #: What was joined and holds that byte.
    losers: tuple[TailPart, ...]

    def notice(self, file: WalFile) -> str:
        return (
            f"segment {file} was written twice: epochs {max(p.name.epoch for p in self.losers)} and"
            f" {self.part.name.epoch} differ from offset {self.offset} on, and epoch {self.part.name.epoch} counts"
        )

    def cut(self, pool: Iterable[TailPart]) -> list[TailPart]:
        """The pool, with nothing of the losers from the first differing byte on."""
        left = []
        for part in pool:
            if not any(part is loser for loser in self.losers):
                left.append(part)
            elif part.name.start < self.offset:
                name = replace(part.name, end=self.offset)
                left.append(TailPart(name, part.before, memoryview(part.data)[: self.offset - part.name.start]))
        return left


class _Joined:
    """Takes each part once: as soon as what is joined reaches its start, the highest epoch first, then the longest."""

    def __init__(self, pool: Sequence[TailPart], segment_size: int) -> None:
        self.content = bytearray(segment_size)
        self.reach = 0
        self.overruled: _Overruled | None = None
        self._waiting = deque(sorted(pool, key=lambda part: part.name.start))
        self._taken: list[TailPart] = []
        self._refused: list[TailPart] = []
        #: The hash of what comes before each start, made in one pass as the reach grows.
        self._starts = deque(sorted({part.name.start for part in pool}))
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._before: dict[int, bytes] = {}

    def join(self) -> None:
        """Until nothing is left that fits, or something is overruled."""
        ready: list[tuple[int, int, int]] = []
        pool: list[TailPart] = []
        while self.overruled is None:
            self._note_hashes()
            while self._waiting and self._waiting[0].name.start <= self.reach:
                part = self._waiting.popleft()
                heapq.heappush(ready, (-part.name.epoch, -part.name.end, len(pool)))
                pool.append(part)
            if not ready:
                return
            self._take(pool[heapq.heappop(ready)[2]])

    def _take(self, part: TailPart) -> None:
        start, end = part.name.start, part.name.end
        if part.before != self._before[start]:
            self._refused.append(part)
            return
        there = min(end, self.reach)
        with memoryview(self.content) as joined, memoryview(part.data) as data:
            if joined[start:there] != data[: there - start]:
                self._disagree(part, start + _first_difference(joined[start:there], data[: there - start]))
                return
            if end > self.reach:
                joined[self.reach : end] = data[self.reach - start :]
        self._taken.append(part)
        self.reach = max(self.reach, end)

    def _disagree(self, part: TailPart, offset: int) -> None:
        holders = tuple(p for p in self._taken if p.name.start <= offset < p.name.end)
        if all(holder.name.epoch < part.name.epoch for holder in holders):
            self.overruled = _Overruled(part, offset, holders)
        else:
            self._refused.append(part)

    def _note_hashes(self) -> None:
        with memoryview(self.content) as joined:
            while self._starts and self._starts[0] <= self.reach:
                start = self._starts.popleft()
                self._hash.update(joined[self._hashed : start])
                self._hashed = start
                self._before[start] = self._hash.digest()

    def notices(self, file: WalFile) -> list[str]:
        """Of what does not fit and would have reached further."""
        said = []
        for epoch in sorted({part.name.epoch for part in self._refused if part.name.end > self.reach}):
            parts = [part.name for part in self._refused if part.name.epoch == epoch and part.name.end > self.reach]
            said.append(
                f"{_tails(len(parts))} of segment {file} and epoch {epoch}, from offset {min(p.start for p in parts)}"
                f" to {max(p.end for p in parts)}, came from another fork than what was joined up to {self.reach}"
            )
        if self._waiting:
            first, last = self._waiting[0].name.start, max(part.name.end for part in self._waiting)
            said.append(
                f"segment {file} has a hole: bytes {self.reach} to {first} are in no tail that fits, and"
                f" {_tails(len(self._waiting))} behind it, up to offset {last}, cannot be joined"
            )
        return said


def _tails(count: int) -> str:
    return "1 tail" if count == 1 else f"{count} tails"


def _first_difference(left: memoryview, right: memoryview) -> int:
    """Of two that are equally long and not equal."""
    low, high = 0, len(left)
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] != right[low:middle]:
            high = middle
        else:
            low = middle
    return low
