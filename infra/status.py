"""Looks at the truth each time: the server, the spool, and a listing of every destination. ``standing`` judges it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from handlers.fetch import Fetcher
from infra.done import Done, last_done
from infra.holdings import Holding, Known, hold, together
from infra.postgres.control import ServerFacts, read_facts, rows
from infra.postgres.kept import Kept
from infra.postgres.senders import StreamFacts, read_stream_facts
from infra.postgres.stream_problems import NO_WAIT, commit_problems, stream_problems
from infra.postgres.sync import meaning
from infra.recoverable import Moments, Recoverable, read_moments, recoverable
from infra.remembered import remembered
from infra.settings import Settings
from infra.sources.spool import SpoolState, holder, look_at_spool
from infra.standing import DestinationStatus, Planned, Status, StreamStatus, brief
from infra.storage.lease import newest
from infra.storage.reported import confirmed
from infra.whereabouts import exposed
from infra.wiring import Site
from pipeline.catalog import Catalog
from pipeline.confirmed import Confirmed, may_come
from pipeline.contracts import Store
from pipeline.errors import SourceError, StoreError
from pipeline.wal import Lsn, WalFile

#: Seconds that an upload may take once a tail is due; a finished segment that takes longer is shipped as tails as well.
GRACE = 5
#: So many segments may be at one destination and not yet at another: they are being uploaded.
ON_THE_WAY = 4
#: Seconds of the longest WALSHIP_TAIL_INTERVAL that ``status`` waits for.
LONGEST = 5
#: A standby sends what it has replayed, for our purpose: see ``ServerFacts.wal_lsn``.
_FLUSHED = """
select (case when pg_is_in_recovery() then coalesce(pg_last_wal_replay_lsn(), '0/0')
             else pg_current_wal_flush_lsn() end)::text
