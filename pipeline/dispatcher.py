"""Carries events from the sources to their handler, the freshest data first, and acknowledges them in order.

The rule that everything rests on: ``Source.done`` is called only when the handler has returned, and the handler returns
only when every required destination has confirmed the object. Uploads may overtake one another; acknowledgements of one
lane (one timeline of one source) never do, so what a source forgets is always a contiguous beginning.

Bounds: at most ``window`` events are known and not yet acknowledged per source; a source that has more waits.
Cancellation: nothing new is taken, what is under way gets ``grace`` seconds to finish, the rest stays with its source.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from pipeline.contracts import Clock, Source
from pipeline.errors import WalshipError
from pipeline.events import Acknowledged, Event, EventFailed, Notice, SegmentReady

#: Brings one event to safety. Returns when it is durable at every required destination.
Handle = Callable[[Source, Event], Awaitable[None]]

#: Given how often an event has failed: seconds until it is tried again, or None to give it up.
Patience = Callable[[int], float | None]


def endless(attempt: int) -> float | None:
    """For a service: try again for ever, from one second apart to half a minute."""
    return min(30.0, 2.0 ** min(attempt - 1, 5))


def none_left(attempt: int) -> float | None:  # noqa: ARG001  the signature is Patience's
    """For a command that a person waits for: one failure is final."""
    return None


class Gate:
    """A number of places, given to whoever waits with the lowest priority value, first come first served within one."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    @asynccontextmanager
    async def place(self, priority: int) -> AsyncIterator[None]:
        """Wait for a place and hold it for the ``async with`` block."""
        await self._enter(priority)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, priority: int) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (priority, next(self._order), turn))
        try:
            await turn
        except asyncio.CancelledError:
            # The place may have been handed over in the same turn of the loop: pass it on, or it is lost for ever.
            if turn.done() and not turn.cancelled():
                self._leave()
            raise

    def _leave(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


@dataclass(slots=True)
class _Entry:
    event: Event
    safe: bool = False


@dataclass(slots=True)
class _Lane:
    """Events of one source that must be acknowledged in the order in which they came."""

    name: tuple[str, str]
    entries: deque[_Entry] = field(default_factory=deque)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Dispatcher:
    """Runs sources against one handler until the sources end or the task is cancelled."""

    def __init__(
        self,
        handle: Handle,
        *,
        clock: Clock,
        notify: Callable[[Notice], None],
        patience: Patience = endless,
        window: int = 1024,
        grace: float = 20.0,
    ) -> None:
        self._handle = handle
        self._clock = clock
        self._notify = notify
        self._patience = patience
        self._window = window
        self._grace = grace
        self._lanes: dict[tuple[str, str], _Lane] = {}
        self._failures: list[WalshipError] = []

    async def run(self, *sources: Source) -> None:
        """Carry all that the sources announce.

        Returns when every source has ended and all is acknowledged. Where patience ran out, raises the first failure
        after everything else was carried; what failed is not acknowledged, nor is what lies behind it in its lane.
        """
        carriers: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as group:
            pumps = [group.create_task(self._pump(source, group, carriers)) for source in sources]
            try:
                await asyncio.gather(*pumps)
                while carriers:
                    await asyncio.wait(carriers)
            except asyncio.CancelledError:
                for pump in pumps:
                    pump.cancel()
                if carriers:
                    await asyncio.wait(carriers, timeout=self._grace)
                raise
        if self._failures:
            raise self._failures[0]

    async def _pump(self, source: Source, group: asyncio.TaskGroup, carriers: set[asyncio.Task[None]]) -> None:
        room = asyncio.Semaphore(self._window)
        async for event in source.events():
            await room.acquire()
            entry = _Entry(event)
            name = (source.name, _lane_of(event))
            lane = self._lanes.setdefault(name, _Lane(name))
            lane.entries.append(entry)
            task = group.create_task(self._carry(source, entry, lane))
            carriers.add(task)
            task.add_done_callback(carriers.discard)
            task.add_done_callback(lambda _: room.release())

    async def _carry(self, source: Source, entry: _Entry, lane: _Lane) -> None:
        if not await self._persist(entry.event, lambda: self._handle(source, entry.event)):
            return
        entry.safe = True
        async with lane.turn:
            while lane.entries and lane.entries[0].safe:
                event = lane.entries[0].event
                if not await self._persist(event, partial(source.done, event)):
                    return
                lane.entries.popleft()
                self._notify(Acknowledged(event))
            if not lane.entries:
                self._lanes.pop(lane.name, None)

    async def _persist(self, event: Event, attempt_once: Callable[[], Awaitable[None]]) -> bool:
        """Try until it succeeds (True) or patience runs out (False; the failure is kept for the end)."""
        for attempt in itertools.count(1):
            try:
                await attempt_once()
            except WalshipError as error:
                self._notify(EventFailed(event, error.fact, error.hint))
                delay = self._patience(attempt)
                if delay is None:
                    self._failures.append(error)
                    break
                await self._clock.sleep(delay)
            else:
                return True
        return False


def _lane_of(event: Event) -> str:
    """Segments of a timeline share a lane; any other file waits for nobody, and nobody waits for it."""
    match event:
        case SegmentReady():
            return f"{event.file.timeline:08X}"
        case _:
            return repr(event)
