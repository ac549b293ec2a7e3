"""``walship list``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import click

from handlers.fetch import Fetcher, read_catalog
from handlers.plan import last_moment
from infra.cli.answering import as_of, heard
from infra.cli.verb import as_of_option, asynchronous, cluster_option, emit, human, json_option, say, settings
from infra.pins import pins_of
from infra.wiring import open_site
from pipeline.catalog import Catalog
from pipeline.errors import IntegrityError, RecoveryError, StoreError
from pipeline.moments import show
from pipeline.runs import Window
from pipeline.wal import Lsn


@click.command("list")
@cluster_option
@as_of_option
@json_option
@asynchronous
async def command(cluster: str, as_json: bool, **options: Any) -> None:
    """Base backups, how far each can be rolled forward, and holes in the WAL.

    What any destination has that answers counts; `walship verify` tells what each of them lacks.

    \b
    Examples:
      walship list
      walship list --cluster 7400000000000000000
      walship list --json
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    waits = None if as_json else say
    async with open_site(await as_of(settings(), options["as_of"]), cluster=cluster, waits=waits) as site:
        away: list[str] = []
        there, _ = await heard(site, lambda _: True, tell=away.append)
        for line in away:
            say(line)
        fetch = Fetcher(
            there.stores, site.chain, site.facts.system_id, refresh=lambda: site.keys.refresh_from(there.stores)
        )
        catalog = await read_catalog(
            there.stores, fetch, site.facts.system_id, segment_size=site.facts.segment_size, notify=say
        )
        moments = await _last_moments(catalog, fetch)
        pinned = await pins_of(there, tell=say)
        if not site.keys.reads:
            say("this host can only write (WALSHIP_WRITER_FILE): what can be restored is shown where a key is at hand")
    emit(_result(catalog, moments, pinned, away), _lines(catalog, moments, pinned), as_json=as_json)


async def _last_moments(catalog: Catalog, fetch: Fetcher) -> dict[tuple[int, Lsn], datetime | None]:
    """Timeline and end of a window → when the last transaction before it ended. The last segments are read for it."""
    found: dict[tuple[int, Lsn], datetime | None] = {}
    for window in reversed(catalog.windows()):  # the newest backup needs the least reading
        key = window.timeline, window.end
        if found.get(key) is None:
            try:
                ending = await last_moment(catalog, window.backup, window.timeline, fetch=fetch)
            except (IntegrityError, RecoveryError, StoreError) as error:
                say(f"the last WAL of timeline {window.timeline} cannot be read: {error.fact}")
                continue
            found[key] = ending.last_transaction
    return found


def _until(window: Window, moments: dict[tuple[int, Lsn], datetime | None]) -> datetime | None:
    """The last time in the window, never before the backup's end, where it begins. None: its WAL could not be read."""
    key = window.timeline, window.end
    if key not in moments:
        return None
    return max(moments[key] or window.backup.stopped, window.backup.stopped)


def _until_words(window: Window, moments: dict[tuple[int, Lsn], datetime | None]) -> str:
    until = _until(window, moments)
    if until is None:
        return "an unknown time (its last WAL cannot be read)"
    if until == window.backup.stopped:
        return "the backup's end (no transaction is stored after it)"
    return show(until)


def _tail_words(window: Window) -> str:
    """Where the end is the open segment's, which is stored as tails so far."""
    return f", the last {human(window.tail)} of it in tails of the open segment" if window.tail else ""


def _result(
    catalog: Catalog,
    moments: dict[tuple[int, Lsn], datetime | None],
    pinned: Mapping[str, list[str]],
    away: Sequence[str],
) -> dict[str, Any]:
    return {
        "system_id": catalog.system_id,
        "segment_size": catalog.segment_size,
        "backups": [
            {
                "name": b.name,
                "kind": b.kind,
                "parent": b.parent or None,
                "started": b.started.isoformat(),
                "stopped": b.stopped.isoformat(),
                "timeline": b.timeline,
                "start_lsn": str(b.start_lsn),
                "stop_lsn": str(b.stop_lsn),
                "size": b.size,
                "stored_size": b.stored_size,
                "server_version": b.server_version,
                "tablespaces": [t.location for t in b.tablespaces],
                "pins": pinned.get(b.name, []),
            }
            for b in catalog.backups
        ],
        "windows": [
            {
                "backup": w.backup.name,
                "timeline": w.timeline,
                "from": w.backup.stopped.isoformat(),
                "from_lsn": str(w.start),
                "to": end.isoformat() if (end := _until(w, moments)) else None,
                "to_lsn": str(w.end),
                "tail_bytes": w.tail,
                "missing": str(w.missing) if w.missing else None,
            }
            for w in catalog.windows()
        ],
        "holes": [{"first": h.first.name, "last": h.last.name, "segments": h.count} for h in catalog.holes()],
        "unknown": {"objects": catalog.unknown, "examples": list(catalog.examples)},
        "sealed": list(catalog.sealed),
        "problems": [*away, *catalog.problems],
        "tail_notices": list(catalog.tail_notices),
    }


def _lines(
    catalog: Catalog, moments: dict[tuple[int, Lsn], datetime | None], pinned: Mapping[str, list[str]]
) -> list[str]:
    lines = [f"cluster {catalog.system_id}"]
    lines += [f"{name}  encrypted: this host can only write, and cannot look into it" for name in catalog.sealed]
    if not catalog.backups and not catalog.sealed:
        lines.append("no base backup yet: `walship backup` takes one")
    for backup in catalog.backups:
        lines.append(
            f"{backup.name}  {show(backup.stopped)}  PostgreSQL {backup.major}  {human(backup.size)}"
            f" (stored {human(backup.stored_size)})"
            + (f", what changed since {backup.parent}" if backup.parent else "")
        )
        lines += [f"  {words}" for words in pinned.get(backup.name, ())]
        for window in catalog.windows():
            if window.backup is backup:
                end = f"; segment {window.missing} is missing" if window.missing else ""
                until = _until_words(window, moments)
                lines.append(f"  restorable on timeline {window.timeline}: {show(backup.stopped)} to {until}{end}")
                lines.append(f"    LSN {window.start} to {window.end}{_tail_words(window)}")
    lines += [f"tail: {notice}" for notice in catalog.tail_notices]
    lines += [f"hole: {h.count} segments are missing, {h.first} to {h.last}" for h in catalog.holes()]
    if catalog.unknown:
        lines.append(f"not walship's: {catalog.unknown} objects below wal/, for example {', '.join(catalog.examples)}")
    return lines
