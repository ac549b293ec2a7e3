"""Which segments were never stored: told of as ranges, and filled one by one."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Missing:
    """A set of segment numbers, kept as ranges: a server that was alone for a month may leave a million."""

    #: Half-open, ascending, apart from each other.
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def add(self, first: int, end: int) -> None:
        """From ``first`` to before ``end``; what is in the set already stays there once."""
        if end <= first:
            return
        apart = []
        for a, b in self.ranges:
            if b < first or end < a:
                apart.append((a, b))
            else:
                first, end = min(first, a), max(end, b)
        self.ranges = sorted([*apart, (first, end)])

    def remove(self, number: int) -> None:
        """Take it out, if it is in the set."""
        halves = [half for a, b in self.ranges for half in ((a, min(b, number)), (max(a, number + 1), b))]
        self.ranges = [(a, b) for a, b in halves if a < b]

    def __len__(self) -> int:
        return sum(b - a for a, b in self.ranges)
