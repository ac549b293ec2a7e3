"""What each destination holds, by a listing of it: names, and the descriptions of its backups and timelines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from handlers.fetch import Fetcher
from infra.reach import Reach, leads_to, unbroken, with_claimed_tails
from infra.repository import refuse_emptied
from infra.wiring import Site
from pipeline.backup import BackupInfo
from pipeline.catalog import Catalog, backup_of, checked_info, info_key, wal_key
from pipeline.contracts import Fetch, Store
from pipeline.errors import IntegrityError, ObjectMissing, Sealed, StoreError
from pipeline.listing import Listing
from pipeline.runs import Runs
from pipeline.tail import TailName
from pipeline.wal import parse_history

#: Most bytes that the description of a backup may have, and a history file.
_MOST_INFO, _MOST_HISTORY = 256 << 20, 1 << 20
#: Descriptions that are read at a time.
_AT_ONCE = 8

#: (destination, backup) → its description, without the digests of its parts: it never changes once it is there.
Known = dict[tuple[str, str], BackupInfo]


@dataclass(frozen=True, slots=True)
class Holding:
    """One destination, as it was listed."""

    name: str
    required: bool
    #: Open segments reach as far as the names of their tails say.
    catalog: Catalog
    #: Empty if it answered, and is a repository.
    error: str = ""
    #: What to do about that; may be empty.
    hint: str = ""

    @property
    def newest(self) -> BackupInfo | None:
        """The newest complete backup there, of those that can be read here."""
        return self.catalog.backups[-1] if self.catalog.backups else None

    @property
    def last_backup(self) -> str:
        """Name of the newest complete backup, whether it can be read here or not; empty if there is none."""
        names = [*self.catalog.sealed, *(backup.name for backup in self.catalog.backups)]
        return self.newest.name if self.newest and not self.catalog.sealed else max(names, default="")

    def timeline(self, servers: int | None) -> int:
        """The server's timeline if anything of it is there, else the newest that is."""
        return servers if servers in self.catalog.timelines and servers is not None else self.catalog.newest_timeline

    def reach(self, timeline: int) -> Reach:
        """Up to where it has the WAL of a timeline without a hole."""
        return unbroken(self.catalog, timeline, self.newest)

    def problems(self, timeline: int) -> tuple[str, ...]:
        """What is wrong there, one sentence each."""
        if self.newest is None or leads_to(self.catalog, timeline, self.newest):
            return self.catalog.problems
        lost = f"no base backup leads to timeline {timeline}, where the WAL is now: take one (`walship backup`)"
        return (*self.catalog.problems, lost)


async def hold(store: Store, site: Site, known: Known, *, required: bool) -> Holding:
    """List one destination. ``known`` is what was read before, and gets what is read now."""
    listing = Listing(site.facts.system_id)
    fetch = Fetcher([store], site.chain, site.facts.system_id)
    try:
        # Tails first: a segment that is finished meanwhile is seen in one of the two listings.
        tails = [tail async for entry in store.list("tail/") if (tail := TailName.parse(entry.key))]
        async for entry in store.list("wal/"):
            listing.add(entry.key)
        folders = [entry.key async for entry in store.list("base/", shallow=True)]
        # A folder proves nothing: a backup is there when its backup_info is.
        names = (folder.removeprefix("base/").rstrip("/") for folder in folders)
        await _describe([name for name in names if backup_of(info_key(name))], store, fetch, listing, known)
        await _read_histories(fetch, listing)
        await refuse_emptied([store])  # last: what is said of a bucket that is gone, a listing says better
    except StoreError as error:
        empty = Catalog(site.facts.system_id, site.facts.segment_size)
        return Holding(store.name, required, empty, error=error.fact, hint=error.hint)
    return Holding(store.name, required, with_claimed_tails(listing.catalog(site.facts.segment_size), tails))


