"""The WAL that the stream has brought and that is not durable yet: a few segments in memory, of which the last grows.

    receiver ──append──> OpenWal ──> a tail shipper per destination (``handlers/tail.py``), each at its own pace
                            └──────> whole segments, by the dispatcher, like any other

One task appends; any number read. A segment's buffer never moves, so a worker thread may read what is filled while more
is appended behind it.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from dataclasses import dataclass, field

from pipeline.contracts import Buffer
from pipeline.wal import Lsn, WalFile

#: Arrivals closer together than this, in seconds, are remembered as one.
_GRAIN = 0.01

#: So many arrivals are remembered of a segment; then every other one of the older half is forgotten. A segment may be
#: open for weeks, and it is the last seconds that matter.
_MOST_MARKS = 4096


@dataclass(slots=True, eq=False)
class OpenSegment:
    """One segment, from its first byte on."""

    file: WalFile
    #: Position of its first byte.
    start: Lsn
    #: As long as a segment; zeros behind ``filled``.
    data: bytearray
    #: Bytes that have arrived.
    filled: int = 0
    #: Nothing more comes: it is whole, or its timeline ended here.
    ended: bool = False
    #: When bytes arrived: (``filled`` before them, monotonic seconds), ascending.
    _marks: list[tuple[int, float]] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return self.filled == len(self.data)

    @property
    def end(self) -> Lsn:
        """Position behind the last byte that has arrived."""
        return self.start + self.filled

    def view(self, begin: int, end: int) -> memoryview:
        """Bytes ``[begin, end)`` of the segment; they must have arrived."""
        assert end <= self.filled
        return memoryview(self.data)[begin:end]

    def arrived(self, offset: int) -> float:
        """When the byte at ``offset`` arrived, in monotonic seconds: that moment, or somewhat before.

        A hundredth of a second, and more only for bytes with thousands of arrivals behind them.
        """
        at = bisect_right(self._marks, offset, key=lambda mark: mark[0]) - 1
        return self._marks[max(at, 0)][1]

    def append(self, data: Buffer, now: float) -> None:
        """Bytes that fit into the segment; ``now`` in monotonic seconds."""
        end = self.filled + len(data)
        assert end <= len(self.data)
        if not self._marks or now - self._marks[-1][1] >= _GRAIN:
            self._marks.append((self.filled, now))
            if len(self._marks) > _MOST_MARKS:
                del self._marks[1 : _MOST_MARKS // 2 : 2]
        self.data[self.filled : end] = data
        self.filled = end


class OpenWal:
    """The segments that are held, the oldest first."""

    def __init__(self) -> None:
        self.segments: list[OpenSegment] = []
        self._version = 0
        self._grown = asyncio.Event()

    def begin(self, file: WalFile, segment_size: int) -> OpenSegment:
        """A new segment, from its first byte on."""
        segment = OpenSegment(file, file.start(segment_size), bytearray(segment_size))
        self.segments.append(segment)
        return segment

    def tell(self) -> None:
        """Something has changed: bytes, a new segment, an end. Wakes whoever waits in ``changed``."""
        self._version += 1
        self._grown.set()
        self._grown = asyncio.Event()

    @property
    def version(self) -> int:
        """Counts the changes."""
        return self._version

    async def changed(self, seen: int) -> int:
        """Wait until ``version`` is greater than ``seen``; returns it."""
        while self._version <= seen:
            await self._grown.wait()
        return self._version

    def following(self, segment: OpenSegment | None) -> OpenSegment | None:
        """The segment that was begun next behind that one, the oldest held for None; None if there is none yet.

        A segment that was dropped meanwhile is followed by the oldest that is held and lies behind it.
        """
        for held in self.segments:
            if segment is None or (held.file.timeline, held.start) > (segment.file.timeline, segment.start):
                return held
        return None

    def drop(self, segment: OpenSegment) -> None:
        """Forget a segment; idempotent. Whoever still holds it may read on."""
        if segment in self.segments:
            self.segments.remove(segment)
            self.tell()
