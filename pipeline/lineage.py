"""A timeline with its ancestors, and which bytes of which segment recovery may be given.

At a fork PostgreSQL copies the old timeline's bytes into the new timeline's first segment, so the segment that contains
a fork exists twice: the new timeline's file holds the old bytes up to the fork and the new ones behind it; the old
timeline's file holds, behind the fork, bytes that the new timeline never had. Recovery (``XLogFileReadAnyTLI``) asks
for the newest timeline that begins in or before the segment, and when that is absent goes back to the older ones
without looking at where those ended: given such a file it replays past the fork, silently. Therefore:

- each segment is taken from the newest leg of the lineage that begins in or before it, as PostgreSQL does;
- an older leg's file is a substitute for it only in the segment where that leg ends, cut at the fork (zeros behind it);
  the WAL ends there, as nothing of the new timeline can be replayed without that segment;
- an older leg's file behind its fork is not part of the path, and is answered absent;
- ``.partial`` (what the promoted server archived of the old timeline's open segment) stands in for an older leg's last
  segment in the same way, and for the last segment of the lineage when no finished one is stored;
- tails that can be joined from the segment's beginning on stand in for any segment that is not stored finished: the
  path goes on behind them only where they are the whole segment. A timeline's tails without a byte behind its fork are
  not used: the older timeline has all of that, and perhaps more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.wal import Lsn, WalFile, WalKind


class Stored(Protocol):
    """What is stored of the segment of (timeline, number)."""

    def has_segment(self, timeline: int, number: int) -> bool: ...

    def run_end(self, timeline: int, number: int) -> int:
        """The first number from that one on whose segment is not stored finished."""
        ...

    def has_partial(self, timeline: int, number: int) -> bool: ...

    def tail_reach(self, timeline: int, number: int) -> int:
        """Bytes that can be joined from tails, 0 if none can."""
        ...


@dataclass(frozen=True, slots=True)
class Leg:
    """The part of the WAL that belongs to one timeline: ``[begin, end)``; the last leg has no end."""

    timeline: int
    begin: Lsn
    end: Lsn | None


@dataclass(frozen=True, slots=True)
class Serve:
    """How a request for a segment is to be answered."""

    #: The stored files that may serve, best first.
    files: tuple[WalFile, ...]
    #: Bytes of the segment that belong to the lineage; behind them zeros are served. None: all.
    cut: int | None
    #: Bytes that older timelines have of the segment as well: tails count only if they reach further.
    begin: int = 0


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive segments of one timeline on the way: numbers ``[first, end)``."""

    timeline: int
    first: int
    end: int
    #: The last of them is a ``.partial``.
    partial: bool = False
    #: Not 0: it is one segment that is stored as tails only, which have so many of its bytes.
    tail: int = 0

    def holds(self, file: WalFile, segment_size: int) -> bool:
        """Whether that segment is one of them."""
        return file.timeline == self.timeline and self.first <= file.start(segment_size) // segment_size < self.end


@dataclass(frozen=True, slots=True)
class WalPath:
    """The segments that recovery reads, without a hole, and why there are no more."""

    stretches: tuple[Stretch, ...]
    start: Lsn
    #: The first byte that is not there: the end of the last segment or of its tails, or a fork whose new timeline's
    #: segment is absent.
    end: Lsn
    #: The first missing segment, if there is more behind it (or more was asked for); None if the WAL just ends.
    missing: WalFile | None
    segment_size: int

    def files(self) -> Iterator[WalFile]:
        """In the order of recovery."""
        for stretch in self.stretches:
            for number in range(stretch.first, stretch.end):
                yield self._file(stretch.timeline, number)

    def stored(self) -> Iterator[WalFile]:
        """The same, as they are stored: a ``.partial`` under its own name, and none of what is stored as tails."""
        for stretch in (stretch for stretch in self.stretches if not stretch.tail):
            for number in range(stretch.first, stretch.end):
                file = self._file(stretch.timeline, number)
                partial = stretch.partial and number == stretch.end - 1
                yield _partial(file) if partial else file

    def finished(self) -> Iterator[WalFile]:
        """As ``files``, without what is stored as tails: those may have grown by the time they are asked for."""
        for stretch in (stretch for stretch in self.stretches if not stretch.tail):
            for number in range(stretch.first, stretch.end):
                yield self._file(stretch.timeline, number)

    def in_tails(self) -> Iterator[WalFile]:
        """The others: segments that are stored as tails."""
        for stretch in (stretch for stretch in self.stretches if stretch.tail):
            yield self._file(stretch.timeline, stretch.first)

    def backwards(self) -> Iterator[WalFile]:
        """The last segment first."""
        for stretch in reversed(self.stretches):
            for number in range(stretch.end - 1, stretch.first - 1, -1):
                yield self._file(stretch.timeline, number)

    def _file(self, timeline: int, number: int) -> WalFile:
        return WalFile.segment(timeline, number * self.segment_size, self.segment_size)

    @property
    def tail(self) -> int:
        """Bytes at its end that come from tails of an open segment; 0 if it ends otherwise."""
        return self.stretches[-1].tail if self.stretches else 0

    @property
    def count(self) -> int:
        return sum(stretch.end - stretch.first for stretch in self.stretches)

    @property
    def size(self) -> int:
        """Bytes of plaintext."""
        return self.count * self.segment_size