def together(holdings: Sequence[Holding]) -> Catalog:
    """What at least one destination has: what a restore can use. There has to be one."""
    catalogs = [each.catalog for each in holdings]
    backups = {backup.name: backup for catalog in catalogs for backup in catalog.backups}
    timelines = {timeline for catalog in catalogs for timeline in catalog.segments}
    tails: dict[int, dict[int, int]] = {}
    for catalog in catalogs:
        for timeline, reaches in catalog.tails.items():
            for number, reach in reaches.items():
                there = tails.setdefault(timeline, {})
                there[number] = max(reach, there.get(number, 0))
    segments = {t: _union(catalog.segments.get(t, Runs()) for catalog in catalogs) for t in timelines}
    histories = {timeline: forks for catalog in catalogs for timeline, forks in catalog.histories.items()}
    unreadable = {timeline: fact for catalog in catalogs for timeline, fact in catalog.unreadable.items()}
    return replace(
        catalogs[0],
        backups=tuple(sorted(backups.values(), key=lambda b: (b.stopped, b.stop_lsn, b.name))),
        segments=segments,
        tails={
            timeline: {n: reach for n, reach in reaches.items() if n not in segments.get(timeline, Runs())}
            for timeline, reaches in tails.items()
        },
        histories=histories,
        sealed={name: stored for catalog in catalogs for name, stored in catalog.sealed.items()},
        unreadable={timeline: fact for timeline, fact in unreadable.items() if timeline not in histories},
    )


def _union(several: Iterable[Runs]) -> Runs:
    different = set(several)
    return different.pop() if len(different) == 1 else Runs.of(number for runs in different for number in runs)


async def _describe(names: Sequence[str], store: Store, fetch: Fetch, listing: Listing, known: Known) -> None:
    few = asyncio.Semaphore(_AT_ONCE)

    async def one(name: str) -> BackupInfo | StoreError | IntegrityError | datetime | None:
        async with few:
            try:
                return await _description(name, store, fetch, known)
            except Sealed:
                return (await _stored_at(store, info_key(name))) or datetime.fromtimestamp(0, UTC)
            except (StoreError, IntegrityError) as error:
                return error

    async with asyncio.TaskGroup() as group:
        tasks = {name: group.create_task(one(name)) for name in names}
    for name, task in tasks.items():
        found = task.result()
        if isinstance(found, StoreError):
            raise found
        if isinstance(found, datetime):
            listing.add_sealed(name, found)
        elif isinstance(found, IntegrityError):
            listing.problem(f"backup {name} cannot be used: {found.fact}")
        elif found is not None:
            listing.add_backup(found)
    for key in [key for key in known if key[0] == store.name and key[1] not in tasks]:
        del known[key]


async def _stored_at(store: Store, key: str) -> datetime | None:
    """When an object was stored, by the store's clock; None if it does not tell."""
    try:
        return (await store.head(key)).modified
    except StoreError:
        return None


async def _description(name: str, store: Store, fetch: Fetch, known: Known) -> BackupInfo | None:
    """None if there is none: the backup is being taken, was never finished, or is being removed."""
    key, place = info_key(name), (store.name, name)
    try:
        if place in known:
            await store.head(key)
            return known[place]
        fetched = await fetch(key, backup=None, most=_MOST_INFO)
    except ObjectMissing:
        known.pop(place, None)
        return None
    info = checked_info(key, name, fetched.plain)
    if info.id != fetched.header.backup:
        raise IntegrityError(f"{key} says another backup id than its header does")
    archives = tuple(replace(archive, parts=()) for archive in info.archives)
    known[place] = slim = replace(info, archives=archives, index=())
    return slim


async def _read_histories(fetch: Fetch, listing: Listing) -> None:
    for file in sorted(listing.history_files):
        try:
            fetched = await fetch(wal_key(file), most=_MOST_HISTORY)
            listing.add_history(file.timeline, parse_history(file.name, bytes(fetched.plain)))
        except Sealed:
            listing.add_history(file.timeline, ())  # by itself, then
        except IntegrityError as error:
            listing.unreadable_history(file.timeline, error.fact)
