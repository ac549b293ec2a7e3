"""Deleting what retention lets go, so that whatever interrupts it, no backup is listed that cannot be restored.

    for each backup: its backup_info at every destination, then its parts there     (what builds on it went before)
    then the WAL that no backup needs that is still listed anywhere, the oldest first, then tails

A backup is deleted at all destinations or at none: where one refuses, the others get its backup_info back. What an
interruption leaves is parts that nobody lists, and WAL that nobody needs: both go the next time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import islice

from pipeline.catalog import info_key, is_piece, parse_wal_key, wal_key
from pipeline.contracts import Body, ObjectInfo, Store
from pipeline.errors import ObjectConflict, ObjectMissing, StoreError
from pipeline.runs import Gathering, Runs
from pipeline.tail import TailName
from pipeline.wal import WalFile, WalKind, segments_per_log
from pipeline.wal_needs import WalNeeds

#: Objects that are handed to ``Store.delete`` at a time.
BATCH = 1000
#: Backups in a row that a destination may refuse to delete until no others are tried.
_REFUSALS = 3

#: Says, for as long as the block lasts, that a backup is about to be deleted. Yields why it must not be; empty: it may.
Claim = Callable[[str], AbstractAsyncContextManager[str]]


@dataclass(slots=True)
class Freed:
    """What went at one destination."""

    objects: int = 0
    #: Bytes as stored.
    size: int = 0

    def add(self, infos: Sequence[ObjectInfo]) -> None:
        self.objects += len(infos)
        self.size += sum(info.size for info in infos)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a destination did not delete."""

    destination: str
    what: str
    fact: str


@dataclass(slots=True)
class WalGoing:
    """WAL and tails at one destination that no backup needs."""

    segment_size: int
    #: Timeline → numbers of finished segments.
    segments: dict[int, Runs] = field(default_factory=dict)
    #: ``.partial`` and ``.backup`` files: (segment number, timeline, name of the object).
    others: list[tuple[int, int, str]] = field(default_factory=list)
    tails: list[str] = field(default_factory=list)
    #: Bytes as stored; of WAL and of tails.
    wal_size: int = 0
    tails_size: int = 0

    @property
    def objects(self) -> int:
        return sum(map(len, self.segments.values())) + len(self.others) + len(self.tails)

    @property
    def size(self) -> int:
        """Bytes as stored, of all."""
        return self.wal_size + self.tails_size

    def ranges(self) -> Iterator[tuple[WalFile, WalFile, int]]:
        """First and last of consecutive segments, and how many they are."""
        for timeline, runs in sorted(self.segments.items()):
            for first, end in runs.ranges:
                yield self._file(timeline, first), self._file(timeline, end - 1), end - first

    def keys(self) -> Iterator[str]:
        """Names of the WAL objects, the oldest first whatever their timeline."""
        segments = (self._keys_of(timeline, runs) for timeline, runs in self.segments.items())
        return (key for _, _, key in heapq.merge(*segments, sorted(self.others)))

    def _keys_of(self, timeline: int, runs: Runs) -> Iterator[tuple[int, int, str]]:
        return ((number, timeline, wal_key(self._file(timeline, number))) for number in runs)

    def _file(self, timeline: int, number: int) -> WalFile:
        return WalFile.segment(timeline, number * self.segment_size, self.segment_size)


async def find_wal(store: Store, needs: WalNeeds, segment_size: int) -> WalGoing:
    """What may go at a destination. A million segments become a few ranges. Raises StoreError.

    Histories never go, nor what lies below ``wal/`` and ``tail/`` under other names than walship's.
    """
    going, gathered = WalGoing(segment_size), dict[int, Gathering]()
    per_log = segments_per_log(segment_size)
    async for entry in store.list("wal/"):
        file = parse_wal_key(entry.key)
        if file is None or file.kind is WalKind.HISTORY or file.seg >= per_log:
            continue
        number = file.log * per_log + file.seg
        if needs.needs(file.timeline, number):
            continue
        going.wal_size += entry.size
        if file.kind is WalKind.SEGMENT:
            gathered.setdefault(file.timeline, Gathering()).add(number)
        else:
            going.others.append((number, file.timeline, entry.key))
    going.segments = {timeline: numbers.runs() for timeline, numbers in gathered.items()}
    async for entry in store.list("tail/"):
        tail = TailName.parse(entry.key)
        if tail is None or tail.file.seg >= per_log:
            continue
        if not needs.needs(tail.file.timeline, tail.file.log * per_log + tail.file.seg):
            going.tails.append(entry.key)
            going.tails_size += entry.size
    return going


