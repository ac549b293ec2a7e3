"""One connection for many looks at a real server: kept, given up in time, and never an error because of its past."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

import infra.postgres.kept
from infra.postgres.control import rows
from infra.postgres.kept import LIFE, Kept
from infra.postgres.throwaway import ThrowawayServer
from infra.settings import Settings
from pipeline.errors import SourceError
from tests.clock import FastClock
from tests.servers import StartServer, server_folder, start_server

__all__ = ["server_folder", "start_server"]


@pytest.fixture
def server(start_server: StartServer) -> ThrowawayServer:
    return start_server()


@pytest.fixture
def clock() -> FastClock:
    return FastClock()


@pytest.fixture
async def kept(server: ThrowawayServer, clock: FastClock) -> AsyncIterator[Kept]:
    settings = Settings(
        _env_file=None, POSTGRES_HOST=server.host, POSTGRES_PORT=str(server.port), POSTGRES_USERNAME="postgres"
    )
    async with Kept(settings, clock) as made:
        yield made


async def process(kept: Kept) -> int:
    """Which of the server's processes answers."""
    async with kept.lent() as connection:
        ((pid,),) = await rows(connection, "select pg_backend_pid()")
    return int(pid)


async def test_one_process_answers_all_and_goes_after_a_minute(
    kept: Kept, clock: FastClock, server: ThrowawayServer
) -> None:
    first = await process(kept)
    assert await process(kept) == first
    await clock.sleep(LIFE + 1)
    assert await process(kept) == first, "a look that has begun is not taken away"
    # By a connection of our own: the one that was kept is gone before anybody asks again.
    ours = "select pid from pg_stat_activity where application_name = 'walship_control'"
    async with asyncio.timeout(30):
        while server.query(ours):
            await asyncio.sleep(0.05)
    assert await process(kept) != first


async def test_what_became_of_it_between_two_looks_is_no_failed_look(kept: Kept, server: ThrowawayServer) -> None:
    first = await process(kept)
    server.query(f"select pg_terminate_backend({first}, 5000)")
    second = await process(kept)
    assert second != first
    server.restart()
    assert await process(kept) != second


async def test_a_server_that_hangs_is_told_and_its_connection_is_not_used_again(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await process(kept)
    monkeypatch.setattr(infra.postgres.kept, "PATIENCE", 0.3)
    with pytest.raises(SourceError, match=r"PostgreSQL at 127\.0\.0\.1:\d+ did not answer within 0 s"):
        async with kept.lent() as connection:
            await rows(connection, "select pg_sleep(30)")
    monkeypatch.undo()
    assert await process(kept) != first


async def test_a_server_that_is_not_there_is_told(kept: Kept, server: ThrowawayServer) -> None:
    await process(kept)
    server.stop()
    with pytest.raises(SourceError, match="cannot be reached"):
        await process(kept)
    server.start()
    await process(kept)
