"""The schedule of a repository as its records tell it: what ran last, and what is owed. For the service and for status.

What never ran has been owed since the repository was made. Backups are more than records of them: as long as a
repository has none that is complete, the first one does not wait for its time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

from infra.cron import Cron, zone
from infra.records import AT_ONCE, Listed, listed, read_all
from infra.settings import Settings
from infra.wiring import Site
from pipeline.catalog import backup_of, info_key
from pipeline.contracts import Fetch
from pipeline.errors import StoreError
from pipeline.operations import Record, RecordName
from pipeline.schedule import ORDER, VERBS, Next, Schedule

#: So many records of one verb are read at most, from the newest on, to find out what ran when.
_MOST = 256


def jobs_of(settings: Settings) -> dict[str, Next]:
    """What is wanted by the settings. Raises ConfigError."""
    time_zone = zone(settings.time_zone)
    expressions = {job: str(getattr(settings, f"schedule_{job}")) for job in ORDER}
    return {job: Cron(expression, time_zone).after for job, expression in expressions.items() if expression}


async def remembered(site: Site) -> Schedule:
    """What is due when, by what was done. StoreError if no destination answers."""
    now = site.clock.now()
    schedule = Schedule(jobs_of(site.settings), now)
    if not schedule.jobs:
        return schedule
    there = await listed(site.stores)
    newest = await newest_backup(site)
    first = next((job for job in schedule.jobs if VERBS[job] == "backup"), "")
    for job in schedule.jobs:
        name, record = await last_of(job, there, site.fetch)
        if name is not None:
            schedule.remember(job, record.ended if record else name.ended, failed=not name.ok)
        elif VERBS[job] == "backup" and newest:
            schedule.remember(job, _moment(newest, site))
        else:
            schedule.remember(job, _created(site))
        if job == first and newest == "" and (name is None or name.ok):  # one that failed is tried again soon anyway
            schedule.at_once(job, now)
    return schedule


async def last_of(job: str, there: Listed, fetch: Fetch) -> tuple[RecordName | None, Record | None]:
    """The newest record of a run that was not stopped halfway; its content, if that can be read."""
    async for name, record in _newest_first(VERBS[job], there.names, fetch):
        if _is_of(job, name, record):
            return name, record
    return None, None


def _is_of(job: str, name: RecordName, record: Record | None) -> bool:
    """A full backup is an incremental one too. Of what cannot be read (a host may write only) nobody knows better."""
    if record is None:
        return True
    if record.stopped:
        return False
    if job != "full":
        return VERBS[job] != "backup" or name.ok or "--incremental" in record.arguments
    return record.summary.get("kind") == "full" if name.ok else "--incremental" not in record.arguments


async def _newest_first(
    verb: str, names: Sequence[RecordName], fetch: Fetch
) -> AsyncIterator[tuple[RecordName, Record | None]]:
    chosen = [name for name in names if name.verb == verb][:_MOST]
    size = 1  # the newest one will do, most of the time
    while chosen:
        batch, chosen = chosen[:size], chosen[size:]
        for name, found in zip(batch, await read_all(fetch, batch), strict=True):
            yield name, found if isinstance(found, Record) else None
        size = AT_ONCE


async def newest_backup(site: Site) -> str | None:
    """Name of the newest complete backup at any destination; empty if there is none.

    None if none is at those that answer, and another does not.
    """
    found, unknown = "", False
    for store in site.stores:
        try:
            folders = [entry.key async for entry in store.list("base/", shallow=True)]
            for name in sorted((folder.removeprefix("base/").rstrip("/") for folder in folders), reverse=True):
                if name <= found:
                    break
                if backup_of(info_key(name)) and await _there(store.list(info_key(name))):
                    found = name
        except StoreError:
            unknown = True
    return None if unknown and not found else found


async def _there(entries: AsyncIterator[object]) -> bool:
    async for _ in entries:
        return True
    return False


def _moment(backup: str, site: Site) -> datetime:
    """When a backup of which there is no record was begun, as its name tells."""
    try:
        return datetime.strptime(backup, "base_%Y%m%d_%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return _created(site)


def _created(site: Site) -> datetime:
    """When the repository was made. Anybody who may write to the store may have written that."""
    try:
        made = datetime.fromisoformat(site.facts.created)
    except ValueError:
        return site.clock.now()
    return made if made.tzinfo else made.replace(tzinfo=UTC)
