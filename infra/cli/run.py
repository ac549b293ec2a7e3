"""``walship run``."""

from __future__ import annotations

import asyncio

import click

from infra.cli.verb import cluster_option, settings, until_signalled
from infra.monitoring import log
from infra.service import serve


@click.command("run")
@cluster_option
def command(cluster: str) -> None:
    """Ship WAL from the spool to every destination until told to stop (SIGTERM).

    What was not yet acknowledged when it stops, however it stops, is still in the spool and goes on at the next start.

    Example: walship run
    """
    log.configure()
    # To be told to stop is how a service ends: no other verb may call that a success.
    asyncio.run(until_signalled(serve(settings(), cluster=cluster)))
