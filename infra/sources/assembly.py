"""Puts the bytes of the stream together to segments, and compares what the server sends a second time.

A stream always begins at a segment's first byte: at a reconnect, at that of the open segment. So its bytes come again,
and they must be what is held already, because they may be stored: a server that sends others has lost what it sent, and
goes on as if it never had (a snapshot was put back under it). Nothing of ours is overwritten then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.contracts import Buffer
from pipeline.errors import SourceError
from pipeline.openwal import OpenSegment, OpenWal
from pipeline.wal import Lsn, WalFile

#: Whole segments that may wait until they are stored somewhere; with one more, nothing further is read.
MOST_WHOLE = 2
#: The same of segments above so many bytes. Each may have an encoded object of its size beside it: two and two are the
#: four that the bound of memory allows.
MOST_WHOLE_LARGE, LARGE = 1, 16 << 20

ROLLED_BACK = (
    "the server was put back to an earlier state, or is another copy of the cluster; what is stored stays as it is."
    " Bring the right server back; or to go on with this one, promote it to a timeline of its own"
)


@dataclass(frozen=True, slots=True)
class _Arrived:
    """When the first byte of a segment arrived: what is remembered when its buffer is gone."""

    end: Lsn
    moment: float


class Assembly:
    """Where the stream is, and the segments of it that are in memory. All times are monotonic seconds."""

    def __init__(self, wal: OpenWal, segment_size: int, announce: Callable[[OpenSegment], None]) -> None:
        """``announce`` is told of each segment when it has become whole."""
        self._wal = wal
        self._size = segment_size
        self._most = MOST_WHOLE if segment_size <= LARGE else MOST_WHOLE_LARGE
        self._announce = announce
        self._open: OpenSegment | None = None
        #: Whole, and stored nowhere yet.
        self._whole: dict[WalFile, OpenSegment] = {}
        #: Ended before they were whole, by a gap or a fork: their ends may still be shipped.
        self._left: list[OpenSegment] = []
        #: What was received behind the end of the last segment that there was room for.
        self._rest = b""
        #: The whole segment at whose end the stream is, as long as nothing is open behind it.
        self._before: OpenSegment | None = None
        self._arrived: dict[Lsn, _Arrived] = {}
        self._expected = Lsn(0)
        self.timeline = 0
        #: End of what has arrived.
        self.received = Lsn(0)

    # -- where the stream is

    def begin_at(self, timeline: int, lsn: Lsn) -> None:
        """The stream goes on at a segment's first byte, behind a gap, on another timeline, or for the first time."""
        assert lsn % self._size == 0
        if (left := self.end()) is not None:
            self._left.append(left)
        self._open = self._before = None
        self.timeline, self.received = timeline, lsn
        self.rewind()

    def rewind(self) -> Lsn:
        """A new connection: where it has to begin."""
        self._rest = b""
        self._expected = self.received if self._open is None else self._open.start
        return self._expected

    @property
    def verified(self) -> bool:
        """Whether the server has sent all again that it had sent to an earlier connection, and the same."""
        return self._expected >= self.received

    @property
    def before(self) -> WalFile | None:
        """The segment to ask a server for at a new connection: nothing that it sends by itself can be compared."""
        return self._before.file if self._before is not None else None

    def compare(self, data: Buffer) -> None:
        """The bytes of ``before`` as the server has them. SourceError if they are others."""
        if self._before is not None and data != self._before.data:
            raise _other_bytes(self._before, self._before.start)

    @property
    def room(self) -> bool:
        """Whether to read on."""
        return not self._rest and len(self._whole) <= self._most

    # -- bytes

    def take(self, start: Lsn, data: Buffer, now: float) -> None:
        """The next bytes. SourceError if they are others than those that came before."""
        if start != self._expected or self._rest:
            raise SourceError(f"PostgreSQL sent WAL from {start} on, where {self._expected} was to come")
        rest = memoryview(data)
        while rest:
            if self._open is None and len(self._whole) > self._most:
                self._rest = bytes(rest)
                return
            rest = rest[self._put(rest, now) :]

    def go_on(self, now: float) -> None:
        """Take what there was no room for, if there is now."""
        if self._rest and len(self._whole) <= self._most:
            rest, self._rest = self._rest, b""
            self.take(self._expected, rest, now)

    def _put(self, data: memoryview, now: float) -> int:
        """Compare or append the beginning of it; returns how many bytes."""
        if self._open is None:
            self._before = None
            self._open = self._wal.begin(WalFile.segment(self.timeline, self._expected, self._size), self._size)
            self._arrived[self._open.start] = _Arrived(self._open.start + self._size, now)
        segment = self._open
        offset = self._expected - segment.start
        if offset < segment.filled:
            piece = data[: segment.filled - offset]
            # As bytes: views are compared item by item, which takes a hundred times as long.
            if bytes(segment.view(offset, offset + len(piece))) != bytes(piece):
                raise _other_bytes(segment, self._expected)
        else:
            piece = data[: self._size - offset]
            segment.append(piece, now)
            self.received = segment.end
        self._expected = self._expected + len(piece)
        if segment.whole and not segment.ended:
            segment.ended = True
            self._open, self._before = None, segment
            self._whole[segment.file] = segment
            self._announce(segment)
        return len(piece)

    # -- ends

    def end(self) -> OpenSegment | None:
        """Nothing more comes of the open segment; returns it, for ``drop``. None if none is open."""
        segment, self._rest = self._open, b""
        if segment is not None and not segment.ended:
            segment.ended = True
            self._wal.tell()
        return segment

    def leave(self, fork: Lsn) -> None:
        """What lies behind ``fork`` was left behind by the server: it ends the open segment."""
        self.end()
        self._before = None
        self.received = self._expected = fork

    def drop(self, segment: OpenSegment) -> None:
        """Give its memory back. Idempotent; whoever reads it may go on."""
        self._whole.pop(segment.file, None)
        if segment is self._open:
            self._open = None
        for left in [each for each in self._left if _place(each) < _place(segment)]:
            self._left.remove(left)
            self._wal.drop(left)  # what comes behind it is stored: its tails had their time
        self._wal.drop(segment)

    def whole(self, file: WalFile) -> OpenSegment | None:
        """The whole segment, as long as it is in memory."""
        return self._whole.get(file)

    def age(self, lsn: Lsn, now: float) -> float:
        """Seconds since the byte at ``lsn`` arrived, 0 if it has not. For a segment that is gone: its first byte."""
        if lsn >= self.received:
            return 0.0
        start = Lsn(lsn // self._size * self._size)
        for segment in self._wal.segments:
            if segment.start == start and segment.start + segment.filled > lsn:
                return now - segment.arrived(lsn - start)
        return now - min((a.moment for a in self._arrived.values() if a.end > lsn), default=now)

    def forget_before(self, lsn: Lsn) -> None:
        """No ``age`` before that is asked for any more."""
        for start in [start for start, arrived in self._arrived.items() if arrived.end <= lsn]:
            del self._arrived[start]


def _place(segment: OpenSegment) -> tuple[int, Lsn]:
    return segment.file.timeline, segment.start


def _other_bytes(segment: OpenSegment, lsn: Lsn) -> SourceError:
    return SourceError(
        f"PostgreSQL sent other bytes of segment {segment.file} than before, behind {lsn}",
        hint=ROLLED_BACK,
        lasting=True,
    )
