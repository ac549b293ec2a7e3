"""What the destinations hold, for whoever decides what may go: from listings, and the small objects that they name."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from handlers.fetch import Fetcher
from infra.reach import with_claimed_tails
from infra.repository import read_facts
from infra.storage.in_use import Marks
from infra.wiring import Site
from pipeline import pins
from pipeline.backup import BackupInfo
from pipeline.catalog import (
    REPOSITORY,
    backup_of,
    checked_info,
    index_key,
    info_key,
    is_piece,
    manifest_key,
    part_key,
    wal_key,
)
from pipeline.contracts import Fetch, ObjectInfo, Store
from pipeline.errors import IntegrityError, ObjectMissing, Sealed, StoreError, foreseen
from pipeline.listing import Listing
from pipeline.pins import Pin
from pipeline.retention import Holdings
from pipeline.tail import TailName
from pipeline.wal import parse_history

#: Most bytes that the description of a backup may have, and a history file.
_MOST_INFO, _MOST_HISTORY = 256 << 20, 1 << 20
#: Characters of a segment's name; a history's is shorter. And how each begins.
_SEGMENT_NAME = 24
_TIMELINE = re.compile(r"[0-9A-F]{8}")
#: Small objects that are read at a time.
_AT_ONCE = 16


@dataclass(slots=True)
class Look:
    """What was seen."""

    held: Holdings
    #: The destinations that answered.
    stores: tuple[Store, ...]
    #: Destination → why it was not asked, where that is allowed.
    away: dict[str, StoreError]
    #: Folders of backups that no destination lists, and that nobody uses: left by what was interrupted.
    leftovers: tuple[str, ...]
    #: Backup → its archives with the number of parts, the number of index objects, whether there is a manifest.
    pieces: dict[str, tuple[tuple[tuple[str, int], ...], int, bool]] = field(default_factory=dict)
    #: Destination → folders of backups there.
    folders: dict[str, frozenset[str]] = field(default_factory=dict)
    #: Pinned backups that no destination lists any more.
    idle_pins: tuple[str, ...] = ()

    async def incomplete(self, name: str) -> str:
        """Why a backup is not whole, from a listing of its parts at all destinations; empty if all are somewhere."""
        archives, index, manifest = self.pieces[name]
        wanted = {part_key(name, archive, n) for archive, count in archives for n in range(1, count + 1)}
        wanted |= {index_key(name, n) for n in range(1, index + 1)} | ({manifest_key(name)} if manifest else set())
        for store in self.stores:
            async for entry in store.list(f"base/{name}/"):
                if is_piece(entry.key, name):
                    wanted.discard(entry.key)
            if not wanted:
                return ""
        return f"{min(wanted)} is missing everywhere, and {len(wanted) - 1} other objects of it" if wanted else ""


async def look(site: Site, marks: Marks, *, skip: bool, settle: bool) -> Look:
    """List and read what is needed. ``skip``: a destination that does not answer is left out, else StoreError.

    ``settle``: wait until it is certain who of those that use a backup is alive, a minute at most.
    """
    await _refuse_strange(site)
    away: dict[str, StoreError] = {}
    listed: list[tuple[Store, _Listed]] = []
    answers = await asyncio.gather(
        *(_list(store, site.facts.system_id) for store in site.stores), return_exceptions=True
    )
    for store, answer in zip(site.stores, answers, strict=True):
        if isinstance(answer, StoreError):
            away[store.name] = answer
        elif isinstance(answer, BaseException):
            raise answer
        else:
            listed.append((store, answer))
    if not listed or (away and not skip):
        error = next(iter(away.values()))
        raise StoreError(
            f"{', '.join(away)} cannot be listed, so nothing is deleted anywhere: {error.fact}",
            hint="what is pinned or used there is not known, and a backup goes at every destination or at none; if the"
            " destination stays away, --skip-unreachable leaves it as it is",
        )
    answering = tuple(store for store, _ in listed)
    # In this order: who takes a backup marks it before its first part, and lists it before the mark goes.
    marks.only(answering)
    await (marks.settle() if settle else marks.look())
    fetch = Fetcher(answering, site.chain, site.facts.system_id, refresh=lambda: site.keys.refresh_from(answering))
    found = _Found(fetch)
    listing = Listing(site.facts.system_id)
    for _, each in listed:
        listing.merge(each.wal)
    names = frozenset[str]().union(*(each.folders for _, each in listed))
    await _few(names, found.info)
    _refuse_other_segments(site, found.infos.values())
    await _few(listing.history_files, lambda file: _history(fetch, listing, wal_key(file), file.timeline, file.name))
    for info in found.infos.values():
        listing.add_backup(info)
    catalog = with_claimed_tails(
        listing.catalog(site.facts.segment_size), {tail for _, each in listed for tail in each.tails}
    )
    # Also those whose chain is broken: they go by the same rules.
    backups = sorted(found.infos.values(), key=lambda b: (b.stopped, b.stop_lsn, b.name))
    pinned, unreadable_pins = await _pins(site, listed)
    used = marks.backups
    held = Holdings(
        replace(catalog, backups=tuple(backups)),
        pins=pinned,
        unreadable_pins=unreadable_pins,
        in_use={name: marks.word(name) for name in sorted(used & found.infos.keys())},
        unreadable=tuple(sorted(found.unreadable)),
        being_taken=bool(used - found.infos.keys()),
        taking=used - found.infos.keys(),
        stored=_newest(each.stored for _, each in listed),
    )
    gone = names - found.infos.keys() - found.unreadable - used
    left = [
        name for name in sorted(gone) if not away and await _any_piece(answering, name)
    ]  # who is away may list them
    return Look(
        held,
        answering,
        away,
        tuple(left),
        found.pieces,
        {store.name: each.folders for store, each in listed},
        () if away else tuple(sorted({*pinned, *unreadable_pins} - names)),
    )


async def _refuse_strange(site: Site) -> None:
    """Nothing is deleted while any destination is of another format, or says of itself what makes no sense.

    Others are passed over where something is only read. Here all of them are changed. Raises IntegrityError.
    """
    for destination in site.destinations:
        with suppress(StoreError):  # it does not answer, which is found out behind this; or the file is lost
            await read_facts(destination.root, site.facts.system_id)


def _refuse_other_segments(site: Site, backups: Iterable[BackupInfo]) -> None:
    """Which segment is whose follows from their size, and anybody may have written what repository.json says of it."""
    for backup in backups:
        if backup.segment_size != site.facts.segment_size:
            raise IntegrityError(
                f"{REPOSITORY} says that segments have {site.facts.segment_size} bytes, and those of {backup.name} have"
                f" {backup.segment_size}: nothing is deleted",
                hint=f"compare {REPOSITORY} of each destination, and put back the right one; backups are authenticated,"
                " that file is not",
            )


@dataclass(frozen=True, slots=True)
class _Listed:
    """The names at one destination."""

    wal: Listing
    tails: Collection[TailName]
    folders: frozenset[str]
    pins: frozenset[str]
    #: Timeline → when the newest of its WAL and tails was stored.
    stored: Mapping[int, datetime]


async def _list(store: Store, system_id: str) -> _Listed:
    # Tails first: a segment that is finished meanwhile is seen in one of the two listings.
    tails, stored = list[TailName](), dict[str, datetime]()
    async for entry in store.list("tail/"):
        if tail := TailName.parse(entry.key):
            tails.append(tail)
            _later(stored, tail.file.name, entry)
    wal = Listing(system_id)
    async for entry in store.list("wal/"):
        wal.add(entry.key)
        _later(stored, entry.key.rpartition("/")[2], entry)
    below = [entry.key async for entry in store.list("base/", shallow=True)]
    pinned = [pins.pinned(entry.key) async for entry in store.list(pins.FOLDER)]
    names = (key.removeprefix("base/").removesuffix("/") for key in below if key.endswith("/"))
    folders = frozenset(name for name in names if backup_of(info_key(name)))
    return _Listed(
        wal,
        tails,
        folders,
        frozenset(name for name in pinned if name),
        {int(timeline, 16): at for timeline, at in stored.items() if _TIMELINE.fullmatch(timeline)},
    )


def _later(stored: dict[str, datetime], name: str, entry: ObjectInfo) -> None:
    """Note when a segment, or what belongs to one, was stored; a million of them are looked at."""
    if entry.modified is not None and len(name) >= _SEGMENT_NAME:
        known = stored.get(name[:8])
        if known is None or entry.modified > known:
            stored[name[:8]] = entry.modified


def _newest(each: Iterable[Mapping[int, datetime]]) -> dict[int, datetime]:
    found: dict[int, datetime] = {}
    for stored in each:
        for timeline, at in stored.items():
            found[timeline] = max(at, found.get(timeline, at))
    return found


async def _any_piece(stores: Sequence[Store], name: str) -> bool:
    """Whether anything is in the folder of a backup that walship has put there: folders may be shown empty."""
    for store in stores:
        async for entry in store.list(f"base/{name}/"):
            if is_piece(entry.key, name):
                return True
    return False


async def _few(names: Collection[Any], do: Callable[[Any], Awaitable[None]]) -> None:
    """Each of them, a few at a time. Raises the first error."""
    few = asyncio.Semaphore(_AT_ONCE)

    async def one(name: Any) -> None:
        async with few:
            await do(name)

    try:
        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(one(name))
    except BaseExceptionGroup as caught:
        error = foreseen(caught)
        if error is None:
            raise
        raise error from None


class _Found:
    """The descriptions of backups."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        #: Without the digests of their parts, which may be a hundred thousand.
        self.infos: dict[str, BackupInfo] = {}
        self.unreadable: set[str] = set()
        self.pieces: dict[str, tuple[tuple[tuple[str, int], ...], int, bool]] = {}

    async def info(self, name: str) -> None:
        key = info_key(name)
        try:
            fetched = await self._fetch(key, backup=None, most=_MOST_INFO)
            info = checked_info(key, name, fetched.plain)
        except ObjectMissing:
            return  # being taken, never finished, or left by an expire that was interrupted
        except Sealed:
            raise  # nothing is wrong with it: this host cannot decide what goes
        except IntegrityError:
            self.unreadable.add(name)
            return
        archives = tuple((archive.name, len(archive.parts)) for archive in info.archives)
        self.pieces[name] = archives, len(info.index), bool(info.manifest)
        slim = tuple(replace(archive, parts=()) for archive in info.archives)
        self.infos[name] = replace(info, archives=slim, index=())


