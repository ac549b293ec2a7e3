"""``walship pin``."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from infra.cli.verb import asynchronous, cluster_option, emit, json_option, say, settings
from infra.pins import pin
from infra.wiring import open_site
from pipeline.errors import ConfigError
from pipeline.moments import parse_time


@click.command("pin")
@click.argument("backup")
@click.option("--reason", default="", metavar="TEXT", help="Why; `walship list` and `walship expire` show it.")
@click.option("--until", metavar="TIME", help="The pin ends then; without it, with `walship unpin`.")
@cluster_option
@json_option
@asynchronous
async def command(backup: str, reason: str, until: str | None, cluster: str, as_json: bool) -> None:
    """Keep a backup, those that it builds on, and all WAL since it began, whatever the policy says.

    A pin at any destination counts. Pinning again replaces the pin.

    \b
    Examples:
      walship pin base_20260114_120000
      walship pin base_20260114_120000 --reason 'before the migration' --until 2027-01-01
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    end = _end(until)
    async with open_site(settings(), cluster=cluster) as site:
        made, taken = await pin(site, backup, reason=reason, until=end, tell=say)
    result = {
        "backup": backup,
        "reason": made.reason,
        "until": made.until.isoformat() if made.until else None,
        "destinations": taken,
    }
    emit(result, [f"{backup} is {made.words} (at {', '.join(taken)})"], as_json=as_json)


def _end(until: str | None) -> datetime | None:
    if until is None:
        return None
    try:
        return parse_time(until, now=datetime.now(UTC))
    except ConfigError as error:
        raise ConfigError(
            f"--until {until!r} is not a time", hint="like 2027-01-14, 2027-01-14 12:00:00 or 2027-01-14T12:00:00+01:00"
        ) from error
