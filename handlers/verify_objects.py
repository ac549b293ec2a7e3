"""One object at one destination: known to be good from an earlier run, or read back and judged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from handlers.checksum import Trailing, check_stored  # a leaf: plain bytes in, verdict out
from handlers.to_the_end import in_thread
from handlers.verify_report import Fault
from pipeline.backup import BackupInfo
from pipeline.catalog import index_key, info_key, manifest_key, part_key
from pipeline.chain import Chain, Expected
from pipeline.contracts import Body, ObjectInfo, Store
from pipeline.errors import IntegrityError, ObjectMissing, StoreError
from pipeline.objects import Header
from pipeline.verified import Memory

#: Told of objects and bytes that were read, and of objects that need not be.
Progress = Callable[[int, int, int], None]
#: Waits until so many bytes may be read.
Pace = Callable[[int], Awaitable[None]]


class Differs(IntegrityError):  # noqa: N818  what was found, as ObjectMissing is
    """It is whole, and not the object that belongs there: nobody knows by itself which of the two is right."""


class _OpenError(IntegrityError):
    """Its stored bytes are whole, and it does not open. ``key``: id of the data key that it names."""

    def __init__(self, error: IntegrityError, key: str) -> None:
        super().__init__(error.fact, hint=error.hint)
        self.key = key


@dataclass(frozen=True, slots=True)
class Wanted:
    """An object, and what has to be true of it."""

    name: str
    #: SHA-256 trailer that it must have, as hex; empty for any.
    digest: str = ""
    #: Id of the backup it must belong to, None for unknown.
    backup: str | None = ""
    #: Nobody needs it: that it was deleted since it was listed is no fault.
    spare: bool = False


@dataclass(slots=True)
class Place:
    """A destination, and what is remembered of it."""

    store: Store
    memory: Memory

    @property
    def name(self) -> str:
        return self.store.name


@dataclass(slots=True)
class Tally:
    """What was found so far."""

    objects: int = 0
    size: int = 0
    trusted: int = 0
    compared: int = 0
    faults: list[Fault] = field(default_factory=list)
    #: (destination, name) → what was to be true of an object that is at fault.
    wanted: dict[tuple[str, str], Wanted] = field(default_factory=dict)
    #: Names of objects of backups that are good somewhere.
    good: set[str] = field(default_factory=set)
    #: Objects below ``keys/`` that are whole: name → destination → trailer.
    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    #: Tails that are damaged and not needed, for something else has their bytes; they can be mended all the same.
    spare: list[Fault] = field(default_factory=list)
    #: Backup → how its files differ from its manifest.
    differs: dict[str, str] = field(default_factory=dict)

    def fault(self, place: Place, wanted: Wanted, kind: str, fact: str) -> None:
        self.faults.append(Fault(place.name, wanted.name, kind, fact))
        self.wanted[place.name, wanted.name] = wanted


@dataclass(frozen=True, slots=True)
class Judged:
    """An object that is as it should be."""

    header: Header
    #: SHA-256 trailer, as hex.
    digest: str
    plain: bytearray | None


def objects_of(info: BackupInfo) -> list[Wanted]:
    """Every object that a complete backup consists of, its parts in their order; backup_info is the first."""
    wanted = [Wanted(info_key(info.name), "", info.id)]
    wanted += [
        Wanted(part_key(info.name, archive.name, number), digest, info.id)
        for archive in info.archives
        for number, digest in enumerate(archive.parts, 1)
    ]
    wanted += [Wanted(index_key(info.name, number), digest, info.id) for number, digest in enumerate(info.index, 1)]
    if info.manifest:
        wanted.append(Wanted(manifest_key(info.name), info.manifest, info.id))
    return wanted


class Inspector:
    """Reads objects back, several at once, and keeps the tally. ``chain`` None: stored bytes alone."""

    def __init__(
        self,
        system_id: str,
        chain: Chain | None,
        *,
        width: int,
        pace: Pace,
        progress: Progress,
        refresh: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """``width``: objects that are read at the same time. ``refresh``: see ``handlers.fetch.Fetcher``."""
        self.system_id = system_id
        self.chain = chain
        self.width = width
        self.tally = Tally()
        self.pace = pace
        self._progress = progress
        self._refresh = refresh
        #: Ids of data keys that were looked for, and do not open what names them.
        self._closed: set[str] = set()

    @asynccontextmanager
    async def crew(self) -> AsyncIterator[Callable[[Awaitable[object]], Awaitable[None]]]:
        """Yields what begins a piece of work, and waits while ``width`` are under way. All are done at the end."""
        gate = asyncio.Semaphore(self.width)

        async def run(work: Awaitable[object]) -> None:
            try:
                await work
            finally:
                gate.release()

        async with asyncio.TaskGroup() as group:

            async def begin(work: Awaitable[object]) -> None:
                await gate.acquire()
                group.create_task(run(work))

            yield begin

    async def listing(self, place: Place, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Objects below ``prefix``. It ends early where the destination fails, and that is noted: see ``answers``."""
        try:
            async for entry in place.store.list(prefix):
                if not entry.key.endswith("/"):
                    yield entry
        except StoreError as error:
            self.tally.fault(place, Wanted(prefix), "unreadable", error.fact)

    def answers(self, place: Place, prefix: str) -> bool:
        """Whether the listing went to its end."""
        return (place.name, prefix) not in self.tally.wanted

    def trusts(self, place: Place, wanted: Wanted, info: ObjectInfo | None) -> bool:
        """Whether the object need not be read: it is counted then."""
        if info is None or not place.memory.knows(info, decoded=self.chain is not None):
            return False
        self.tally.trusted += 1
        self._good(wanted)
        self.told()
        return True

    async def read(
        self, place: Place, wanted: Wanted, info: ObjectInfo | None, *, keep: bool = False
    ) -> bytearray | None:
        """Read it and judge it. Its plaintext, if it is good and to be kept."""
        tally = self.tally
        try:
            await self.pace(info.size if info else 0)
            judged, size = await self.judge(place.store, wanted, keep=keep)
        except ObjectMissing as error:
            if wanted.spare:
                return None
            tally.fault(place, wanted, "missing", error.fact)
        except StoreError as error:
            tally.fault(place, wanted, "unreadable", error.fact)
        except Differs as error:
            tally.fault(place, wanted, "conflict", error.fact)
        except IntegrityError as error:
            tally.fault(place, wanted, "damaged", error.fact)
        else:
            self.count(size)
            self.learn(place, wanted, judged, info)
            return judged.plain
        if info is not None:
            place.memory.drop(info)
        self.count(0)
        return None

    def learn(self, place: Place, wanted: Wanted, judged: Judged, info: ObjectInfo | None) -> None:
        """It is good, as far as it was looked at."""
        self._good(wanted)
        if wanted.name.startswith("keys/"):
            self.tally.keys.setdefault(wanted.name, {})[place.name] = judged.digest
        elif info is not None:
            place.memory.add(info, decoded=self.chain is not None)
        if judged.header.key:
            place.memory.keys.setdefault(judged.header.key, wanted.name)

    async def judge(self, store: Store, wanted: Wanted, *, keep: bool = False) -> tuple[Judged, int]:
        """The object, if it is what it should be, and its size. Raises StoreError, IntegrityError, Differs."""
        body = await store.get(wanted.name)
        try:
            return await self.judge_body(body, wanted, keep=keep), body.size
        finally:
            body.close()

    async def judge_body(self, body: Body, wanted: Wanted, *, keep: bool = False) -> Judged:
        """The same of a body that is at hand. Raises IntegrityError, Differs."""
        work = partial(_judge, body, wanted, self.system_id, self.chain, keep)
        try:
            return await in_thread(work)
        except _OpenError as error:
            # A service that has started since writes under a key that was not known when we began.
            if self._refresh is None or error.key in self._closed:
                raise
            if not await self._refresh():
                self._closed.add(error.key)
                raise
        return await in_thread(work)

    def count(self, size: int) -> None:
        """An object was read."""
        self.tally.objects += 1
        self.tally.size += size
        self.told()

    def told(self) -> None:
        self._progress(self.tally.objects, self.tally.size, self.tally.trusted)

    def _good(self, wanted: Wanted) -> None:
        if wanted.name.startswith("base/"):
            self.tally.good.add(wanted.name)


