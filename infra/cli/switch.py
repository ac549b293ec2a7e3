"""``walship switch``."""

from __future__ import annotations

import click

from infra.alongside import alongside
from infra.cli.optional import not_yet
from infra.cli.verb import asynchronous, emit, json_option, say, settings
from infra.postgres.connect import connect
from infra.postgres.control import read_facts, switch_wal
from infra.postgres.problems import handing_over, refuse
from infra.safety import store_history, wait_for_earlier, wait_for_wal, without
from infra.storage.retry import LOOK
from infra.storage.rooted import Rooted
from infra.wiring import open_destinations, open_shipping, open_site


@click.command("switch")
@json_option
@asynchronous
async def command(as_json: bool) -> None:
    """Switch WAL and wait until the old segment, and all before it, is at every required destination.

    All that was committed before is then offsite. Where no service runs, it ships meanwhile itself. (`walship push`
    does not end the open segment: it ships only what lies in the spool now.)

    A destination that is not required gets a few seconds more; one that lacks the segment then is named on stderr, and
    no failure. If the server is not set up to hand over its WAL, it fails at once, and nothing is switched. If a
    required destination was emptied, it fails without waiting for it.

    \b
    Examples:
      walship switch
      walship switch --json
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    wanted = settings()
    async with await connect(wanted) as connection:
        server = await read_facts(connection)
        if "stream" not in wanted.sources:  # then the segment could come through the archive alone
            refuse(handing_over(server, wanted))
        segment = await switch_wal(connection, segment_size=server.segment_size)
    async with (
        open_site(wanted, cluster=server.system_identifier, writer=True) as site,
        open_shipping(site) as shipping,
        alongside(site, shipping, say),
        open_destinations(wanted, policy=LOOK) as looked_at,
    ):
        began = site.clock.monotonic()
        await wait_for_wal(site.required_stores, [segment], clock=site.clock, timeout=wanted.wal_timeout, tell=say)
        await wait_for_earlier(site, segment, tell=say)
        seconds = site.clock.monotonic() - began
        await store_history(site, shipping.command.ship, segment.timeline)
        others = [Rooted(each.root, site.facts.system_id) for each in looked_at if not each.required]
        missing = await without(others, [segment], clock=site.clock)
    for name, why in missing.items():
        say(not_yet(name, why))
    places = [store.name for store in site.stores if store.name not in missing]
    emit(
        {
            "segment": segment.name,
            "seconds": round(seconds, 3),
            "destinations": places,
            "missing": {name: why.fact for name, why in missing.items()},
        },
        [f"{segment.name} is safe at {', '.join(places)} after {seconds:.1f} s"],
        as_json=as_json,
    )
