"""``walship run``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import click

from infra.cli.verb import cluster_option, settings, until_signalled
from infra.malloc import give_back_large_blocks
from infra.monitoring import log
from infra.service import serve


@click.command("run")
@cluster_option
def command(cluster: str) -> None:
    """Ship WAL to every destination until told to stop (SIGTERM).

    It comes from the spool that PostgreSQL archives into (WALSHIP_SOURCES=watch), from the server itself through a
    replication slot that walship makes (stream), or from both (watch,stream).

    What was not yet acknowledged when it stops, however it stops, is still in the spool, and kept on the server by the
    slot: it goes on at the next start. Settings are read at the start only.

    \b
    Examples:
      walship run
      WALSHIP_SOURCES=stream walship run
    """  # noqa: D301  the character is meant: it tells click to leave these lines as they are
    log.configure()
    give_back_large_blocks()
    # To be told to stop is how a service ends: no other verb may call that a success.
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(until_signalled(serve(settings(), cluster=cluster)))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, whose shorter turns are half a millisecond of each synchronous commit; None, asyncio's, without it."""
    try:
        import uvloop
    except ImportError:
        return None  # it has no wheel for this platform, and nothing but speed depends on it
    return uvloop.new_event_loop
