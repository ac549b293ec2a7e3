"""What all verbs share: run an async function, take settings, print a result."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

import click
from click.core import ParameterSource

from infra.monitoring import log
from infra.settings import Settings, load
from pipeline.errors import ConfigError
from pipeline.moments import in_json

P = ParamSpec("P")

#: Exit code of a verb that SIGTERM has stopped: 128 + 15.
TERMINATED = 143

#: For every verb that prints a result.
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result, or the error, as JSON.")

cluster_option = click.option(
    "--cluster", default="", metavar="ID", help="System identifier, where a destination holds several clusters."
)

as_of_option = click.option(
    "--as-of", metavar="TIME", help="Read the bucket as it was then, before objects were deleted or replaced."
)


def destination_names(
    context: click.Context,  # noqa: ARG001  the signature is click's
    parameter: click.Parameter,  # noqa: ARG001  likewise
    incomplete: str,
) -> list[str]:
    """For the shell, which completes a word with them: none where the settings are wrong, for it has no use for why."""
    from infra.storage import display_name

    with contextlib.suppress(ConfigError, OSError):
        names = [display_name(url) for url in load(keyless=True).destinations]
        return [name for name in names if name.startswith(incomplete)]
    return []


from_option = click.option(
    "--from", "source", default="", metavar="DEST", help="Read from this destination only.",
    shell_complete=destination_names,
)  # fmt: skip


def asynchronous(function: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run the verb in an event loop. SIGTERM or SIGINT cancels it, so that it stops cleanly, whatever it does.

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
    """Do the work, or as much of it as there is time for. True if SIGTERM ended it, KeyboardInterrupt for SIGINT.

    Only the first signal cancels it: a second one would end the cleaning up that the first one has begun. Whoever sends
    three means it, and gets what the signal does to any program.
    """
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            task.cancel()
        elif len(received) == 2:
            say("walship: it is ending already, and cleans up first; once more ends it at once, uncleaned")
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

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
        if not received:  # else they stay until the loop is closed, which waits for its threads
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
    return False


def settings() -> Settings:
    """Settings of the environment and ``.env``, or a ConfigError."""
    return load()


def typed() -> tuple[str, ...]:
    """What was typed behind the verb that is running, for the record of it; of a URL what may be shown."""
    from infra.storage import display_name

    context = click.get_current_context()
    words: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params.get(name)
        option = max(parameter.opts, key=len) if isinstance(parameter, click.Option) else ""
        for each in value if isinstance(value, tuple | list) else (value,):
            shown = display_name(str(each)) if "://" in str(each) else str(each)
            words.append(option if each is True else f"{option} {shown}".strip())
    return tuple(words)


def emit(result: Any, lines: list[str], *, as_json: bool) -> None:
    """The result, on stdout: for a machine or for a person."""
    if as_json:
        click.echo(json.dumps(result, indent=2, default=in_json))
    else:
        for line in lines:
            click.echo(line)


def say(line: str) -> None:
    """Something for people that is not the result, on stderr. What was told of a destination is not told twice."""
    click.echo(log.shortened(line), err=True)


def human(size: float) -> str:
    """``1536`` → ``1.5 KB``; powers of 1024, as PostgreSQL's pg_size_pretty counts."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"
