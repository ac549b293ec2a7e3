"""How things stand, read from the truth each time: the server, the spool, and a listing of every destination."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from handlers.fetch import Fetcher
from infra.postgres.connect import connect
from infra.postgres.control import ServerFacts, read_facts, rows
from infra.postgres.senders import StreamFacts, read_stream_facts
from infra.postgres.stream_problems import NO_WAIT, commit_problems, stream_problems
from infra.postgres.sync import meaning
from infra.reach import leads_to, unbroken, with_claimed_tails
from infra.settings import Settings
from infra.sources.spool import SpoolState, holder, look_at_spool
from infra.storage.lease import newest
from infra.wiring import Site
from pipeline.backup import BackupInfo
from pipeline.catalog import Listing, backup_of, checked_info, info_key, wal_key
from pipeline.contracts import Fetch, Store
from pipeline.errors import IntegrityError, ObjectMissing, SourceError, StoreError
from pipeline.tail import TailName
from pipeline.wal import Lsn, parse_history

#: Waiting longer than this in the spool is no longer a passing queue.
SLOW = timedelta(minutes=2)
#: Seconds that an upload may take once a tail is due; a finished segment that takes longer is shipped as tails as well.
GRACE = 5
#: Seconds of the longest WALSHIP_TAIL_INTERVAL that ``status`` waits for.
LONGEST = 5
#: A standby sends what it has replayed, for our purpose: see ``ServerFacts.wal_lsn``.
_FLUSHED = """
select (case when pg_is_in_recovery() then coalesce(pg_last_wal_replay_lsn(), '0/0')
             else pg_current_wal_flush_lsn() end)::text
