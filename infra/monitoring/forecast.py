"""When something will be full, at the rate at which it has been filling lately."""

from __future__ import annotations

import math
from collections import deque

#: Seconds that a rate is measured over: long enough for a checkpoint to give back what it may, short enough to be now.
WINDOW = 600.0
#: Less than this many seconds tell no rate.
_SHORTEST = 2.0


class Remaining:
    """Room that is left, as it was at each look."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, float]] = deque()

    def add(self, now: float, room: float) -> None:
        """So many bytes are left; ``now`` in monotonic seconds."""
        self._looks.append((now, room))
        while len(self._looks) > 2 and self._looks[1][0] <= now - WINDOW:
            self._looks.popleft()

    def forget(self) -> None:
        """Nobody knows any more, or there is no limit."""
        self._looks.clear()

    def seconds(self) -> float:
        """Until nothing is left; infinity if it does not get less, NaN if that is not known."""
        if not self._looks:
            return math.nan
        (first, before), (last, after) = self._looks[0], self._looks[-1]
        if after <= 0:
            return 0.0
        if last - first < _SHORTEST:
            return math.nan
        rate = (before - after) / (last - first)
        return after / rate if rate > 0 else math.inf
