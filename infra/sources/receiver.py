"""The stream source: WAL over the replication protocol, from wherever the primary is, into the open WAL in memory.

Per connect: who is it, is it the one to follow, where does its slot stand (``primary``); then, timeline by timeline,

    WalStream ──> Assembly (segments, compared with what was sent before) ──> OpenWal, and SegmentReady when whole
    Durable ──> the flush position, reported as soon as it moves, at least each second, never for what is not durable

At the end of a timeline it goes over to the next (``promotion``). All that a broken connection has brought is kept, and
the next one goes on at the open segment's first byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from infra.postgres.connect import RefusedError, connect
from infra.postgres.replication import ReplicationConnection
from infra.postgres.walstream import TimelineEnded, WalData, WalStream, fetch_segment
from infra.settings import Settings
from infra.sources.announced import Announced
from infra.sources.assembly import Assembly
from infra.sources.primary import Primary, leg_of, look_at, prepare_slot
from infra.sources.promotion import Promotion
from infra.sources.refusals import Refusals
from infra.sources.server_watch import ServerWatch
from pipeline.contracts import Buffer, Clock
from pipeline.durable import Durable
from pipeline.errors import SourceError, WalshipError, foreseen
from pipeline.events import Event, HistoryReady, Notice, StreamLost, StreamStarted, WalMoved
from pipeline.lineage import Lineage
from pipeline.openwal import OpenWal
from pipeline.resume import GoOn
from pipeline.wal import Lsn, WalFile

#: Seconds that a server that shuts down is held up at most by what is not durable.
GRACE = 10.0
#: Shortest and longest pause in seconds between attempts to connect. Short at first: until then nothing becomes safe.
PAUSES = (0.2, 10.0)
#: Seconds between reports that nothing has caused, and between answers to keepalives.
_REPORT = 1.0
_ANSWER = 0.1


class Resume(Protocol):
    """Where the repository ends: the first segment of the lineage that is missing, not before ``after``.

    None if nothing is stored. See ``pipeline.resume``. Behind a gap (``after``) ``durable`` knows nothing of what lies
    from there to the answer: each destination that has it must be told of by ``Durable.stored``.
    """

    async def __call__(self, lineage: Lineage, after: int = 0) -> GoOn | None: ...


class Receiver:
    """A ``pipeline.contracts.Source`` of whole segments and of histories; the open end is in the ``OpenWal``."""

    name = "stream"

    def __init__(
        self,
        settings: Settings,
        *,
        system_id: str,
        segment_size: int,
        wal: OpenWal,
        resume: Resume,
        make_durable: Callable[[Lsn], Durable],
        clock: Clock,
        notify: Callable[[Notice], None],
        grace: float = GRACE,
        pauses: tuple[float, float] = PAUSES,
    ) -> None:
        """``resume`` is asked at the first connect and behind a gap, ``make_durable`` once: where does it begin.

        ``grace`` and ``pauses``: see ``GRACE`` and ``PAUSES``.
        """
        self._settings = settings
        #: The settings for the server that is connected to, or was last.
        self.server = settings
        self._system_id = system_id
        self._size = segment_size
        self._wal = wal
        self._resume = resume
        self._make_durable = make_durable
        self._clock = clock
        self._notify = notify
        self._grace = grace
        self._pauses = pauses
        self._wake = asyncio.Event()
        self._announced = Announced(settings, segment_size)
        self._assembly = Assembly(wal, segment_size, self._announced.segment)
        #: Whether commits wait for us; polled, so it may be seconds old.
        self.synchronous = False
        #: None until the first connect.
        self.durable: Durable | None = None
        #: End of the server's WAL, as far as it has told.
        self.current = Lsn(0)
        self._promotion = Promotion(
            self._assembly, self._announced, segment_size=segment_size, wake=self._wake, notify=notify
        )
        self._refusals = Refusals(notify)
        self._received_any = False
        #: ``host:port`` of the server.
        self._place = ""

    @property
    def lineage(self) -> Lineage | None:
        """The server's timeline and where it came from. None until the first connect."""
        return self._promotion.lineage

    @property
    def received(self) -> Lsn:
        """End of what has arrived."""
        return self._assembly.received

    # -- the source

    def events(self) -> AsyncIterator[Event]:
        """What is ready. See ``pipeline.contracts.Source``."""
        return self._announced.events()

    async def ready(self, event: Event) -> None:
        """Before ``read``: have the bytes in memory again, from the server, if ``stored_somewhere`` let them go."""
        await self._announced.ready(event)

    def read(self, event: Event) -> Buffer:
        """The bytes of a segment or a history; no copy. See ``pipeline.contracts.Source``."""
        return self._announced.read(event)

    async def done(self, event: Event) -> None:
        """Durable at every required destination. See ``pipeline.contracts.Source``."""
        self.stored_somewhere(event)
        self._announced.forget(event)
        if isinstance(event, HistoryReady) and self.durable is not None:
            self._promotion.history_done(event.file, self.durable)

    def stored_somewhere(self, event: Event) -> None:
        """The object is durable somewhere, though not everywhere: its memory is given back. Idempotent."""
        if (segment := self._announced.release(event)) is not None:
            self._assembly.drop(segment)
        self._wake.set()

    # -- what is durable

    def history_stored(self, destination: str, file: WalFile) -> None:
        """The history of a timeline is stored there."""
        if self.durable is not None:
            self._promotion.history_stored(destination, file, self.durable)
            self.report_soon()

    def stored(self, destination: str, file: WalFile, start: int, end: int) -> bool:
        """Bytes ``[start, end)`` (positions) of that segment, or tail of it, are durable there.

        Tells ``durable``, as far as they belong to the server's lineage (bytes that an old primary wrote behind a fork
        do not, and must never be acknowledged to the new one). Returns whether that took the destination further.
        """
        leg = leg_of(self.lineage, file.timeline) if self.lineage is not None else None
        if leg is None or self.durable is None:
            return False
        end = end if leg.end is None else min(leg.end, end)
        moved = start < end and self.durable.stored(destination, start, end)
        if moved:
            self.report_soon()
        return moved

    def report_soon(self) -> None:
        """``durable`` has moved: the server is told at once, not within the second."""
        self._wake.set()

    # -- connecting

    async def run(self) -> None:
        """Connect, receive, connect again, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tell_for_ever())
            group.create_task(self._connect_for_ever())

    async def _connect_for_ever(self) -> None:
        pause, longest = self._pauses
        while True:
            self._received_any = False
            try:
                await self._connect_once()
            except (WalshipError, BaseExceptionGroup) as caught:
                error = foreseen(caught)
                if error is None:
                    raise
                if self._received_any:
                    pause = self._pauses[0]
                if isinstance(error, SourceError) and error.lasting:
                    pause = longest
                self._notify(StreamLost(error.fact, error.hint, pause))
            await self._clock.sleep(pause)
            pause = min(longest, pause * 2)

    async def _connect_once(self) -> None:
        """To the primary. Where several servers say that they are one, a demoted one that runs again hides no other."""
        candidates = self._settings
        while True:
            async with await ReplicationConnection.open(candidates, application_name=candidates.slot) as replication:
                place = replication.place  # not always spelled as in the settings: then any of them may be meant
                here = [s for s in candidates.servers if f"{s[0]}:{s[1]}" == place] or candidates.servers
                others = [server for server in candidates.servers if server not in here]
                self.server = self._announced.server = candidates.at(*here)
                try:
                    primary, kept = await self._agree_with(replication)
                except SourceError as error:
                    if not error.lasting or not others:
                        raise
                    self._notify(StreamLost(error.fact, error.hint, 0.0))
                    candidates = candidates.at(*others)
                    continue
                async with asyncio.TaskGroup() as group:
                    pid = replication.pgconn.backend_pid
                    watch = ServerWatch(self.server, pid, clock=self._clock, synchronous=self._set_synchronous)
                    watching = group.create_task(watch.run())
                    await self._follow(replication, primary, kept, watch)
                    watching.cancel()

    async def _agree_with(self, replication: ReplicationConnection) -> tuple[Primary, Lsn]:
        """Who is there, and from where on its slot keeps WAL. SourceError if it is not to be followed."""
        slot = self._settings.slot
        async with await connect(self.server) as control:
            primary = await look_at(replication, control, system_id=self._system_id, segment_size=self._size)
            self._promotion.agree(primary, self.durable)
            await self._compare()
            # Before the slot: a server that is refused would keep WAL in it for ever.
            gap = self._refusals.gap
            unknown = self.durable is None or gap is not None
            go = await self._resume(primary.lineage, gap[1] if gap else 0) if unknown else None
            kept = await prepare_slot(replication, control, slot, renew=self._refusals.slot_lies)
            self._refusals.slot_lies = False
        self.current = primary.lsn
        if unknown:
            self._begin(primary, go, kept)
        return primary, kept

    async def _compare(self) -> None:
        """Where the open segment is empty, nothing is sent again: ask for the one before it, and compare that."""
        if (file := self._assembly.before) is None:
            return
        try:
            self._assembly.compare(await fetch_segment(self.server, file, self._size))
        except RefusedError as error:
            if error.state != "58P01":  # removed: that happens to what is stored, and cannot be compared
                raise

    def _begin(self, primary: Primary, go: GoOn | None, kept: Lsn) -> None:
        """Set the position, for the first time or behind a gap. ``kept``: from where on the slot keeps WAL."""
        gap, self._refusals.gap = self._refusals.gap, None
        if go is None:
            # Behind a gap at its very end, even if the slot has moved on: what is missing is told by the next refusal.
            lsn = gap[1] if gap else Lsn(kept // self._size * self._size)
            timeline = primary.lineage.newest(lsn // self._size).timeline
        else:
            timeline, lsn = go.timeline, go.lsn
        self._refusals.hole_end = go.hole_end if go is not None else None
        self._assembly.begin_at(timeline, lsn)
        if self.durable is None:
            self.durable = self._make_durable(lsn)
        elif gap:
            self.durable.skip(*gap)
        self._promotion.begin_leg(primary, self.durable)

    # -- streaming

    async def _follow(
        self, replication: ReplicationConnection, primary: Primary, kept: Lsn, watch: ServerWatch
    ) -> None:
        """One timeline after the other; ends only with an error."""
        while True:
            leg = leg_of(primary.lineage, self._assembly.timeline)
            assert leg is not None
            if leg.end is None or self._assembly.received < leg.end:
                await self._stream(replication, primary, kept, watch)
                if self._assembly.received != leg.end:
                    raise SourceError(
                        f"timeline {leg.timeline} of PostgreSQL at {primary.place} ended at {self._assembly.received}",
                        hint="it is looked at anew",
                    )
            assert self.durable is not None
            await self._promotion.go_over(primary, leg, self.durable, replication.timeline_history)

    async def _stream(
        self, replication: ReplicationConnection, primary: Primary, kept: Lsn, watch: ServerWatch
    ) -> None:
        """Receive one timeline to its end."""
        timeline, begin = self._assembly.timeline, self._assembly.rewind()
        try:
            stream = await WalStream.start(replication, slot=self._settings.slot, timeline=timeline, lsn=begin)
            if isinstance(stream, TimelineEnded):
                return
            try:
                self._started(primary.place)
                await self._receive(stream, kept, watch)
            finally:
                await stream.close()
        except RefusedError as error:
            raise self._refusals.explain(error, primary, timeline=timeline, begin=begin, kept=kept) from None

    async def _receive(self, stream: WalStream, kept: Lsn, watch: ServerWatch) -> None:
        """Data in, reports out, until the timeline ends."""
        assert self.durable is not None
        # That WAL is removed is said in place of the first bytes: those are asked for even where there is no room.
        asked = begun = False
        reported, reported_at = Lsn(0), -_REPORT
        while True:
            self._wake.clear()
            now = self._clock.monotonic()
            before = self._assembly.received
            self._assembly.go_on(now)
            while (self._assembly.room or not begun) and (message := stream.take()) is not None:
                self._received_any = True
                if isinstance(message, TimelineEnded):
                    return  # the end of the segment is told next
                self.current = max(self.current, message.server_end)
                if isinstance(message, WalData):
                    begun = True
                    self._assembly.take(message.start, message.data, now)
                elif message.reply_requested:
                    asked = True
                    watch.asked(message.server_end)
            if self._assembly.received > before:
                self._wal.tell()
            self._promotion.tell_history(self.durable)
            now = self._clock.monotonic()
            flush = self._flush(self.durable, now)
            # Below its restart_lsn the slot would move back; and a server that differs must not take ours for its own.
            flush = flush if flush >= kept and self._assembly.verified else Lsn(0)
            if flush > reported or now - reported_at >= (_ANSWER if asked else _REPORT):
                await stream.report(flush, now=self._clock.now())
                asked, reported, reported_at = False, flush, now
            self._leave_if_held_up(watch)
            pause = reported_at + (_ANSWER if asked else _REPORT) - now
            await stream.wait(self._wake, reading=self._assembly.room or not begun, seconds=max(pause, 0.001))

    def _leave_if_held_up(self, watch: ServerWatch) -> None:
        if watch.held_up(reading=self._assembly.room) >= self._grace:
            raise SourceError(
                f"PostgreSQL is shutting down and has waited {self._grace:g} seconds for WAL that is not durable yet:"
                " the connection is closed, so that it can",
                hint="nothing is lost as long as its disk lives: the slot keeps the rest until it is up again",
            )

    def _flush(self, durable: Durable, now: float) -> Lsn:
        """Where commits do not wait for us, nobody is late with what is not due yet."""
        leisure = 0.0 if self.synchronous else self._settings.tail_interval
        return durable.flush(self._assembly.received, now, leisure=leisure)

    # -- what is said

    def _set_synchronous(self, *, synchronous: bool) -> None:
        if synchronous != self.synchronous:
            self.synchronous = synchronous
            self._wal.tell()
            self._started(self._place, changed=True)

    def _started(self, place: str, *, changed: bool = False) -> None:
        self._place = place
        at = self._assembly
        self._notify(StreamStarted(place, at.timeline, at.received, self.synchronous, changed))

    async def _tell_for_ever(self) -> None:
        """How far everybody is, each second, connected or not."""
        while True:
            await self._clock.sleep(_REPORT)
            if (durable := self.durable) is None:
                continue
            now, received = self._clock.monotonic(), self._assembly.received
            reached = durable.reached()
            self._assembly.forget_before(min(reached.values(), default=received))
            age = {name: self._assembly.age(lsn, now) for name, lsn in reached.items()}
            self._promotion.tell_history(durable)  # also when the new primary is gone already
            flush = self._flush(durable, now)
            self._notify(WalMoved(self._assembly.timeline, max(self.current, received), received, flush, reached, age))
