"""Verification from end to end: what was verified before, look, mend, remember. What ``infra/cli/verify.py`` calls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from handlers.body import collect
from handlers.checksum import Checksum
from handlers.compress import Compress
from handlers.encrypt import Encrypt
from handlers.fetch import read_catalog
from handlers.heal import Healer
from handlers.verify import Verification
from handlers.verify_objects import Progress
from handlers.verify_report import Healing, Report
from infra.marked import check_there
from infra.pace import Pace
from infra.storage.in_use import using
from infra.storage.reported import confirmed
from infra.wiring import Site
from pipeline.catalog import Catalog
from pipeline.chain import Chain, Expected
from pipeline.confirmed import may_come
from pipeline.contracts import Body, Store
from pipeline.errors import IntegrityError, ObjectMissing, ReadOnly, SourceError, StoreError
from pipeline.verified import MOST, Memory, memory_key

#: Seconds between two times that what was verified so far is written down: an interruption costs no more than that.
SAVE_EVERY = 300.0
#: Seconds that a destination has to take it; and when the process is told to end.
_PATIENCE, _STOPPING = 120.0, 5.0
#: Seconds between looks at the WAL where a segment that is missing may be on its way.
_PAUSES = (1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be verified, and how."""

    #: None: all of the repository.
    backup: str | None = None
    #: Stored bytes alone, although this host could decode them.
    stored_only: bool = False
    #: Trust nothing that was verified before.
    everything: bool = False
    heal: bool = False
    #: Of healing: only say what would be done.
    dry_run: bool = False
    #: Bytes a second, at all destinations together; 0: no limit.
    rate: int = 0


async def _arrived(site: Site) -> Catalog:
    """What is stored. Where several segments are under way, a later one may be there first: that is no hole yet."""
    told = await confirmed(site.stores)
    for pause in (*_PAUSES, None):
        catalog = await read_catalog(
            site.stores, site.fetch, site.facts.system_id, segment_size=site.facts.segment_size
        )
        coming = any(may_come(hole.last, catalog.segment_size, told) for hole in catalog.holes())
        if pause is None or not coming:
            break
        await site.clock.sleep(pause)
    return catalog


async def verify_site(
    site: Site,
    order: Order,
    *,
    tell: Callable[[str], None],
    progress: Progress = lambda _objects, _size, _trusted: None,
    healed: Callable[[Healing], None] = lambda _: None,
) -> Report:
    """Verify, mend if that is asked for, and remember. What is wrong is in the report.

    ``tell`` hears what a person should know beside that; ``healed`` of each fault that was tried to be mended.
    Raises RecoveryError for a backup that does not exist, StoreError if no destination answers.
    """
    catalog = await _arrived(site)
    memories = {store.name: await recall(site, store, order, tell) for store in site.stores}
    pace = Pace(order.rate) if order.rate else None

    async def wait(size: int) -> None:
        if pace is not None:
            await site.clock.sleep(pace.take(size))

    run = Verification(
        catalog,
        site.stores,
        chain=None if order.stored_only or not site.keys.reads else site.chain,
        backup=order.backup,
        memories=memories,
        width=2 * site.settings.workers,
        pace=wait,
        progress=progress,
        refresh=lambda: site.keys.refresh_from(site.stores),
    )
    saving = _Saving(site, memories, tell)
    beside = asyncio.create_task(saving.now_and_then())
    patience = _PATIENCE
    try:
        await run.look()
        if order.heal:
            hold = _look_only if order.dry_run else lambda backup: _held(site, backup, tell)
            healer = Healer(run.inspector, run.places, hold=hold, dry_run=order.dry_run, tell=healed)
            try:
                await healer.heal()
            finally:
                run.healings = healer.healings
    except asyncio.CancelledError:
        patience = _STOPPING
        raise
    finally:
        beside.cancel()
        await asyncio.wait([beside])
        await saving.at_the_end(patience)
    return run.report()


