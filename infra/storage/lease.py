"""The lease: which one of several services writes to a repository, and up to where it has reported WAL as safe.

As a lock it is advice, and no more.

    lease/<number, 8 hex digits>       content: see ``heartbeat``

A number is taken by creating its object, which of several writers one can do. Its holder rewrites it every third of the
time to live. Another writer that sees the highest number unchanged for that long, on its own monotonic clock, takes the
next number; a holder that sees a higher one stops. No wall clock is asked, and nothing is locked: a holder that was
suspended may write on until its next heartbeat. That does no harm, because names, prefix hashes and conditional
creates keep what is stored right; the lease keeps two services from working against each other for days, unnoticed.

A destination that fails has no say: numbers are looked for, and taken, wherever a destination answers, and one that
comes back gets the lease with the next heartbeat. Two writers that see different halves of the destinations can hold
one number for a while; each stops where it meets the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

from handlers.body import joined
from infra.clock import SystemClock
from infra.storage.heartbeat import MOST, Heartbeat, Holder
from pipeline.contracts import Clock, Store
from pipeline.errors import ObjectConflict, ObjectMissing, SourceError, StoreError, foreseen
from pipeline.moments import moment_in
from pipeline.objects import MemoryBody

#: Seconds after which a lease that does not change is free.
TTL = 15.0
#: Seconds a destination has to answer, at each question, while the lease is taken or given back.
ANSWER = 5.0
#: Leases below ours that are kept, for people who look what happened.
KEPT = 8
#: Looks at a lease within its time to live.
_LOOKS = 10
#: How often others may be faster before we give up.
_ATTEMPTS = 10

_FOLDER = "lease/"
_KEY = re.compile(r"lease/([0-9a-f]{8})")
_LAST = 0xFFFFFFFF
#: After which no command looks whether a holder is alive.
_STALE = timedelta(hours=1)


class LeaseHeldError(SourceError):
    """Another service writes to this repository; it may end. ``holder``: which, as far as its lease can be read."""

    def __init__(self, fact: str, *, hint: str = "", holder: Holder | None = None) -> None:
        super().__init__(fact, hint=hint)
        self.holder = holder


def lease_key(number: int) -> str:
    """The name of a lease."""
    return f"{_FOLDER}{number:08x}"


class Lease:
    """A lease that is held. ``acquire`` one, ``run`` it beside the work, ``release`` it when the work is done."""

    def __init__(
        self,
        epoch: int,
        holder: Holder,
        places: Sequence[Place],
        *,
        clock: Clock,
        ttl: float,
        tell: Callable[[str], None],
    ) -> None:
        #: The number of the lease: names the tails of its holder.
        self.epoch = epoch
        self.holder = holder
        #: Set once another writer was seen: stop.
        self.lost = asyncio.Event()
        #: What a heartbeat says of the WAL that is safe (``pipeline.confirmed``); given by whoever ships.
        self.confirmed: Callable[[], object | None] = lambda: None
        self._places = places
        self._clock = clock
        self._ttl = ttl
        self._tell = tell
        self._counter = 0

    @classmethod
    async def acquire(
        cls,
        stores: Sequence[Store],
        *,
        clock: Clock,
        ttl: float = TTL,
        tell: Callable[[str], None],
        server: str = "",
    ) -> Lease:
        """Take the next number, at every destination that answers. The stores are rooted at the cluster's folder.

        Waits up to one ``ttl`` (seconds) where a lease is held, to see whether its holder is alive. Then, or as soon as
        that is clear, LeaseHeldError that names it. StoreError if no destination answers, or lets the lease be written.
        ``server`` says for people what is shipped; ``tell`` is given a line about each thing that takes time.
        """
        for _ in range(_ATTEMPTS):
            places = [Place(store, clock) for store in stores]
            epoch = 1 + await _vacant(places, clock, ttl, tell)
            lease = cls(epoch, Holder.here(clock.now(), server), places, clock=clock, ttl=ttl, tell=tell)
            if await lease._create([place for place in places if place.failure is None]):
                return lease
        raise LeaseHeldError(
            f"others took the lease of this repository {_ATTEMPTS} times in a row, just before us",
            hint="several services were started for one repository: stop all but one",
        )

    async def run(self) -> None:
        """Rewrite the heartbeat, at each destination at its own pace, until cancelled.

        Raises LeaseHeldError that names the other writer when a higher number is seen, or ours in other hands. A
        process that was suspended notices at once: the pause until the next heartbeat is over when it wakes.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for place in self._places:
                    group.create_task(self._keep(place))
        except BaseExceptionGroup as caught:
            error = foreseen(caught)
            if error is None:
                raise
            raise error from None

    async def release(self) -> None:
        """Say at every destination that the lease is free, so that the next writer need not wait. End ``run`` first.

        Also after another writer was met: of two that hold one number, the one that noticed first gives way. Failures
        are told, not raised: who comes next then waits one time to live.
        """
        await ask_all(self._places, self._give_back)
        for place in self._places:
            if place.failure is not None:
                self._tell(f"the lease cannot be given back at {place.store.name}: {place.failure}")

    async def _create(self, places: Sequence[Place]) -> bool:
        """Create our number; False if another writer was faster anywhere.

        One destination after the other, always in the same order: of several writers that see the same destinations,
        the first destination chooses one, and the others have created nothing.
        """
        try:
            for place in places:
                await place.ask(self._create_at)
        except ObjectConflict:
            await self.release()
            return False
        except BaseException:
            # Cancelled, or a defect: nobody shall wait for a lease that never was.
            await self.release()
            raise
        failures = [place.failure for place in places if place.failure is not None]
        if len(failures) < len(places):
            return True
        await self.release()
        raise failures[0]

    async def _create_at(self, place: Place) -> None:
        try:
            await place.store.put(lease_key(self.epoch), self._heartbeat())
        except ObjectConflict:
            # Or it was us: an attempt whose answer got lost.
            if not self._is_ours(await place.read(self.epoch)):
                raise

    async def _keep(self, place: Place) -> None:
        """The heartbeats at one destination."""
        pause, failing = self._ttl / 3, False
        while True:
            began = self._clock.monotonic()
            try:
                await self._beat(place)
            except StoreError as error:
                if not failing:
                    self._tell(f"the lease cannot be renewed at {place.store.name}: {error}")
                failing = True
                began = self._clock.monotonic()
            else:
                if failing:
                    self._tell(f"the lease is renewed at {place.store.name} again")
                failing = False
            # After a heartbeat that took long, at once: we may have been suspended in the midst of it.
            await self._clock.sleep(max(0.0, began + pause - self._clock.monotonic()))

    async def _beat(self, place: Place) -> None:
        """Look who else is there, then say that we are."""
        numbers = await place.numbers(after=self.epoch - 1 if place.cleaned else 0)
        highest = max(numbers, default=0)
        if highest > self.epoch:
            raise await self._overtaken(place, highest)
        if self.epoch in numbers:
            there = Heartbeat.decode(await place.read(self.epoch))
            # What is released is nobody's: left by a writer that met us elsewhere, and gave way.
            if there is not None and there.holder.instance != self.holder.instance and not there.released:
                raise await self._overtaken(place, self.epoch)
            await place.store.put(lease_key(self.epoch), self._heartbeat(), replace=True)
        else:
            with contextlib.suppress(ObjectConflict):  # looked at with the next heartbeat
                await place.store.put(lease_key(self.epoch), self._heartbeat())
        if not place.cleaned:
            place.cleaned = True
            # Where it is refused (object lock, rights), they stay: some hundred bytes for each start of a service.
            with contextlib.suppress(StoreError):
                await place.store.delete([lease_key(number) for number in numbers if number < self.epoch - KEPT])

    async def _overtaken(self, place: Place, number: int) -> LeaseHeldError:
        self.lost.set()
        content = b""
        with contextlib.suppress(StoreError):  # that it is there is enough
            content = await place.read(number)
        return LeaseHeldError(
            f"another service writes to this repository: {_words(content)} holds {lease_key(number)} at"
            f" {place.store.name}, and this one held {lease_key(self.epoch)}",
            hint=_hint(self._ttl),
        )

    async def _give_back(self, place: Place) -> None:
        # Looked at first: after an attempt that failed it may be somebody else's, or not there.
        with contextlib.suppress(ObjectMissing):
            if self._is_ours(await place.read(self.epoch)):
                await place.store.put(lease_key(self.epoch), self._heartbeat(released=True), replace=True)

    def _is_ours(self, content: bytes) -> bool:
        there = Heartbeat.decode(content)
        return there is not None and there.holder.instance == self.holder.instance

    def _heartbeat(self, *, released: bool = False) -> MemoryBody:
        self._counter += 1
        now, safe = self._clock.now(), self.confirmed()
        return Heartbeat.of(
            self.holder, self._counter, now, released=released, confirmed=str(safe) if safe else ""
        ).encode()


