"""While a standby follows the archive: who ends that, what is told meanwhile, and what it does without a store."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from handlers.serve_wal import WalServer
from infra.postgres.restored import Started
from pipeline.errors import StoreError, WalshipError
from pipeline.recovery import RestorePlan
from pipeline.wal import parse_history

T = TypeVar("T")

#: Seconds between two looks for a timeline that leaves the one that a standby follows.
_LOOK = 30.0
#: Seconds before a store is asked again that has failed with all its retries.
_AGAIN = 1.0


class WalAsker:
    """Asks for a server's WAL: from when it is a standby that ``follows`` on, a store that is away is waited for.

    An error would end a server that others read from, over seconds without the store. "Absent" would let it be promoted
    meanwhile without what is stored: so a promotion waits as well. A shutdown does not.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.follows = False

    async def ask(self, question: Callable[..., Awaitable[T]], name: str, *more: Any) -> T:
        """What ``question`` answers for that file. Raises what it raises, but for what passes."""
        waited = False
        while True:
            try:
                answer = await question(name, *more)
            except StoreError as error:
                if not (self.follows and error.passing):
                    raise
                if not waited:
                    self._say(f"the standby waits for {name}, which cannot be fetched now: {error.fact}")
                waited = True
                await asyncio.sleep(_AGAIN)
            else:
                if waited:
                    self._say(f"the standby goes on: the store has answered for {name}")
                return answer


async def follow(
    server: Started, ended: Coroutine[Any, Any, bool], plan: RestorePlan, wal: WalServer, say: Callable[[str], None]
) -> bool:
    """Until the standby is promoted (True) or stopped, or SIGINT or SIGTERM ends the feed and leaves it running.

    Raises what ``ended`` raises.
    """
    say(
        f"the standby (process {server.pid}, port {server.port}) follows timeline {plan.timeline} of the archive;"
        " SIGINT or SIGTERM ends this command and not the server, which then starts walship for each segment"
    )
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, told.set)
    ending = asyncio.create_task(ended)
    waits = [asyncio.create_task(told.wait()), ending]
    looking = asyncio.create_task(_tell_of_fork(plan.timeline, wal, say))
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            say(f"the standby goes on without this command, as process {server.pid}")
            return False
        if not ending.result():
            say(f"the standby (process {server.pid}) was stopped")
        return ending.result()
    finally:
        # The signals stay ours: what remains is done in a moment, and another signal must not cut it short.
        for task in (*waits, looking):
            task.cancel()


async def _tell_of_fork(timeline: int, wal: WalServer, say: Callable[[str], None]) -> None:
    """A standby stays on its timeline, and would silently stand still once the primary has gone over to another one."""
    newer = timeline + 1
    while True:
        await asyncio.sleep(_LOOK)
        try:
            while (history := await wal.read(f"{newer:08X}.history")) is not None:
                forks = parse_history(f"{newer:08X}.history", bytes(history))
                if forks and forks[-1].timeline == timeline:
                    say(
                        f"timeline {newer} has left timeline {timeline} at LSN {forks[-1].lsn}, and this standby goes"
                        f" on following timeline {timeline} only; to follow the new one, end it, and restore it again"
                        " with --standby --delta"
                    )
                    return
                newer += 1
        except WalshipError:
            continue  # the feed tells what is wrong with the store
