"""Joins the rooms: settings in, working parts out. The only module that knows who everybody is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from handlers.checksum import Checksum
from handlers.compress import Compress
from handlers.encrypt import Encrypt
from handlers.fetch import Fetcher
from handlers.outlet import Outlet
from handlers.ship import Shipper
from handlers.upload import Uploader
from infra.clock import SystemClock
from infra.held import held
from infra.keys import RepositoryKeys, open_keys
from infra.monitoring.log import log_notice
from infra.monitoring.stages import STAGES, Observe, TimedStage
from infra.repository import Destination, RepositoryFacts, find
from infra.settings import Settings
from infra.storage import is_past, open_store
from infra.storage.retry import RetryPolicy
from infra.storage.rooted import Rooted
from infra.storage.telling import Telling
from pipeline.catalog import kind_of
from pipeline.chain import Chain
from pipeline.contracts import Clock, Stage, Store
from pipeline.dispatcher import Gate
from pipeline.errors import ConfigError
from pipeline.events import Notice

log = structlog.get_logger()

#: Objects held in memory at a time. With the base of the interpreter it makes the bound of memory:
#: 100 MB + 4 × max(segment, part).
PLACES = 4


class Listeners(list[Callable[[Notice], None]]):
    """Whoever wants to be told; called like one of them."""

    def __init__(self, *listeners: Callable[[Notice], None]) -> None:
        super().__init__(listeners)

    def __call__(self, notice: Notice) -> None:
        for listener in self:
            listener(notice)


@dataclass(frozen=True, slots=True)
class Site:
    """One cluster's repository at all its destinations, opened."""

    settings: Settings
    facts: RepositoryFacts
    destinations: tuple[Destination, ...]
    #: The destinations, rooted at the cluster's folder; same order.
    stores: tuple[Store, ...]
    keys: RepositoryKeys
    chain: Chain
    fetch: Fetcher
    clock: Clock
    notify: Listeners

    @property
    def required_stores(self) -> tuple[Store, ...]:
        pairs = zip(self.destinations, self.stores, strict=True)
        return tuple(store for destination, store in pairs if destination.required)


@dataclass(frozen=True, slots=True)
class Shipping:
    """What is needed to write to a site. Both shippers share one gate: WAL goes before parts, within one bound."""

    #: For a command that a person waits for: a required destination that is down is an error.
    command: Shipper
    #: For what is in the spool anyway: it is waited for. Needs ``uploader.run``.
    service: Shipper
    uploader: Uploader


@asynccontextmanager
async def open_destinations(
    settings: Settings, *, policy: RetryPolicy | None = None, waits: Callable[[str], None] | None = None
) -> AsyncIterator[tuple[Destination, ...]]:
    """The destinations of the settings; nothing is asked of them yet. ``waits`` is told of one that is slow."""
    if not settings.destinations:
        raise _no_destinations()
    async with AsyncExitStack() as stack:
        opened: list[Destination] = []
        for url in settings.destinations:
            store = open_store(url, settings, policy=policy)
            stack.push_async_callback(store.close)
            if any(store.name == other.name for other in opened):
                raise ConfigError(
                    f"WALSHIP_DESTINATIONS has two destinations that are both called {store.name}",
                    hint="give one of them another bucket name or prefix: the name tells them apart in messages",
                )
            if waits is not None:
                store = Telling(store, waits)
            opened.append(Destination(store, url in settings.required_urls, past=is_past(url)))
        yield tuple(opened)


def _no_destinations() -> ConfigError:
    """Most often the file with the settings is in another folder."""
    here = "" if Path(".env").exists() else f"there is no .env in {Path.cwd()}: go to the folder that has it; "
    return ConfigError(
        "WALSHIP_DESTINATIONS is not set",
        hint=f"{here}WALSHIP_DESTINATIONS is for example file:///var/backups/walship,s3://bucket/prefix",
    )


@asynccontextmanager
async def open_site(
    settings: Settings,
    *,
    cluster: str = "",
    writer: bool = False,
    allow_unencrypted: bool = False,
    notify: Callable[[Notice], None] = log_notice,
    policy: RetryPolicy | None = None,
    waits: Callable[[str], None] | None = None,
    timed: Observe | None = None,
) -> AsyncIterator[Site]:
    """Find the repository and open its keys. ``writer`` makes a data key of its own for what is written.

    ``policy``: how patient the stores are; None for what suits a command. ``waits``: see ``open_destinations``.
    ``timed``: told how long each stage takes on what is written.
    """
    clock = SystemClock()
    async with open_destinations(settings, policy=policy, waits=waits) as destinations:
        facts = await find(destinations, cluster)
        stores = tuple(Rooted(d.root, facts.system_id) for d in destinations)
        keys = await open_keys(
            stores, settings, facts.system_id, clock, writer=writer, allow_unencrypted=allow_unencrypted
        )
        chain = make_chain(settings, keys, facts.system_id, timed=timed)
        fetch = Fetcher(stores, chain, facts.system_id, refresh=lambda: keys.refresh_from(stores))
        yield Site(settings, facts, destinations, stores, keys, chain, fetch, clock, Listeners(notify))


@asynccontextmanager
async def open_shipping(site: Site) -> AsyncIterator[Shipping]:
    """Ready to write: worker threads, the gate, and an outlet for each destination. Nothing is contacted yet."""
    pairs = zip(site.destinations, site.stores, strict=True)
    outlets = [Outlet(store, d.required, site.keys.key_object, site.keys.confirm) for d, store in pairs]

    def hold(store: Store, backup: str) -> AbstractAsyncContextManager[str]:
        return held((store,), backup, clock=site.clock, tell=lambda line: log.info("marks", said=line))

    uploader = Uploader(outlets, clock=site.clock, notify=site.notify, hold=hold)
    gate = Gate(PLACES)
    with ThreadPoolExecutor(site.settings.workers, thread_name_prefix="encode") as workers:

        def shipper(*, patient: bool) -> Shipper:
            return Shipper(site.chain, uploader, gate=gate, workers=workers, clock=site.clock, patient=patient)

        yield Shipping(shipper(patient=False), shipper(patient=True), uploader)


def make_chain(settings: Settings, keys: RepositoryKeys, system_id: str, *, timed: Observe | None = None) -> Chain:
    """Compress, encrypt, checksum, as the settings say. ``timed``: see ``open_site``."""

    def cipher_for(name: str) -> str:
        encrypted = settings.wal_encrypted if kind_of(name) == "wal" else settings.backup_encryption_enabled
        return settings.backup_encryption_algorithm if encrypted else "none"

    compress = Compress(settings.compression, settings.compression_level, hurried=lambda name: name.startswith("tail/"))
    stages: list[Stage] = [compress, Encrypt(keys, cipher_for), Checksum()]
    if timed is not None:
        stages = [TimedStage(stage, name, timed) for stage, name in zip(stages, STAGES, strict=True)]
    return Chain(stages, keys, system_id)