async def _history(fetch: Fetch, listing: Listing, key: str, timeline: int, name: str) -> None:
    try:
        fetched = await fetch(key, most=_MOST_HISTORY)
        listing.add_history(timeline, parse_history(name, bytes(fetched.plain)))
    except Sealed:
        raise
    except IntegrityError as error:
        listing.unreadable_history(timeline, error.fact)


async def _pins(site: Site, listed: Sequence[tuple[Store, _Listed]]) -> tuple[dict[str, list[Pin]], set[str]]:
    """The pins of all destinations: one at any of them counts. And the backups whose pin cannot be read."""
    found: dict[str, list[Pin]] = {}
    unreadable: set[str] = set()

    async def one(place: tuple[Store, str]) -> None:
        store, name = place
        try:
            pin = await read_pin(site, store, name)
        except IntegrityError:
            unreadable.add(name)
        else:
            if pin is not None and pin not in found.setdefault(name, []):
                found[name].append(pin)

    await _few([(store, name) for store, each in listed for name in each.pins], one)
    return found, unreadable


async def read_pin(site: Site, store: Store, backup: str) -> Pin | None:
    """The pin of a backup at one destination. Raises StoreError, and IntegrityError for one that cannot be read."""
    key = pins.pin_key(backup)
    fetch = Fetcher([store], site.chain, site.facts.system_id, refresh=lambda: site.keys.refresh_from(site.stores))
    try:
        fetched = await fetch(key, most=pins.MOST)
    except ObjectMissing:
        return None
    return Pin.decode(key, fetched.plain)
