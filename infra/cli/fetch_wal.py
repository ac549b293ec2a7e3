"""``walship fetch-wal``."""

from __future__ import annotations

from pathlib import Path

import click

from handlers.serve_wal import deliver
from infra.cli.verb import asynchronous
from infra.fetch_context import FetchContext
from infra.postgres.wal_script import ABSENT
from pipeline.errors import SourceError


@click.command("fetch-wal")
@click.argument("name")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--context",
    "context_file",
    required=True,
    type=click.Path(path_type=Path),
    help="File that `walship restore` has left in the data directory.",
)
@click.pass_context
@asynchronous
async def command(context: click.Context, name: str, path: Path, context_file: Path) -> None:
    """Fetch one WAL file for a recovering server: NAME to PATH.

    Called by the sh script behind restore_command, never by restore_command itself. Exit status 0: it is there, whole;
    44: every destination answered, and none has it; anything else is an error, which the script turns into 200 so that
    recovery stops instead of promoting a truncated cluster.
    """
    async with FetchContext.read(context_file).open() as server:
        try:
            found = await deliver(server, name, path)
        except OSError as error:
            raise SourceError(f"{path} cannot be written: {error.strerror}") from None
    if not found:
        context.exit(ABSENT)
