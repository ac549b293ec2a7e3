"""What tests of the lease share: taking one, renewing it, looking at it, and a holder in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from handlers.body import joined
from infra.storage.lease import Lease, lease_key
from pipeline.contracts import Clock, Store
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody
from tests.clock import FastClock

_ROOT = Path(__file__).parents[1]
TTL = 15.0
DOWN = StoreError("nobody answers", passing=True)

#: A process that takes the lease in a folder, says its number, renews it, and says what ended that.
_HOLDER = """
import asyncio, sys
from pathlib import Path
from infra.clock import SystemClock
from infra.storage.lease import Lease
from infra.storage.local import LocalStore
from pipeline.errors import SourceError

async def main():
    ttl = float(sys.argv[2])
    lease = await Lease.acquire([LocalStore(Path(sys.argv[1]))], clock=SystemClock(), ttl=ttl, tell=lambda _: None)
    print(lease.epoch, flush=True)
    try:
        await lease.run()
    except SourceError as error:
        print(lease.lost.is_set(), error, flush=True)

asyncio.run(main())
"""


class Meanwhile(FastClock):
    """Whenever somebody sleeps by this clock, something happens elsewhere."""

    def __init__(self, act: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self._act = act

    async def sleep(self, seconds: float) -> None:
        await self._act()
        await super().sleep(seconds)


def silent(_line: str) -> None:
    """Told, and not of interest."""


async def take(*stores: Store, clock: Clock | None = None, tell: Callable[[str], None] = silent) -> Lease:
    return await Lease.acquire(stores, clock=clock or FastClock(), ttl=TTL, tell=tell, server="spool /spool")


async def beat(lease: Lease) -> None:
    """One heartbeat at each destination that answers."""
    for place in lease._places:
        with contextlib.suppress(StoreError):
            await lease._beat(place)


async def said(store: Store, number: int) -> dict[str, Any]:
    members = json.loads(joined(await store.get(lease_key(number))))
    assert isinstance(members, dict)
    return members


async def write(store: Store, number: int, content: bytes) -> None:
    await store.put(lease_key(number), MemoryBody((content,)), replace=True)


async def numbers(store: Store) -> list[int]:
    return sorted([int(info.key.removeprefix("lease/"), 16) async for info in store.list("lease/")])


@contextlib.contextmanager
def process(folder: Path, ttl: float = TTL) -> Iterator[subprocess.Popen[str]]:
    """A holder of lease 1 in a process of its own."""
    command = [sys.executable, "-c", _HOLDER, str(folder), str(ttl)]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "1\n"
            yield holder
        finally:
            holder.kill()
