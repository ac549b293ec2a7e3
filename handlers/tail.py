"""Ships the open end of the WAL to one destination: cuts tails when they are due, delivers, folds and removes them.

    OpenWal ──cut when due──> encode (a thread) ──> outlet.put ──in order──> ``stored`` ──> fold every 256
              ^                                        │                        finished segment is here ──> remove
              └── from the first byte not durable ── fails

Each destination has a shipper and a position of its own, so one that is slow or away holds back no other, and its tails
always chain. What is never done: a tail behind a hole in what was cut; two different bytes under one key (a tail's
bytes are the segment's, whoever cuts them); ``stored`` for a byte before all earlier ones of its segment are durable.

*Asynchronous*: a tail goes ``interval`` seconds after the arrival of its first byte, so no byte waits longer than that
before its PUT begins, an idle server makes none, and no more than one per interval begins. A segment that is whole by
then makes none either: its finished object is on its way at once, earlier than the tail would have been, and what
counts stays "interval + one PUT". It may be held up all the same, by an uploader that waits for another destination to
time out. So when for ``HELD_UP`` seconds no finished segment has reached this destination, the rest goes as a tail
after all; while they do arrive, tails of what waits behind them would only take bandwidth from them.

*Synchronous* (commits wait for us): what has gathered goes at once, several PUTs at a time. The end of a segment goes
as a tail too, unless so much is left of it that the finished object is as soon there.

*Failure*: everything in flight is given up, the destination is told of (``failed`` marks it down), and once it is up
again, cutting begins anew from its durable position; from the segment's first byte (``lost``) if what is durable is not
there any more: it may have come back emptied, or as another disk. What was given up may be stored all the same, and is
then an overlap, which restore can join; its key can be met again only with the same bytes, which is success. Where
something damaged lies under that key, the range is cut differently.

*Folding*: 256 tails of a segment are stored once more as one of their joint range, from memory, before they are
deleted; 256 of those as well. A timeline's last, never finished segment is folded into one tail in the end. Folding and
removing run beside the tails and never delay one, but for the processor; deletes that hang delay nothing at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine

from handlers.outlet import Outlet, Parcel
from handlers.tail_clean import TailCleaner
from handlers.tail_course import Course, Cut, Tail
from pipeline.contracts import Buffer, Clock
from pipeline.errors import IntegrityError, ObjectConflict, ObjectMissing, StoreError, WalshipError, foreseen
from pipeline.events import DestinationHampered, Notice, ObjectStored
from pipeline.openwal import OpenSegment, OpenWal
from pipeline.tail import TailName
from pipeline.wal import Lsn, WalFile, WalKind

#: Tails under way at a time.
MOST_IN_FLIGHT, MOST_IN_FLIGHT_SYNCHRONOUS = 4, 16

#: No tail is cut while so many bytes are under way: with one more tail, that is what a destination costs in memory.
MOST_BYTES = 4 << 20

#: Synchronous: no tail is longer, what remains goes in the next.
LONGEST_SYNCHRONOUS = 4 << 20

#: Segments that are let go of elsewhere and have tails under way, which hold their memory: nor is any tail cut then.
MOST_LINGERING = 3

#: Seconds between two cuts in synchronous mode, at least: a PUT costs about as much however small it is.
SPACING = 0.002

#: Synchronous: when more bytes than this are left of a whole segment, its finished object is waited for.
MOST_OF_WHOLE = 1 << 20

#: Seconds without any finished segment arriving, after which the rest of a whole one goes as a tail.
HELD_UP = 5.0

#: Seconds between looks at what has no event of its own: a destination that is down, synchronous mode switched on, and
#: while nothing is written, whether the destination was down.
POLL, SLICE, IDLE = 0.1, 0.25, 5.0

#: ``SLICE`` while there are several segments: they come and go quickly, and who looks late holds them in memory.
HASTE = 0.03

#: Finished segments that are remembered until the stream comes by. Of one that was forgotten, tails may be cut: the
#: stream's own attempt to store it finds it there, and they go.
MOST_FINISHED = 4096

#: Seconds until a destination that is up and refused a tail is tried again: first and longest.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0

#: Bytes that are hashed in the loop: a hop to a thread takes longer.
HASH_AT_ONCE = 64 << 10


class TailShipper:
    """The tails of one destination. ``run`` must be running."""

    def __init__(
        self,
        wal: OpenWal,
        outlet: Outlet,
        *,
        encode: Callable[[str, Buffer], Awaitable[Parcel]],
        epoch: int,
        interval: float,
        synchronous: Callable[[], bool],
        clock: Clock,
        notify: Callable[[Notice], None],
        stored: Callable[[str, WalFile, Lsn, Lsn], None],
        lost: Callable[[str, WalFile, Lsn, Lsn], None],
        failed: Callable[[Outlet, str, WalshipError], Awaitable[None]],
        fold_at: int = 256,
    ) -> None:
        """``encode``: key and plaintext → the object; the shipper closes its body. ``epoch``: number of our lease.

        ``interval`` in seconds. ``synchronous``: whether commits wait for us now. ``stored``: called with the
        destination, the segment, and the range ``[start, end)`` of WAL that is durable there by now, per segment in
        order and without a hole; the segment tells the timeline, because what was written behind a fork is not of the
        new one. ``lost``: called likewise with what was durable there and is gone; it is told as stored once more.
        ``failed``: tells, and marks the outlet down unless only this object is wrong.
        """
        self._wal = wal
        self._outlet = outlet
        self._encode = encode
        self._epoch = epoch
        self._interval = interval
        self._synchronous = synchronous
        self._clock = clock
        self._notify = notify
        self._stored = stored
        self._lost = lost
        self._failed = failed
        self._fold_at = fold_at
        self._cleaner = TailCleaner(outlet, notify=notify)
        #: Segments that are not done with, the oldest first; and the newest that was seen.
        self._courses: list[Course] = []
        self._last: OpenSegment | None = None
        #: Segments whose finished object is here, until that has been acted on.
        self._finished: dict[WalFile, None] = {}
        #: Segments that have tails of ours here.
        self._tailed: set[WalFile] = set()
        #: Outages of the destination behind which what is durable was looked for.
        self._outages = outlet.outages
        #: Deliveries under way and how many bytes each has, and the first of them that failed: key and why.
        self._flight: dict[asyncio.Task[None], int] = {}
        self._failure: tuple[str, WalshipError] | None = None
        self._pause = FIRST_PAUSE
        #: In monotonic seconds: no cut before; the last headway of finished segments.
        self._not_before = self._headway = clock.monotonic()
        #: Seconds that a PUT takes, smoothed.
        self._latency = 0.0
        #: Plaintexts are copies: one tail is encoded at a time, and one joint tail is encoded and stored.
        self._encoding, self._joining = asyncio.Lock(), asyncio.Lock()
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Cut and deliver until cancelled.

        Raises ObjectConflict when a tail of ours is there with other bytes: another writer uses our epoch.
        """
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    self._wake.clear()
                    seen = self._wal.version
                    self._follow(group)
                    if self._failure is not None:
                        await self._give_up(*self._failure)
                    await self._rest(seen, await self._cut_due(group))
        except BaseExceptionGroup as errors:
            if (error := foreseen(errors)) is None:
                raise
            raise error from None

    def segment_stored(self, file: WalFile) -> None:
        """The finished segment, of the stream's bytes, is stored at this destination.

        Nothing more of it is cut, and our tails of it are removed. Any finished segment may be named, whoever stored
        it; may be called before ``run``.
        """
        if file.kind is WalKind.SEGMENT:
            self._headway = self._clock.monotonic()
            self._finished[file] = None
            if len(self._finished) > MOST_FINISHED:
                del self._finished[next(iter(self._finished))]
            self._wake.set()

    @property
    def newest(self) -> str | None:
        """Key of the last tail that is durable and still needed; None if there is none."""
        lasts = [course.last for course in self._courses if not course.closed]
        return next((last.key for last in reversed(lasts) if last is not None), None)

    def _follow(self, group: asyncio.TaskGroup) -> None:
        """Take up what has begun, let go of what is done with."""
        while (segment := self._wal.following(self._last)) is not None:
            self._last = segment
            self._courses.append(Course(segment, self._epoch))
        for course in self._courses:
            # Dropped means that a destination has the finished segment: it is owed to this one and will be copied. To
            # hold on to it would fill the memory while this destination is away.
            dropped = course.segment.whole and course.segment not in self._wal.segments
            course.closed = course.closed or dropped or course.segment.file in self._finished
            if not course.folding and course.foldable(self._fold_at):
                course.folding = True
                group.create_task(self._fold(group, course))
        self._courses = [each for each in self._courses if not (each.quiet and (each.closed or each.over))]
        busy = {course.segment.file for course in self._courses}
        for file in self._finished.keys() - busy:
            if file in self._tailed:
                self._tailed.discard(file)
                group.create_task(self._cleaner.remove(file, self._epoch))
            if self._last is not None and file <= self._last.file:
                del self._finished[file]

    async def _cut_due(self, group: asyncio.TaskGroup) -> float | None:
        """Cut what is due. Seconds until something else is, as things are; 0: look again; None: when the WAL moves."""
        now = self._clock.monotonic()
        if self._outlet.down:
            self._headway = now
            await self._clock.sleep(POLL)
            return 0
        if now < self._not_before:
            await self._clock.sleep(min(POLL, self._not_before - now))
            return 0
        if self._outlet.outages != self._outages:
            await self._look_again()
            return 0
        synchronous = self._synchronous()
        dues = [(due, course) for course in self._courses if (due := self._due(course, synchronous)) is not None]
        if not dues:
            return None
        due, course = min(dues, key=lambda pair: pair[0])
        if due > now:
            return due - now
        lingering = sum(course.closed for course in self._courses) >= MOST_LINGERING
        most = MOST_IN_FLIGHT_SYNCHRONOUS if synchronous else MOST_IN_FLIGHT
        if len(self._flight) >= most or sum(self._flight.values()) >= MOST_BYTES or lingering:
            await self._first(self._wake.wait(), self._clock.sleep(HASTE if self._courses[1:] else SLICE))
            return 0
        await self._cut(group, course, LONGEST_SYNCHRONOUS if synchronous else course.waiting)
        if synchronous:
            # What is free is spread over the time that a PUT takes only when little is: commits come in bunches.
            spread = self._latency / most if len(self._flight) >= most // 2 else 0.0
            self._not_before = now + max(SPACING, spread)
        return 0

    def _due(self, course: Course, synchronous: bool) -> float | None:  # noqa: FBT001  two modes, looked up once
        """When what waits of the segment has to go, in monotonic seconds; None if nothing waits."""
        segment = course.segment
        if course.closed or not course.waiting:
            return None
        arrived = segment.arrived(course.sent)
        if segment.whole and not (synchronous and course.waiting <= MOST_OF_WHOLE):
            return max(arrived, self._headway) + max(HELD_UP, self._interval)
        return arrived if synchronous or segment.ended else arrived + self._interval

    async def _cut(self, group: asyncio.TaskGroup, course: Course, most: int) -> None:
        size = min(most, course.waiting)
        cut = course.cut(course.sent + size)
        self._tailed.add(course.segment.file)
        task = group.create_task(self._deliver(course, cut))
        self._flight[task] = cut.tail.name.end - cut.tail.name.start
        task.add_done_callback(self._settled)
        await asyncio.to_thread(course.hash_on) if size > HASH_AT_ONCE else course.hash_on()  # while it is encoded

    def _settled(self, task: asyncio.Task[None]) -> None:
        del self._flight[task]
        self._wake.set()  # only now: whoever wakes counts what is in flight

    async def _deliver(self, course: Course, cut: Cut) -> None:
        key = cut.tail.name.key
        try:
            async with self._encoding:
                parcel = await self._encoded(course, cut.tail)
            seconds = await self._put(parcel)
        except ObjectConflict:
            raise
        except (StoreError, IntegrityError) as error:
            if isinstance(error, IntegrityError):
                course.spoiled.add(cut.tail.name)
            self._failure = self._failure or (key, error)
        else:
            if self._outlet.outages != self._outages:
                return  # it may follow what is gone: cut anew once that is known
            self._latency += (seconds - self._latency) / 8
            self._pause = FIRST_PAUSE
            for name in course.landed(cut):
                start = course.segment.start
                self._stored(self._outlet.name, name.file, start + name.start, start + name.end)

    async def _encoded(self, course: Course, tail: Tail) -> Parcel:
        copy = tail.name.end - tail.name.start > HASH_AT_ONCE
        plain = await asyncio.to_thread(course.plain, tail) if copy else course.plain(tail)
        return await self._encode(tail.name.key, plain)

    async def _put(self, parcel: Parcel) -> float:
        """Store and close it; returns how many seconds the destination took."""
        began = self._clock.monotonic()
        new = self._outlet.abilities is None
        try:
            await self._outlet.deliver(parcel)
        finally:
            parcel.body.close()
        seconds = self._clock.monotonic() - began
        if new and (abilities := self._outlet.abilities) and not abilities.conditional_put:
            self._notify(DestinationHampered(self._outlet.name, abilities.remark))
        self._notify(ObjectStored(self._outlet.name, parcel.name, parcel.body.size, seconds))
        return seconds

    async def _give_up(self, key: str, error: WalshipError) -> None:
        """A delivery failed: all that is in flight is cut anew once the destination is up."""
        await self._recall()
        self._failure = None
        await self._failed(self._outlet, key, error)
        self._not_before = self._clock.monotonic() + self._pause
        self._pause = min(LONGEST_PAUSE, self._pause * 2)

    async def _recall(self) -> None:
        """Nothing is in flight any more."""
        under_way = set(self._flight)
        for task in under_way:
            task.cancel()
        if under_way:
            await asyncio.wait(under_way)
        for course in self._courses:
            course.roll_back()

    async def _look_again(self) -> None:
        """The destination was down: is what was durable there still to be found? The last tail of a segment tells."""
        outages = self._outlet.outages
        await self._recall()
        for course in [each for each in self._courses if not each.closed]:
            last = course.last
            try:
                if last is not None:
                    await self._outlet.store.head(last.key)
            except ObjectMissing:
                if course.last != last:
                    return  # folded meanwhile: once more
                start, end = course.segment.start, course.segment.start + course.durable
                course.restart()
                self._lost(self._outlet.name, course.segment.file, start, Lsn(end))
            except StoreError as error:
                assert last is not None
                self._failure = last.key, error
                return
        self._outages = outages

    async def _fold(self, group: asyncio.TaskGroup, course: Course) -> None:
        try:
            while members := course.foldable(self._fold_at):
                joint = course.joint(members)
                if not await self._persist(course, members, joint):
                    return
                group.create_task(self._clear(course, course.folded(members, joint)))
        finally:
            course.folding = False
            self._wake.set()

    async def _clear(self, course: Course, names: set[TailName]) -> None:
        """Delete what is folded. A delete that is late must not meet a tail that was cut anew under that name."""
        course.spoiled |= names
        await self._cleaner.delete([name.key for name in names])
        course.spoiled -= {name for name in names if name.key not in self._cleaner.unanswered}

    async def _persist(self, course: Course, members: list[Tail], joint: Tail) -> bool:
        """Store the joint tail, however long it takes. False if that is no longer of use."""
        pause = FIRST_PAUSE
        while not course.closed and course.holds(members):
            # Not before it is known whether the members are still there: a joint tail would hide that others are not.
            if not self._outlet.down and self._outlet.outages == self._outages:
                try:
                    async with self._joining:
                        await self._put(await self._encoded(course, joint))
                except ObjectConflict:
                    raise
                except (StoreError, IntegrityError) as error:
                    await self._failed(self._outlet, joint.name.key, error)
                    if isinstance(error, IntegrityError):
                        course.spoiled.add(joint.name)
                        return False  # fewer of them make another one
                else:
                    if self._outlet.outages == self._outages:
                        return True
            await self._clock.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)
        return False

    async def _rest(self, seen: int, seconds: float | None) -> None:
        """Until something may be due: the time has passed, the WAL has moved, or an answer has come."""
        if seconds is not None and not self._synchronous():
            # Whatever arrives meanwhile is due later than that: a busy server need not wake us for every message.
            if seconds:
                await self._clock.sleep(min(seconds, HASTE if self._courses[1:] else SLICE, max(self._interval, 0.01)))
            return
        if seconds == 0:
            return
        pause = self._clock.sleep(IDLE if seconds is None else seconds)
        await self._first(self._wal.changed(seen), self._wake.wait(), pause)

    async def _first(self, *all_: Coroutine[object, object, object]) -> None:
        waits = [asyncio.create_task(each) for each in all_]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