@dataclass(frozen=True, slots=True)
class Lineage:
    """A timeline and its ancestors, the oldest first."""

    legs: tuple[Leg, ...]
    segment_size: int

    @property
    def timeline(self) -> int:
        """The one that all this leads to."""
        return self.legs[-1].timeline

    def holds(self, timeline: int, lsn: Lsn) -> bool:
        """Whether WAL of ``timeline`` up to ``lsn`` belongs to this lineage: lsn must not lie behind its fork."""
        return any(leg.timeline == timeline and (leg.end is None or lsn <= leg.end) for leg in self.legs)

    def newest(self, number: int) -> Leg:
        """The leg that PostgreSQL asks first for the segment: the newest one that begins in or before it."""
        for leg in reversed(self.legs):
            if leg.begin // self.segment_size <= number:
                return leg
        return self.legs[0]

    def serve(self, file: WalFile) -> Serve | None:
        """How to answer a request of recovery for a segment; None: it is not part of this lineage."""
        if file.kind is not WalKind.SEGMENT:
            return None
        leg = next((leg for leg in self.legs if leg.timeline == file.timeline), None)
        start = file.start(self.segment_size)
        # A leg that begins behind the segment cannot have it; PostgreSQL does not ask then.
        if leg is None or leg.begin >= start + self.segment_size:
            return None
        if leg.end is not None and leg.end <= start:
            return None
        cut = None
        if leg.end is not None and leg.end < start + self.segment_size:
            cut = leg.end - start
        # A .partial is complete up to the fork only; in the middle of a leg it would end recovery silently.
        may_be_partial = cut is not None or leg.end is None or leg.end == start + self.segment_size
        files = (file, _partial(file)) if may_be_partial else (file,)
        return Serve(files, cut, max(0, leg.begin - start))

    def path(self, stored: Stored, start: Lsn, wanted: Lsn) -> WalPath:
        """The segments from ``start`` up to ``wanted``, or up to the first missing one. See ``Catalog.wal_path``."""
        size = self.segment_size
        number = start // size
        reached = Lsn(number * size)
        stretches: list[Stretch] = []
        # At least the segment with the start is always needed.
        wanted = max(wanted, Lsn(start + 1))
        end = -(-wanted // size)
        while reached < wanted:
            found = self._provider(number, end, stored)
            if found is None:
                break
            stretch, leg, whole = found
            _extend(stretches, stretch)
            if not whole:
                edge = reached + (stretch.tail or size)
                reached = edge if leg.end is None else min(leg.end, edge)
                break
            number = stretch.end
            reached = Lsn(number * size)
        missing = None
        if reached < wanted:
            # Also where a .partial, tails, or an older timeline's file up to the fork stand in for what is missing.
            missing = WalFile.segment(self.newest(number).timeline, number * size, size)
        return WalPath(tuple(stretches), start, reached, missing, size)

    def _provider(self, number: int, end: int, stored: Stored) -> tuple[Stretch, Leg, bool] | None:
        """What serves the segment, whose it is, and whether the path goes on behind it.

        Finished ones in a row are one answer, up to ``end`` and to where a newer leg takes over: months of WAL are as
        quick to go through as a day of it.
        """
        newest = self.newest(number)
        size = self.segment_size
        if stored.has_segment(newest.timeline, number):
            run = stored.run_end(newest.timeline, number)
            newer = (leg.begin // size for leg in self.legs if leg.begin // size > number)
            return Stretch(newest.timeline, number, min(run, end, *newer)), newest, True
        edge = Lsn((number + 1) * size)
        for leg in reversed(self.legs):
            if leg.begin >= edge or (leg.end is not None and leg.end <= edge - size):
                continue
            ends = leg is newest and leg.end == edge
            if leg is not newest and stored.has_segment(leg.timeline, number):
                return Stretch(leg.timeline, number, number + 1), leg, False
            if stored.has_partial(leg.timeline, number) and (leg.end is None or leg.end <= edge):
                return Stretch(leg.timeline, number, number + 1, partial=True), leg, ends
            tail = stored.tail_reach(leg.timeline, number)
            if edge - size + tail > max(leg.begin, edge - size):
                return Stretch(leg.timeline, number, number + 1, tail=tail), leg, leg is newest and tail == size
        return None


def _partial(file: WalFile) -> WalFile:
    return WalFile(file.timeline, file.log, file.seg, WalKind.PARTIAL, f"{file.name}.partial")


def _extend(stretches: list[Stretch], following: Stretch) -> None:
    last = stretches[-1] if stretches else None
    joins = last and last.timeline == following.timeline and last.end == following.first
    if last and joins and not (last.partial or last.tail or following.tail):
        stretches[-1] = Stretch(last.timeline, last.first, following.end, following.partial)
    else:
        stretches.append(following)
