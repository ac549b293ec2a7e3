"""One destination as a shipper sees it: it takes objects, only if absent, and remembers what it is owed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from handlers.verbatim import Parcel, create
from pipeline.catalog import REPOSITORY
from pipeline.contracts import Abilities, Body, Store
from pipeline.errors import ObjectConflict, ObjectMissing, RepositoryGone

__all__ = ["Backlog", "Outlet", "Parcel", "copy_order", "emptied"]  # whoever has to do with an outlet gives it parcels


@dataclass(slots=True)
class Backlog:
    """What a destination is being filled with, as listings told, less what is there since."""

    objects: int
    #: Bytes.
    size: int
    #: Names of those that nobody could give: some of them, if they are many.
    stuck: set[str] = field(default_factory=set)
    #: When it was last told, in monotonic seconds.
    told: float = 0.0

    def less(self, size: int) -> None:
        """One of them is there."""
        self.objects, self.size = max(0, self.objects - 1), max(0, self.size - size)


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
    #: Destinations that have nothing which it lacks, as their listings told, but for what could not be copied.
    compared: set[str] = field(default_factory=set)
    #: What others have and it lacks is being copied there: how much of it is left.
    backlog: Backlog | None = None
    #: Something was copied to it, or it was down: that it has caught up is news.
    late: bool = False
    #: Names of data keys that are known to be there.
    keys: set[str] = field(default_factory=set)
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
        self.late = True
        self.behind.set()

    def settle(self, name: str, error: Exception | None = None) -> None:
        """It is owed no more: it is there, or (``error``) nobody can give it."""
        if (owed := self.owed.pop(name, None)) is not None and not owed.done():
            if error is None:
                owed.set_result(None)
            else:
                owed.set_exception(error)
        if error is None and self.backlog is not None and name in self.backlog.stuck:
            self.backlog.stuck.discard(name)
            self.backlog.less(0)

    def lacks_parts_of(self, name: str) -> bool:
        """Whether ``name`` is the backup_info of a backup that is still incomplete here."""
        folder, _, last = name.rpartition("/")
        return last == "backup_info" and any(n.startswith(f"{folder}/") and n != name for n in self.owed)

    async def deliver(self, parcel: Parcel) -> None:
        """Create the object here. The same object being here already is success; other bytes are ObjectConflict."""
        async with self._preparing:
            if self.abilities is None:
                self.abilities = await self._prepare()
        await create(self.store, parcel)

    async def _prepare(self) -> Abilities:
        """Before the first object: does "only if absent" hold here, and is our data key here?

        Some stores ignore the condition without a word. And a key goes before all that is encrypted under it, or a
        crash would leave objects that nobody can read. RepositoryGone if there is no repository.
        """
        try:
            there = await self.store.get(REPOSITORY)
        except ObjectMissing:
            raise emptied(self.store) from None
        abilities = await self.store.probe(REPOSITORY, there)
        if self.key_object is not None:
            name, body = self.key_object
            with suppress(ObjectConflict):  # its id is random: what is there under that name is this very key
                await self.store.put(name, body)
            if self.confirm is not None:
                await self.confirm(self.store)
        return abilities


def emptied(store: Store) -> RepositoryGone:
    """What is to be said of a destination where the repository is gone."""
    return RepositoryGone(
        f"{store.name} has no {REPOSITORY}: it was emptied, or it is new, or something else is in its place",
        hint="nothing counts as stored there; after walship init what other destinations have is copied",
        passing=True,
    )


def copy_order(name: str) -> tuple[int, str]:
    """Keys first, so that nothing lies there unreadable; backup_info last, so that no backup is listed that is none."""
    if name.startswith("keys/"):
        return 0, name
    return (2 if name.endswith("/backup_info") else 1), name
