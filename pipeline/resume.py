"""Where the stream goes on: where the *repository* ends, not where the server is now.

Asking the server instead ("IDENTIFY_SYSTEM") would skip what lies between the last stored byte and now, and the end of
the old timeline after a promotion.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.lineage import Lineage
from pipeline.runs import Runs
from pipeline.wal import Lsn


@dataclass(frozen=True, slots=True)
class GoOn:
    """The first segment that is missing, as the stream is to ask for it."""

    #: The oldest timeline that has bytes in the segment: where a fork lies in it, the end of the old one comes first.
    timeline: int
    #: The segment's first byte.
    lsn: Lsn
    #: Where stored segments begin again behind the hole; None if nothing is stored behind it.
    hole_end: Lsn | None = None


def go_on(lineage: Lineage, stored: dict[int, Runs], *, begin: Lsn | None, after: int = 0) -> GoOn | None:
    """The first missing segment of the lineage from ``begin`` on, not before ``after``; None if nothing is stored.

    ``stored``: finished segments, by timeline. ``begin``: where the newest base backup
    begins, as holes before it harm nobody; None if there is no backup: then only the last run of segments counts.
    """
    size = lineage.segment_size
    numbers = [
        number
        for leg in lineage.legs
        for first, end in stored.get(leg.timeline, Runs()).ranges
        for number in (first, end - 1)
        if leg.end is None or number * size < leg.end
    ]
    if not numbers:
        return None

    def has(number: int) -> bool:
        return number in stored.get(lineage.newest(number).timeline, Runs())

    last = max(numbers)
    if begin is None:
        number = last
        while number > 0 and has(number - 1):
            number -= 1
    else:
        number = begin // size
    number = max(number, after // size)
    while has(number):
        number += 1
    edge = (number + 1) * size
    leg = next(leg for leg in lineage.legs if leg.begin < edge and (leg.end is None or leg.end > number * size))
    behind = next((n for n in range(number + 1, last + 1) if has(n)), None)
    return GoOn(leg.timeline, Lsn(number * size), Lsn(behind * size) if behind is not None else None)
