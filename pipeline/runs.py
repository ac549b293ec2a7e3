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
