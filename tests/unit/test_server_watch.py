"""Whoever looks at the server beside the stream ends when the stream does."""

from __future__ import annotations

import asyncio

import pytest

from infra.clock import SystemClock
from infra.postgres.throwaway import free_port
from infra.settings import Settings
from infra.sources.server_watch import ServerWatch


@pytest.mark.parametrize("steps", range(5))
async def test_a_cancel_that_comes_with_a_suspicion_ends_it(steps: int) -> None:
    """Both come at one moment when the server dies: the watch's connection breaks, and so does the stream's."""
    settings = Settings(POSTGRES_HOST="127.0.0.1", POSTGRES_PORT=str(free_port()))
    told: list[bool] = []

    def tell(*, synchronous: bool) -> None:
        told.append(synchronous)

    watch = ServerWatch(settings, 0, clock=SystemClock(), synchronous=tell)
    task = asyncio.create_task(watch.run())
    await asyncio.sleep(0.3)  # it has tried to connect, and waits
    watch._suspected.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=30)
    task.cancel()
    assert done, "the cancel was swallowed"
    assert told == []
