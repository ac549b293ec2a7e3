"""``walship push``."""

from __future__ import annotations

import click

from infra.cli.verb import asynchronous, cluster_option, emit, json_option, settings
from infra.monitoring.log import log_notice
from infra.service import push


@click.command("push")
@cluster_option
@json_option
@asynchronous
async def command(cluster: str, as_json: bool) -> None:
    """Ship what waits in the spool, then exit. For a cron job, or before a host is shut down for good.

    Exits with 0 only if nothing that was there is left unshipped. The segment that is open is not there yet: `walship
    switch` ends it first, ships as this does where no service runs, and waits until all of it is safe. With the stream
    alone there is no spool, and `walship switch` is what ships.

    \b
    Examples:
      walship push
      walship push --json
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    shipped = await push(settings(), log_notice, cluster=cluster)
    result = {"shipped": shipped}
    emit(result, ["shipped 1 file" if shipped == 1 else f"shipped {shipped} files"], as_json=as_json)
