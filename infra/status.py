"""How things stand, read from the truth each time: the server, the spool, and a listing of every destination."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from infra.postgres.connect import connect
from infra.postgres.control import ServerFacts, read_facts
from infra.sources.spool import SpoolState, holder, look_at_spool
from infra.wiring import Site
from pipeline.catalog import Listing, info_key
from pipeline.contracts import Store
from pipeline.errors import ObjectMissing, SourceError, StoreError
from pipeline.wal import Lsn

#: Waiting longer than this in the spool is no longer a passing queue.
SLOW = timedelta(minutes=2)


@dataclass(frozen=True, slots=True)
class DestinationStatus:
    """One destination."""

    name: str
    required: bool
    #: Empty if it answered.
    error: str = ""
    #: The newest finished segment there, on the server's timeline.
    last_segment: str = ""
    #: All finished WAL before this position is there; None if nothing is.
    durable_lsn: str | None = None
    #: Bytes written by the server and not yet there; None if the server or the destination does not answer.
    lag_bytes: int | None = None
    #: Segments missing between stored ones.
    holes: int = 0
    last_backup: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """All of it; ``reasons`` is empty if all is well."""

    system_id: str
    now: datetime
    #: Empty if the server answered.
    server_error: str
    current_lsn: str | None
    spool: SpoolState | None
    #: Process id of the service that ships the spool; None if there is none.
    service: int | None
    destinations: tuple[DestinationStatus, ...]
    reasons: tuple[str, ...] = field(default=())

    @property
    def healthy(self) -> bool:
        return not self.reasons

    def result(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"healthy": self.healthy, **asdict(self)}


async def read_status(site: Site) -> Status:
    """Look at everything. What does not answer is part of the status, never an error."""
    now = site.clock.now()
    server, server_error = await _server(site)
    spool_dir = site.settings.spool_dir
    spool = look_at_spool(spool_dir, now) if spool_dir else None
    destinations = []
    for destination, store in zip(site.destinations, site.stores, strict=True):
        destinations.append(await _destination(store, site, server, required=destination.required))
    status = Status(
        system_id=site.facts.system_id,
        now=now,
        server_error=server_error,
        current_lsn=str(server.wal_lsn) if server else None,
        spool=spool,
        service=holder(spool_dir) if spool_dir else None,
        destinations=tuple(destinations),
    )
    return replace(status, reasons=tuple(_reasons(status, server, site.facts.segment_size)))


async def _server(site: Site) -> tuple[ServerFacts | None, str]:
    try:
        async with await connect(site.settings) as connection:
            facts = await read_facts(connection)
    except SourceError as error:
        return None, error.fact
    if facts.system_identifier != site.facts.system_id:
        return None, f"the server is the cluster {facts.system_identifier}, not {site.facts.system_id}"
    return facts, ""


async def _destination(store: Store, site: Site, server: ServerFacts | None, *, required: bool) -> DestinationStatus:
    listing = Listing(site.facts.system_id)
    backups = []
    try:
        async for entry in store.list("wal/"):
            listing.add(entry.key)
        async for entry in store.list("base/", shallow=True):
            name = entry.key.removeprefix("base/").rstrip("/")
            if await _has_backup(store, name):
                backups.append(name)
    except StoreError as error:
        return DestinationStatus(store.name, required, error=error.fact)
    catalog = listing.catalog(site.facts.segment_size)
    timeline = server.timeline if server else catalog.newest_timeline
    runs = catalog.segments.get(timeline)
    durable = Lsn((runs.last + 1) * site.facts.segment_size) if runs else None
    lag = max(0, server.wal_lsn - durable) if server and durable is not None else None
    return DestinationStatus(
        store.name,
        required,
        last_segment=catalog.file(timeline, runs.last).name if runs else "",
        durable_lsn=str(durable) if durable is not None else None,
        lag_bytes=lag,
        holes=sum(hole.count for hole in catalog.holes()),
        last_backup=max(backups, default=""),
    )


async def _has_backup(store: Store, name: str) -> bool:
    """A folder proves nothing: a backup is there when its backup_info is."""
    try:
        await store.head(info_key(name))
    except ObjectMissing:
        return False
    return True


def _reasons(status: Status, server: ServerFacts | None, segment_size: int) -> Iterator[str]:
    """What keeps the status from being healthy, the gravest first."""
    if status.server_error:
        yield f"server: {status.server_error}"
    if server and server.archiver.failing:
        yield f"server: archiving fails since {server.archiver.last_failed_wal}"
    if status.spool is not None:
        if status.service is None:
            yield "no service ships the spool (`walship run`)"
        if status.spool.oldest_seconds > SLOW.total_seconds():
            yield f"spool: {status.spool.files} files wait, the oldest for {status.spool.oldest_seconds:.0f} s"
        if status.spool.refused:
            yield f"spool: {status.spool.refused} files were refused and moved aside"
    for place in status.destinations:
        for reason in _reasons_of(place, segment_size):
            yield f"{place.name}: {reason}"


def _reasons_of(place: DestinationStatus, segment_size: int) -> Iterator[str]:
    if place.error:
        yield place.error
        return
    if place.holes:
        yield f"{place.holes} segments are missing between stored ones"
    if place.durable_lsn is None:
        yield "no WAL yet"
    elif place.lag_bytes is not None and place.lag_bytes > 4 * segment_size:
        yield f"{place.lag_bytes} bytes of WAL are not there yet"
    if not place.last_backup:
        yield "no base backup"
