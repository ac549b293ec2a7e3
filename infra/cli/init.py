"""``walship init``."""

from __future__ import annotations

from dataclasses import asdict

import click

from infra.at_hand import weakness
from infra.cli.verb import asynchronous, emit, json_option, say, settings
from infra.clock import SystemClock
from infra.founding import found
from infra.postgres.connect import connect
from infra.postgres.control import read_facts
from infra.repository import RepositoryFacts
from infra.wiring import open_destinations


@click.command("init")
@json_option
@asynchronous
async def command(as_json: bool) -> None:
    """Make the repository of the cluster that POSTGRES_* points to at every destination, or join it there.

    Run it once, and again whenever a destination is added. It never overwrites anything.

    \b
    Examples:
      walship init
      walship init --json
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    wanted = settings()
    clock = SystemClock()
    async with open_destinations(wanted) as destinations:
        async with await connect(wanted) as connection:
            server = await read_facts(connection)
        facts = RepositoryFacts(
            system_id=server.system_identifier,
            server_major=server.version_num // 10000,
            segment_size=server.segment_size,
            created=clock.now().isoformat(timespec="seconds"),
        )
        founded = await found(destinations, facts, wanted, clock)
    lines = [f"cluster {facts.system_id}, PostgreSQL {facts.server_major}, segments of {facts.segment_size >> 20} MB"]
    for place in founded:
        lines.append(f"{place.destination}: {'made' if place.made else 'was there already'}")
        lines.append(f"  {place.abilities.remark}")
    lines.append("next: `walship check`, then `walship run` for the WAL and `walship backup` for a first base backup")
    if wanted.backup_encryption_enabled or wanted.wal_encrypted:
        what = "passphrase" if wanted.passphrase else "private key"
        if wanted.passphrase or wanted.identity_file:
            lines.append(f"keep the {what} somewhere else than on this host: without it nothing can be read")
    emit({**asdict(facts), "destinations": [asdict(place) for place in founded]}, lines, as_json=as_json)
    if weak := weakness(wanted.passphrase):
        say(f"WARNING: {weak[0]}\nhint: {weak[1]}")
