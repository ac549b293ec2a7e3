"""Up to where the WAL is durable: per destination without a hole, and at all that are required together.

``flush`` is what is reported to PostgreSQL, which uses that one number both to release synchronous commits and to
recycle WAL: so it is never ahead of what is durable at the destinations that count, and it never goes back.

A required destination that stays behind for longer than ``patience`` seconds no longer counts, if another required one
does not stay behind: loudly, and until it has caught up. With none left, commits wait.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping

from pipeline.events import Notice, SyncDegraded, SyncRestored
from pipeline.wal import Lsn


class Durable:
    """Destinations and how far they are. All positions are of the lineage that the server is on."""

    def __init__(
        self,
        destinations: Mapping[str, bool],
        origin: Lsn,
        *,
        notify: Callable[[Notice], None],
        patience: float | None = None,
        behind: Mapping[str, Lsn] | None = None,
    ) -> None:
        """``destinations``: name → whether it is required; each has everything before ``origin``, or before its
        position in ``behind``, where something is still copied to it.

        ``patience`` in seconds, None for ever.
        """
        self._required = {name for name, required in destinations.items() if required}
        self._reached: dict[str, Lsn] = dict.fromkeys(destinations, origin) | dict(behind or {})
        #: Stored ahead of a hole: destination → ranges, ascending, apart from each other and from its position.
        self._ahead: dict[str, list[tuple[int, int]]] = {name: [] for name in destinations}
        self._notify = notify
        self._patience = patience
        self._degraded: set[str] = set()
        #: destination → since when it lags behind what has been received.
        self._behind: dict[str, float] = {}
        self._flush = min((self._reached[name] for name in self._required), default=Lsn(0))
        #: destination → a fork: what lies behind it counts there only once the new timeline's history is there as well.
        self._held: dict[str, Lsn] = {}
        #: Where the newest timeline that was held begins.
        self._fork = Lsn(0)
        #: Beginnings of segments that are stored with other bytes than the server's: flush goes no further.
        self._doubts: set[int] = set()

    def stored(self, destination: str, start: int, end: int) -> bool:
        """``[start, end)`` is durable there; returns whether that took its position further."""
        if start > self._reached[destination]:
            _add(self._ahead[destination], start, end)
            return False
        if end <= self._reached[destination]:
            return False
        self._advance(destination, end)
        self._behind.pop(destination, None)
        return True

    def _advance(self, destination: str, position: int) -> None:
        """It has everything before ``position``, and what was ahead and follows without a hole."""
        ahead = self._ahead[destination]
        while ahead and ahead[0][0] <= position:
            position = max(position, ahead.pop(0)[1])
        self._reached[destination] = Lsn(position)

    def leave(self, fork: Lsn) -> None:
        """The server has left its timeline at ``fork``: what is durable behind it is not of its lineage any more.

        The one case in which positions go back: the new primary must not be told that it has what the old one wrote.
        """
        for name, ahead in self._ahead.items():
            self._reached[name] = min(fork, self._reached[name])
            self._ahead[name] = [(start, min(end, fork)) for start, end in ahead if start < fork]
        self._flush = min(fork, self._flush)

    def retreat(self, destination: str, start: int, end: int) -> None:
        """``[start, end)`` was stored there and is gone: it came back emptied, or as another disk.

        What was reported is not taken back; but nothing more counts there until the range is stored again.
        """
        reached = self._reached[destination]
        if start < reached:
            self._reached[destination] = Lsn(start)
            self._ahead[destination].insert(0, (start, reached))
        kept = [part for s, e in self._ahead[destination] for part in ((s, min(e, start)), (max(s, end), e))]
        self._ahead[destination] = [(s, e) for s, e in kept if s < e]

    def doubt(self, lsn: int) -> None:
        """Some destination has other bytes under the name of the segment that begins at ``lsn``: ours are not safe."""
        self._doubts.add(lsn)

    def trust(self, lsn: int) -> None:
        """The segment that begins at ``lsn`` is stored as it should be; idempotent."""
        self._doubts.discard(lsn)

    def hold(self, fork: Lsn) -> None:
        """A new timeline begins at ``fork``: without its history, what lies behind it cannot be restored.

        What an earlier hold still holds back stays so: the history of the newer timeline leads there as well.
        """
        self._fork = fork
        self._held = {name: min(fork, self._held.get(name, fork)) for name in self._reached}

    def release(self, destination: str) -> None:
        """The history of the new timeline is stored there."""
        if self._held.pop(destination, None) is not None:
            self._behind.pop(destination, None)

    @property
    def begun(self) -> bool:
        """Whether the new timeline's first byte is stored at some destination: its history may follow."""
        return self.anywhere(self._fork, self._fork + 1)

    def anywhere(self, start: int, end: int) -> bool:
        """Whether all of ``[start, end)`` is durable at one destination, behind a hole or not."""
        return any(
            end <= reached or any(first <= start and end <= last for first, last in self._ahead[name])
            for name, reached in self._reached.items()
        )

    def skip(self, start: int, end: int) -> None:
        """``[start, end)`` will never come: a gap has opened, and is told by whoever found it.

        It holds nobody up. What lies around it counts only where it is stored.
        """
        for name in self._reached:
            self.stored(name, start, end)

    def reached(self) -> dict[str, Lsn]:
        """Destination → up to where it has everything."""
        return dict(self._reached)

    @property
    def degraded(self) -> frozenset[str]:
        """Required destinations that do not count at the moment."""
        return frozenset(self._degraded)

    def flush(self, received: Lsn, now: float, *, leisure: float = 0.0) -> Lsn:
        """The position to report. ``received``: end of what has arrived; ``now`` in monotonic seconds.

        ``leisure``: seconds that a byte may wait before anybody is asked to store it, which is nobody's delay.
        """
        self._judge(received, now, leisure)
        counting = self._required - self._degraded
        durable = min([*map(self._counts_to, counting), *map(Lsn, self._doubts)], default=Lsn(0))
        self._flush = max(self._flush, durable)
        return self._flush

    def _counts_to(self, destination: str) -> Lsn:
        """Up to where what is stored there can be restored."""
        reached = self._reached[destination]
        return min(reached, self._held.get(destination, reached))

    def _judge(self, received: Lsn, now: float, leisure: float) -> None:
        """Who counts. A destination that makes headway, however slowly, is not given up."""
        for name in sorted(self._required):
            reached = self._counts_to(name)
            if name in self._degraded:
                if reached >= self._flush:
                    self._degraded.discard(name)
                    self._behind.pop(name, None)
                    self._notify(SyncRestored(name))
            elif reached >= received:
                self._behind.pop(name, None)
            else:
                self._behind.setdefault(name, now)
        if self._patience is None:
            return
        patience = self._patience + leisure
        counting = self._required - self._degraded
        late = {name for name in counting if now - self._behind.get(name, now) > patience}
        if late != counting:
            for name in sorted(late):
                self._degraded.add(name)
                said = f"{name} has stored nothing for {patience:g} seconds and is at LSN {self._counts_to(name)}"
                self._notify(SyncDegraded(name, said))


def _add(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    """Add ``[start, end)`` to ascending ranges, joining what touches: a destination that catches up for hours meanwhile
    gets more tails than fit into memory one by one.
    """
    first = bisect_left(ranges, start, key=lambda each: each[1])
    last = bisect_right(ranges, end, key=lambda each: each[0])
    if first < last:
        start, end = min(start, ranges[first][0]), max(end, ranges[last - 1][1])
    ranges[first:last] = [(start, end)]
