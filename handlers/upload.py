"""One encoded object to several destinations at once, each at its own pace.

    ship ──> Uploader ──> Outlet a ──> Store            all at once; one that fails does not stop another
                     └──> Outlet b ──> Store            what it lacks is *owed* to it, by name

An object is encoded once; its bytes go to every destination and into every retry. A destination that fails is taken for
down: nothing waits for its time-outs any more, and once it answers again, what it lacks is copied to it verbatim from a
destination that has it. So a long outage costs names in memory, never bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from handlers.checksum import check_stored
from pipeline.catalog import REPOSITORY, data_key_name
from pipeline.contracts import Abilities, Body, Clock, Store
from pipeline.errors import IntegrityError, ObjectConflict, ObjectMissing, StoreError, WalshipError
from pipeline.events import DestinationCaughtUp, DestinationFailed, DestinationHampered, Notice, ObjectStored
from pipeline.objects import Header

#: Seconds between attempts to reach a destination that is down: first and longest.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0


@dataclass(frozen=True, slots=True)
class Parcel:
    """An encoded object on its way."""

    header: Header
    body: Body
    #: SHA-256 trailer, as hex.
    digest: str

    @property
    def name(self) -> str:
        return self.header.name


@dataclass(slots=True)
class Outlet:
    """A destination, and how it is doing."""

    store: Store
    required: bool = True
    #: The object that holds the data key this process writes under; None when nothing is encrypted.
    key_object: tuple[str, Body] | None = None
    #: It failed, and has not taken anything since.
    down: bool = False
    #: Objects that are safe elsewhere and not here: name → resolved once it is here as well.
    owed: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    #: Set while it is down or owed anything.
    behind: asyncio.Event = field(default_factory=asyncio.Event)
    #: What the store was found to be able to do; None until the first object is delivered.
    abilities: Abilities | None = None
    _preparing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        return self.store.name

    async def deliver(self, parcel: Parcel) -> None:
        """Create the object here. The same object being here already is success; other bytes are ObjectConflict."""
        async with self._preparing:
            if self.abilities is None:
                self.abilities = await self._prepare()
        try:
            await self.store.put(parcel.name, parcel.body)
        except ObjectConflict:
            await self._compare(parcel)

    async def _prepare(self) -> Abilities:
        """Before the first object: does "only if absent" hold here, and is our data key here?

        Some stores ignore the condition without a word. And a key goes before all that is encrypted under it, or a
        crash would leave objects that nobody can read.
        """
        there = await self.store.get(REPOSITORY)
        abilities = await self.store.probe(REPOSITORY, there)
        if self.key_object is not None:
            name, body = self.key_object
            with suppress(ObjectConflict):  # its id is random: what is there under that name is this very key
                await self.store.put(name, body)
        return abilities

    async def _compare(self, parcel: Parcel) -> None:
        """Something of that name is here: an earlier attempt of ours, the same file shipped before, or a stranger."""
        stored = await self.store.get(parcel.name)
        try:
            header, digest = await asyncio.to_thread(check_stored, parcel.name, stored.chunks())
        except IntegrityError as error:
            raise IntegrityError(
                f"{error.fact}, at {self.name}; it was to be stored again",
                hint="the source still has it: move the damaged object away, and it is shipped at the next attempt",
            ) from None
        finally:
            stored.close()
        mine = parcel.header
        same = (header.name, header.system_id, header.plain_size) == (mine.name, mine.system_id, mine.plain_size)
        if digest == parcel.digest or (same and header.fingerprint == mine.fingerprint):
            return
        raise ObjectConflict(
            f"{parcel.name} is stored at {self.name} with other bytes (made {header.created or 'at an unknown time'})",
            hint="two servers write to one repository, or this one was rolled back: find the other one; a clone needs"
            " archive_mode=off, or a destination of its own. Nothing was overwritten, and nothing is acknowledged",
        )


class Uploader:
    """Stores parcels at all destinations. ``run`` must be running for destinations that are down to catch up."""

    def __init__(self, outlets: Sequence[Outlet], *, clock: Clock, notify: Callable[[Notice], None]) -> None:
        self.outlets = tuple(outlets)
        self._clock = clock
        self._notify = notify

    async def store(self, parcel: Parcel) -> frozenset[str]:
        """Offer the parcel to every destination at once; returns the names of those that now have it.

        What is missing at some is owed to them from then on, if any other has it. Raises ObjectConflict or
        IntegrityError if a required destination holds something else of that name, StoreError if none has taken it.
        """
        results = await asyncio.gather(*(self._offer(outlet, parcel) for outlet in self.outlets))
        failed = {outlet.name: error for outlet, error in zip(self.outlets, results, strict=True) if error is not None}
        for outlet in self.outlets:
            error = failed.get(outlet.name)
            if outlet.required and isinstance(error, ObjectConflict | IntegrityError):
                raise error
        if len(failed) == len(self.outlets):
            raise failed[self.outlets[0].name]
        for outlet in self.outlets:
            if outlet.name in failed:
                outlet.owed.setdefault(parcel.name, asyncio.get_running_loop().create_future())
                outlet.behind.set()
        return frozenset(outlet.name for outlet in self.outlets) - failed.keys()

    async def settle(self, name: str) -> None:
        """Wait until no required destination is owed the object."""
        owed = [outlet.owed[name] for outlet in self.outlets if outlet.required and name in outlet.owed]
        if owed:
            await asyncio.gather(*map(asyncio.shield, owed))

    def missing(self, name: str) -> list[str]:
        """Names of the required destinations that are owed the object."""
        return [outlet.name for outlet in self.outlets if outlet.required and name in outlet.owed]

    async def run(self) -> None:
        """Bring destinations that were down up to date. Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            for outlet in self.outlets:
                group.create_task(self._revive(outlet))

    async def _offer(self, outlet: Outlet, parcel: Parcel) -> WalshipError | None:
        if outlet.down:
            return StoreError(f"{outlet.name} is down", hint="it is tried again all the time", passing=True)
        began = self._clock.monotonic()
        new = outlet.abilities is None
        try:
            await outlet.deliver(parcel)
        except (StoreError, IntegrityError) as error:
            self._failed(outlet, parcel.name, error)
            return error
        if new and outlet.abilities and not outlet.abilities.conditional_put:
            self._notify(DestinationHampered(outlet.name, outlet.abilities.remark))
        seconds = self._clock.monotonic() - began
        self._notify(ObjectStored(outlet.name, parcel.name, parcel.body.size, seconds))
        return None

    def _failed(self, outlet: Outlet, name: str, error: WalshipError) -> None:
        """Tell, and take the destination for down unless it is only this one object that is wrong."""
        self._notify(DestinationFailed(outlet.name, name, error.fact, error.hint))
        if not isinstance(error, ObjectConflict | IntegrityError):
            outlet.down = True
            outlet.behind.set()

    async def _revive(self, outlet: Outlet) -> None:
        while True:
            await outlet.behind.wait()
            pause = FIRST_PAUSE
            while outlet.behind.is_set():
                await self._clock.sleep(pause)
                pause = min(LONGEST_PAUSE, pause * 2)
                await self._catch_up(outlet)

    async def _catch_up(self, outlet: Outlet) -> None:
        """Copy what is owed. The destination counts as up as soon as it answers or takes anything again."""
        try:
            await outlet.store.head(REPOSITORY)
        except StoreError as error:
            self._failed(outlet, REPOSITORY, error)
            return
        outlet.down = False  # fresh objects go straight to it again, while older ones are still being copied
        for name in list(outlet.owed):
            try:
                await self._copy(name, outlet)
            except (StoreError, IntegrityError) as error:
                self._failed(outlet, name, error)
                if outlet.down:
                    return
            else:
                outlet.owed.pop(name).set_result(None)
        if not outlet.owed:
            outlet.behind.clear()
            self._notify(DestinationCaughtUp(outlet.name))

    async def _copy(self, name: str, outlet: Outlet) -> None:
        """Verbatim, from the first other destination that has the object whole."""
        failure: WalshipError = IntegrityError(f"{name} is owed to {outlet.name}, and no other destination answers")
        for other in self.outlets:
            if other is outlet or name in other.owed or other.down:
                continue
            try:
                body = await other.store.get(name)
                header, digest = await asyncio.to_thread(check_stored, name, body.chunks())
            except (StoreError, IntegrityError) as error:
                failure = IntegrityError(error.fact, hint=error.hint)  # its own trouble is not the receiver's
                continue
            try:
                await self._copy_key(header.key, other, outlet)
                await outlet.deliver(Parcel(header, body, digest))
            finally:
                body.close()
            return
        raise failure

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