"""
#: Most bytes that the description of a backup may have, and a history file.
_MOST_INFO, _MOST_HISTORY = 256 << 20, 1 << 20


@dataclass(frozen=True, slots=True)
class DestinationStatus:
    """One destination."""

    name: str
    required: bool
    #: Empty if it answered.
    error: str = ""
    #: The timeline that the positions are of: the server's, or the newest there if there is nothing of that.
    timeline: int = 1
    #: The newest finished segment there, on the server's timeline.
    last_segment: str = ""
    #: Up to here the WAL is there without a hole, from the newest backup on (or from the first segment, if there is no
    #: backup), by finished segments and, as far as their names tell, by tails; None if there is no WAL.
    durable_lsn: str | None = None
    #: So many bytes of that are in tails alone.
    tail_bytes: int = 0
    #: The first segment that is missing there although later ones are stored; empty if none is.
    missing: str = ""
    #: Bytes written by the server and not yet there; None if the server or the destination does not answer.
    lag_bytes: int | None = None
    #: Segments missing between stored ones.
    holes: int = 0
    last_backup: str = ""
    #: What could not be read there, one sentence each.
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """The stream, as the server tells of it."""

    slot: str
    #: Empty if walship streams from the slot; else what is in the way.
    problem: str
    #: reserved, extended, unreserved, lost; empty if there is no slot, or it keeps nothing.
    wal_status: str
    #: Bytes of WAL that the server keeps for the slot.
    retained_bytes: int
    #: Bytes that may be written before the slot is in danger; None without a limit.
    safe_wal_size: int | None
    #: async, potential, sync or quorum; empty if walship does not stream.
    sync_state: str
    #: What commits wait for, by the server's settings.
    commits: str
    #: Whether no commit returns now before we have confirmed it.
    waited_for: bool
    #: What ``check`` calls an error, and ``problem`` does not tell.
    errors: tuple[str, ...]
    #: Up to here the server has WAL that it sends: what it has written and not flushed, no stream can have.
    flushed_lsn: str


@dataclass(frozen=True, slots=True)
class Status:
    """All of it; ``reasons`` is empty if all is well."""

    system_id: str
    now: datetime
    #: Empty if the server answered.
    server_error: str
    current_lsn: str | None
    #: The server's; None likewise.
    timeline: int | None
    #: None if there is no spool, or it cannot be read.
    spool: SpoolState | None
    #: Empty if the spool could be read.
    spool_error: str
    #: Process id of the service that ships the spool; None if there is none.
    service: int | None
    #: The same for people, where no spool tells it; else empty.
    service_words: str
    #: None if WALSHIP_SOURCES is without stream, or the server does not answer.
    stream: StreamStatus | None
    destinations: tuple[DestinationStatus, ...]
    reasons: tuple[str, ...] = field(default=())

    @property
    def healthy(self) -> bool:
        return not self.reasons

    def result(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"healthy": self.healthy, **asdict(self)}


async def read_status(site: Site, *, waits: Callable[[str], None] = lambda _: None) -> Status:
    """Look at everything. What does not answer is part of the status, never an error.

    With the stream on, bytes that a destination lacks may be on their way, or may be refused there for hours. So it is
    looked at again until they were due (``waits`` is told once, in a sentence): ``GRACE`` seconds behind the interval
    at most, and no longer than what is missing needs.
    """
    begun = site.clock.monotonic()
    first, server = await _look(site)
    status, late = first, _late(first, first, site)
    interval = site.settings.tail_interval if site.settings.tail_interval <= LONGEST else 0
    for seconds in range(1, GRACE + 1):
        if not late:
            break
        if seconds == 1:
            waits(f"looking again, for up to {interval + GRACE:g} s: the newest WAL is not yet at {', '.join(late)}")
        await site.clock.sleep(max(0.0, begun + interval + seconds - site.clock.monotonic()))
        status, server = await _look(site)
        late = _late(status, first, site)
    passed = site.clock.monotonic() - begun
    missing = [f"{name}: {what} {passed:.0f} s ago" for name, what in late.items()]
    return replace(status, reasons=(*_reasons(status, server, site), *missing))


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


async def _look(site: Site) -> tuple[Status, ServerFacts | None]:
    """Once, without reasons."""
    now = site.clock.now()
    server, stream, server_error = await _server(site)
    spool_dir = site.settings.spool_dir if "watch" in site.settings.sources else None
    spool, spool_error = None, ""
    if spool_dir:
        try:
            spool = look_at_spool(spool_dir, now)
        except SourceError as error:
            spool_error = error.fact
    destinations = []
    for destination, store in zip(site.destinations, site.stores, strict=True):
        destinations.append(await _destination(store, site, server, required=destination.required))
    service_words = "unknown" if spool_error else ""
    if "stream" in site.settings.sources and spool_dir is None:
        service_words = await _service(site.stores, stream)
    status = Status(
        system_id=site.facts.system_id,
        now=now,
        server_error=server_error,
        current_lsn=str(server.wal_lsn) if server else None,
        timeline=server.timeline if server else None,
        spool=spool,
        spool_error=spool_error,
        service=holder(spool_dir) if spool_dir else None,
        service_words=service_words,
        stream=stream,
        destinations=tuple(destinations),
    )
    return status, server


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


async def _server(site: Site) -> tuple[ServerFacts | None, StreamStatus | None, str]:
    stream = None
    try:
        async with await connect(site.settings) as connection:
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


async def _destination(store: Store, site: Site, server: ServerFacts | None, *, required: bool) -> DestinationStatus:
    listing = Listing(site.facts.system_id)
    fetch = Fetcher([store], site.chain, site.facts.system_id)
    names = []
    try:
        # Tails first: a segment that is finished meanwhile is seen in one of the two listings.
        tails = [tail async for entry in store.list("tail/") if (tail := TailName.parse(entry.key))]
        async for entry in store.list("wal/"):
            listing.add(entry.key)
        async for entry in store.list("base/", shallow=True):
            name = entry.key.removeprefix("base/").rstrip("/")
            if backup_of(info_key(name)):
                names.append(name)
        backup = await _newest_backup(names, fetch, listing)
        await _read_histories(fetch, listing)
    except StoreError as error:
        return DestinationStatus(store.name, required, error=error.fact)
    catalog = with_claimed_tails(listing.catalog(site.facts.segment_size), tails)
    timeline = server.timeline if server and server.timeline in catalog.timelines else catalog.newest_timeline
    runs = catalog.segments.get(timeline)
    reach = unbroken(catalog, timeline, backup)
    problems = catalog.problems
    if backup is not None and not leads_to(catalog, timeline, backup):
        problems += (f"no base backup leads to timeline {timeline}, where the WAL is now: take one (`walship backup`)",)
    return DestinationStatus(
        store.name,
        required,
        timeline=timeline,
        last_segment=catalog.file(timeline, runs.last).name if runs else "",
        durable_lsn=str(reach.lsn) if reach.lsn is not None else None,
        tail_bytes=reach.in_tails,
        missing=reach.missing.name if reach.missing else "",
        lag_bytes=max(0, server.wal_lsn - reach.lsn) if server and reach.lsn is not None else None,
        holes=sum(hole.count for hole in catalog.holes()),
        last_backup=backup.name if backup else "",
        problems=problems,
    )


async def _newest_backup(names: list[str], fetch: Fetch, listing: Listing) -> BackupInfo | None:
    """A folder proves nothing: a backup is there when its backup_info is. Only the newest is read: they can be big."""
    for name in sorted(names, reverse=True):
        try:
            fetched = await fetch(info_key(name), backup=None, most=_MOST_INFO)
            return checked_info(info_key(name), name, fetched.plain)
        except ObjectMissing:
            continue  # being taken, or never finished
        except IntegrityError as error:
            listing.problem(f"backup {name} cannot be used: {error.fact}")
    return None


async def _read_histories(fetch: Fetch, listing: Listing) -> None:
    for file in sorted(listing.history_files):
        try:
            fetched = await fetch(wal_key(file), most=_MOST_HISTORY)
            listing.add_history(file.timeline, parse_history(file.name, bytes(fetched.plain)))
        except IntegrityError as error:
            listing.unreadable_history(file.timeline, error.fact)


def _reasons(status: Status, server: ServerFacts | None, site: Site) -> Iterator[str]:
    """What keeps the status from being healthy, the gravest first."""
    if status.server_error:
        yield f"server: {status.server_error}"
    if server and server.archiver.failing and "watch" in site.settings.sources:
        yield f"server: archiving fails since {server.archiver.last_failed_wal}"
    if status.stream is not None and status.stream.problem:
        yield f"stream: {status.stream.problem}"
    if status.stream is not None:
        yield from status.stream.errors
    if status.spool_error:
        yield f"spool: {status.spool_error}"
    if status.spool is not None:
        if status.service is None:
            yield "no service ships the spool (`walship run`)"
        if status.spool.oldest_seconds > SLOW.total_seconds():
            yield f"spool: {status.spool.files} files wait, the oldest for {status.spool.oldest_seconds:.0f} s"
        if status.spool.refused:
            yield f"spool: {status.spool.refused} files were refused and moved aside"
    for place in status.destinations:
        streamed = status.stream is not None and not status.stream.problem
        for reason in _reasons_of(place, None if streamed else 4 * site.facts.segment_size):
            yield f"{place.name}: {reason}"


def _reasons_of(place: DestinationStatus, most: int | None) -> Iterator[str]:
    """``most`` bytes may be on their way; None: somebody else looks at that."""
    if place.error:
        yield place.error
        return
    yield from place.problems
    if place.missing:
        yield f"{place.missing} is missing: what lies behind it cannot be reached"
    # Before the newest backup they harm nobody who wants to go back to a moment behind it; `walship list` shows them.
    if place.holes and not place.last_backup:
        yield f"{place.holes} segments are missing between stored ones"
    if place.durable_lsn is None:
        yield "no WAL yet"
    elif most is not None and place.lag_bytes is not None and place.lag_bytes > most:
        yield f"{place.lag_bytes} bytes of WAL are not there yet"
    if not place.last_backup:
        yield "no base backup"
