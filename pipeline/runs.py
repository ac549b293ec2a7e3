"""What a catalog consists of: sets of segment numbers, holes between them, windows that can be restored.

A segment number is a position in the WAL divided by the size of a segment. A listing of a hundred thousand segments
becomes a few ranges.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.backup import BackupInfo
from pipeline.wal import Lsn, WalFile


@dataclass(frozen=True, slots=True)
class Runs:
    """A set of segment numbers as half-open ranges, ascending, with holes between them."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Runs:
        ranges: list[tuple[int, int]] = []
        first = end = None
        for number in sorted(set(numbers)):
            if first is None or end is None:
                first = number
            elif number != end:
                ranges.append((first, end))
                first = number
            end = number + 1
        if first is not None and end is not None:
            ranges.append((first, end))
        return cls(tuple(ranges))

    def __contains__(self, number: int) -> bool:
        return self.reach(number) > number

    def __len__(self) -> int:
        return sum(end - first for first, end in self.ranges)

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __iter__(self) -> Iterator[int]:
        for first, end in self.ranges:
            yield from range(first, end)

    def reach(self, number: int) -> int:
        """The first number from ``number`` on that is not in the set."""
        at = bisect_right(self.ranges, number, key=lambda run: run[0]) - 1
        return max(number, self.ranges[at][1]) if at >= 0 else number

    def holes(self) -> tuple[tuple[int, int], ...]:
        """What is missing between the first and the last."""
        return tuple((end, first) for (_, end), (first, _) in zip(self.ranges, self.ranges[1:], strict=False))

    @property
    def last(self) -> int:
        """The greatest number. ValueError for the empty set."""
        if not self.ranges:
            raise ValueError("an empty set has no last member")
        return self.ranges[-1][1] - 1


class Gathering:
    """Segment numbers on their way to ``Runs``: where they come in order, as listings do, a million take no room."""

    #: Ranges that are not joined yet, at most: so many come where a store lists in no order.
    _MOST = 4096

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._known = 0

    def add(self, number: int, end: int | None = None) -> None:
        """A number, or all from it up to ``end``, which is not one of them. In any order, also twice."""
        behind = number + 1 if end is None else end
        if self._ranges and self._ranges[-1][1] == number:
            self._ranges[-1] = self._ranges[-1][0], behind
            return
        self._ranges.append((number, behind))
        if len(self._ranges) > 2 * self._known + self._MOST:
            self._join()

    def runs(self) -> Runs:
        """All of them."""
        self._join()
        return Runs(tuple(self._ranges))

    def _join(self) -> None:
        joined: list[tuple[int, int]] = []
        for first, end in sorted(self._ranges):
            if joined and first <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            else:
                joined.append((first, end))
        self._ranges = joined
        self._known = len(joined)


@dataclass(frozen=True, slots=True)
class Hole:
    """Consecutive segments of a timeline that are missing between stored ones."""

    first: WalFile
    last: WalFile
    count: int


@dataclass(frozen=True, slots=True)
class Window:
    """What one backup can be rolled forward to on one timeline: from its end to the last byte without a hole."""

    backup: BackupInfo
    timeline: int
    start: Lsn
    end: Lsn
    #: The first segment that is missing although later ones are stored.
    missing: WalFile | None
    #: Bytes of the open segment at its end, which come from tails.
    tail: int = 0
