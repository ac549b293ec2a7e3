"""Reads, again and again and in the background, what the metrics cannot be told by notices.

    Surroundings ── server over SQL, spool ──┐
                                             ├──> Metrics      as long as the service lives, and the repository is open
    Survey ──────── each destination ────────┘

Nothing here may stop the shipping: what does not answer in time is a reading that failed. Listings are slow and cost
money, so they are rare; what is stored meanwhile is told by notices.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import structlog

from handlers.fetch import Fetcher
from handlers.serve_wal import WalServer
from infra.done import VERBS, Done, last_done
from infra.holdings import Holding, Known, hold
from infra.monitoring.metrics import Metrics
from infra.monitoring.missing import Missing
from infra.monitoring.readings import BackupReading, RepositoryReading, ServerReading, SlotReading, SpoolReading
from infra.postgres.control import ServerFacts, read_facts
from infra.postgres.kept import Kept
from infra.postgres.senders import StreamFacts, read_stream_facts
from infra.reach import leads_to
from infra.settings import Settings
from infra.sources.spool import look_at_spool
from infra.wiring import Site
from pipeline.backup import BackupInfo
from pipeline.catalog import Catalog
from pipeline.contracts import Clock, Store
from pipeline.errors import IntegrityError, RecoveryError, SourceError, StoreError
from pipeline.events import Notice, OperationEnded
from pipeline.lineage import Lineage, WalPath
from pipeline.wal import Lsn, WalFile
from pipeline.walmarks import transactions
from pipeline.walrecords import Payload

log = structlog.get_logger()

#: Longest pause in seconds between looks at the server and at the spool.
SURROUNDINGS_EVERY = 15.0
#: Longest pause between listings of a destination that does not answer, has a hole, or has no base backup yet.
UNWELL_EVERY = 30.0
#: Seconds that the spool has for an answer; and a destination for all of its listing.
_PATIENCE, _LISTING = 10.0, 300.0
#: The last transaction is looked for in so many segments at most; and at every so manyth listing.
_SEGMENTS, _EACH = 8, 2
#: A backup whose parts have not grown for so many seconds is not being taken any more.
_ABANDONED = 3600.0


@asynccontextmanager
async def beside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Let them run during the ``async with`` block; a defect in one of them ends it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in work]
        yield
        for task in tasks:
            task.cancel()


class Surroundings:
    """The server and the spool. ``run`` until cancelled."""

    def __init__(self, settings: Settings, metrics: Metrics, *, kept: Kept, clock: Clock) -> None:
        self._settings = settings
        self._kept = kept
        self._metrics = metrics
        self._clock = clock
        self._spool = settings.spool_dir if "watch" in settings.sources else None
        #: A file system that hangs holds up one thread, and not one more at each look.
        self._look: asyncio.Future[SpoolReading] | None = None

    async def run(self) -> None:
        """Look every few seconds."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._again(self._read_server))
            if self._spool is not None:
                group.create_task(self._again(self._read_spool))

    async def _again(self, read: Callable[[], Awaitable[None]]) -> None:
        while True:
            await read()
            await self._clock.sleep(min(SURROUNDINGS_EVERY, self._settings.survey_interval))

    async def _read_server(self) -> None:
        try:
            async with self._kept.lent() as connection:
                facts = await read_facts(connection)
                streams = "stream" in self._settings.sources
                stream = await read_stream_facts(connection, self._settings.slot) if streams else None
        except SourceError:
            self._metrics.readings.failed("server")  # whoever needs the server tells why
            return
        free = await asyncio.to_thread(_wal_volume_free, facts)
        slot = _slot(stream) if stream is not None else None
        self._metrics.server_read(ServerReading(facts.wal_lsn, facts.archive_timeout, slot, free))

    async def _read_spool(self) -> None:
        assert self._spool is not None
        if self._look is None:
            self._look = asyncio.ensure_future(asyncio.to_thread(_look, self._spool, self._clock))
        try:
            async with asyncio.timeout(_PATIENCE):
                reading = await asyncio.shield(self._look)
        except TimeoutError:
            self._metrics.readings.failed("spool")
            return
        except SourceError:
            self._metrics.readings.failed("spool")
        else:
            self._metrics.spool_read(reading)
        self._look = None


def _look(spool: Path, clock: Clock) -> SpoolReading:
    state = look_at_spool(spool, clock.now())
    try:
        room = os.statvfs(spool)
    except OSError as error:
        raise SourceError(f"the spool {spool} cannot be read: {error.strerror}") from None
    volume = (room.f_blocks - room.f_bfree + room.f_bavail) * room.f_frsize  # as df counts: without root's reserve
    return SpoolReading(state.files, state.bytes, state.free_bytes, volume, state.oldest_seconds, state.refused)


