"""Marks on backups that are in use: taken, restored, rehearsed, copied, or built upon. What has one is not deleted.

    use/<backup>/<8 hex digits>            content: see ``heartbeat``
    use/<backup>/<8 hex digits>.going      the same, of who is about to delete it, until all of it is deleted

Whoever uses a backup writes its mark anew all the time, at every destination that lets it, and removes it at the end. A
mark counts until somebody has seen it unchanged for one time to live on its own monotonic clock: no age and no wall
clock is asked. Then whoever made it is gone, and the mark is removed *before* anything else is: a process that was only
suspended finds it missing, and ``Use.check`` tells it that its backup was given up.

Two that look at the same moment: a user writes its mark and then looks for ``.going``; who deletes writes that and then
looks for marks. So at least one of them sees the other, and gives way.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from handlers.body import joined
from infra.storage.heartbeat import MOST, Heartbeat, Holder
from pipeline.contracts import Clock, Store
from pipeline.errors import ObjectMissing, ReadOnly, SourceError, StoreError

FOLDER = "use/"
#: Seconds after which a mark that does not change is of somebody who is gone.
TTL = 60.0
#: Seconds that a destination has for each question about a mark: it must hold up neither a restore nor a backup.
ANSWER = 5.0
#: Looks at a mark, and beats of its holder, within the time to live.
_LOOKS, _BEATS = 10, 4

_KEY = re.compile(r"use/(?P<backup>[A-Za-z0-9_.-]{1,200})/[0-9a-f]{8}(?P<going>\.going)?")


class Use:
    """Marks of this process, on one backup or several. See ``using``."""

    def __init__(self, stores: Sequence[Store], *, clock: Clock, tell: Callable[[str], None], what: str) -> None:
        self._clock = clock
        self._tell = tell
        self._holder = Holder.here(clock.now(), what)
        self._number = secrets.token_hex(4)
        self._counter = 0
        #: Those that may still take marks.
        self._stores = list(stores)
        #: (destination, backup) of the marks that are there; and of those that somebody has removed.
        self._written: set[tuple[str, str]] = set()
        self._lost: set[tuple[str, str]] = set()
        #: Destinations that did not take their marks when they were asked last, and backups that none took at first.
        self._silent: set[str] = set()
        self._unmarked: set[str] = set()
        self._backups: list[str] = []
        self._told: set[str] = set()
        self._over = False
        #: The marks are being removed.
        self._ending = False
        self._beating: asyncio.Future[None] | None = None

    async def add(self, backup: str) -> None:
        """Mark a backup: before anything of it is stored or read."""
        self._backups.append(backup)
        await self._at_all(self._stores, [backup], self._write)
        if not any(marked == backup for _, marked in self._written):
            self._unmarked.add(backup)

    async def check(self) -> bool:
        """Raise SourceError if a mark was removed: we were suspended so long that others took us for gone.

        What we had stored may be deleted since. To be asked before it is declared complete. False: that is not certain,
        for a destination could not be asked, or none took the mark at first.
        """
        await self._at_all(self._stores, self._backups, self._beat)
        if self._lost:
            where, backup = min(self._lost)
            raise SourceError(
                f"{backup} was given up at {where}: its mark there was removed, for nothing was heard of this process"
                " for a minute or longer",
                hint="the machine was suspended, or the store did not answer for so long: take the backup again",
            )
        return not (self._silent or self._unmarked)

    async def going(self, backup: str, *, ttl: float = TTL) -> str:
        """Who is deleting the backup, in words; empty if nobody is. Waits up to ``ttl`` to see whether they live."""
        marks = Marks(self._stores, clock=self._clock, ttl=ttl)
        with contextlib.suppress(StoreError):  # who cannot be asked cannot delete there either
            await marks.settle([backup], going=True)  # our own is there too, and others who use it are welcome
        return marks.word(backup, going=True)

    def let_go(self) -> None:
        """The backups are not needed any more, although the block goes on: the marks go with the next beat."""
        self._over = True

    async def run(self) -> None:
        """Write them anew until cancelled, or let go."""
        while not self._over:
            await self._clock.sleep(TTL / _BEATS)
            self._beating = asyncio.ensure_future(self._at_all(self._stores, self._backups, self._beat))
            await asyncio.shield(self._beating)
        await self.end()

    async def end(self) -> None:
        """Remove them, as far as that goes: what stays is removed by others, one time to live later."""
        self._ending = True
        # What is being written now would be there again behind our deletion.
        if self._beating is not None:
            await asyncio.wait([self._beating])

        async def remove(store: Store, backup: str) -> None:
            if (store.name, backup) in self._written:
                await store.delete([self._key(backup)])
                self._written.discard((store.name, backup))

        await self._at_all(self._stores, self._backups, remove)

    def _key(self, backup: str) -> str:
        return f"{FOLDER}{backup}/{self._number}"

    async def _at_all(self, stores: Sequence[Store], backups: Sequence[str], do: _Do) -> None:
        await asyncio.gather(*(self._at(store, backups, do) for store in list(stores)))

    async def _at(self, store: Store, backups: Sequence[str], do: _Do) -> None:
        try:
            for backup in list(backups):
                async with asyncio.timeout(ANSWER):
                    await do(store, backup)
            self._silent.discard(store.name)
        except ReadOnly:
            self._stores.remove(store)  # the past, from which nobody deletes
        except StoreError as error:
            self._silent.add(store.name)
            if not error.passing and not any(name == store.name for name, _ in self._written):
                self._stores.remove(store)  # it lets us read and not write: asked once
            self._say(store, error.fact)
        except TimeoutError:
            self._silent.add(store.name)
            self._say(store, f"it has not answered in {ANSWER:.0f} s")

    def _say(self, store: Store, fact: str) -> None:
        if store.name not in self._told:
            self._told.add(store.name)
            what = (
                "keeps the mark that the backup is in use, which counts for a minute more"
                if self._ending
                else "takes no mark that the backup is in use; do not expire it meanwhile"
            )
            self._tell(f"{store.name} {what}: {fact}")

    async def _write(self, store: Store, backup: str) -> None:
        self._counter += 1
        heartbeat = Heartbeat.of(self._holder, self._counter, self._clock.now())
        await store.put(self._key(backup), heartbeat.encode(), replace=True)
        self._written.add((store.name, backup))

    async def _beat(self, store: Store, backup: str) -> None:
        if (store.name, backup) in self._written:
            try:
                await store.head(self._key(backup))
            except ObjectMissing:
                self._lost.add((store.name, backup))
        await self._write(store, backup)


_Do = Callable[[Store, str], Awaitable[None]]


@contextlib.asynccontextmanager
async def using(
    stores: Sequence[Store], *backups: str, clock: Clock, tell: Callable[[str], None], what: str
) -> AsyncIterator[Use]:
    """Mark the backups as in use for as long as the block lasts; others may be added in it.

    ``what`` says for people what is done with them. A destination that takes no marks (a restore often may only read)
    is told of once, and is no error. The stores are rooted at the cluster's folder.
    """
    use = Use(stores, clock=clock, tell=tell, what=what)
    beats = asyncio.create_task(use.run())
    try:
        for backup in backups:
            await use.add(backup)
        yield use
    finally:
        beats.cancel()
        await asyncio.wait([beats])
        await use.end()
        if not beats.cancelled():
            beats.result()  # a defect, if it ended by itself before it was let go


@dataclass(slots=True)
class _Seen:
    """A mark, as it was last seen at one destination."""

    store: Store
    key: str
    backup: str
    going: bool
    content: bytes
    #: Monotonic seconds: since when it is so, and when it was last looked at. And whether it was ever seen to change.
    since: float
    last: float
    moved: bool = False


class Marks:
    """The marks that others have made, looked at time and again. See the head of this file for what they mean."""

    def __init__(self, stores: Sequence[Store], *, clock: Clock, ttl: float = TTL) -> None:
        self._stores = tuple(stores)
        self._clock = clock
        self._ttl = ttl
        self._seen: dict[tuple[str, str], _Seen] = {}
        #: Our own ``.going``.
        self._ours: set[str] = set()

    def only(self, stores: Sequence[Store]) -> None:
        """Go on with these destinations alone: the others do not answer."""
        self._stores = tuple(stores)

    async def look(self, backup: str = "") -> None:
        """See how they are now: all, or those on one backup. Raises StoreError if a destination does not tell."""
        prefix = f"{FOLDER}{backup}/" if backup else FOLDER
        await asyncio.gather(*(self._look(store, prefix) for store in self._stores))

    async def _look(self, store: Store, prefix: str) -> None:
        keys = {entry.key async for entry in store.list(prefix)}
        # A mark that is replaced in the very moment may be missing from the listing of a folder: so those that were
        # there are asked for by name, and a listing that decides what is deleted is made twice.
        keys |= {key for name, key in self._seen if name == store.name and key.startswith(prefix)}
        if prefix != FOLDER:
            keys |= {entry.key async for entry in store.list(prefix)}
        for key in sorted(keys):
            match = _KEY.fullmatch(key)
            if match is None or key in self._ours:
                continue
            try:
                body = await store.get(key, (0, MOST))
            except ObjectMissing:  # removed since
                self._seen.pop((store.name, key), None)
                continue
            try:
                content = joined(body)
            finally:
                body.close()
            self._note(store, key, match, content)

    def _note(self, store: Store, key: str, match: re.Match[str], content: bytes) -> None:
        now = self._clock.monotonic()
        known = self._seen.get((store.name, key))
        if known is None:
            seen = _Seen(store, key, match["backup"], bool(match["going"]), content, now, now)
            self._seen[store.name, key] = seen
            return
        known.last = now
        if known.content != content:
            known.content, known.since, known.moved = content, now, True

    def word(self, backup: str, *, going: bool | None = None) -> str:
        """Who uses the backup, as far as is known, for people; empty if nobody does.

        ``going``: only marks of those who delete, or only the others'.
        """
        for seen in self._of(backup):
            if not self._dead(seen) and going in (None, seen.going):
                there = Heartbeat.decode(seen.content)
                return there.holder.words if there else f"somebody who cannot be told from {seen.key}"
        return ""

    @property
    def backups(self) -> frozenset[str]:
        """All that have a mark of somebody who is not known to be gone."""
        return frozenset(seen.backup for seen in self._seen.values() if not self._dead(seen))

    async def settle(self, backups: Collection[str] | None = None, *, going: bool | None = None) -> None:
        """Look until it is certain of each mark on them (None: on any) whether its maker lives; one ``ttl`` at most.

        ``going``: as in ``word``.
        """
        while True:
            for backup in [""] if backups is None else sorted(backups):
                await self.look(backup)
            wanted = [s for s in self._seen.values() if backups is None or s.backup in backups]
            wanted = [seen for seen in wanted if going in (None, seen.going)]
            if all(seen.moved or self._dead(seen) for seen in wanted):
                return
            await self._clock.sleep(self._ttl / _LOOKS)

    async def bury(self) -> None:
        """Remove the marks of those who are gone. Before what they have left is deleted: see the head of this file."""
        # Who writes one of his marks is alive, and may have been unable to write the others.
        alive = {seen.key for seen in self._seen.values() if not self._dead(seen)}
        for seen in [seen for seen in self._seen.values() if seen.key not in alive]:
            await seen.store.delete([seen.key])
            self._seen.pop((seen.store.name, seen.key), None)

    @contextlib.asynccontextmanager
    async def claim(self, backup: str, *, what: str) -> AsyncIterator[str]:
        """For as long as the block lasts, say that the backup is about to be deleted. Yields who uses it: then do not.

        Raises StoreError if any destination cannot be written, or be asked.
        """
        key = f"{FOLDER}{backup}/{secrets.token_hex(4)}.going"
        holder = Holder.here(self._clock.now(), what)
        self._ours.add(key)
        written: list[Store] = []
        beats: asyncio.Task[None] | None = None
        try:
            for store in self._stores:
                written.append(store)
                await store.put(key, Heartbeat.of(holder, 1, self._clock.now()).encode(), replace=True)
            await self.look(backup)
            beats = asyncio.create_task(self._go_on_saying(key, holder))
            yield self.word(backup)
        finally:
            if beats is not None:
                beats.cancel()
                await asyncio.wait([beats])  # what is being written now would be there again behind our deletion
            for store in written:
                with contextlib.suppress(StoreError):  # told by whoever deletes there next; dead after one time to live
                    await store.delete([key])

    async def _go_on_saying(self, key: str, holder: Holder) -> None:
        """A large backup takes longer to delete than a mark lives; until cancelled."""
        counter = 1
        while True:
            await self._clock.sleep(TTL / _BEATS)
            counter += 1
            heartbeat = Heartbeat.of(holder, counter, self._clock.now())
            await asyncio.gather(*(self._say_so(store, key, heartbeat) for store in self._stores))

    @staticmethod
    async def _say_so(store: Store, key: str, heartbeat: Heartbeat) -> None:
        with contextlib.suppress(StoreError, TimeoutError):  # told by whoever deletes there next
            async with asyncio.timeout(ANSWER):
                await store.put(key, heartbeat.encode(), replace=True)

    def _of(self, backup: str) -> list[_Seen]:
        return [seen for seen in self._seen.values() if seen.backup == backup]

    def _dead(self, seen: _Seen) -> bool:
        there = Heartbeat.decode(seen.content)
        ended = there is not None and (there.released or there.holder.ended())
        # By what was seen: time in which nobody looked proves nothing.
        return ended or seen.last - seen.since >= self._ttl