"""


@dataclass(frozen=True, slots=True)
class Outside:
    """One look at all but the destinations."""

    now: datetime
    #: None if it did not answer, or is another cluster's: ``server_error`` tells.
    server: ServerFacts | None
    stream: StreamStatus | None
    server_error: str
    #: None if there is none, or it cannot be read: ``spool_error`` tells.
    spool: SpoolState | None
    spool_error: str
    #: Process id of whoever ships the spool.
    service: int | None


async def read_status(site: Site, *, waits: Callable[[str], None] = lambda _: None) -> Status:
    """Look at everything. What does not answer is part of the status, never an error.

    With the stream on, bytes that a destination lacks may be on their way, or may be refused there for hours. So it is
    looked at again until they were due (``waits`` is told once, in a sentence): ``GRACE`` seconds behind the interval
    at most, and no longer than what is missing needs. So is a segment before which others have arrived.
    """
    async with Kept(site.settings, site.clock) as kept:
        status, holdings = await _look_until_due(site, kept, waits)
    stored, unread = await _recoverable(site, holdings, status)
    done: dict[str, Done] = {}
    planned: tuple[Planned, ...] = ()
    with suppress(StoreError):  # told as the destinations' errors
        done = await last_done(site)
        schedule = await remembered(site)
        planned = tuple(Planned(job, schedule.due_at(job)) for job in schedule.jobs)
    return replace(
        status,
        recoverable=stored,
        unknown=tuple(map(brief, unread)),
        last_drill=done.get("drill", Done()).success,
        last_verify=done.get("verify", Done()).success,
        failed_drill=done.get("drill", Done()).failing,
        failed_verify=done.get("verify", Done()).failing,
        schedule=planned,
        exposed=await asyncio.to_thread(exposed, site.settings),
    )


async def _look_until_due(site: Site, kept: Kept, waits: Callable[[str], None]) -> tuple[Status, list[Holding]]:
    begun = site.clock.monotonic()
    known: Known = {}
    told = await confirmed(site.stores)
    first, holdings = await _look(site, kept, known)
    status, late = first, _late(first, first, site)
    interval = site.settings.tail_interval if site.settings.tail_interval <= LONGEST else 0
    for seconds in range(1, GRACE + 1):
        waited = [*late, *_coming(status, told, site.facts.segment_size)]
        if not waited:
            break
        if seconds == 1:
            waits(f"looking again, for up to {interval + GRACE:g} s: the newest WAL is not yet at {', '.join(waited)}")
        await site.clock.sleep(max(0.0, begun + interval + seconds - site.clock.monotonic()))
        status, holdings = await _look(site, kept, known)
        late = _late(status, first, site)
    passed = site.clock.monotonic() - begun
    places = tuple(
        replace(place, late=f"{late[place.name]} {passed:.0f} s ago") if place.name in late else place
        for place in status.destinations
    )
    return replace(status, destinations=places), holdings


def _late(status: Status, first: Status, site: Site) -> dict[str, str]:
    """What of the server's WAL at the first look is not at a destination, though the stream could have brought it.

    Where an outage, a hole or a stream that is not there explains it, that is told instead.
    """
    if first.stream is None or first.timeline is None or status.stream is None or status.stream.problem:
        return {}
    flushed = Lsn.parse(first.stream.flushed_lsn)
    # Tails that are not waited for may be missing; more than the one segment that is just being uploaded may not.
    waited = site.settings.tail_interval <= LONGEST
    allowed = 0 if waited else site.facts.segment_size
    found = {}
    for place in status.destinations:
        if place.error or place.missing or place.durable_lsn is None:
            continue
        if place.timeline < first.timeline and waited:
            found[place.name] = f"nothing of timeline {first.timeline} is there, on which the server was"
        elif place.timeline == first.timeline and Lsn.parse(place.durable_lsn) + allowed < flushed:
            found[place.name] = f"the WAL is there up to LSN {place.durable_lsn}, and the server was at LSN {flushed}"
    return found


def _coming(status: Status, told: Sequence[Confirmed], segment_size: int) -> Iterator[str]:
    """Destinations that lack a segment before others that have arrived, which nobody has said to be safe yet."""
    for place in status.destinations:
        file = WalFile.parse(place.missing)
        if file is not None and may_come(file, segment_size, told):
            yield place.name


async def _look(site: Site, kept: Kept, known: Known) -> tuple[Status, list[Holding]]:
    """Once: everything but what can be restored."""
    outside = await look_outside(site, kept)
    holdings = [
        await hold(store, site, known, required=destination.required)
        for destination, store in zip(site.destinations, site.stores, strict=True)
    ]
    service_words = "unknown" if outside.spool_error else ""
    if "stream" in site.settings.sources and spool_of(site.settings) is None:
        service_words = await _service(site.stores, outside.stream)
    places = tuple(
        replace(destination_status(holding, outside.server), lacks=_lacks(holding, holdings)) for holding in holdings
    )
    return status_of(site, outside, places, service_words=service_words), holdings


def spool_of(settings: Settings) -> Path | None:
    """The folder that is watched, if one is."""
    return settings.spool_dir if "watch" in settings.sources else None


async def look_outside(site: Site, kept: Kept) -> Outside:
    """The server and the spool. What does not answer is told as such."""
    now = site.clock.now()
    server, stream, server_error = await _server(site, kept)
    folder = spool_of(site.settings)
    spool, spool_error, service = None, "", None
    if folder:
        try:
            spool = await asyncio.to_thread(look_at_spool, folder, now)
        except SourceError as error:
            spool_error = error.fact
        service = await asyncio.to_thread(holder, folder)
    return Outside(now, server, stream, server_error, spool, spool_error, service)


def status_of(
    site: Site, outside: Outside, places: tuple[DestinationStatus, ...], *, service_words: str = ""
) -> Status:
    """The record of one look, without what can be restored."""
    server, stream = outside.server, outside.stream
    fails = server is not None and server.archiver.failing and "watch" in site.settings.sources
    streamed = stream is not None and not stream.problem
    return Status(
        system_id=site.facts.system_id,
        now=outside.now,
        server_error=brief(outside.server_error),
        current_lsn=str(server.wal_lsn) if server else None,
        timeline=server.timeline if server else None,
        spool=outside.spool,
        spool_error=brief(outside.spool_error),
        service=outside.service,
        service_words=service_words,
        stream=stream,
        destinations=places,
        most_on_the_way=None if streamed else 4 * site.facts.segment_size,
        archiving_fails_at=server.archiver.last_failed_wal if server and fails else "",
        reads=site.keys.reads,
    )


async def _recoverable(site: Site, holdings: Sequence[Holding], status: Status) -> tuple[Recoverable | None, list[str]]:
    """What any destination that answers has. The newest WAL is read only where it is not known how far it goes."""
    answering = [holding for holding in holdings if not holding.error]
    if not answering:
        return None, ["no destination answers"]
    if not site.keys.reads:
        return None, []  # where a key is at hand, that can be told
    catalog = together(answering)
    end = catalog.known_end(catalog.lineage(catalog.newest_timeline)) if not catalog.unreadable else None
    written = status.stream.flushed_lsn if status.stream else status.current_lsn
    complete = written is not None and end is not None and status.timeline == catalog.newest_timeline
    until = status.now if complete and end is not None and end >= Lsn.parse(written or "") else None
    stores = [store for store, holding in zip(site.stores, holdings, strict=True) if not holding.error]
    fetch = Fetcher(stores, site.chain, site.facts.system_id)
    moments: Moments = {}
    unread = await read_moments(catalog, fetch, moments, opened=until is None)
    return recoverable(catalog, places_of_backups(answering), until=until, moments=moments), unread


async def _service(stores: Sequence[Store], stream: StreamStatus | None) -> str:
    """What is known of a service that ships no spool: by its slot, else by the newest lease that can be read."""
    if stream is not None and stream.sync_state:
        return f"running: it streams from the slot {stream.slot}"
    found = []
    for store in stores:
        with suppress(StoreError):  # told as the destination's error
            if (there := await newest(store)) is not None:
                found.append(there)
    if not found:
        return "unknown"
    return max(found, key=lambda there: (there[0], there[1].released, there[1].counter))[1].words


async def _server(site: Site, kept: Kept) -> tuple[ServerFacts | None, StreamStatus | None, str]:
    stream = None
    try:
        async with kept.lent() as connection:
            facts = await read_facts(connection)
            if facts.system_identifier != site.facts.system_id:
                return None, None, f"the server is the cluster {facts.system_identifier}, not {site.facts.system_id}"
            if "stream" in site.settings.sources:
                ((flushed,),) = await rows(connection, _FLUSHED)
                seen = await read_stream_facts(connection, site.settings.slot)
                stream = _stream(facts, seen, site.settings, flushed)
    except SourceError as error:
        return None, None, error.fact
    return facts, stream, ""


def _stream(server: ServerFacts, stream: StreamFacts, settings: Settings, flushed: str) -> StreamStatus:
    slot, ours, name = stream.slot, stream.ours, settings.slot
    problem = ""
    if slot is None:
        problem = f"there is no slot {name}: nothing streams (`walship run` makes it)"
    elif ours is None:
        kept = f"it keeps {slot.retained} bytes of WAL"
        used = f"is in use by another program: {slot.holder}" if slot.active else "is idle: nothing streams"
        problem = f"the slot {name} {used}; {kept}"
    if slot is not None and slot.lost:
        problem = f"the slot {name} is lost: the server did not keep its WAL"
    elif slot is not None and slot.wal_status == "unreserved":
        problem = f"the slot {name} is about to be lost: it keeps more than max_slot_wal_keep_size"
    means = meaning(server.synchronous_standby_names, name)
    sync = ours is not None and ours.sync_state in ("sync", "quorum") and server.synchronous_commit not in NO_WAIT
    shared = any(found.severity == "error" for found in commit_problems(server, stream, name))
    told = problem.partition(":")[0]
    return StreamStatus(
        slot=name,
        problem=problem,
        wal_status=slot.wal_status if slot else "",
        retained_bytes=slot.retained if slot else 0,
        safe_wal_size=slot.safe_wal_size if slot else None,
        sync_state=ours.sync_state if ours else "",
        commits=means.fact,
        waited_for=sync and means.wait == "ours" and not shared,
        errors=tuple(
            found.fact
            for found in stream_problems(server, stream, settings)
            if found.severity == "error" and found.fact.partition(":")[0] != told
        ),
        flushed_lsn=flushed,
    )


def destination_status(holding: Holding, server: ServerFacts | None) -> DestinationStatus:
    """One destination, by its listing and what the server said at that time."""
    if holding.error:
        return DestinationStatus(holding.name, holding.required, error=brief(holding.error), hint=brief(holding.hint))
    catalog = holding.catalog
    timeline = holding.timeline(server.timeline if server else None)
    runs = catalog.segments.get(timeline)
    reach = holding.reach(timeline)
    return DestinationStatus(
        holding.name,
        holding.required,
        timeline=timeline,
        last_segment=catalog.file(timeline, runs.last).name if runs else "",
        durable_lsn=str(reach.lsn) if reach.lsn is not None else None,
        tail_bytes=reach.in_tails,
        missing=reach.missing.name if reach.missing else "",
        lag_bytes=max(0, server.wal_lsn - reach.lsn) if server and reach.lsn is not None else None,
        holes=sum(hole.count for hole in catalog.holes()),
        last_backup=holding.last_backup,
        backups=len(catalog.backups) + len(catalog.sealed),
        problems=tuple(map(brief, holding.problems(timeline))),
    )


def _lacks(holding: Holding, holdings: Sequence[Holding]) -> str:
    """What other destinations have and this one does not, but for segments that may just be on their way there."""
    answering = [each for each in holdings if not each.error]
    if holding.error or len(answering) < 2:
        return ""
    everything, own = together(answering), holding.catalog
    backups = len(_named(everything) - _named(own))
    segments = sum(map(len, everything.segments.values())) - sum(map(len, own.segments.values()))
    if not backups and segments <= ON_THE_WAY:
        return ""
    return f"{backups} base backups and {segments} segments of WAL that others have are not there yet"


def _named(catalog: Catalog) -> set[str]:
    return {backup.name for backup in catalog.backups} | catalog.sealed.keys()


def places_of_backups(holdings: Sequence[Holding]) -> dict[str, tuple[str, ...]]:
    """Backup → names of the destinations that have it."""
    names = {backup.name for each in holdings for backup in each.catalog.backups}
    return {
        name: tuple(each.name for each in holdings if any(b.name == name for b in each.catalog.backups))
        for name in names
    }
