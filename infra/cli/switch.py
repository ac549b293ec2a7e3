"""``walship switch``."""

from __future__ import annotations

import click

from infra.alongside import alongside
from infra.cli.verb import asynchronous, emit, json_option, say, settings
from infra.postgres.connect import connect
from infra.postgres.control import read_facts, switch_wal
from infra.safety import store_history, wait_for_wal
from infra.wiring import open_shipping, open_site


@click.command("switch")
@json_option
@asynchronous
async def command(as_json: bool) -> None:
    """Switch WAL and wait until the old segment is at every destination.

    All that was committed before is then offsite. Needs a service that ships, or ships the spool itself.

    \b
    Examples:
      walship switch
      walship switch --json
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    wanted = settings()
    async with await connect(wanted) as connection:
        server = await read_facts(connection)
        segment = await switch_wal(connection, segment_size=server.segment_size)
    async with (
        open_site(wanted, cluster=server.system_identifier, writer=True) as site,
        open_shipping(site) as shipping,
        alongside(site, shipping, say),
    ):
        began = site.clock.monotonic()
        await wait_for_wal(site.stores, [segment], clock=site.clock, timeout=wanted.wal_timeout, tell=say)
        seconds = site.clock.monotonic() - began
        await store_history(site, shipping.command.ship, segment.timeline)
    places = ", ".join(store.name for store in site.stores)
    emit(
        {"segment": segment.name, "seconds": round(seconds, 3), "destinations": [s.name for s in site.stores]},
        [f"{segment.name} is safe at {places} after {seconds:.1f} s"],
        as_json=as_json,
    )
