"""From one timeline to the next: whom to follow, what the old one leaves behind, and when the new one's history goes.

    the old timeline's end, up to the fork ──stored──> the new one's first bytes ──stored──> its history

In this order: a history in the repository whose first bytes are not there would lead a restore past the fork. For each
step one destination is enough, so that one that is away keeps nothing from the others; it is given what it lacks when
it is up again. PostgreSQL is told of nothing behind the fork before the history is stored where it counts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from infra.postgres.connect import RefusedError
from infra.sources.announced import Announced
from infra.sources.assembly import Assembly
from infra.sources.primary import Primary, leg_after, leg_of, parting, refuse_old
from pipeline.durable import Durable
from pipeline.events import Notice, TimelineLeft
from pipeline.lineage import Leg, Lineage
from pipeline.wal import Lsn, WalFile

#: Seconds between looks at what has no event of its own.
_LOOK = 1.0


class Promotion:
    """Which lineage is followed, and how far the change to its last timeline has come."""

    def __init__(
        self,
        assembly: Assembly,
        announced: Announced,
        *,
        segment_size: int,
        wake: asyncio.Event,
        notify: Callable[[Notice], None],
    ) -> None:
        """``wake`` is set whenever a position in ``Durable`` has moved."""
        self._assembly = assembly
        self._announced = announced
        self._size = segment_size
        self._wake = wake
        self._notify = notify
        #: The server's timeline and where it came from. None until the first connect.
        self.lineage: Lineage | None = None
        #: The timeline whose beginning is held back in ``Durable`` until its history is stored; 0: none ever was.
        self._held = 0
        #: That history, until its turn has come.
        self._history: bytes | None = None

    def agree(self, primary: Primary, durable: Durable | None) -> None:
        """Follow the server; SourceError if it is not to be followed."""
        known, current = self.lineage, self._assembly.timeline
        if durable is None or known is None:
            self.lineage = primary.lineage
            return
        refuse_old(primary, known, current, self._assembly.received)
        self.lineage = primary.lineage
        parted = parting(known, primary.lineage)
        if parted is None:
            return
        timeline, fork = parted
        # Positions may lie behind the fork although the stream never got there: the old primary archived it whole.
        left = max(self._assembly.received, *durable.reached().values())
        durable.leave(fork)
        leg = leg_of(primary.lineage, current)
        if leg is not None and leg.end is not None and leg.end < self._assembly.received:
            self._assembly.leave(leg.end)
        if left > fork:
            self._notify(TimelineLeft(timeline, fork, left))

    def begin_leg(self, primary: Primary, durable: Durable) -> None:
        """On the server's last timeline: what lies behind the fork counts only with the history that leads there."""
        timeline = self._assembly.timeline
        leg = primary.lineage.legs[-1]
        if leg.timeline == timeline and timeline > 1 and timeline != self._held:
            durable.hold(leg.begin)
            self._held = timeline
            self._history = primary.history

    async def go_over(
        self, primary: Primary, leg: Leg, durable: Durable, history: Callable[[int], Awaitable[bytes]]
    ) -> None:
        """From the end of a timeline to the first byte of the next one's first segment.

        ``history``: the server's history file of a timeline.
        """
        assert leg.end is not None
        self._assembly.end()
        last = (leg.end - 1) // self._size * self._size
        while not durable.anywhere(last, leg.end):
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK):  # not wait_for, which may swallow a cancel before Python 3.12
                    await self._wake.wait()
        self.tell_history(durable)
        if leg.timeline > 1 and leg.timeline != self._held:
            # One that was passed through: nobody has asked for its history, and it may be restored to as well.
            with contextlib.suppress(RefusedError):  # the server need not have it any more
                self._announced.history(leg.timeline, await history(leg.timeline))
        # From here on bytes behind the fork are the new timeline's; none that came before may count among them.
        durable.leave(leg.end)
        following = leg_after(primary.lineage, leg.timeline)
        self._assembly.begin_at(following.timeline, Lsn(leg.end // self._size * self._size))
        self.begin_leg(primary, durable)

    def tell_history(self, durable: Durable) -> None:
        """Announce it if its turn has come: the first bytes of its timeline are stored."""
        if self._history is not None and durable.begun:
            self._announced.history(self._held, self._history)
            self._history = None

    def history_stored(self, destination: str, file: WalFile, durable: Durable) -> None:
        """A history is stored at a destination: what lies behind its fork counts there, if it was held back for it."""
        if file.timeline == self._held:  # not that of a timeline that was passed through on the way
            durable.release(destination)

    def history_done(self, file: WalFile, durable: Durable) -> None:
        """A history is durable at every required destination."""
        for destination in durable.reached():
            self.history_stored(destination, file, durable)
