"""``walship status``."""

from __future__ import annotations

import click

from infra.cli.verb import asynchronous, cluster_option, emit, human, json_option, say, settings
from infra.status import Status, StreamStatus, read_status
from infra.storage.retry import LOOK
from infra.wiring import open_site


@click.command("status")
@cluster_option
@json_option
@asynchronous
async def command(cluster: str, as_json: bool) -> None:
    """How far behind each destination is, what waits, and whether all is well.

    Read afresh from the server, the spool and every destination; nothing of it is remembered. With the stream, what a
    destination lacks is looked at again once it was due: that takes WALSHIP_TAIL_INTERVAL and a second, or a few if it
    does not come.

    The exit code is 0 also if it is NOT WELL; a script reads "healthy" of --json.

    Example: walship status --json
    """
    waits = None if as_json else say
    async with open_site(settings(), cluster=cluster, policy=LOOK, waits=waits) as site:
        status = await read_status(site, waits=waits or (lambda _: None))
    emit(status.result(), _lines(status), as_json=as_json)


def _lines(status: Status) -> list[str]:
    lines = [f"cluster {status.system_id}: {'all is well' if status.healthy else 'NOT WELL'}"]
    lines += [f"  ! {reason}" for reason in status.reasons]
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
    return lines


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