def _slot(stream: StreamFacts) -> SlotReading:
    if stream.slot is None:
        return SlotReading(active=False, retained=None, safe=None)
    return SlotReading(stream.ours is not None, stream.slot.retained, stream.slot.safe_wal_size)


def _wal_volume_free(server: ServerFacts) -> int | None:
    """Free bytes where the server's WAL lies, if its data directory is on this machine and open to us.

    The control file begins with the system identifier: a directory of that name may be another server's.
    """
    if not server.data_directory:
        return None
    folder = Path(server.data_directory)
    try:
        with (folder / "global" / "pg_control").open("rb") as control:
            if int.from_bytes(control.read(8), sys.byteorder) != int(server.system_identifier):
                return None
        room = os.statvfs(folder / "pg_wal")
    except OSError:
        return None
    return room.f_bavail * room.f_frsize


class Survey:
    """What each destination holds. ``run`` until cancelled."""

    def __init__(
        self,
        site: Site,
        metrics: Metrics,
        *,
        listed: Callable[[Holding], None] = lambda _: None,
        done: Callable[[Mapping[str, Done]], None] = lambda _: None,
    ) -> None:
        """``listed`` is told of each listing, also of one that was not answered; ``done`` of what the records say."""
        self._site = site
        self._metrics = metrics
        self._listed = listed
        self._done = done
        #: A scheduled operation is over, and has left a record.
        self._ended = asyncio.Event()
        self._known: Known = {}
        #: destination → end of the WAL there, when the last transaction was looked for, and when that one ended.
        self._found: dict[str, tuple[Lsn, float | None]] = {}

    def heard(self, notice: Notice) -> None:
        """A listener of the pipeline."""
        if isinstance(notice, OperationEnded):
            self._ended.set()

    async def run(self) -> None:
        """List them now and then; each by itself, so that one that hangs holds up no other."""
        async with asyncio.TaskGroup() as group:
            for destination, store in zip(self._site.destinations, self._site.stores, strict=True):
                group.create_task(self._again(store, required=destination.required))
            group.create_task(self._read_records_for_ever())

    async def _again(self, store: Store, *, required: bool) -> None:
        looks = 0
        while True:
            well = await self._read(store, required=required, opens=looks % _EACH == 0)
            looks += 1
            interval = self._site.settings.survey_interval
            # Somebody mends it just now, and looks whether it is mended.
            await self._site.clock.sleep(interval if well else min(interval, UNWELL_EVERY))

    async def _read_records_for_ever(self) -> None:
        while True:
            self._ended.clear()
            await self._read_records()
            interval = asyncio.ensure_future(self._site.clock.sleep(self._site.settings.survey_interval))
            ended = asyncio.ensure_future(self._ended.wait())
            try:
                await asyncio.wait([interval, ended], return_when=asyncio.FIRST_COMPLETED)
            finally:
                interval.cancel()
                ended.cancel()

    async def _read_records(self) -> None:
        """When verify and drill last went well, and a backup went wrong."""
        readings = self._metrics.readings
        try:
            async with asyncio.timeout(_LISTING):
                found = await last_done(self._site)
        except (StoreError, TimeoutError):
            for verb in VERBS:
                readings.failed(verb)
            return
        for verb in VERBS:
            done = found[verb]
            success, failure = (moment.timestamp() if moment else 0.0 for moment in (done.success, done.failure))
            readings.operation_read(verb, success=success, failure=failure, **done.figures)
        if (failed := found["backup"].failure) is not None:
            self._metrics.backup_failed(failed.timestamp())
        self._done(found)

    async def _read(self, store: Store, *, required: bool, opens: bool) -> bool:
        """``opens``: read the end of the WAL as well, if there is more than at the last time.

        Returns whether all is well there: it answers, and what is stored there can be restored to its end.
        """
        site, readings, abandoned = self._site, self._metrics.readings, 0.0
        try:
            async with asyncio.timeout(_LISTING):
                await site.keys.refresh(store)  # what commands have stored lies under keys of theirs
                holding = await hold(store, site, self._known, required=required)
                abandoned = await _abandoned(store, holding.catalog, site.clock.now())
        except (StoreError, IntegrityError) as error:
            holding = _nothing(store, site, error.fact, required=required)
        except TimeoutError:
            holding = _nothing(store, site, f"it was not listed within {_LISTING:.0f} s", required=required)
        self._listed(holding)
        if holding.error:
            readings.failed("repository", store.name)
            return False
        reading = await asyncio.to_thread(repository_reading, holding)
        self._metrics.repository_read(store.name, replace(reading, abandoned=abandoned))
        if not site.keys.reads:  # no more can be read here
            return bool(holding.last_backup) and holding.reach(holding.catalog.newest_timeline).missing is None
        if opens or readings.is_up("last_commit", store.name) != 1:
            try:
                async with asyncio.timeout(_LISTING):
                    await self._read_last_commit(store, holding)
            except (StoreError, IntegrityError, RecoveryError, TimeoutError):
                readings.failed("last_commit", store.name)
        return holding.newest is not None and holding.reach(holding.catalog.newest_timeline).missing is None

    async def _read_last_commit(self, store: Store, holding: Holding) -> None:
        backup, timeline = holding.newest, holding.catalog.newest_timeline
        if backup is None:
            self._metrics.readings.last_commit_read(store.name, None)
            return
        if not leads_to(holding.catalog, timeline, backup):
            timeline = backup.timeline
        lineage = holding.catalog.lineage(timeline)
        path = holding.catalog.wal_path(lineage, backup.start_lsn)
        end, moment = self._found.get(store.name, (None, None))
        if end != path.end:
            moment = await self._last_moment(store, lineage, path, backup.stop_lsn)
            self._found[store.name] = path.end, moment
        self._metrics.readings.last_commit_read(store.name, moment)

    async def _last_moment(self, store: Store, lineage: Lineage, path: WalPath, begin: Lsn) -> float | None:
        """When the last transaction behind ``begin`` ended, by what is stored there and nowhere else."""
        fetch = Fetcher([store], self._site.chain, self._site.facts.system_id)
        server, size = WalServer(fetch, lineage), lineage.segment_size
        for file in islice(path.backwards(), _SEGMENTS):
            if file.end(size) <= begin:
                break
            content = await server.read(file.name)
            if content is not None:
                moment = await asyncio.to_thread(_last, bytes(content), file, size, begin, path.end)
                if moment is not None:
                    return moment
        return None


