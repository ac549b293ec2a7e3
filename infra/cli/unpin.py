"""``walship unpin``."""

from __future__ import annotations

import click

from infra.cli.verb import asynchronous, cluster_option, emit, json_option, settings
from infra.pins import unpin
from infra.wiring import open_site


@click.command("unpin")
@click.argument("backup")
@cluster_option
@json_option
@asynchronous
async def command(backup: str, cluster: str, as_json: bool) -> None:
    """Remove the pin of a backup, at every destination. From then on the policy decides about it.

    Example: walship unpin base_20260114_120000
    """
    async with open_site(settings(), cluster=cluster) as site:
        found = await unpin(site, backup)
    was = "; ".join(pin.words for pin in found) or "pinned, by a pin that could not be read"
    emit(
        {"backup": backup, "was": [pin.words for pin in found]},
        [f"{backup} is pinned no longer; it was {was}"],
        as_json=as_json,
    )
