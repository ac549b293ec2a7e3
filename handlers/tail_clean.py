"""Takes tails away at one destination: those that are folded, and those of segments whose finished object is there.

Our own go as soon as the finished segment of the bytes that they were cut from is stored. What somebody else has left
(an earlier process, another writer) is compared first: where two servers wrote a segment, one of them has the finished
name, and the commits that the other one acknowledged are in its tails and nowhere else.

What cannot be deleted is told once and stays: shipping never waits for it, and it harms no restore, which looks at
tails only where there is no finished segment, and joins what overlaps. What failed in passing, or was not answered, is
taken by ``LeftOvers`` within the hour: deletes that hang must not take the connections that tails need.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field

from handlers.outlet import Outlet
from pipeline.catalog import wal_key
from pipeline.contracts import Buffer, Fetch, ObjectInfo
from pipeline.errors import IntegrityError, ObjectMissing, StoreError
from pipeline.events import DeleteRefused, Notice, SourcesDiffer, TailsRemoved
from pipeline.tail import HASH_SIZE, TailName, tail_folder
from pipeline.wal import WalFile, WalKind

#: Tails that are deleted at once, and how often that. Less than a destination has connections: the others are for tails
#: that commits wait for, which stood still for most of a second when 256 deletes at once took them all.
WIDTH, MOST_UNDER_WAY = 4, 2

#: Segments and folds that may wait for their turn; what comes on top is left to ``LeftOvers``.
MOST_WAITING = 64

#: Seconds in which a look, a listing and a delete have to be answered. A healthy store takes a small part of one.
ANSWER_WITHIN = 10.0

#: Seconds in which nothing is removed after one that was not.
REST = 60.0


class TailCleaner:
    """Deletes tails at one destination, at its own pace. Raises no StoreError. Times are those of the event loop."""

    def __init__(self, outlet: Outlet, *, notify: Callable[[Notice], None]) -> None:
        self._outlet = outlet
        self._notify = notify
        self._turns = asyncio.Semaphore(MOST_UNDER_WAY)
        self._waiting = 0
        self._resting_until = 0.0
        #: Keys whose delete was sent and not answered: they may go at any moment, or stay.
        self.unanswered: set[str] = set()

    async def delete(self, keys: Collection[str]) -> bool:
        """Delete these; returns whether they are gone. A refusal is told once, until a delete succeeds.

        So is that no answer comes, after ``ANSWER_WITHIN`` seconds; then nothing is tried for ``REST`` seconds.
        """
        return await self._in_turn(lambda: self._delete(sorted(keys)))

    async def remove(self, file: WalFile, epoch: int) -> None:
        """Delete the tails of our ``epoch``, if the finished segment is seen here.

        For whoever knows that its bytes are those that the tails were cut from: they are not compared.
        """
        await self._in_turn(lambda: self._remove(file, epoch))

    async def _in_turn(self, work: Callable[[], Awaitable[bool]]) -> bool:
        """Do it as soon as few enough are under way. False, and left undone, if that would take too long."""
        if self._waiting >= MOST_WAITING:
            return False
        self._waiting += 1
        try:
            async with self._turns:
                return asyncio.get_running_loop().time() >= self._resting_until and await work()
        finally:
            self._waiting -= 1

    async def _delete(self, waiting: list[str]) -> bool:
        while waiting:
            some = waiting[:WIDTH]
            self.unanswered.update(some)
            try:
                async with asyncio.timeout(ANSWER_WITHIN):
                    await self._outlet.store.delete(some)
            except TimeoutError:
                self._rest()
                if not self._outlet.down:
                    self._tell(
                        f"a delete of tails that are no longer needed has not been answered for {ANSWER_WITHIN:g} s",
                        "nothing waits for it, and restores are not harmed; but small objects stay, and more of them,"
                        " until the destination answers deletes again: look at what it does with them",
                    )
                return False
            except StoreError as error:
                if not error.passing:
                    self.unanswered.difference_update(some)
                    self._tell(
                        f"tails that are no longer needed cannot be deleted: {error.fact}",
                        "restores are not harmed, but one small object stays for each interval in which the WAL moved:"
                        " allow s3:DeleteObject under tail/. Let no lifecycle rule expire current objects there, they"
                        " may be all that is stored of a segment; docs/durability.md says what tails cost then",
                    )
                return False
            self.unanswered.difference_update(some)
            self._outlet.keeps_all = False
            del waiting[:WIDTH]
        return True

    async def _remove(self, file: WalFile, epoch: int) -> bool:
        store = self._outlet.store
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                await store.head(wal_key(file))
                names = [name async for info in store.list(tail_folder(file)) if (name := TailName.parse(info.key))]
        except StoreError:
            return False  # absent after all, or it does not answer now: left to ``LeftOvers``
        except TimeoutError:
            self._rest()
            return False
        keys = sorted(name.key for name in names if name.epoch == epoch)
        gone = await self._delete(list(keys))
        if keys and gone:
            self._notify(TailsRemoved(self._outlet.name, len(keys)))
        return gone

    def _rest(self) -> None:
        self._resting_until = asyncio.get_running_loop().time() + REST

    def _tell(self, fact: str, hint: str) -> None:
        if not self._outlet.keeps_all:
            self._outlet.keeps_all = True
            self._notify(DeleteRefused(self._outlet.name, fact, hint))


@dataclass(slots=True)
class LeftOvers:
    """Tails of finished segments at one destination that a crash, an outage or another writer has left.

    ``clean`` is for the start and once an hour. ``fetch`` must read at this destination alone.
    """

    outlet: Outlet
    fetch: Fetch
    notify: Callable[[Notice], None]
    #: Segments whose tails have to stay, which is told, and the finished object that they were compared with.
    _kept: dict[WalFile, ObjectInfo] = field(default_factory=dict)
    #: What may go and could not be deleted yet, and the finished object that holds all of it.
    _covered: dict[WalFile, tuple[ObjectInfo, list[str]]] = field(default_factory=dict)

    async def clean(self) -> int:
        """Delete what the finished segment beside it holds as well; returns how many.

        Tails of unfinished segments (the open one, an old timeline's last) stay. If a single tail of a segment has
        other bytes than the finished one, all of them stay (it may need the others to be joined), and that is told
        once. Raises StoreError when the destination cannot be asked.
        """
        cleaner, gone = TailCleaner(self.outlet, notify=self.notify), 0
        for file in await self._finished():
            keys = await self._deletable(file)
            if not keys:
                continue
            if not await cleaner.delete(keys):
                break  # the others neither; what was read is remembered, for where deletes are refused it all stays
            del self._covered[file]
            self.notify(TailsRemoved(self.outlet.name, len(keys)))
            gone += len(keys)
        return gone

    async def _finished(self) -> list[WalFile]:
        """Segments that have a folder of tails, and are finished here."""
        store = self.outlet.store
        folders = [info.key.split("/")[1] async for info in store.list("tail/", shallow=True) if info.key[-1] == "/"]
        files = {file for file in map(WalFile.parse, folders) if file and file.kind is WalKind.SEGMENT}
        # One listing per 16 hex digits, not a question per segment: where deletes are refused there may be very many.
        finished: set[str] = set()
        for shared in sorted({file.name[:16] for file in files}):
            finished |= {info.key async for info in store.list(f"wal/{shared}/")}
        return sorted(file for file in files if wal_key(file) in finished)

    async def _deletable(self, file: WalFile) -> list[str]:
        """Keys of the tails of a segment that is finished here; none if they have to stay."""
        store = self.outlet.store
        try:
            info = await store.head(wal_key(file))
        except ObjectMissing:
            return []
        if self._kept.get(file) == info:
            return []
        if file in self._covered and self._covered[file][0] == info:
            return self._covered[file][1]
        names = [name async for each in store.list(tail_folder(file)) if (name := TailName.parse(each.key))]
        try:
            differing = await self._differing(file, names)
        except IntegrityError as error:
            self._keep(file, info, f"cannot be compared with the finished segment: {error.fact}")
            return []
        if differing is not None:
            said = f"hold other bytes than the finished segment there, which begins to differ in {differing.key}"
            self._keep(file, info, f"{said}: commits that another server acknowledged may be in them, and nowhere else")
            return []
        keys = [name.key for name in names]
        self._covered[file] = info, keys
        return keys

    async def _differing(self, file: WalFile, names: list[TailName]) -> TailName | None:
        """The first tail that is not a part of the finished segment."""
        if not names:
            return None
        whole = (await self.fetch(wal_key(file))).plain
        hasher, hashed = hashlib.sha256(), 0
        for name in sorted(names, key=lambda each: each.start):
            try:
                plain = (await self.fetch(name.key, most=HASH_SIZE + name.end - name.start)).plain
            except ObjectMissing:
                continue  # whoever stored it has removed it
            await asyncio.to_thread(hasher.update, memoryview(whole)[hashed : name.start])
            hashed = name.start
            if not _is_part(name, plain, hasher.digest(), whole):
                return name
        return None

    def _keep(self, file: WalFile, info: ObjectInfo, fact: str) -> None:
        self._kept[file] = info
        self.notify(
            SourcesDiffer(
                f"the tails of segment {file} at {self.outlet.name} {fact}",
                "they stay as they are. A restore takes the finished segment: find out which server wrote what, and to"
                f" restore from the tails instead, move {wal_key(file)} away from every destination",
            )
        )


def _is_part(name: TailName, plain: Buffer, before: bytes, whole: Buffer) -> bool:
    """Whether a tail's plaintext is what the segment would give for its name; ``before``: hash up to its start."""
    with memoryview(plain) as tail, memoryview(whole) as segment:
        return tail[:HASH_SIZE] == before and tail[HASH_SIZE:] == segment[name.start : name.end]