def _judge(body: Body, wanted: Wanted, system_id: str, chain: Chain | None, keep: bool) -> Judged:  # noqa: FBT001
    """Runs in a thread."""
    if chain is None or wanted.name.startswith("keys/"):  # those were opened before anything else
        header, digest = check_stored(wanted.name, body.chunks())
        _compare(wanted, header, digest, system_id)
        return Judged(header, digest, None)
    end = Trailing(body.chunks())
    try:
        header, plain = chain.decode(Expected(wanted.name, system_id, wanted.backup), end)
    except IntegrityError as error:
        # Whether the stored bytes are whole is the better sentence, and decides what may be done about it.
        header, digest = check_stored(wanted.name, body.chunks())
        _compare(wanted, header, digest, system_id)
        raise _OpenError(error, header.key) from None
    digest = end.trailer.hex()
    _compare(wanted, header, digest, system_id)
    return Judged(header, digest, plain if keep else None)


def _compare(wanted: Wanted, header: Header, digest: str, system_id: str) -> None:
    """What is whole has to be what belongs there as well."""
    if header.system_id != system_id:
        raise Differs(f"{wanted.name} belongs to the cluster {header.system_id}, not to {system_id}")
    if wanted.backup is not None and header.backup != wanted.backup:
        raise Differs(f"{wanted.name} belongs to the base backup {header.backup or '(none)'}")
    if wanted.digest and digest != wanted.digest:
        raise Differs(f"{wanted.name} is not the one that its backup_info lists")
