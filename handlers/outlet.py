"""One destination as a shipper sees it: it takes objects, only if absent, and remembers what it is owed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from handlers.checksum import check_stored
from pipeline.catalog import REPOSITORY
from pipeline.contracts import Abilities, Body, Store
from pipeline.errors import IntegrityError, ObjectConflict
from pipeline.objects import Header


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
    #: Called once that is stored here, before anything is encrypted under it: does it count? Raises ConfigError if not.
    confirm: Callable[[Store], Awaitable[None]] | None = None
    #: It failed, and has not taken anything since.
    down: bool = False
    #: Objects that are safe elsewhere and not here: name → resolved once it is here as well.
    owed: dict[str, asyncio.Future[None]] = field(default_factory=dict)
    #: Set while it is down or owed anything.
    behind: asyncio.Event = field(default_factory=asyncio.Event)
    #: How often it was taken for down: what comes back may be another disk, or an emptied bucket.
    outages: int = 0
    #: It lets go of nothing, and that was told.
    keeps_all: bool = False
    #: When it was last told that it is still away, in monotonic seconds.
    told: float = float("-inf")
    #: What others have and it lacks is known, and owed to it.
    compared: bool = False
    #: What the store was found to be able to do; None until the first object is delivered.
    abilities: Abilities | None = None
    _preparing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        return self.store.name

    def owe(self, name: str) -> None:
        """Remember that the object is missing here and is to be copied from elsewhere."""
        if name not in self.owed:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody has to wait for it
            self.owed[name] = future
        self.behind.set()

    def lacks_parts_of(self, name: str) -> bool:
        """Whether ``name`` is the backup_info of a backup that is still incomplete here."""
        folder, _, last = name.rpartition("/")
        return last == "backup_info" and any(n.startswith(f"{folder}/") and n != name for n in self.owed)

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
            if self.confirm is not None:
                await self.confirm(self.store)
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
            " archive_mode=off, or a destination of its own. Nothing was overwritten",
            ours=mine.fingerprint,
            theirs=header.fingerprint,
        )