class Place:
    """The leases at one destination."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self.store = store
        #: Why it did not do what it was asked last; None if it did.
        self.failure: StoreError | None = None
        #: Leases that nobody needs were deleted.
        self.cleaned = False
        #: The highest number there, 0 for none; its content, and since when it is so.
        self.highest = 0
        self.content = b""
        self.since = 0.0
        #: The content was seen to change: somebody writes it.
        self.moved = False
        self._clock = clock

    async def numbers(self, *, after: int = 0) -> list[int]:
        """Those there are above ``after``, or all; in no order."""
        behind = lease_key(after) if after else ""
        matches = [_KEY.fullmatch(info.key) async for info in self.store.list(_FOLDER, after=behind)]
        return [int(match[1], 16) for match in matches if match]

    async def read(self, number: int) -> bytes:
        """The first bytes of a lease; more than ``MOST`` are not a heartbeat anyway."""
        body = await self.store.get(lease_key(number), (0, MOST))
        try:
            return joined(body)
        finally:
            body.close()

    async def look(self) -> None:
        """See which lease is the highest, and whether it is as it was."""
        highest, content = max(await self.numbers(), default=0), b""
        if highest:
            with contextlib.suppress(ObjectMissing):  # deleted since
                content = await self.read(highest)
        if (highest, content) != (self.highest, self.content):
            self.moved = bool(highest) and highest == self.highest
            self.highest, self.content, self.since = highest, content, self._clock.monotonic()

    async def ask(self, question: Callable[[Place], Awaitable[None]]) -> None:
        """Try it within ``ANSWER`` seconds, and remember a failure. ObjectConflict is an answer, and raised."""
        self.failure = None
        try:
            async with asyncio.timeout(ANSWER):
                await question(self)
        except ObjectConflict:
            raise
        except StoreError as error:
            self.failure = error
        except TimeoutError:
            self.failure = StoreError(f"{self.store.name} has not answered in {ANSWER:.0f} s", passing=True)


async def newest(store: Store) -> tuple[int, Heartbeat] | None:
    """The highest lease at a destination, for people; None if none can be read there. Raises StoreError."""
    place = Place(store, SystemClock())
    await place.look()
    there = Heartbeat.decode(place.content)
    return (place.highest, there) if there else None


async def refuse_if_written(
    stores: Sequence[Store], *, clock: Clock, ttl: float = TTL, tell: Callable[[str], None]
) -> None:
    """LeaseHeldError that names the service which writes to the repository, if one is alive; takes no lease.

    For commands that would write WAL beside it. Waits, and raises, as ``Lease.acquire`` does; but not for one that gave
    no sign for an hour by its own clock: nobody takes its lease away, and each command would wait for it again.
    """
    places = [Place(store, clock) for store in stores]
    await ask_all(places, Place.look)
    if not all(place.failure or _long_ago(place, clock.now()) for place in places):
        await _vacant(places, clock, ttl, tell)


async def _vacant(places: Sequence[Place], clock: Clock, ttl: float, tell: Callable[[str], None]) -> int:
    """The highest number there is, once nobody holds it; LeaseHeldError if somebody does. See ``Lease.acquire``."""
    watched = 0
    while True:
        # Who has failed is not asked again here: it may take its time over each question.
        await ask_all([place for place in places if place.failure is None], Place.look)
        answering = [place for place in places if place.failure is None]
        if not answering:
            raise places[0].failure or StoreError("a lease needs a destination")
        highest = max(place.highest for place in answering)
        holding = [place for place in answering if place.highest == highest]
        where = f"{lease_key(highest)} at {holding[0].store.name}"
        if highest == 0 or _given_up(holding):
            return _below_last(highest, where)
        for place in holding:
            if place.moved:
                raise LeaseHeldError(
                    f"this repository is written already by {_words(place.content)}, which was seen alive just now"
                    f" ({lease_key(highest)} at {place.store.name})",
                    hint=_hint(ttl),
                    holder=there.holder if (there := Heartbeat.decode(place.content)) else None,
                )
        now = clock.monotonic()
        if all(now - place.since >= ttl for place in holding):
            tell(f"{_words(holding[0].content)} has not renewed {where} for {ttl:.0f} s, and counts as gone")
            return _below_last(highest, where)
        if highest != watched:
            tell(f"{_words(holding[0].content)} holds {where}: watching for {ttl:.0f} s whether it is alive")
            watched = highest
        await clock.sleep(ttl / _LOOKS)


def _long_ago(place: Place, now: datetime) -> bool:
    there = Heartbeat.decode(place.content)
    written = moment_in(there.written) if there else None
    return place.highest == 0 or (written is not None and now - written > _STALE)


def _given_up(holding: Sequence[Place]) -> bool:
    """Whether all that hold a number are certain to be done with it."""
    heartbeats = [Heartbeat.decode(place.content) for place in holding]
    # Given back at one destination is given back: another may have been away at that moment.
    done = {there.holder.instance for there in heartbeats if there and (there.released or there.holder.ended())}
    return all(there is not None and there.holder.instance in done for there in heartbeats)


def _below_last(number: int, where: str) -> int:
    if number >= _LAST:
        raise StoreError(
            f"{where} has the last number there is",
            hint="walship counts leases from 1, so it made none like it: delete that object",
        )
    return number


async def ask_all(places: Sequence[Place], question: Callable[[Place], Awaitable[None]]) -> None:
    """At the same time; each within ``ANSWER`` seconds, what fails is remembered by its place."""
    async with asyncio.TaskGroup() as group:
        for place in places:
            group.create_task(place.ask(question))


def _words(content: bytes) -> str:
    there = Heartbeat.decode(content)
    return there.holder.words if there else "a process that cannot be told from its lease"


def _hint(ttl: float) -> str:
    return (
        "stop one of the two; a clone of the server needs a repository of its own; if that host is gone, try again"
        f" after {ttl:.0f} s"
    )
