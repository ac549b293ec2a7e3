"""Carries events from the sources to their handler, the freshest data first, and acknowledges them in order.

The rule that everything rests on: ``Source.done`` is called only when every required destination has confirmed the
object, which is when the handler returns, or when the future that it returned is resolved. Uploads may overtake one
another; acknowledgements of one lane (one timeline of one source) never do, so what a source forgets is always a
contiguous beginning.

Bounds, per source: at most ``window`` events are stored nowhere yet, each with a task of its own; at most
``MOST_NAMES`` are not acknowledged, which costs their names. A source that has more waits.
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
from pipeline.errors import IntegrityError, ObjectConflict, SourceError, WalshipError
from pipeline.events import Acknowledged, Event, EventFailed, Notice, SegmentReady

#: Brings one event to safety. None: it is durable at every required destination. A future: it is durable somewhere, and
#: the future is resolved once it is where it has to be, or fails when it has to be handled anew.
Handle = Callable[[Source, Event], Awaitable["asyncio.Future[None] | None"]]

#: Given an error and how often the event has failed: seconds until it is tried again, or None to give it up.
Patience = Callable[[WalshipError, int], float | None]

#: Events per source that may be known and not acknowledged.
MOST_NAMES = 200_000

#: Seconds until something is tried again that only a person can mend: it is not worth encoding it twice a minute.
FOR_PEOPLE = 300.0


def endless(error: WalshipError, attempt: int) -> float | None:
    """For a service: try again for ever, from one second apart to half a minute, or to what people need."""
    if isinstance(error, ObjectConflict | IntegrityError) or (isinstance(error, SourceError) and error.lasting):
        return FOR_PEOPLE
    return min(30.0, 2.0 ** min(attempt - 1, 5))


def none_left(error: WalshipError, attempt: int) -> float | None:  # noqa: ARG001  the signature is Patience's
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
    source: Source
    lane: _Lane
    #: Released with the acknowledgement.
    names: asyncio.Semaphore
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
        #: Tasks of events that are under way, and what is durable somewhere and waited for.
        self._carriers: set[asyncio.Task[None]] = set()
        self._owed: set[asyncio.Future[None]] = set()

    async def run(self, *sources: Source) -> None:
        """Carry all that the sources announce.

        Returns when every source has ended and all is acknowledged. Where patience ran out, raises the first failure
        after everything else was carried; what failed is not acknowledged, nor is what lies behind it in its lane.
        """
        async with asyncio.TaskGroup() as group:
            pumps = [group.create_task(self._pump(source, group)) for source in sources]
            try:
                await asyncio.gather(*pumps)
                while self._carriers or self._owed:
                    await asyncio.wait(self._carriers | self._owed, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                for pump in pumps:
                    pump.cancel()
                if self._carriers:
                    await asyncio.wait(self._carriers, timeout=self._grace)
                raise
        if self._failures:
            raise self._failures[0]

    async def _pump(self, source: Source, group: asyncio.TaskGroup) -> None:
        room, names = asyncio.Semaphore(self._window), asyncio.Semaphore(MOST_NAMES)
        async for event in source.events():
            await names.acquire()
            await room.acquire()
            name = (source.name, _lane_of(event))
            lane = self._lanes.setdefault(name, _Lane(name))
            entry = _Entry(event, source, lane, names)
            lane.entries.append(entry)
            self._start(group, entry, room)

    def _start(self, group: asyncio.TaskGroup, entry: _Entry, room: asyncio.Semaphore) -> None:
        task = group.create_task(self._carry(group, entry, room))
        self._carriers.add(task)
        task.add_done_callback(self._carriers.discard)

    async def _carry(self, group: asyncio.TaskGroup, entry: _Entry, room: asyncio.Semaphore) -> None:
        """Handle the event; acknowledge it, or leave that to the future for what is durable somewhere."""
        owed: list[asyncio.Future[None] | None] = []

        async def once() -> None:
            owed.append(await self._handle(entry.source, entry.event))

        try:
            handled = await self._persist(entry.event, once)
        finally:
            room.release()
        if not handled:
            return
        future = owed[-1]
        if future is None:
            await self._acknowledge(entry)
            return
        self._owed.add(future)
        future.add_done_callback(lambda done: self._settled(done, group, entry, room))

    def _settled(
        self, owed: asyncio.Future[None], group: asyncio.TaskGroup, entry: _Entry, room: asyncio.Semaphore
    ) -> None:
        """What was waited for is there, or has to be handled anew. Called by the event loop."""
        self._owed.discard(owed)
        if owed.cancelled():
            return  # we are stopping
        work = self._acknowledge(entry) if owed.exception() is None else self._again(group, entry, room)
        task = group.create_task(work)
        self._carriers.add(task)
        task.add_done_callback(self._carriers.discard)

    async def _again(self, group: asyncio.TaskGroup, entry: _Entry, room: asyncio.Semaphore) -> None:
        await room.acquire()
        await self._carry(group, entry, room)

    async def _acknowledge(self, entry: _Entry) -> None:
        """Tell the source of this event, and of those behind it that waited for it."""
        entry.safe = True
        lane = entry.lane
        async with lane.turn:
            while lane.entries and lane.entries[0].safe:
                head = lane.entries[0]
                if not await self._persist(head.event, partial(head.source.done, head.event)):
                    return
                lane.entries.popleft()
                head.names.release()
                self._notify(Acknowledged(head.event))
            if not lane.entries:
                self._lanes.pop(lane.name, None)

    async def _persist(self, event: Event, attempt_once: Callable[[], Awaitable[None]]) -> bool:
        """Try until it succeeds (True) or patience runs out (False; the failure is kept for the end)."""
        for attempt in itertools.count(1):
            try:
                await attempt_once()
            except WalshipError as error:
                self._notify(EventFailed(event, error.fact, error.hint))
                delay = self._patience(error, attempt)
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
