"""One encoded object to several destinations at once, each at its own pace.

    ship ──> Uploader ──> Outlet a ──> Store            all at once; one that fails does not stop another
                     └──> Outlet b ──> Store            what it lacks is *owed* to it, by name

An object is encoded once; its bytes go to every destination and into every retry. A destination that fails is taken for
down: nothing waits for its time-outs any more, and once it answers again, what it lacks is copied to it verbatim from a
destination that has it. So a long outage costs names in memory, never bytes, as long as any destination answers; while
none does, nothing is read. What an earlier process left owing, or a new destination lacks, is found by comparing
listings, and copied as ``walship copy`` does it (``handlers.copy``): that costs neither names nor bytes in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

from handlers.copy import Means, Trouble, copy, estimate, not_held
from handlers.difference import Wanted
from handlers.outlet import Backlog, Outlet, Parcel, copy_order, emptied
from handlers.verbatim import NoneServes, bring
from pipeline.catalog import REPOSITORY
from pipeline.contracts import Clock, Store
from pipeline.errors import IntegrityError, ObjectConflict, ObjectMissing, StoreError, WalshipError
from pipeline.events import (
    DestinationCaughtUp,
    DestinationFailed,
    DestinationFilling,
    DestinationHampered,
    Notice,
    ObjectStored,
)

#: Seconds between attempts to reach a destination that is down: first and longest.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 5.0

#: Seconds between words about a destination that stays away, or is being filled.
TELL_EVERY = 30.0

#: Seconds between looks whether a destination still is one.
WATCH_EVERY = 5.0

#: So many objects that a destination refuses, one after the other, and it is left alone for a while.
MOST_REFUSALS = 10

#: Seconds until the listings are compared again: a command may have stored what a destination did not take.
COMPARE_EVERY = 3600.0

#: Objects and bytes of what a destination is filled with that are held at a time: beside what is shipped.
_AT_ONCE, _BYTES_AT_ONCE = 4, 32 << 20
#: Names that are remembered of what nobody can give.
_MOST_STUCK = 1000

#: Marks a backup at a store as in use while it is copied from there: see ``handlers.copy.Means``.
Hold = Callable[[Store, str], AbstractAsyncContextManager[str]]


class Uploader:
    """Stores parcels at all destinations. ``run`` must be running for destinations that are down to catch up."""

    def __init__(
        self,
        outlets: Sequence[Outlet],
        *,
        clock: Clock,
        notify: Callable[[Notice], None],
        hold: Hold = lambda _store, backup: not_held(backup),
    ) -> None:
        self.outlets = tuple(outlets)
        self._clock = clock
        self._hold = hold
        #: Whoever is to be told.
        self.notify = notify
        self._up = asyncio.Event()
        self._up.set()

    async def store(self, parcel: Parcel, *, patience: float | None = None) -> frozenset[str]:
        """Offer the parcel to every destination at once; returns the names of those that now have it.

        What is missing at some is owed to them from then on, if any other has it. ``patience``: seconds that the others
        have once one has it, None for as long as it takes; who takes longer is taken for down, so that a destination
        that accepts and never answers holds up no other. Raises ObjectConflict or IntegrityError if a required
        destination holds something else of that name, StoreError if none has taken it.
        """
        tasks = [asyncio.create_task(self._offer(outlet, parcel)) for outlet in self.outlets]
        try:
            await self._wait(tasks, patience)
        finally:
            for task in tasks:
                task.cancel()  # those that are done stay as they are
            await asyncio.gather(*tasks, return_exceptions=True)
        failed: dict[str, WalshipError] = {}
        for outlet, task in zip(self.outlets, tasks, strict=True):
            if task.cancelled():
                fact = f"{outlet.name} has not answered for {patience:g} seconds, and others have"
                late = failed[outlet.name] = StoreError(fact, passing=True)
                await self.failed(outlet, parcel.name, late)
            elif (told := task.result()) is not None:
                failed[outlet.name] = told
        for outlet in self.outlets:
            known = failed.get(outlet.name)
            if outlet.required and isinstance(known, ObjectConflict | IntegrityError):
                raise known
        if len(failed) == len(self.outlets):
            raise failed[self.outlets[0].name]
        for outlet in self.outlets:
            if outlet.name in failed:
                outlet.owe(parcel.name)
        return frozenset(outlet.name for outlet in self.outlets) - failed.keys()

    @staticmethod
    async def _wait(tasks: Collection[asyncio.Task[WalshipError | None]], patience: float | None) -> None:
        """Until all have ended, or ``patience`` seconds after the first success."""
        waiting: set[asyncio.Task[WalshipError | None]] = set(tasks)
        until: float | None = None
        loop = asyncio.get_running_loop()
        while waiting and (until is None or loop.time() < until):
            timeout = None if until is None else until - loop.time()
            done, waiting = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            stored = any(not task.cancelled() and not task.exception() and task.result() is None for task in done)
            if stored and until is None and patience is not None:
                until = loop.time() + patience

    def owed(self, name: str) -> asyncio.Future[None] | None:
        """Resolved once no required destination is owed the object; None if none is.

        Fails with StoreError when the copy that the others were to get it from is lost: it has to be shipped anew.
        """
        waiting = [outlet.owed[name] for outlet in self.outlets if outlet.required and name in outlet.owed]
        if not waiting:
            return None
        # Its members are shared with others who wait, and belong to the outlet: nobody's cancellation may reach them.
        together = asyncio.gather(*map(asyncio.shield, waiting))
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        together.add_done_callback(lambda done: _hand_on(done, future))
        return future

    def missing(self, name: str) -> list[str]:
        """Names of the required destinations that are owed the object."""
        return [outlet.name for outlet in self.outlets if outlet.required and name in outlet.owed]

    @property
    def is_reachable(self) -> bool:
        """Whether any destination is not known to be down."""
        return self._up.is_set()

    async def reachable(self) -> None:
        """Wait until a destination is not known to be down."""
        await self._up.wait()

    async def run(self) -> None:
        """Bring destinations up to date that were down, or lack what others have. Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            for outlet in self.outlets:
                if len(self.outlets) > 1:
                    outlet.behind.set()  # until the listings are compared
                group.create_task(self._revive(outlet))

    async def watch(self) -> None:
        """Notice a destination that was emptied, or has something else in its place. Runs until cancelled.

        Puts would go on without a word: what makes it the repository, and the keys, are gone.
        """
        while True:
            await self._clock.sleep(WATCH_EVERY)
            for outlet in self.outlets:
                if outlet.down:
                    continue
                try:
                    await outlet.store.head(REPOSITORY)
                except ObjectMissing:
                    await self.failed(outlet, REPOSITORY, emptied(outlet.store))
                except StoreError:
                    continue  # whoever stores something there tells

    async def _offer(self, outlet: Outlet, parcel: Parcel) -> WalshipError | None:
        if outlet.down:
            return StoreError(f"{outlet.name} is down", hint="it is tried again all the time", passing=True)
        if outlet.lacks_parts_of(parcel.name):
            return StoreError(f"{outlet.name} still lacks parts of {parcel.name}", hint="they are copied", passing=True)
        began = self._clock.monotonic()
        new = outlet.abilities is None
        try:
            await outlet.deliver(parcel)
        except (StoreError, IntegrityError) as error:
            await self.failed(outlet, parcel.name, error)
            return error
        if new and outlet.abilities and not outlet.abilities.conditional_put:
            self.notify(DestinationHampered(outlet.name, outlet.abilities.remark))
        seconds = self._clock.monotonic() - began
        self.notify(ObjectStored(outlet.name, parcel.name, parcel.body.size, seconds))
        return None

    async def give(self, parcel: Parcel, outlet: Outlet) -> None:
        """Store it at this destination alone, whoever else has it. Raises as ``Outlet.deliver`` does."""
        began = self._clock.monotonic()
        await outlet.deliver(parcel)
        outlet.settle(parcel.name)
        self.notify(ObjectStored(outlet.name, parcel.name, parcel.body.size, self._clock.monotonic() - began))

    async def failed(self, outlet: Outlet, name: str, error: WalshipError) -> None:
        """Tell, and take the destination for down unless it is only this one object that is wrong."""
        self.notify(DestinationFailed(outlet.name, name, error.fact, error.hint))
        if isinstance(error, ObjectConflict | IntegrityError):
            return
        if isinstance(error, StoreError) and not error.passing and name != REPOSITORY:
            try:
                await outlet.store.head(REPOSITORY)
            except StoreError:
                pass
            else:
                return  # it answers, and refuses this one: too large, a name it does not like
        self._set_down(outlet, down=True)

    def _set_down(self, outlet: Outlet, *, down: bool) -> None:
        outlet.down = down
        if down:
            outlet.outages += 1
            outlet.late = True
            outlet.behind.set()
            outlet.compared.clear()
            outlet.keys.clear()
            outlet.abilities = None  # what comes back may be another disk, or an emptied bucket: look at it anew
        else:
            for other in self.outlets:  # what it has may be lacking there
                if other is not outlet and outlet.name not in other.compared:
                    other.behind.set()
        if all(each.down for each in self.outlets):
            self._up.clear()
        else:
            self._up.set()

    async def _revive(self, outlet: Outlet) -> None:
        while True:
            if not outlet.behind.is_set():
                await self._idle(outlet)
            pause = FIRST_PAUSE
            while outlet.behind.is_set():
                await self._clock.sleep(pause)
                pause = min(LONGEST_PAUSE, pause * 2)
                await self._catch_up(outlet)

    async def _idle(self, outlet: Outlet) -> None:
        """Until it lacks something, or it is time to look whether it does."""
        try:
            async with asyncio.timeout(COMPARE_EVERY if len(self.outlets) > 1 else None):
                await outlet.behind.wait()
        except TimeoutError:
            outlet.compared.clear()
            outlet.behind.set()

    async def _catch_up(self, outlet: Outlet) -> None:
        """Copy what is owed, then what others have. The destination counts as up as soon as it answers."""
        if (outlet.down or outlet.owed) and not await self._answers(outlet):
            return
        # Fresh objects go straight to it again, while older ones are still being copied.
        if outlet.down:
            self._set_down(outlet, down=False)
        if not (await self._copy_owed(outlet) and await self._fill(outlet)):
            return
        if not outlet.owed and not outlet.down:
            outlet.behind.clear()
            if outlet.late and not outlet.backlog:
                outlet.late = False
                self.notify(DestinationCaughtUp(outlet.name))

    async def _answers(self, outlet: Outlet) -> bool:
        try:
            await outlet.store.head(REPOSITORY)
        except StoreError as error:
            now = self._clock.monotonic()
            if not outlet.down or now - outlet.told >= TELL_EVERY:
                outlet.told = now
                known = emptied(outlet.store) if isinstance(error, ObjectMissing) else error
                await self.failed(outlet, REPOSITORY, known)
            return False
        return True

    async def _copy_owed(self, outlet: Outlet) -> bool:
        """What was stored elsewhere meanwhile: somebody waits for it. False: the destination refuses."""
        refused = 0
        for name in sorted(outlet.owed, key=copy_order):
            if outlet.lacks_parts_of(name):
                continue
            try:
                await self._copy(name, outlet)
            except (StoreError, IntegrityError) as error:
                await self.failed(outlet, name, error)
                refused += 1
                if outlet.down or refused == MOST_REFUSALS:
                    return False
        return True

    async def _copy(self, name: str, outlet: Outlet) -> None:
        """Verbatim, from the first other destination that has the object whole."""
        others = [other for other in self.outlets if other is not outlet and name not in other.owed]
        up = [other.store for other in others if not other.down]
        began = self._clock.monotonic()
        try:
            size = await bring(name, up, outlet.store, give=outlet.deliver, keys=outlet.keys)
        except NoneServes as error:
            if len(up) == len(others) and error.lost:
                # Nobody can give it any more. Whoever has it at its source ships it anew.
                outlet.settle(name, StoreError(f"{name} is lost where it was stored", passing=True))
            raise IntegrityError(
                f"{name} is owed to {outlet.name}, and no other destination can give it"
                + (f": {error.fact}" if error.failures else "")
            ) from None
        outlet.settle(name)
        self.notify(ObjectStored(outlet.name, name, size, self._clock.monotonic() - began))

    async def _fill(self, outlet: Outlet) -> bool:
        """Copy what others have: names there minus names here. False: it is not known yet what that is, or not done."""
        for other in self.outlets:
            if other is outlet or other.down or other.name in outlet.compared:
                continue
            try:
                if not await self._fill_from(other, outlet):
                    return False
            except StoreError:
                return False  # one of them could not be listed: told when something is stored there, and tried again
            outlet.compared.add(other.name)
        return True

    async def _fill_from(self, other: Outlet, outlet: Outlet) -> bool:
        lacking = (await estimate(other.store, outlet.store, WANTED)).total
        if not lacking.objects:
            self._tell_backlog(outlet, None)
            return True
        outlet.late = True
        self._tell_backlog(outlet, Backlog(lacking.objects, lacking.size))
        means = Means(
            give=partial(self._give_copy, outlet),
            hold=partial(self._hold, other.store),
            before=partial(self._between, outlet),
            trouble=partial(self._told, outlet),
            at_once=_AT_ONCE,
            bytes_at_once=_BYTES_AT_ONCE,
        )
        others = [each.store for each in self.outlets if each not in (outlet, other) and not each.down]
        done = await copy([other.store], outlet.store, WANTED, means, others=others)
        stuck = {trouble.name for trouble in done.troubles}
        backlog = Backlog(len(stuck), 0, set(sorted(stuck)[:_MOST_STUCK])) if stuck else None
        self._tell_backlog(outlet, backlog)
        return not outlet.down

    async def _between(self, outlet: Outlet, _size: int) -> None:
        """What is shipped just now comes before all that is old."""
        if outlet.owed:
            await self._copy_owed(outlet)
        if outlet.down:
            raise StoreError(f"{outlet.name} is down", passing=True)

    async def _give_copy(self, outlet: Outlet, parcel: Parcel) -> None:
        began = self._clock.monotonic()
        try:
            await outlet.deliver(parcel)
        except StoreError as error:
            if not isinstance(error, ObjectConflict) and not outlet.down:
                await self.failed(outlet, parcel.name, error)
            raise
        outlet.settle(parcel.name)
        if (backlog := outlet.backlog) is not None:
            backlog.less(parcel.body.size)
            if self._clock.monotonic() - backlog.told >= TELL_EVERY:
                self._tell_backlog(outlet, backlog)
        self.notify(ObjectStored(outlet.name, parcel.name, parcel.body.size, self._clock.monotonic() - began))

    def _told(self, outlet: Outlet, trouble: Trouble) -> None:
        if trouble.kind != "refused":  # that was told when it happened
            fact = f"{trouble.name} cannot be copied to {outlet.name}: {trouble.fact}"
            hint = "walship verify names all that is damaged; it is tried again in an hour, and at the next start"
            self.notify(DestinationFailed(outlet.name, trouble.name, fact, hint))

    def _tell_backlog(self, outlet: Outlet, backlog: Backlog | None) -> None:
        outlet.backlog = backlog
        objects, size = (backlog.objects, backlog.size) if backlog else (0, 0)
        if backlog is not None:
            backlog.told = self._clock.monotonic()
        self.notify(DestinationFilling(outlet.name, objects, size))


#: What any destination has to have: all but tails, which each gets at its own pace.
WANTED = Wanted(aside=True)


def _hand_on(done: asyncio.Future[list[None]], future: asyncio.Future[None]) -> None:
    if future.done():
        return
    if done.cancelled():
        future.cancel()
    elif (error := done.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(None)