def _nothing(store: Store, site: Site, error: str, *, required: bool) -> Holding:
    return Holding(store.name, required, Catalog(site.facts.system_id, site.facts.segment_size), error=error)


def _last(content: bytes, file: WalFile, size: int, begin: Lsn, end: Lsn) -> float | None:
    """When the last transaction in a segment ended that lies between two positions; None if there is none."""
    payload = Payload(content, file.start(size))
    times = [t.time for t in transactions(payload) if t.committed and t.lsn >= begin and t.end <= end]
    return max(times).timestamp() if times else None


def repository_reading(holding: Holding) -> RepositoryReading:
    """What a listing means for the metrics. ``abandoned`` is not in it: it is 0."""
    catalog, newest = holding.catalog, holding.newest
    timeline = catalog.newest_timeline
    reach = holding.reach(timeline)
    missing: dict[int, Missing] = {}
    for hole in catalog.holes():
        first = hole.first.start(catalog.segment_size) // catalog.segment_size
        missing.setdefault(hole.first.timeline, Missing()).add(first, first + hole.count)
    if reach.missing is not None:
        first = reach.missing.start(catalog.segment_size) // catalog.segment_size
        missing.setdefault(reach.missing.timeline, Missing()).add(first, first + 1)
    return RepositoryReading(
        durable=reach.lsn,
        missing=missing,
        newest=_backup(newest) if newest else _sealed_backup(catalog),
        backups=len(catalog.backups) + len(catalog.sealed),
        first=next((b.stopped.timestamp() for b in catalog.backups if _consistent(catalog, b)), None),
        abandoned=0.0,
    )


def _backup(backup: BackupInfo) -> BackupReading:
    return BackupReading(
        stopped=backup.stopped.timestamp(),
        seconds=(backup.stopped - backup.started).total_seconds(),
        size=backup.stored_size,
        start=backup.start_lsn // backup.segment_size,
    )


def _sealed_backup(catalog: Catalog) -> BackupReading | None:
    """What the names tell a host that only writes: when the newest was complete. None if there is none."""
    moments = [stored.timestamp() for stored in catalog.sealed.values() if stored is not None]
    return BackupReading(max(moments), math.nan, math.nan, 0) if moments else None


def _consistent(catalog: Catalog, backup: BackupInfo) -> bool:
    """Whether the WAL that it needs to be restored at all is there."""
    try:
        return catalog.wal_path(catalog.lineage(backup.timeline), backup.start_lsn).end >= backup.stop_lsn
    except RecoveryError:
        return False


async def _abandoned(store: Store, catalog: Catalog, now: datetime) -> float:
    """When the newest of the backups that have parts and no backup_info was last written to; 0 if that is just now."""
    whole = {backup.name for backup in catalog.backups} | set(catalog.sealed)
    folders = [entry.key async for entry in store.list("base/", shallow=True)]
    begun = sorted(folder for folder in folders if folder.removeprefix("base/").rstrip("/") not in whole)
    if not begun or (whole and begun[-1].removeprefix("base/").rstrip("/") < max(whole)):
        return 0.0
    moments = [entry.modified.timestamp() async for entry in store.list(begun[-1]) if entry.modified is not None]
    last = max(moments, default=0.0)
    return last if now.timestamp() - last > _ABANDONED else 0.0