async def recall(site: Site, store: Store, order: Order, tell: Callable[[str], None]) -> Memory:
    """What is remembered of a destination. What cannot be read, or is not ours, is not believed, and told."""
    key = memory_key(store.name)
    memory = Memory(
        store.name,
        site.facts.system_id,
        now=site.clock.now(),
        interval=site.settings.verify_span,
        trust=not order.everything,
    )
    try:
        body = await store.get(key)
        try:
            memory.load(await asyncio.to_thread(_decoded, site, key, body))
        finally:
            body.close()
    except ObjectMissing:
        return memory
    except (StoreError, IntegrityError) as error:
        tell(f"what was verified before at {store.name} is not known, so all of it is read: {error.fact}")
    if memory.future:
        tell(f"what was verified at {store.name} by a clock ahead of this one is read again")
    return memory


def _decoded(site: Site, key: str, body: Body) -> bytes:
    """Runs in a thread. It is not encrypted, so that hosts that only write have it too; its fingerprint is keyed."""
    header, plain = site.chain.decode(Expected(key, site.facts.system_id, "", MOST), body.chunks())
    if header.cipher != "none" or site.keys.fingerprint(key, plain) != header.fingerprint:
        raise IntegrityError(f"{key} was not written by anybody who has the keys of this repository")
    return bytes(plain)


class _Saving:
    """Writes down what was verified, at the destination that it is about."""

    def __init__(self, site: Site, memories: dict[str, Memory], tell: Callable[[str], None]) -> None:
        self._site = site
        self._memories = memories
        self._tell = tell
        #: Destinations that do not take it; and how much was added when it was written last.
        self._refused: set[str] = set()
        self._saved: dict[str, int] = {}

    async def now_and_then(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(SAVE_EVERY)  # not by the site's clock: it says nothing of what is stored
            for store in self._site.stores:
                if self._memories[store.name].added > self._saved.get(store.name, 0):
                    await self._save(store, _PATIENCE)

    async def at_the_end(self, patience: float) -> None:
        """What is left."""
        for store in self._site.stores:
            if self._memories[store.name].changed:
                await self._save(store, patience)

    async def _save(self, store: Store, patience: float) -> None:
        if store.name in self._refused:
            return
        memory = self._memories[store.name]
        added = memory.added
        try:
            async with asyncio.timeout(patience):
                body = await asyncio.to_thread(_encoded, self._site, memory_key(store.name), memory.encode())
                try:
                    await store.put(memory_key(store.name), body, replace=True)
                finally:
                    body.close()
        except ReadOnly:
            self._refused.add(store.name)
        except (StoreError, TimeoutError) as error:
            self._refused.add(store.name)
            fact = error.fact if isinstance(error, StoreError) else f"no answer within {patience:g} seconds"
            self._tell(f"what was verified at {store.name} could not be written down, and is read again: {fact}")
        else:
            self._saved[store.name] = added


def _encoded(site: Site, key: str, content: bytes) -> Body:
    chain = Chain([Compress("zstd"), Encrypt(site.keys, lambda _name: "none"), Checksum()], site.keys,
                  site.facts.system_id)  # fmt: skip
    return collect(chain.encode(key, content, created=site.clock.now()))


@contextlib.asynccontextmanager
async def _held(site: Site, backup: str, tell: Callable[[str], None]) -> AsyncIterator[str]:
    """Keep a backup from being expired while it is mended: see ``storage.in_use``."""
    async with using(site.stores, backup, clock=site.clock, tell=tell, what="verify --heal") as use:
        if who := await use.going(backup):
            yield f"{backup} is being deleted by {who}"
            return
        try:
            await check_there(site, backup)
        except SourceError:
            yield f"{backup} was deleted meanwhile"
            return
        yield ""


@contextlib.asynccontextmanager
async def _look_only(_backup: str) -> AsyncIterator[str]:
    yield ""
