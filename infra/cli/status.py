"""``walship status``."""

from __future__ import annotations

from datetime import datetime

import click

from infra.cli.verb import asynchronous, cluster_option, emit, human, json_option, say, settings
from infra.recoverable import Recoverable, Stretch
from infra.standing import Planned, Status, StreamStatus, judge
from infra.status import read_status
from infra.storage.retry import LOOK
from infra.wiring import open_site
from pipeline.moments import show

#: Holes that are named; the others are counted.
_MOST_HOLES = 5


@click.command("status")
@cluster_option
@json_option
@asynchronous
async def command(cluster: str, as_json: bool) -> None:
    """Whether it is safe and why, how far behind each destination is, and what can be restored.

    Read afresh from the server, the spool and every destination; nothing of it is remembered. With the stream, what a
    destination lacks is looked at again once it was due: that takes WALSHIP_TAIL_INTERVAL and a second, or a few if it
    does not come.

    "Safe on this host only": all is well, and losing the host may lose all of it.

    The exit code is 0 also if it is not safe; a script reads "healthy" of --json, or "state": safe, lagging, at_risk,
    unsafe or unknown.

    \b
    Examples:
      walship status
      walship status --json
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    waits = None if as_json else say
    async with open_site(settings(), cluster=cluster, policy=LOOK, waits=waits) as site:
        status = await read_status(site, waits=waits or (lambda _: None))
    emit(status.result(), _lines(status), as_json=as_json)


def _lines(status: Status) -> list[str]:
    lines = [judge(status)[1], f"cluster {status.system_id}"]
    lines += [f"  ! {reason}" for reason in (*status.reasons, *status.unknown)]
    lines += [f"  hint: {hint}" for hint in status.hints]
    if status.exposed is not None:
        lines += [f"  note: {status.exposed.fact}", f"  hint: {status.exposed.hint}"]
    lines.append(f"server   {status.server_error or f'WAL written to {status.current_lsn}'}")
    known = "not running" if status.service is None else f"process {status.service}"
    lines.append(f"service  {status.service_words or known}")
    if status.stream is not None:
        lines += _stream(status.stream)
    if status.spool_error:
        lines.append(f"spool    {status.spool_error}")
    if status.spool is not None:
        lines.append(
            f"spool    {status.spool.files} files wait ({human(status.spool.bytes)}),"
            f" {human(status.spool.free_bytes)} are free"
        )
    for place in status.destinations:
        lines.append(f"{place.name}{'' if place.required else ' (not required)'}")
        if place.error:
            lines.append(f"  {place.error}")
            continue
        lag = "unknown" if place.lag_bytes is None else human(place.lag_bytes)
        hole = f", {place.missing} is missing" if place.missing else ""
        newest = f"last segment {place.last_segment}"
        if not place.last_segment:
            newest = f"timeline {place.timeline}: no finished segment yet"
        tails = f", {human(place.tail_bytes)} in tails" if place.tail_bytes else ""
        lines.append(f"  {newest}{tails}{hole}; behind by {lag}")
        lines.append(f"  last backup  {place.last_backup or 'none'}")
    if status.recoverable is not None:
        lines += _recoverable(status.recoverable)
    if not status.reads:
        lines.append("restore  not known here: this host can only write (`walship list` tells, where a key is at hand)")
    lines += [f"verified {_when(status.last_verify)}", f"drill    {_when(status.last_drill)}"]
    return lines + [f"next     {_planned(each, status.now)}" for each in status.schedule]


def _recoverable(stored: Recoverable) -> list[str]:
    lines = [] if stored.stretches else ["restore  nothing: there is no base backup with the WAL that it needs"]
    lines += [f"restore  {_stretch(stretch, stored)}" for stretch in stored.stretches]
    if stored.backups:
        last = stored.backups[-1]
        count = "1 base backup" if len(stored.backups) == 1 else f"{len(stored.backups)} base backups"
        lines.append(f"backups  {count}, the last one {last.name} of {show(last.stopped)} ({human(last.size)})")
    for hole in stored.holes[:_MOST_HOLES]:
        several = f"{hole.segments} segments are missing, {hole.first} to {hole.last}"
        lines.append(f"hole     {several if hole.segments > 1 else f'segment {hole.first} is missing'}")
    if len(stored.holes) > _MOST_HOLES:
        lines.append(f"hole     {stored.missing_segments} segments are missing in all (`walship list` names them)")
    return lines


def _stretch(stretch: Stretch, stored: Recoverable) -> str:
    ends = f"to {show(stretch.ends)}" if stretch.ends else "to a time that is not known"
    where = "" if stretch.timeline == stored.newest_timeline else f" on timeline {stretch.timeline} (--timeline)"
    why = {"open": "", "hole": f"; {stretch.missing} is missing behind it", "left": ", where that timeline was left"}
    return f"any moment from {show(stretch.begins)} {ends}{where}{why[stretch.ended_by]}"


def _planned(planned: Planned, now: datetime) -> str:
    what = f"{planned.job} backup" if planned.job in ("full", "incremental") else planned.job
    if planned.next is None:
        return f"{what}: never"
    return f"{what}: {show(planned.next)}{'' if planned.next > now else ', and is due'}"


def _when(moment: datetime | None) -> str:
    return show(moment) if moment else "never with success, as far as is known"


def _stream(stream: StreamStatus) -> list[str]:
    safe = "" if stream.safe_wal_size is None else f", and can keep {human(max(0, stream.safe_wal_size))} more"
    kept = f"the slot {stream.slot} keeps {human(stream.retained_bytes)}{safe}"
    waits = "commits do not wait for it" if stream.sync_state == "async" else "commits need not wait for it"
    if stream.waited_for:
        waits = "commits wait for it"
    return [
        f"stream   {stream.problem or f'WAL streams, {waits}; {kept}'}",
        f"commits  {stream.commits.removeprefix('commits ')}",
    ]
