"""``walship run``."""

from __future__ import annotations

import click

from infra.cli.verb import asynchronous, settings
from infra.service import serve


@click.command("run")
@asynchronous
async def command() -> None:
    """Ship WAL from the spool to every destination until told to stop (SIGTERM).

    What was not yet acknowledged when it stops, however it stops, is still in the spool and goes on at the next start.

    Example: walship run
    """
    await serve(settings())
