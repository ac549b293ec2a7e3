"""Waiting until WAL is safe: not a moment too early, and not long after."""

from __future__ import annotations

import asyncio

import pytest

from infra.clock import SystemClock
from infra.safety import segments_between, wait_for_wal, without
from infra.storage.memory import MemoryStore
from pipeline.catalog import wal_key
from pipeline.errors import SourceError, StoreError
from pipeline.objects import MemoryBody
from tests.clock import FastClock
from tests.stores import Faulty

SIZE = 1 << 20
FILES = segments_between(1, 5 * SIZE + 40, 7 * SIZE, SIZE)


async def put(store: MemoryStore, number: int) -> None:
    await store.put(wal_key(FILES[number]), MemoryBody([b"x"]))


async def test_every_store_must_have_every_file() -> None:
    stores = MemoryStore("one"), MemoryStore("two")
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
    store = MemoryStore("bucket")
    await put(store, 0)
    with pytest.raises(SourceError, match=f"segment {FILES[1]} has not arrived at bucket in 30 seconds"):
        await wait_for_wal([store], FILES, clock=clock, timeout=30, tell=said.append)
    assert 30 <= clock.passed < 32
    assert said[0] == f"waiting for WAL: 1 of 2 segments are safe, next is {FILES[1]} at bucket"


async def test_whoever_knows_of_a_file_shortens_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.safety.PAUSE", 3600.0)
    monkeypatch.setattr("infra.safety._FIRST_PAUSE", 3600.0)
    store, stirred = MemoryStore("bucket"), asyncio.Event()
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
    there, empty = MemoryStore("there"), MemoryStore("empty")
    away = Faulty(MemoryStore("away"), down={"list": StoreError("away: no route to it")})
    silent = Faulty(MemoryStore("silent"), delay={"list": 3600.0})
    for number in range(2):
        await put(there, number)
    async with asyncio.timeout(60):
        found = await without([there, empty, away, silent], FILES, clock=FastClock(), patience=0.5)
    assert found == {
        "empty": f"segment {FILES[0]} has not arrived at empty in 0 seconds",
        "away": "away: no route to it",
        "silent": "silent has not answered for 1 seconds",
    }
