"""Copies to one destination what it lacks and another has: several objects at a time, verbatim, checked on the way.

``walship copy`` and the service, which fills new destinations and those that were away, both do it with this. It is
resumable because nothing is remembered: the next run compares the listings anew. What cannot be copied is told, and
everything else is; only a store that does not answer, or takes nothing, ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field

from handlers.difference import Lack, Phase, Strange, Wanted, phases  # copy in three files: what is lacking,
from handlers.verbatim import NoneServes, Parcel, bring, compare, take  # and how one object is brought
from pipeline.catalog import info_key
from pipeline.contracts import Store
from pipeline.errors import IntegrityError, ObjectConflict, ObjectMissing, StoreError, foreseen

#: Objects, and bytes of them, that are on their way at a time. One that is larger than all goes alone.
AT_ONCE, BYTES_AT_ONCE = 8, 64 << 20
#: So many objects that cannot be read, one after the other, and it is not the objects that are wrong.
MOST_REFUSALS = 10
#: Kinds of objects that may go while they are copied: expire removes them, and nobody misses the copy.
_PASSING = frozenset({"wal", "tail", "pin", "record", "conflict"})


@dataclass(frozen=True, slots=True)
class Trouble:
    """One object that was not copied."""

    name: str
    #: ``damaged`` or ``unreadable`` at every source, ``missing`` from all although a backup needs it,
    #: ``refused`` by the target, or ``conflict``: the target has other bytes, or a damaged object, under that name.
    kind: str
    fact: str


@dataclass(slots=True)
class Amount:
    """Of objects."""

    objects: int = 0
    size: int = 0

    def add(self, size: int) -> None:
        self.objects += 1
        self.size += size


@dataclass(slots=True)
class Copied:
    """What was done, or (by ``estimate``) would be."""

    #: kind of object (see ``Phase``) → how many.
    kinds: dict[str, Amount] = field(default_factory=dict)
    #: Backups that were lacking and are complete at the target now.
    backups: list[str] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    #: Backups that were not completed, and why.
    given_up: dict[str, str] = field(default_factory=dict)
    #: Objects that went at the source meanwhile.
    vanished: int = 0
    strange: Strange = field(default_factory=Strange)

    @property
    def total(self) -> Amount:
        return Amount(sum(k.objects for k in self.kinds.values()), sum(k.size for k in self.kinds.values()))

    def count(self, kind: str, size: int) -> None:
        self.kinds.setdefault(kind, Amount()).add(size)


@asynccontextmanager
async def not_held(_backup: str) -> AsyncIterator[str]:
    """Where nobody else deletes: see ``Means.hold``."""
    yield ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """How objects are copied; all of it may be left out."""

    #: Whose objects they must be; empty: not asked.
    system_id: str = ""
    #: Stores a parcel at the target.
    give: Callable[[Parcel], Awaitable[object]] | None = None
    #: Marks a backup as in use for as long as the block lasts, and says who is about to delete it; empty: nobody.
    hold: Callable[[str], AbstractAsyncContextManager[str]] = not_held
    #: Asked before each object, with its size: may wait, and may raise to end it all.
    before: Callable[[int], Awaitable[None]] | None = None
    #: Told of each object that was dealt with, and of the bytes that were copied: 0 if it was not.
    progress: Callable[[int], None] = lambda _size: None
    #: Told of each trouble at once.
    trouble: Callable[[Trouble], None] = lambda _trouble: None
    at_once: int = AT_ONCE
    bytes_at_once: int = BYTES_AT_ONCE


async def estimate(source: Store, target: Store, wanted: Wanted) -> Copied:
    """What the target lacks, by listings alone: nothing is read or written. StoreError."""
    found = Copied()
    async with aclosing(phases(source, target, wanted, found.strange)) as found_phases:
        async for phase in found_phases:
            async with aclosing(phase.lacking) as lacking:
                async for lack in lacking:
                    if lack.theirs is None:
                        found.count(phase.kind, lack.size)
                        if phase.kind == "backup":
                            found.backups.append(phase.backup)
    return found


async def copy(
    sources: Sequence[Store],
    target: Store,
    wanted: Wanted,
    means: Means,
    *,
    others: Sequence[Store] = (),
) -> Copied:
    """Copy what the target lacks of the sources. What one has damaged, the next and ``others`` are asked for.

    StoreError if a listing breaks, the target takes nothing any more, or no source answers: what was copied until then
    is there, and the next run goes on.
    """
    work = _Copy(target, means)
    for number, source in enumerate(sources):
        await work.all_of((source, *sources[:number], *sources[number + 1 :], *others), wanted)
    return work.done


class _Copy:
    def __init__(self, target: Store, means: Means) -> None:
        self._target = target
        self._means = means
        self.done = Copied()
        self._sources: Sequence[Store] = ()
        self._room = _Room(means.at_once, means.bytes_at_once)
        #: Of no use to try again from the next source.
        self._failed: set[str] = set()
        #: Backups that were marked as in use; and those that go at the source.
        self._held: set[str] = set()
        self._deleted: set[str] = set()
        self._refusals = 0
        self._keys: set[str] = set()

    async def all_of(self, sources: Sequence[Store], wanted: Wanted) -> None:
        self._sources = sources
        holding = ""
        async with (
            AsyncExitStack() as held,
            aclosing(phases(sources[0], self._target, wanted, self.done.strange)) as found,
        ):
            async for phase in found:
                if phase.backup != holding:
                    await held.aclose()
                    holding = phase.backup
                await self._phase(phase, held)

    async def _phase(self, phase: Phase, held: AsyncExitStack) -> None:
        """Several at a time; the first error that ends it all ends the others."""
        try:
            async with asyncio.TaskGroup() as group, aclosing(phase.lacking) as lacking:
                async for lack in lacking:
                    if await self._is_left_out(phase, lack, held):
                        continue
                    if self._means.before is not None:
                        await self._means.before(lack.size)
                    await self._room.take(lack.size)
                    group.create_task(self._one(phase, lack))
        except BaseExceptionGroup as caught:
            error = foreseen(caught)
            if error is None:
                raise
            raise error from None

    async def _is_left_out(self, phase: Phase, lack: Lack, held: AsyncExitStack) -> bool:
        if lack.name in self._failed or phase.backup in self._deleted:
            return True
        if phase.kind == "backup" and (phase.backup in self.done.given_up or not await self._is_whole(phase)):
            return True  # nobody may list what is not whole
        if phase.backup and phase.backup not in self._held:
            self._held.add(phase.backup)
            if who := await held.enter_async_context(self._means.hold(phase.backup)):
                self._give_up(phase.backup, f"it is being deleted by {who}")
                return True
        return False

    async def _is_whole(self, phase: Phase) -> bool:
        """Whether all parts are there still: to who cleans up at the target they were parts of no backup until now."""
        if phase.before is None:
            return True
        async with aclosing(phase.before()) as lacking:
            async for lack in lacking:
                if lack.theirs is None:
                    self.done.given_up[phase.backup] = f"{lack.name} went at the target while it was copied"
                    return False
        return True

    async def _one(self, phase: Phase, lack: Lack) -> None:
        copied = 0
        try:
            if lack.theirs is not None:
                await self._compare(lack)
            else:
                copied = await self._bring(phase, lack)
            self._refusals = 0
        except NoneServes as error:
            await self._not_served(phase, lack, error)
        except (ObjectConflict, IntegrityError) as error:  # the latter: the target has a damaged object of that name
            self._fail(phase, lack, "conflict", error.fact)
        except StoreError as error:
            self._refused(phase, lack, "refused", error)
        finally:
            await self._room.give_back(lack.size)
        self._means.progress(copied)

    async def _bring(self, phase: Phase, lack: Lack) -> int:
        means = self._means
        size = await bring(
            lack.name, self._sources, self._target, system_id=means.system_id, give=means.give, keys=self._keys
        )
        self.done.count(phase.kind, size)
        if phase.kind == "backup":
            self.done.backups.append(phase.backup)
        return size

    async def _compare(self, lack: Lack) -> None:
        """Both have it, with different sizes: another encoding of the same, or other bytes."""
        failures = []
        for source in self._sources:
            try:
                parcel = await take(source, lack.name, system_id=self._means.system_id)
            except (StoreError, IntegrityError) as error:
                failures.append(error)
                continue
            try:
                await compare(self._target, parcel)
            except ObjectMissing:
                return  # gone there since: copied the next time
            finally:
                parcel.body.close()
            return
        raise NoneServes(lack.name, failures)

    async def _not_served(self, phase: Phase, lack: Lack, error: NoneServes) -> None:
        if error.silent is not None:
            self._refused(phase, lack, "unreadable", error.silent)
        elif not error.missing:
            self._fail(phase, lack, "damaged", error.fact)
        elif phase.kind in _PASSING:
            self.done.vanished += 1
        elif phase.kind in ("part", "backup") and await self._is_deleted(phase.backup):
            self.done.vanished += 1
            self._give_up(phase.backup, "it was deleted at the source while it was copied")
        else:
            self._fail(phase, lack, "missing", error.fact)

    async def _is_deleted(self, backup: str) -> bool:
        """Its backup_info goes before all else of it."""
        for source in self._sources:
            try:
                await source.head(info_key(backup))
            except ObjectMissing:
                continue
            return False
        return True

    def _refused(self, phase: Phase, lack: Lack, kind: str, error: StoreError) -> None:
        """One object may be too large, or forbidden; several one after the other are the store's answer to all."""
        self._refusals += 1
        if error.passing or self._refusals >= MOST_REFUSALS:
            raise error
        self._fail(phase, lack, kind, error.fact)

    def _give_up(self, backup: str, why: str) -> None:
        self._deleted.add(backup)
        self.done.given_up[backup] = why

    def _fail(self, phase: Phase, lack: Lack, kind: str, fact: str) -> None:
        trouble = Trouble(lack.name, kind, fact)
        self._failed.add(lack.name)
        self.done.troubles.append(trouble)
        if phase.kind == "part":
            self.done.given_up.setdefault(phase.backup, f"{lack.name} could not be copied: {kind}")
        self._means.trouble(trouble)


class _Room:
    """So many objects, and bytes of them, at a time."""

    def __init__(self, objects: int, size: int) -> None:
        self._objects, self._size, self._most = objects, size, size
        self._changed = asyncio.Condition()

    async def take(self, size: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._objects > 0 and self._size >= min(size, self._most))
            self._objects -= 1
            self._size -= min(size, self._most)

    async def give_back(self, size: int) -> None:
        async with self._changed:
            self._objects += 1
            self._size += min(size, self._most)
            self._changed.notify_all()
