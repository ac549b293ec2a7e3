"""What all verbs share: run an async function, take settings, print a result."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

import click

from infra.monitoring import log
from infra.settings import Settings, load

P = ParamSpec("P")

#: Exit code of a verb that SIGTERM has stopped: 128 + 15.
TERMINATED = 143

#: For every verb that prints a result.
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result, or the error, as JSON.")

cluster_option = click.option(
    "--cluster", default="", metavar="ID", help="System identifier, where a destination holds several clusters."
)


def asynchronous(function: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run the verb in an event loop. SIGTERM and SIGINT cancel it, so that it stops cleanly, whatever it does.

    A verb that was stopped has not done its work: SystemExit 143 (or KeyboardInterrupt), as a shell reports it.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        log.configure(plain=True)
        if asyncio.run(until_signalled(function(*args, **kwargs))):
            say("walship: stopped by SIGTERM before it was done")
            raise SystemExit(TERMINATED)

    return run


async def until_signalled(work: Coroutine[Any, Any, None]) -> bool:
    """Do the work, or as much of it as there is time for. True if SIGTERM ended it, KeyboardInterrupt for SIGINT."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not received:
            raise
        if received[0] == signal.SIGINT:
            raise KeyboardInterrupt from None
        return True
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    return False


def settings() -> Settings:
    """Settings of the environment and ``.env``, or a ConfigError."""
    return load()


def emit(result: Any, lines: list[str], *, as_json: bool) -> None:
    """The result, on stdout: for a machine or for a person."""
    if as_json:
        click.echo(json.dumps(result, indent=2, default=str))
    else:
        for line in lines:
            click.echo(line)


def say(line: str) -> None:
    """Something for people that is not the result, on stderr."""
    click.echo(line, err=True)


def human(size: float) -> str:
    """``1536`` → ``1.5 KB``; powers of 1024, as PostgreSQL's pg_size_pretty counts."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"
