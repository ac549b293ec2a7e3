"""Waiting until WAL is safe: what a base backup, a switch and the demo need to know before they say "done"."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from handlers.base_backup import WalSafe
from infra.clock import sleep_or
from infra.holdings import hold
from infra.postgres.connect import Connection, connect
from infra.postgres.control import rows
from infra.postgres.replication import ReplicationConnection
from infra.postgres.slots import look
from infra.repository import refuse_emptied
from infra.settings import Settings
from infra.sources.spool import segments_up_to
from infra.wiring import Site
from pipeline.catalog import wal_key
from pipeline.contracts import Clock, Ship, Store
from pipeline.errors import SourceError, StoreError, WalshipError
from pipeline.events import Notice, ObjectStored
from pipeline.wal import Lsn, WalFile, WalKind

#: Seconds between looks; the first ones follow sooner, because the last segment of a backup is on its way already.
PAUSE = 0.5
_FIRST_PAUSE = 0.03
#: So much longer is each than the one before.
_SLOWER = 1.5
#: Seconds between words to the person who waits.
EVERY = 5.0
#: Seconds in which WAL that is at all required destinations arrives at the others as well, if they take it.
PATIENCE = 5.0

_ARCHIVED = "select coalesce(last_archived_wal, ''), current_setting('archive_mode') from pg_stat_archiver"

_LATE = (
    "is `walship run` running? does PostgreSQL archive into the spool? `walship status` and pg_stat_archiver tell;"
    " WALSHIP_WAL_TIMEOUT sets how long to wait"
)


def segments_between(timeline: int, start: int, stop: int, segment_size: int) -> list[WalFile]:
    """The segments that hold the bytes from ``start`` up to, not including, ``stop``; at least the one of ``start``."""
    file = WalFile.segment(timeline, start, segment_size)
    files = [file]
    while files[-1].end(segment_size) < stop:
        files.append(files[-1].next(segment_size))
    return files


async def wait_for_wal(
    stores: Sequence[Store],
    files: Iterable[WalFile],
    *,
    clock: Clock,
    timeout: float,
    tell: Callable[[str], None],
    stirred: asyncio.Event | None = None,
) -> None:
    """Return once every store has every file. SourceError after ``timeout`` seconds in which nothing new arrived.

    StoreError at once if one was emptied, before or meanwhile: nothing arrives there until somebody has mended it.
    ``stirred`` is set by who knows that it is worth a look: where this process ships the WAL itself.
    """
    stirred = stirred or asyncio.Event()
    missing = {store.name: {wal_key(file) for file in files} for store in stores}
    total = sum(map(len, missing.values()))
    progressed = said = clock.monotonic()
    looked = -math.inf
    pause = min(_FIRST_PAUSE, PAUSE)
    while True:
        before = sum(map(len, missing.values()))
        stirred.clear()  # what is stored from here on may be missed by the listing
        for store in stores:
            await _strike_out(store, missing[store.name])
        left = sum(map(len, missing.values()))
        now = clock.monotonic()
        if not left or now - looked >= EVERY:  # also before it is said that all is there
            looked = now
            await refuse_emptied(stores)
        if not left:
            return
        if left < before:
            progressed = now
        place, names = next((place, names) for place, names in missing.items() if names)
        first = min(names).rpartition("/")[2]
        if now - progressed > timeout:
            raise SourceError(f"segment {first} has not arrived at {place} in {timeout:.0f} seconds", hint=_LATE)
        if now - said >= EVERY:
            said = now
            tell(f"waiting for WAL: {total - left} of {total} segments are safe, next is {first} at {place}")
        await sleep_or(clock, pause, stirred.wait())
        pause = min(PAUSE, _SLOWER * pause)


async def without(
    stores: Sequence[Store], files: Collection[WalFile], *, clock: Clock, patience: float = PATIENCE
) -> dict[str, WalshipError]:
    """Which of the stores do not have all the files within ``patience`` seconds: name → why."""

    async def why(store: Store) -> WalshipError | None:
        try:
            async with asyncio.timeout(2 * patience):
                await wait_for_wal([store], files, clock=clock, timeout=patience, tell=lambda _: None)
        except (SourceError, StoreError) as error:
            return error
        except TimeoutError:
            return StoreError(f"{store.name} has not answered for {2 * patience:g} seconds", passing=True)
        return None

    whys = await asyncio.gather(*map(why, stores))
    return {store.name: said for store, said in zip(stores, whys, strict=True) if said}


async def wait_for_earlier(site: Site, segment: WalFile, *, tell: Callable[[str], None]) -> None:
    """Return once all WAL before the end of ``segment``, which has arrived, is safe: segments overtake one another.

    SourceError when nothing has moved for ``WALSHIP_WAL_TIMEOUT`` seconds, StoreError if a required destination was
    emptied meanwhile.
    """
    clock, seen, pause = site.clock, "", _FIRST_PAUSE
    moved = said = clock.monotonic()
    async with await connect(site.settings) as connection:
        while waits := await _waiting(connection, site, segment):
            if waits != seen:
                seen, moved = waits, clock.monotonic()
            elif clock.monotonic() - moved > site.settings.wal_timeout:
                raise SourceError(f"segment {segment} is safe, and earlier WAL is not: {waits}", hint=_LATE)
            if clock.monotonic() - said >= EVERY:
                said = clock.monotonic()
                await refuse_emptied(site.required_stores)
                tell(f"{segment} is safe; waiting for earlier WAL: {waits}")
            await clock.sleep(pause)
            pause = min(PAUSE, _SLOWER * pause)


async def _waiting(connection: Connection, site: Site, segment: WalFile) -> str:
    """What says that not all up to the segment is safe; empty if all is.

    The position of the slot is what was reported: of all required destinations, unless ``WALSHIP_SYNC_TIMEOUT`` lets
    one be left out. From the spool a file goes when it is at all of them, in order. Without one, listings tell.
    """
    settings, archives, words = site.settings, False, ""
    if "watch" in settings.sources and settings.spool_dir is not None:
        ((last, mode),) = await rows(connection, _ARCHIVED)
        archives, archived = mode != "off", WalFile.parse(last)
        # A label or a history that was archived last says nothing of the segments: then the spool alone decides.
        if archived is not None and archived.kind is WalKind.SEGMENT and archived < segment:
            words = f"PostgreSQL has archived {last}"
        elif files := await asyncio.to_thread(segments_up_to, settings.spool_dir, segment):
            words = f"{files[0]} is in the spool"
    if archives and (not words or "stream" not in settings.sources or settings.sync_timeout is not None):
        return words
    slot = await look(connection, settings.slot) if "stream" in settings.sources else None
    if slot is None or slot.restart_lsn is None or slot.restart_lsn < segment.end(site.facts.segment_size):
        return words or f"the slot {settings.slot} is at LSN {slot.restart_lsn if slot else 'none'}"
    return await _lacking(site, segment) if settings.sync_timeout is not None else ""


async def _lacking(site: Site, segment: WalFile) -> str:
    """A required destination that has less than all up to the segment; empty if none has."""
    for store in site.required_stores:
        reach = (await hold(store, site, {}, required=True)).reach(segment.timeline).lsn
        if reach is None or reach < segment.end(site.facts.segment_size):
            return f"{store.name} has all up to LSN {reach or 'none'}"
    return ""


@contextmanager
def _stirred(site: Site) -> Iterator[asyncio.Event]:
    """Set whenever this process has stored a file of WAL somewhere."""
    event = asyncio.Event()

    def listen(notice: Notice) -> None:
        if isinstance(notice, ObjectStored) and notice.name.startswith("wal/"):
            event.set()

    site.notify.append(listen)
    try:
        yield event
    finally:
        site.notify.remove(listen)


def wal_safe(
    site: Site, tell: Callable[[str], None], *, ship_history: Callable[[int], Awaitable[None]] | None = None
) -> WalSafe:
    """How a backup waits for its WAL: until every required destination lists it.

    ``ship_history`` stores the history of a timeline, which PostgreSQL archives only if it archived already when the
    timeline began: a restored server did not. Without it, the history has to come as all WAL does.
    """

    async def wait(start: Lsn, stop: Lsn, timeline: int) -> None:
        with _stirred(site) as stirred:

            async def arrived(files: Iterable[WalFile]) -> None:
                await wait_for_wal(
                    site.required_stores, files, clock=site.clock, timeout=site.settings.wal_timeout, tell=tell,
                    stirred=stirred,
                )  # fmt: skip

            # A history that is there before any WAL of its timeline would make "latest" follow one without bytes.
            await arrived(segments_between(timeline, start, stop, site.facts.segment_size))
            if timeline > 1:
                if ship_history is not None:
                    await ship_history(timeline)
                await arrived([WalFile.history(timeline)])

    return wait


def history_shipper(settings: Settings, ship: Ship) -> Callable[[int], Awaitable[None]]:
    """Takes a timeline's history from the server, by the replication protocol, and ships it."""

    async def ship_history(timeline: int) -> None:
        async with await ReplicationConnection.open(settings) as connection:
            content = await connection.timeline_history(timeline)
        # Shipped already, by the archiver's way or by an earlier backup: the same bytes are a success.
        await ship(wal_key(WalFile.history(timeline)), content)

    return ship_history


async def store_history(site: Site, ship: Ship, timeline: int) -> None:
    """Have the history of the server's timeline stored, if WAL of it is there and the history is not everywhere.

    Never before that WAL: "latest" would follow a timeline that has no bytes.
    """
    history = wal_key(WalFile.history(timeline))
    if timeline == 1:
        return
    missing = False
    for store in site.required_stores:
        names = {entry.key async for entry in store.list(f"wal/{timeline:08X}", shallow=True)}
        if not names - {history}:
            return
        missing = missing or history not in names
    if missing:
        await history_shipper(site.settings, ship)(timeline)


async def _strike_out(store: Store, missing: set[str]) -> None:
    """Remove from ``missing`` what the store has, by one listing per folder that begins at the first missing name."""
    for folder in {key.rpartition("/")[0] for key in missing}:
        first = min(key for key in missing if key.startswith(f"{folder}/"))
        # What sorts behind a name without its last digit begins with that name: ``after`` is exclusive.
        missing -= {entry.key async for entry in store.list(f"{folder}/", after=first[:-1])}
