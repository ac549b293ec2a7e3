"""The service and its one-shot sibling: the spool, the dispatcher and the uploader, running together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from infra.settings import Settings
from infra.sources.spool import holder
from infra.sources.watcher import SpoolWatcher
from infra.wiring import Shipping, Site, open_shipping, open_site
from pipeline.contracts import Source
from pipeline.dispatcher import Dispatcher, Handle, endless, none_left
from pipeline.errors import ConfigError, SourceError, StoreError
from pipeline.events import Acknowledged, BackupReady, Event, Notice

log = structlog.get_logger()

#: Longest pause in seconds between attempts to open the repository at the start of the service.
LONGEST_PAUSE = 30.0


def spool_of(settings: Settings) -> Path:
    """The folder that PostgreSQL archives into, or a ConfigError."""
    if settings.spool_dir is None:
        raise ConfigError(
            "WALSHIP_SPOOL_DIR is not set", hint="it is the folder that archive_library or archive_command writes into"
        )
    return settings.spool_dir


async def serve(settings: Settings) -> None:
    """Ship until cancelled. A destination that does not answer at the start is waited for; the spool keeps all."""
    spool = spool_of(settings)
    pause = 1.0
    while True:
        try:
            async with open_site(settings, writer=True) as site, open_shipping(site, patient=True) as shipping:
                await _ship_for_ever(spool, site, shipping)
        except StoreError as error:
            if not error.passing:
                raise
            log.warning("no_destination", error=error.fact, hint=error.hint, retry_in=pause)
        await asyncio.sleep(pause)
        pause = min(LONGEST_PAUSE, pause * 2)


async def _ship_for_ever(spool: Path, site: Site, shipping: Shipping) -> None:
    watcher = _watcher(spool, site, once=False)
    dispatcher = Dispatcher(_handler(site, shipping), clock=site.clock, notify=site.notify, patience=endless)
    log.info("started", cluster=site.facts.system_id, spool=str(spool), destinations=[s.name for s in site.stores])
    async with asyncio.TaskGroup() as group:
        group.create_task(shipping.uploader.run())
        try:
            await dispatcher.run(watcher)
        finally:
            log.info("stopped", waiting=watcher.waiting)


async def push(settings: Settings, notify: Callable[[Notice], None]) -> int:
    """Ship what is in the spool now; returns how many files were acknowledged, or raises the first failure."""
    spool = spool_of(settings)
    shipped = 0

    def count(notice: Notice) -> None:
        nonlocal shipped
        shipped += isinstance(notice, Acknowledged)
        notify(notice)

    async with open_site(settings, writer=True, notify=count) as site, open_shipping(site, patient=False) as shipping:
        watcher = _watcher(spool, site, once=True)
        dispatcher = Dispatcher(_handler(site, shipping), clock=site.clock, notify=count, patience=none_left)
        await dispatcher.run(watcher)
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


def _handler(site: Site, shipping: Shipping) -> Handle:
    async def handle(source: Source, event: Event) -> None:
        if isinstance(event, BackupReady):
            raise SourceError(f"{event.folder} is a base backup", hint="not yet")
        else:
            await shipping.shipper.carry(source, event)

    return handle


@asynccontextmanager
async def alongside(site: Site, tell: Callable[[str], None]) -> AsyncIterator[None]:
    """Ship the spool during the ``async with`` block, unless a service does that already.

    For commands that wait until WAL is safe: they work whether the service runs or not.
    """
    spool = site.settings.spool_dir
    if spool is None or holder(spool) is not None:
        yield
        return
    tell(f"no service is running: shipping what arrives in {spool} meanwhile")
    async with open_shipping(site, patient=True) as shipping:
        work = asyncio.create_task(_ship_for_ever(spool, site, shipping))
        try:
            yield
        finally:
            work.cancel()
            await asyncio.wait([work])
            if not work.cancelled() and (error := work.exception()):
                tell(f"shipping the spool ended: {error}")
