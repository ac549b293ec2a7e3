"""Waiting until WAL is safe: not a moment too early, and not long after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from infra.cli.exits import exit_code
from infra.clock import SystemClock
from infra.safety import EVERY, PAUSE, segments_between, wait_for_earlier, wait_for_wal, without
from infra.storage.memory import MemoryStore
from pipeline.catalog import REPOSITORY, wal_key
from pipeline.errors import SourceError, StoreError
from pipeline.objects import MemoryBody
from tests.clock import FastClock
from tests.sites import site_at
from tests.stores import Faulty

SIZE = 1 << 20
FILES = segments_between(1, 5 * SIZE + 40, 7 * SIZE, SIZE)


async def repository(name: str) -> MemoryStore:
    store = MemoryStore(name)
    await store.put(REPOSITORY, MemoryBody([b"{}"]))
    return store


async def put(store: MemoryStore, number: int) -> None:
    await store.put(wal_key(FILES[number]), MemoryBody([b"x"]))


async def test_every_store_must_have_every_file() -> None:
    stores = await repository("one"), await repository("two")
    waiting = asyncio.create_task(wait_for_wal(stores, FILES, clock=FastClock(), timeout=1e9, tell=lambda _: None))
    for store, number in ((stores[0], 0), (stores[0], 1), (stores[1], 1)):
        await put(store, number)
        await asyncio.sleep(0.02)
        assert not waiting.done()
    await put(stores[1], 0)
    async with asyncio.timeout(60):
        await waiting


async def test_what_never_comes_is_named() -> None:
    clock, said = FastClock(), list[str]()
    store = await repository("bucket")
    await put(store, 0)
    with pytest.raises(SourceError, match=f"segment {FILES[1]} has not arrived at bucket in 30 seconds"):
        await wait_for_wal([store], FILES, clock=clock, timeout=30, tell=said.append)
    assert 30 <= clock.passed < 32
    assert said[0] == f"waiting for WAL: 1 of 2 segments are safe, next is {FILES[1]} at bucket"


@pytest.mark.parametrize("arrived", [False, True])
async def test_an_emptied_store_is_not_waited_for(*, arrived: bool) -> None:
    """Nor is WAL safe there that a service stores before it has noticed: keys and backups are gone."""
    clock, emptied = FastClock(), MemoryStore("far")
    for number in range(2 * arrived):
        await put(emptied, number)
    stores = [await repository("near"), emptied]
    for number in range(2):
        await put(stores[0], number)
    with pytest.raises(StoreError, match=r"^far has no repository\.json: ") as raised:
        await wait_for_wal(stores, FILES, clock=clock, timeout=600, tell=lambda _: None)
    assert clock.passed == 0
    assert (exit_code(raised.value), "after walship init" in raised.value.hint) == (11, True)


async def test_a_store_that_is_emptied_meanwhile_ends_the_wait() -> None:
    clock, store = FastClock(), await repository("far")
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        store._objects.clear()

    with pytest.raises(StoreError, match=r"^far has no repository\.json: "):
        await wait_for_wal([store], FILES, clock=clock, timeout=600, tell=tell)
    assert len(said) == 1
    assert EVERY <= clock.passed < 2 * EVERY + 2 * PAUSE


async def test_wal_that_arrives_where_all_else_is_gone_is_not_safe() -> None:
    """The service stores it before it has noticed; and so soon after the last look that none was due."""
    store = await repository("far")

    class Emptying(FastClock):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds)
            store._objects.clear()
            for number in range(2):
                await put(store, number)

    clock = Emptying()
    with pytest.raises(StoreError, match=r"^far has no repository\.json: "):
        await wait_for_wal([store], FILES, clock=clock, timeout=600, tell=lambda _: None)
    assert clock.passed < 1


async def test_earlier_wal_is_not_waited_for_at_an_emptied_store(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def connection() -> AsyncIterator[None]:
        yield

    async def connect(*_: object) -> AbstractAsyncContextManager[None]:
        return connection()

    async def waiting(*_: object) -> str:
        return f"{FILES[0]} is in the spool"

    monkeypatch.setattr("infra.safety.connect", connect)
    monkeypatch.setattr("infra.safety._waiting", waiting)
    clock = FastClock()
    site = await site_at(MemoryStore("far"), clock=clock)
    with pytest.raises(StoreError, match=r"^far has no repository\.json: "):
        await wait_for_earlier(site, FILES[1], tell=lambda _: None)
    assert clock.passed < 2 * EVERY


async def test_whoever_knows_of_a_file_shortens_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.safety.PAUSE", 3600.0)
    monkeypatch.setattr("infra.safety._FIRST_PAUSE", 3600.0)
    store, stirred = await repository("bucket"), asyncio.Event()
    waiting = asyncio.create_task(
        wait_for_wal([store], FILES, clock=SystemClock(), timeout=1e9, tell=lambda _: None, stirred=stirred)
    )
    for number in range(2):
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await put(store, number)
        stirred.set()
    async with asyncio.timeout(60):
        await waiting
    assert len(asyncio.all_tasks()) == 1


async def test_who_lacks_it_is_named_with_the_reason_and_holds_nobody_up() -> None:
    there, empty, emptied = await repository("there"), await repository("empty"), MemoryStore("emptied")
    away = Faulty(await repository("away"), down={"list": StoreError("away: no route to it")})
    silent = Faulty(await repository("silent"), delay={"list": 3600.0})
    for number in range(2):
        await put(there, number)
    async with asyncio.timeout(60):
        found = await without([there, empty, emptied, away, silent], FILES, clock=FastClock(), patience=0.5)
    assert {name: error.fact for name, error in found.items()} == {
        "empty": f"segment {FILES[0]} has not arrived at empty in 0 seconds",
        "emptied": "emptied has no repository.json: it was emptied, or it is new, or something else is in its place",
        "away": "away: no route to it",
        "silent": "silent has not answered for 1 seconds",
    }
