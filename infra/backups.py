"""Base backups on command: the stream from PostgreSQL, shipped by this process, with the WAL it needs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from importlib import import_module
from threading import Thread

from handlers.base_backup import Cluster, Progress, WalSafe, take
from handlers.expire import Expirer
from handlers.fetch import read_catalog
from handlers.unfinished import clean_unfinished
from infra.alongside import alongside
from infra.marked import marked
from infra.pace import Pace
from infra.postgres import basebackup, local_copy
from infra.postgres.claim import claimed
from infra.postgres.connect import connect
from infra.postgres.control import ServerFacts, read_facts, switch_wal
from infra.postgres.damage import Damage
from infra.postgres.problems import problems, refuse
from infra.records import backup_summary, recording
from infra.safety import history_shipper, wal_safe
from infra.settings import Settings
from infra.storage.in_use import Marks
from infra.wiring import Site, open_shipping, open_site
from pipeline.backup import BackupInfo, BackupMessage
from pipeline.backup_chain import LONGEST, chain_of
from pipeline.catalog import manifest_key
from pipeline.contracts import Buffer
from pipeline.errors import IntegrityError, ObjectMissing, SourceError, StoreError, WalshipError, foreseen
from pipeline.wal import Lsn

#: Said where an incremental backup was asked for, and a full one is taken that it does not need.
_NO_NEXT = (
    "summarize_wal is off: the next incremental backup will be refused; in psql: ALTER SYSTEM SET summarize_wal = on;"
    " SELECT pg_reload_conf()"
)


async def look_at_server(settings: Settings) -> ServerFacts:
    """Connect, look, disconnect. Raises SourceError."""
    async with await connect(settings) as connection:
        return await read_facts(connection)


async def backup(
    settings: Settings,
    *,
    label: str,
    report: Callable[[Progress], None],
    tell: Callable[[str], None],
    incremental: bool = False,
    damaged: Callable[[Damage], None] = lambda _: None,
    arguments: Sequence[str] = (),
) -> BackupInfo:
    """Take a base backup of the server and return it once it, and all WAL it needs, is at every required destination.

    ``incremental``: only what changed since the newest one, if there is one; through the server in any case.
    ``damaged`` is told of pages whose checksum was wrong already; ``arguments`` are for the record of it.

    Refuses before it begins if the server cannot give what a backup needs, or gives one already. A service that runs
    meanwhile keeps its priority: this process is nicer than it. Without one, this process ships the spool as well.

    From the moment in which backup_info is stored it is a backup: what fails behind that, or is stopped, is told, and
    is no reason to call it failed.
    """
    os.nice(5)  # first: on Linux it is a thread's own, and those that it starts have it from then on
    if settings.data_dir is not None and not incremental:
        # numpy would start a thread for each further processor, to multiply matrices, and each spins for a while.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        # Page checksums need numpy, which takes a while to load: meanwhile the server is asked, and begins the backup.
        Thread(target=import_module, args=("numpy",)).start()
    server = await look_at_server(settings)
    refuse_unable(server, settings)
    if incremental:
        basebackup.refuse_too_old(server.major)
    source = settings.for_backups()
    if settings.backup_host:
        refuse_stranger(await look_at_server(source), server, settings.backup_host)
    taken: BackupInfo | None = None
    found: list[Damage] = []

    def hurt(damage: Damage) -> None:
        found.append(damage)
        damaged(damage)

    try:
        async with (
            open_site(settings, cluster=server.system_identifier, writer=True) as site,
            open_shipping(site) as shipping,
            claimed(source),
            alongside(site, shipping, tell),
            recording(site, "backup", arguments, tell=tell) as entry,
        ):
            if incremental:
                site.keys.need_reading("an incremental backup")
            marks = await _looked_at(site, tell)
            ship_history = history_shipper(settings, shipping.command.ship)
            wait = wal_safe(site, tell, ship_history=ship_history)
            parent = await _newest(site, tell) if incremental else None
            if incremental and parent is None and server.summarize_wal is False and not settings.backup_host:
                tell(_NO_NEXT)
            since = await _manifest_of(site, parent) if parent else None
            async with (
                marked(site, shipping.command.ship, parent, tell=tell) as ship,
                aclosing(_messages(source, label, since, hurt, tell)) as messages,
            ):
                taken = await take(
                    messages,
                    ship=ship,
                    cluster=Cluster(server.system_identifier, server.version_num, server.segment_size),
                    wal_safe=_behind_a_switch(settings, server, wait) if settings.backup_host else wait,
                    clock=site.clock,
                    label=label,
                    report=report,
                    parent=parent,
                )
            entry.summary |= {**backup_summary(taken), "damaged": len(found)}
            await _clear_up(site, taken, marks, tell)
    except (WalshipError, BaseExceptionGroup, asyncio.CancelledError) as caught:
        if taken is None or not _told(taken, caught, tell):
            raise
    return taken


async def _clear_up(site: Site, taken: BackupInfo, marks: Marks, tell: Callable[[str], None]) -> None:
    """``marks`` were looked at when the backup began: those that have not changed since are of processes that died."""

    def claim(name: str) -> AbstractAsyncContextManager[str]:
        return marks.claim(name, what="backup")

    expirer = Expirer(site.stores, claim=claim, tell=tell, progress=lambda _: None)
    try:
        await marks.look()
        await marks.bury()
        names = await clean_unfinished(site.stores, remove=expirer.unlisted, tell=tell)
    except (WalshipError, asyncio.CancelledError) as caught:
        if not _told(taken, caught, tell):
            raise
        return
    for store, freed in expirer.freed.items():
        if freed.objects:
            size = f"{freed.size / 1e6:.0f} MB"
            tell(f"{store}: {freed.objects} objects ({size}) of {', '.join(names)}, never finished, were deleted")
    for refusal in expirer.refusals:
        where = f" at {refusal.destination}" if refusal.destination else ""
        tell(f"{refusal.what} could not be deleted{where}: {refusal.fact}")


async def _looked_at(site: Site, tell: Callable[[str], None]) -> Marks:
    """The marks on backups, as they are now."""
    marks = Marks(site.stores, clock=site.clock)
    try:
        await marks.look()
    except StoreError as error:
        tell(f"who uses which backup is not known: {error.fact}")
    return marks


def _told(taken: BackupInfo, caught: BaseException, tell: Callable[[str], None]) -> bool:
    """What came up behind a backup that is complete; False for a defect, which is not to be passed over."""
    if isinstance(caught, asyncio.CancelledError):
        if task := asyncio.current_task():
            task.uncancel()
        tell(f"{taken.name} is complete; the clearing up behind it was stopped")
        return True
    if error := foreseen(caught):
        tell(f"{taken.name} is complete; the clearing up behind it failed: {error.fact}")
    return error is not None


def _behind_a_switch(settings: Settings, server: ServerFacts, wait: WalSafe) -> WalSafe:
    """A backup of a standby ends in an open segment, and nothing on the standby can finish it: the primary does."""

    async def switched(start: Lsn, stop: Lsn, timeline: int) -> None:
        async with await connect(settings) as primary:
            await switch_wal(primary, segment_size=server.segment_size)
        await wait(start, stop, timeline)

    return switched


def refuse_stranger(standby: ServerFacts, primary: ServerFacts, host: str) -> None:
    """WALSHIP_BACKUP_HOST has to be a standby of the very server whose WAL is shipped. Raises SourceError."""
    if standby.system_identifier != primary.system_identifier:
        raise SourceError(
            f"WALSHIP_BACKUP_HOST: {host} is of the cluster {standby.system_identifier}, and the server of"
            f" {primary.system_identifier}",
            hint="name a standby of the server at POSTGRES_HOST",
        )
    if not standby.in_recovery:
        raise SourceError(
            f"WALSHIP_BACKUP_HOST: {host} is no standby any more, but a primary",
            hint="after a failover POSTGRES_HOST and WALSHIP_BACKUP_HOST change places; nothing was begun",
        )


async def _newest(site: Site, tell: Callable[[str], None]) -> BackupInfo | None:
    """What an incremental backup builds on."""
    catalog = await read_catalog(site.stores, site.fetch, site.facts.system_id, notify=tell)
    return parent_of(catalog.backups, tell)


def parent_of(backups: Sequence[BackupInfo], tell: Callable[[str], None]) -> BackupInfo | None:
    """The newest of the complete ``backups``, oldest first, or None where a full one has to be taken: ``tell`` why."""
    able = [backup for backup in backups if backup.manifest]
    if not able:
        tell("there is no backup yet that an incremental one could build on: a full one is taken")
        return None
    newest = able[-1]
    before = len(chain_of(newest, {backup.name: backup for backup in backups})) - 1
    if before + 1 >= LONGEST:
        tell(
            f"a full backup is taken: {newest.name} builds on {before} others already, and a restore lays down each of"
            " them. Take a full one now and then: walship backup"
        )
        return None
    tell(f"what has changed since {newest.name} is backed up")
    return newest


async def _manifest_of(site: Site, backup: BackupInfo) -> bytearray:
    hint = "nothing can build on that backup; take a full one: walship backup"
    try:
        fetched = await site.fetch(manifest_key(backup.name), backup=backup.id)
    except (ObjectMissing, IntegrityError) as error:
        raise IntegrityError(f"{error.fact}: {backup.name} is not complete", hint=hint) from None
    if fetched.digest != backup.manifest:
        raise IntegrityError(
            f"{fetched.destination}: the backup_manifest of {backup.name} is not the one that its backup_info lists",
            hint=f"it was exchanged: {hint}",
        )
    return fetched.plain


def _messages(
    settings: Settings,
    label: str,
    since: Buffer | None,
    damaged: Callable[[Damage], None],
    tell: Callable[[str], None],
) -> AsyncGenerator[BackupMessage, None]:
    """From the data directory where it can be read, else through the server."""
    pace = Pace(settings.backup_rate) if settings.backup_rate else None
    if settings.data_dir is None or since is not None:
        return basebackup.stream(settings, label=label, pace=pace, since=since, damaged=damaged, tell=tell)
    return local_copy.stream(
        settings,
        settings.data_dir,
        label=label,
        workers=settings.workers,
        pace=pace,
        damaged=damaged,
        tell=tell,
    )


def refuse_unable(server: ServerFacts, settings: Settings) -> None:
    """A backup without its WAL is none: say so before an hour is spent. Raises the first error as SourceError."""
    refuse(problems(server, settings))
