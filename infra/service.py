"""The service and its one-shot sibling: the spool, the dispatcher and the uploader, running together."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog

from handlers.base_backup import Cluster, take
from handlers.ship import Shipper
from infra import systemd
from infra.alongside import what_is_shipped
from infra.keys import KeyReplacedError
from infra.marked import marked
from infra.monitored import Monitor, monitored, monitoring
from infra.planning import contradictions
from infra.postgres.connect import connect
from infra.postgres.control import ServerFacts, read_facts
from infra.postgres.problems import problems
from infra.postgres.senders import read_stream_facts
from infra.postgres.stream_problems import stream_problems
from infra.records import backup_summary, recording
from infra.repository import find
from infra.safety import history_shipper, store_history, wal_safe
from infra.schedule import Scheduler
from infra.settings import Settings
from infra.sources.dropped import dropped_messages, dropped_wal, open_dropped
from infra.sources.spool import SpoolTakenError, holder
from infra.sources.watcher import SpoolWatcher
from infra.storage.lease import Lease, LeaseHeldError, refuse_if_written
from infra.storage.reported import forget_confirmed
from infra.storage.retry import SERVICE
from infra.streaming import Streaming, keep_clean
from infra.systemd import supervised
from infra.wiring import Shipping, Site, open_destinations, open_shipping, open_site
from pipeline.catalog import wal_key
from pipeline.confirmed import Told
from pipeline.contracts import Source
from pipeline.dispatcher import Dispatcher, Handle, endless, none_left
from pipeline.errors import ConfigError, IntegrityError, ObjectConflict, SourceError, StoreError, WalshipError, foreseen
from pipeline.events import Acknowledged, BackupReady, Event, Notice, SegmentReady
from pipeline.reconcile import Reconciler

log = structlog.get_logger()

#: Longest pause in seconds between attempts to open the repository at the start of the service.
LONGEST_PAUSE = 30.0

#: Seconds between looks at the server's timeline.
LOOK_AT_TIMELINE = 30.0

#: Seconds until our own stream is there to be seen.
SETTLED = 5.0


def spool_to_watch(settings: Settings) -> Path | None:
    """The folder to watch; None if the stream is the only source. ConfigError if it is needed and not set."""
    return spool_of(settings) if "watch" in settings.sources else None


def spool_of(settings: Settings) -> Path:
    """The folder that PostgreSQL archives into, or a ConfigError."""
    if settings.spool_dir is None and settings.sources == ("stream",):
        raise ConfigError(
            "WALSHIP_SOURCES is stream: there is no spool, and nothing in it to push",
            hint="`walship switch` ends the open segment and waits until it is stored, also without a service;"
            " `walship status` tells what is stored by now",
        )
    if settings.spool_dir is None:
        raise ConfigError(
            "WALSHIP_SPOOL_DIR is not set", hint="it is the folder that archive_library or archive_command writes into"
        )
    return settings.spool_dir


async def serve(settings: Settings, *, cluster: str = "") -> None:
    """Ship until cancelled. What can pass (a store that is away, a spool in other hands) is waited for, loudly."""
    spool = spool_to_watch(settings)
    async with open_destinations(settings) as destinations:
        names = {destination.name: destination.required for destination in destinations}
    async with monitoring(settings, names) as monitor, supervised():
        await _serve(settings, cluster, spool, monitor)


async def _serve(settings: Settings, cluster: str, spool: Path | None, monitor: Monitor | None) -> None:
    pause = 1.0
    while True:
        began = time.monotonic()
        try:
            chosen = cluster or await _cluster(settings)
            async with (
                open_site(
                    settings, cluster=chosen, writer=True, policy=SERVICE, timed=monitor.stage_done if monitor else None
                ) as site,
                open_shipping(site) as shipping,
                _holding_lease(site) as lease,
            ):
                scheduler = Scheduler(site)
                async with monitored(site, shipping, monitor, cluster=chosen, planned=scheduler.planned):
                    await _ship_for_ever(spool, site, shipping, lease, scheduler)
        except (WalshipError, BaseExceptionGroup) as caught:
            error = foreseen(caught)
            if error is None or not _can_pass(error):
                raise
            log.warning("waiting", error=error.fact, hint=error.hint, retry_in=pause)
            systemd.tell(STATUS=f"waiting: {error.fact}")
            if monitor is not None:
                monitor.waits(error)
        if time.monotonic() - began > LONGEST_PAUSE:
            pause = 1.0  # it ran for a while: a new trouble, not the old one
        await asyncio.sleep(pause)
        pause = min(LONGEST_PAUSE, pause * 2)


@asynccontextmanager
async def _holding_lease(site: Site) -> AsyncIterator[Lease]:
    """Nobody else ships this cluster meanwhile; the next writer need not wait when we are through."""
    what = what_is_shipped(site.settings)
    lease = await Lease.acquire(site.stores, clock=site.clock, tell=_tell_of_lease, server=what)
    try:
        yield lease
    finally:
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(5):
                await lease.release()


def _tell_of_lease(line: str) -> None:
    (log.warning if " cannot be " in line else log.info)("lease", said=line)


def _can_pass(error: WalshipError) -> bool:
    """Whether to wait rather than to end: what was not acknowledged stays in the spool, and in the slot, meanwhile.

    Told by the error alone: by the time it gets here, what it was about may be over. The spool is in other hands while
    a backup or a switch that found no service ships it; they give it back. So is the lease, until its holder ends.
    """
    if isinstance(error, StoreError) and not isinstance(error, ObjectConflict):
        return error.passing
    # The next attempt has a number of its own, or is told whose turn it is, or opens the new key.
    return isinstance(error, LeaseHeldError | ObjectConflict | KeyReplacedError | SpoolTakenError)


async def _cluster(settings: Settings) -> str:
    """Whose WAL is in the spool: empty where the destinations hold one cluster only, else what the server says."""
    async with open_destinations(settings, policy=SERVICE) as destinations:
        try:
            await find(destinations)
        except ConfigError as error:
            try:
                async with await connect(settings) as connection:
                    return (await read_facts(connection)).system_identifier
            except SourceError:
                raise error from None
    return ""


async def _ship_for_ever(
    spool: Path | None,
    site: Site,
    shipping: Shipping,
    lease: Lease | None = None,
    scheduler: Scheduler | None = None,
) -> None:
    """``lease`` and ``scheduler`` are None for a command, which ships for a while and makes no tails."""
    handle = _handler(site, shipping.service)
    sources: list[Source] = []
    watcher = stream = None
    if lease is not None:
        _let_tell(lease, site)
    else:
        await forget_confirmed(site.stores)
    if spool is not None:
        sources.append(watcher := _watcher(spool, site, once=False))
        if (other := holder(spool)) not in (None, os.getpid()):
            fact = f"the spool {spool} is shipped by process {other} already"
            raise SpoolTakenError(fact, hint="one service is enough: it goes on once that one has given it back")
    if "stream" in site.settings.sources:
        stream = Streaming(site, shipping, epoch=lease.epoch if lease else None)
        site.notify.append(stream.heard)
        handle = stream.shipping(handle)
        sources.append(stream.receiver)
    if len(sources) > 1:
        handle = Reconciler(
            handle,
            segment_size=site.facts.segment_size,
            fingerprint=site.keys.fingerprint,
            shipped=shipping.service.fingerprint,
            notify=site.notify,
        ).handle
    if stream is not None:
        handle = stream.around(handle)
    dispatcher = Dispatcher(handle, clock=site.clock, notify=site.notify, patience=endless)
    systemd.tell(STATUS=f"shipping cluster {site.facts.system_id}")
    log.info(
        "started",
        cluster=site.facts.system_id,
        sources=[source.name for source in sources],
        spool=str(spool) if spool else "",
        destinations=[s.name for s in site.stores],
        epoch=lease.epoch if lease else 0,
    )
    async with asyncio.TaskGroup() as group:
        group.create_task(shipping.uploader.run())
        if lease is not None:
            group.create_task(lease.run())
            group.create_task(keep_clean(site, shipping))
            group.create_task(shipping.uploader.watch())
        if scheduler is not None:
            group.create_task(scheduler.run())
        if watcher is not None:
            group.create_task(_keep_history(site, shipping.service))
        if stream is not None:
            group.create_task(stream.run())
        group.create_task(_tell_of_server(site, scheduled=scheduler is not None))
        try:
            await dispatcher.run(*sources)
        finally:
            log.info("stopped", waiting=watcher.waiting if watcher else 0)


def _let_tell(lease: Lease, site: Site) -> None:
    """From now on its heartbeats say up to where WAL was reported as safe."""
    told = Told(site.facts.segment_size)
    site.notify.append(told.heard)
    lease.confirmed = lambda: told.newest


async def ship_unless_taken(spool: Path | None, site: Site, shipping: Shipping) -> None:
    """Ship, but leave it to a service that has started in the meantime."""
    try:
        await _ship_for_ever(spool, site, shipping)
    except (SourceError, BaseExceptionGroup) as caught:
        if not isinstance(foreseen(caught), SpoolTakenError):
            raise


async def _tell_of_server(site: Site, *, scheduled: bool) -> None:
    """Shipping needs no word with the server; but a server that does not archive is nothing to be silent about.

    Nor is a job that is ``scheduled`` and can only fail.
    """
    streams = "stream" in site.settings.sources
    server: ServerFacts | None = None
    if streams:
        await site.clock.sleep(SETTLED)
    try:
        async with await connect(site.settings) as connection:
            server = await read_facts(connection)
            stream = await read_stream_facts(connection, site.settings.slot) if streams else None
    except SourceError as error:
        log.warning("server", error=error.fact, hint=error.hint)
    for wrong in contradictions(site.settings, server) if scheduled else ():
        log.warning("schedule", error=wrong.fact, hint=wrong.hint)
    if server is None:
        return
    if server.system_identifier != site.facts.system_id:
        log.warning("server", error=f"it is the cluster {server.system_identifier}, not {site.facts.system_id}")
    found = problems(server, site.settings) + (stream_problems(server, stream, site.settings) if stream else [])
    for problem in found:
        log.warning("server", error=problem.fact, hint=problem.hint)


async def _keep_history(site: Site, shipper: Shipper) -> None:
    """Once WAL of a new timeline is stored, have its history stored as well, archived or not.

    A server that was restored promotes before its archiving is switched on, and PostgreSQL archives that history never:
    without it, all that it writes from then on could not be reached.
    """
    while True:
        try:
            async with await connect(site.settings) as connection:
                server = await read_facts(connection)
            if server.system_identifier == site.facts.system_id:
                await store_history(site, shipper.ship, server.timeline)
        except (SourceError, StoreError, IntegrityError) as error:
            log.debug("no_history", error=error.fact)  # looked at again; what is wrong is told by whoever it stops
        await site.clock.sleep(LOOK_AT_TIMELINE)


async def push(settings: Settings, notify: Callable[[Notice], None], *, cluster: str = "") -> int:
    """Ship what is in the spool now; returns how many files were acknowledged, or raises the first failure."""
    spool = spool_of(settings)
    shipped = 0

    def count(notice: Notice) -> None:
        nonlocal shipped
        shipped += isinstance(notice, Acknowledged)
        notify(notice)

    chosen = cluster or await _cluster(settings)
    async with (
        open_site(settings, cluster=chosen, writer=True, notify=count) as site,
        open_shipping(site) as shipping,
    ):
        if holder(spool) is None:  # else the spool itself says who ships it
            await refuse_if_written(site.stores, clock=site.clock, tell=_tell_of_lease)
        watcher = _watcher(spool, site, once=True)
        dispatcher = Dispatcher(_handler(site, shipping.command), clock=site.clock, notify=count, patience=none_left)
        await dispatcher.run(watcher)
        for outlet in shipping.uploader.outlets:
            if outlet.owed:
                log.warning(
                    "owed", destination=outlet.name, objects=len(outlet.owed), hint="`walship run` copies them there"
                )
        if watcher.refused:
            raise SourceError(
                f"{len(watcher.refused)} files in {spool} were refused and are not shipped: {watcher.refused[0]}",
                hint="see the message about each above",
            )
    return shipped


def _watcher(spool: Path, site: Site, *, once: bool) -> SpoolWatcher:
    return SpoolWatcher(
        spool,
        system_id=site.facts.system_id,
        segment_size=site.facts.segment_size,
        clock=site.clock,
        notify=site.notify,
        once=once,
    )


def _handler(site: Site, shipper: Shipper) -> Handle:
    async def handle(source: Source, event: Event) -> asyncio.Future[None] | None:
        if not isinstance(event, BackupReady):
            try:
                return await shipper.carry(source, event)
            except ObjectConflict as conflict:
                # Only the archiver's: where a history of the stream is not the stored one, its WAL cannot be restored,
                # and nothing behind the fork may count as safe.
                if source.name != SpoolWatcher.name or isinstance(event, SegmentReady):
                    raise
                return await shipper.set_aside(source, event, conflict)
        await _take_dropped(site, shipper, Path(event.folder))
        return None

    return handle


async def _take_dropped(site: Site, shipper: Shipper, folder: Path) -> None:
    """Ship a ``pg_basebackup -Ft`` that lies in the spool, its WAL first, as a base backup like any other."""
    system_id, segment_size = site.facts.system_id, site.facts.segment_size
    try:
        backup = await asyncio.to_thread(open_dropped, folder, system_id=system_id, segment_size=segment_size)
    except SourceError as error:
        # It has been read whole, and stays as it is until somebody comes: not to be read again twice a minute.
        raise SourceError(error.fact, hint=error.hint, lasting=True) from None
    wal = dropped_wal(backup)
    while (file := await asyncio.to_thread(next, wal, None)) is not None:
        await shipper.ship(wal_key(file[0]), file[1])
    wait = wal_safe(
        site,
        lambda line: log.info("waiting_for_wal", backup=str(folder), said=line),
        ship_history=history_shipper(site.settings, shipper.ship),
    )
    # Before the parts: where the WAL never comes, they would be stored anew at each attempt.
    await wait(backup.start_lsn, backup.stop_lsn, backup.stop_timeline)
    major = backup.major or site.facts.server_major
    async with marked(site, shipper.ship, tell=lambda line: log.info("marks", said=line)) as ship:
        taken = await take(
            dropped_messages(backup),
            ship=ship,
            cluster=Cluster(system_id, major * 10000, segment_size),
            wal_safe=wait,
            clock=site.clock,
            label=backup.label,
        )
    # Failures are told, and tried again for hours: a record of each would bury the others.
    async with recording(site, "backup", ["dropped"], tell=lambda line: log.warning("record", error=line)) as entry:
        entry.summary |= backup_summary(taken)
    log.info("backup_taken", backup=taken.name, dropped=str(folder), bytes=taken.size)