class Expirer:
    """Deletes at several destinations, and remembers what went and what was refused."""

    def __init__(
        self, stores: Sequence[Store], *, claim: Claim, tell: Callable[[str], None], progress: Callable[[int], None]
    ) -> None:
        """``progress`` is told of the bytes that went, at all destinations together."""
        self._stores = list(stores)
        self._claim = claim
        self._tell = tell
        self._progress = progress
        self._in_a_row = 0
        #: Destination → what went there.
        self.freed = {store.name: Freed() for store in stores}
        self.refusals: list[Refusal] = []

    async def backup(self, name: str) -> str:
        """Delete a backup; why it stays, or empty if it went. What cannot be deleted is in ``refusals``."""
        if self._in_a_row >= _REFUSALS:
            return f"{self.refusals[-1].destination} refuses deletions: no others were tried"
        try:
            async with self._claim(name) as reason:
                if reason:
                    return reason
                if refused := await self._unlist(name):
                    self._in_a_row += 1
                    return refused
                self._in_a_row = 0
                await self._pieces(name)
        except StoreError as error:
            # Whether somebody uses it cannot be asked, or be told: it is still listed everywhere.
            self.refusals.append(Refusal("", f"backup {name}", error.fact))
            self._in_a_row += 1
            return error.fact
        return ""

    async def unlisted(self, name: str) -> str:
        """Delete the parts of a backup that no destination lists; why they stay, or empty."""
        try:
            async with self._claim(name) as reason:
                if reason:
                    return reason
                for store in self._stores:
                    try:
                        await store.head(info_key(name))
                    except ObjectMissing:
                        continue
                    return f"it has been finished, and is listed at {store.name}"
                await self._pieces(name)
        except StoreError as error:
            self.refusals.append(Refusal("", f"the parts of {name}", error.fact))
            return error.fact
        return ""

    async def wal(self, store: Store, going: WalGoing) -> None:
        """Delete WAL at one destination, the oldest first, and then tails."""
        freed, keys, done = self.freed[store.name], going.keys(), 0
        for what, batches, size in (
            ("WAL", _batches(keys), going.wal_size),
            ("tails", _batches(going.tails), going.tails_size),
        ):
            count = going.objects - len(going.tails) if what == "WAL" else len(going.tails)
            for batch in batches:
                try:
                    await store.delete(batch)
                except StoreError as error:
                    self.refusals.append(Refusal(store.name, f"{what} from {batch[0]} on", error.fact))
                    return
                done += len(batch)
                share = size * len(batch) // count
                freed.objects += len(batch)
                freed.size += share
                self._progress(share)

    async def loose(self, keys: Sequence[str], what: str) -> None:
        """Delete small objects everywhere: old records, and pins that have ended."""
        for store in self._stores if keys else ():
            try:
                for batch in _batches(keys):
                    await store.delete(batch)
            except StoreError as error:
                self.refusals.append(Refusal(store.name, what, error.fact))

    async def _unlist(self, name: str) -> str:
        """Delete its backup_info at every destination; if one refuses, undo that, and say why it stays."""
        key, taken = info_key(name), list[tuple[Store, Body]]()
        try:
            for store in self._stores:
                try:
                    body = await store.get(key)
                except ObjectMissing:
                    continue
                try:
                    await store.delete([key])
                except StoreError as error:
                    self._refused_at(store, name, error)
                    taken.append((store, body))  # it may have done so, and its answer was lost
                    await self._put_back(key, taken)
                    return f"{store.name} refuses to delete it: {error.fact}"
                taken.append((store, body))
        except StoreError as error:
            self.refusals.append(Refusal("", f"backup {name}", error.fact))
            await self._put_back(key, taken)
            return error.fact
        else:
            for store, body in taken:
                self.freed[store.name].add([ObjectInfo(key, body.size)])
        finally:
            for _, body in taken:
                body.close()
        return ""

    def _refused_at(self, store: Store, name: str, error: StoreError) -> None:
        self.refusals.append(Refusal(store.name, f"backup {name}", error.fact))
        # Asked first from now on: then nothing has to be put back elsewhere.
        self._stores.sort(key=lambda each: each is not store)

    async def _put_back(self, key: str, taken: Iterable[tuple[Store, Body]]) -> None:
        for store, body in taken:
            try:
                await store.put(key, body)
            except ObjectConflict:
                continue
            except StoreError as error:
                self._tell(f"{key} may be gone at {store.name}, and could not be put back there: {error.fact}")

    async def _pieces(self, name: str) -> None:
        """All that belongs to a backup that is not listed. What walship has not put there stays."""
        for store in self._stores:
            try:
                # Listed to the end first: what is deleted under a listing may make it skip.
                pieces = [e async for e in store.list(f"base/{name}/") if is_piece(e.key, name)]
                for start in range(0, len(pieces), BATCH):
                    await self._delete(store, pieces[start : start + BATCH])
            except StoreError as error:
                self.refusals.append(Refusal(store.name, f"parts of {name}", error.fact))

    async def _delete(self, store: Store, infos: Sequence[ObjectInfo]) -> None:
        await store.delete([info.key for info in infos])
        self.freed[store.name].add(infos)
        self._progress(sum(info.size for info in infos))


def _batches(keys: Iterable[str]) -> Iterator[list[str]]:
    source = iter(keys)
    while batch := list(islice(source, BATCH)):
        yield batch
