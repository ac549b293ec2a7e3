"""One encoded object to several destinations at once, each at its own pace.

    ship ──> Uploader ──> Outlet a ──> Store            all at once; one that fails does not stop another
                     └──> Outlet b ──> Store            what it lacks is *owed* to it, by name

An object is encoded once; its bytes go to every destination and into every retry. A destination that fails is taken for
down: nothing waits for its time-outs any more, and once it answers again, what it lacks is copied to it verbatim from a
destination that has it. So a long outage costs names in memory, never bytes, as long as any destination answers; while
none does, nothing is read. What an earlier process left owing is found by comparing listings at the start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from handlers.checksum import check_stored
from handlers.outlet import Outlet, Parcel
from pipeline.catalog import REPOSITORY, data_key_name
from pipeline.contracts import Clock
from pipeline.errors import IntegrityError, ObjectConflict, ObjectMissing, StoreError, WalshipError
from pipeline.events import DestinationCaughtUp, DestinationFailed, DestinationHampered, Notice, ObjectStored

#: Seconds between attempts to reach a destination that is down: first and longest.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 5.0

#: Seconds between words about a destination that stays away.
TELL_EVERY = 30.0

#: Seconds between looks whether a destination still is one.
WATCH_EVERY = 5.0

#: So many objects that a destination refuses, one after the other, and it is left alone for a while.
MOST_REFUSALS = 10


class Uploader:
    """Stores parcels at all destinations. ``run`` must be running for destinations that are down to catch up."""

    def __init__(self, outlets: Sequence[Outlet], *, clock: Clock, notify: Callable[[Notice], None]) -> None:
        self.outlets = tuple(outlets)
        self._clock = clock
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
            group.create_task(self._owe_differences())
            for outlet in self.outlets:
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
                    await self.failed(outlet, REPOSITORY, _emptied(outlet))
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
        if (owed := outlet.owed.pop(parcel.name, None)) is not None and not owed.done():
            owed.set_result(None)
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
            outlet.behind.set()
            outlet.compared = False
            outlet.abilities = None  # what comes back may be another disk, or an emptied bucket: look at it anew
        if all(each.down for each in self.outlets):
            self._up.clear()
        else:
            self._up.set()

    async def _owe_differences(self) -> None:
        """What an earlier process left undone: names at any destination minus names here are owed here.

        One that cannot be listed is behind until it could be: what it lacks is not known.
        """
        if len(self.outlets) < 2:
            self.outlets[0].compared = True
            return
        listings = await asyncio.gather(*map(_names, self.outlets))
        everywhere = set().union(*(names for names in listings if names is not None))
        for outlet, names in zip(self.outlets, listings, strict=True):
            outlet.compared = names is not None
            if names is None:
                outlet.behind.set()
                continue
            for name in sorted(everywhere - names, key=copy_order):
                outlet.owe(name)

    async def _revive(self, outlet: Outlet) -> None:
        while True:
            await outlet.behind.wait()
            pause = FIRST_PAUSE
            while outlet.behind.is_set():
                await self._clock.sleep(pause)
                pause = min(LONGEST_PAUSE, pause * 2)
                await self._catch_up(outlet)

    async def _catch_up(self, outlet: Outlet) -> None:
        """Copy what is owed. The destination counts as up as soon as it answers."""
        try:
            await outlet.store.head(REPOSITORY)
        except StoreError as error:
            now = self._clock.monotonic()
            if not outlet.down or now - outlet.told >= TELL_EVERY:
                outlet.told = now
                known = _emptied(outlet) if isinstance(error, ObjectMissing) else error
                await self.failed(outlet, REPOSITORY, known)
            return
        # Fresh objects go straight to it again, while older ones are still being copied.
        if outlet.down:
            self._set_down(outlet, down=False)
        if not outlet.compared:
            await self._owe_differences()
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
                    return
        if outlet.compared and not outlet.owed and not outlet.down:
            outlet.behind.clear()
            self.notify(DestinationCaughtUp(outlet.name))

    async def _copy(self, name: str, outlet: Outlet) -> None:
        """Verbatim, from the first other destination that has the object whole."""
        others = [other for other in self.outlets if other is not outlet and name not in other.owed]
        failures: list[WalshipError] = []
        for other in others:
            if other.down:
                continue
            try:
                body = await other.store.get(name)
                header, digest = await asyncio.to_thread(check_stored, name, body.chunks())
            except (StoreError, IntegrityError) as error:
                failures.append(error)
                continue
            began = self._clock.monotonic()
            try:
                await self._copy_key(header.key, other, outlet)
                await outlet.deliver(Parcel(header, body, digest))
            finally:
                body.close()
            if (owed := outlet.owed.pop(name, None)) is not None and not owed.done():
                owed.set_result(None)
            self.notify(ObjectStored(outlet.name, name, body.size, self._clock.monotonic() - began))
            return
        lost = len(failures) == len(others) and all(isinstance(e, ObjectMissing | IntegrityError) for e in failures)
        # Nobody can give it any more. Whoever has it at its source ships it anew.
        if lost and (owed := outlet.owed.pop(name, None)) is not None and not owed.done():
            owed.set_exception(StoreError(f"{name} is lost where it was stored", passing=True))
        raise IntegrityError(
            f"{name} is owed to {outlet.name}, and no other destination can give it"
            + (f": {failures[0].fact}" if failures else "")
        )

    async def _copy_key(self, key_id: str, source: Outlet, target: Outlet) -> None:
        """The object may have been made by an earlier process, under a data key that the target has not seen."""
        if not key_id:
            return
        name = data_key_name(key_id)
        try:
            await target.store.head(name)
        except ObjectMissing:
            body = await source.store.get(name)
            with suppress(ObjectConflict):
                await target.store.put(name, body)


def _emptied(outlet: Outlet) -> StoreError:
    return StoreError(
        f"{outlet.name} has no {REPOSITORY} any more: it was emptied, or something else is in its place",
        hint="nothing counts as stored there; after walship init what other destinations have is copied",
        passing=True,
    )


async def _names(outlet: Outlet) -> set[str] | None:
    """What a copy of the repository consists of at this destination; None if it does not answer."""
    names: set[str] = set()
    try:
        for prefix in ("keys/", "wal/", "conflict/", "base/"):
            names.update([entry.key async for entry in outlet.store.list(prefix) if not entry.key.endswith("/")])
    except StoreError:
        return None  # found out, and told, when something is stored there
    complete = {name.rpartition("/")[0] for name in names if name.endswith("/backup_info")}
    # Parts of a backup that never became one are nobody's loss.
    return {name for name in names if not name.startswith("base/") or "/".join(name.split("/")[:2]) in complete}


def copy_order(name: str) -> tuple[int, str]:
    """Keys first, so that nothing lies there unreadable; backup_info last, so that no backup is listed that is none."""
    if name.startswith("keys/"):
        return 0, name
    return (2 if name.endswith("/backup_info") else 1), name


def _hand_on(done: asyncio.Future[list[None]], future: asyncio.Future[None]) -> None:
    if future.done():
        return
    if done.cancelled():
        future.cancel()
    elif (error := done.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(None)
