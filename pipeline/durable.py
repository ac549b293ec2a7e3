"""Up to where the WAL is durable: per destination without a hole, and at all that are required together.

``flush`` is what is reported to PostgreSQL, which uses that one number both to release synchronous commits and to
recycle WAL: so it is never ahead of what is durable at the destinations that count, and it never goes back.

A required destination that stays behind for longer than ``patience`` seconds no longer counts, if another required one
does not stay behind: loudly, and until it has caught up. With none left, commits wait.
"""

from __future__ import annotations

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
        #: Stored ahead of a hole: destination → ranges by start.
        self._ahead: dict[str, dict[int, int]] = {name: {} for name in destinations}
        self._notify = notify
        self._patience = patience
        self._degraded: set[str] = set()
        #: destination → since when it lags behind what has been received.
        self._behind: dict[str, float] = {}
        self._flush = min((self._reached[name] for name in self._required), default=Lsn(0))
        #: destination → a fork: what lies behind it counts there only once the new timeline's history is there as well.
        self._held: dict[str, Lsn] = {}

    def stored(self, destination: str, start: int, end: int) -> bool:
        """``[start, end)`` is durable there; returns whether that took its position further."""
        reached, ahead = self._reached[destination], self._ahead[destination]
        if start > reached:
            ahead[start] = max(end, ahead.get(start, 0))
            return False
        if end <= reached:
            return False
        reached = Lsn(end)
        for begin in sorted(ahead):
            if begin > reached:
                break
            reached = Lsn(max(reached, ahead.pop(begin)))
        self._reached[destination] = reached
        self._behind.pop(destination, None)
        return True

    def leave(self, fork: Lsn) -> None:
        """The server has left its timeline at ``fork``: what is durable behind it is not of its lineage any more.

        The one case in which positions go back: the new primary must not be told that it has what the old one wrote.
        """
        for name, ahead in self._ahead.items():
            self._reached[name] = min(fork, self._reached[name])
            self._ahead[name] = {start: min(end, fork) for start, end in ahead.items() if start < fork}
        self._flush = min(fork, self._flush)

    def forget_ahead(self) -> None:
        """The timeline has changed: what was stored ahead of a hole may not belong to the new one."""
        for ahead in self._ahead.values():
            ahead.clear()

    def hold(self, fork: Lsn) -> None:
        """A new timeline begins at ``fork``: without its history, what lies behind it cannot be restored."""
        self._held = dict.fromkeys(self._reached, fork)

    def release(self, destination: str) -> None:
        """The history of the new timeline is stored there."""
        self._held.pop(destination, None)

    @property
    def begun(self) -> bool:
        """Whether bytes behind the fork that is held are stored at every destination that counts."""
        counting = self._required - self._degraded
        return all(self._reached[name] > fork for name, fork in self._held.items() if name in counting)

    def skip_to(self, lsn: Lsn) -> None:
        """Nothing before ``lsn`` will ever come: a gap has opened, and is told by whoever found it."""
        for name in self._reached:
            self._reached[name] = max(lsn, self._reached[name])

    def reached(self) -> dict[str, Lsn]:
        """Destination → up to where it has everything."""
        return dict(self._reached)

    @property
    def degraded(self) -> frozenset[str]:
        """Required destinations that do not count at the moment."""
        return frozenset(self._degraded)

    def flush(self, received: Lsn, now: float) -> Lsn:
        """The position to report. ``received``: end of what has arrived; ``now`` in monotonic seconds."""
        self._judge(received, now)
        counting = self._required - self._degraded
        durable = min((min(self._reached[n], self._held.get(n, self._reached[n])) for n in counting), default=Lsn(0))
        self._flush = max(self._flush, durable)
        return self._flush

    def _judge(self, received: Lsn, now: float) -> None:
        """Who counts. A destination that makes headway, however slowly, is not given up."""
        for name in sorted(self._required):
            reached = self._reached[name]
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
        counting = self._required - self._degraded
        late = {name for name in counting if now - self._behind.get(name, now) > self._patience}
        if late != counting:
            for name in sorted(late):
                self._degraded.add(name)
                said = f"{name} has stored nothing for {self._patience:g} seconds and is at LSN {self._reached[name]}"
                self._notify(SyncDegraded(name, said))
