"""Marks on backups that are in use: alive while they change, dead after one time to live, seen by whoever deletes."""

from __future__ import annotations

import asyncio

import pytest

from handlers.body import joined
from infra.storage.heartbeat import Heartbeat, Holder
from infra.storage.in_use import TTL, Marks, using
from infra.storage.memory import MemoryStore
from pipeline.contracts import Store
from pipeline.errors import SourceError, StoreError
from pipeline.objects import MemoryBody
from tests.clock import FastClock
from tests.stores import Faulty

NAME = "base_20260114_120000"


class Held(FastClock):
    """Time stands still for whoever sleeps on it, until it is moved on."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(3600 if seconds else 0)


async def names(store: MemoryStore) -> list[str]:
    return [entry.key async for entry in store.list("")]


async def left_behind(store: Store, *, backup: str = NAME, going: bool = False, counter: int = 1) -> str:
    """The mark of a process of another machine."""
    clock = FastClock()
    here = Holder.here(clock.now(), "restore")
    holder = Holder("db9", 77, here.started, "another kernel", 1, here.instance, "restore")
    key = f"use/{backup}/0000000a{'.going' if going else ''}"
    await store.put(key, Heartbeat.of(holder, counter, clock.now()).encode(), replace=True)
    return key


async def test_a_mark_is_there_while_the_backup_is_used_and_gone_afterwards() -> None:
    stores, clock, told = [MemoryStore("a"), MemoryStore("b")], Held(), list[str]()
    marks = Marks(stores, clock=clock)
    async with using(stores, NAME, clock=clock, tell=told.append, what="restore") as use:
        await marks.look()
        assert "(restore)" in marks.word(NAME)
        assert marks.backups == {NAME}
        await use.add("base_2")
        assert len(await names(stores[1])) == 2
    await marks.look()
    assert (marks.word(NAME), marks.backups, told) == ("", frozenset(), [])
    assert await names(stores[0]) == await names(stores[1]) == []


async def test_what_does_not_change_for_its_time_to_live_is_dead_and_is_buried() -> None:
    store, clock = MemoryStore(), FastClock()
    key = await left_behind(store)
    marks = Marks([store], clock=clock)
    await marks.look()
    assert "process 77 on db9" in marks.word(NAME)
    await marks.bury()
    assert await names(store) == [key]  # in doubt
    await marks.settle([NAME])
    assert clock.passed >= TTL
    assert marks.word(NAME) == ""
    await marks.bury()
    assert await names(store) == []


async def test_what_changes_is_alive_and_nobody_waits_longer() -> None:
    store, clock = MemoryStore(), FastClock()
    await left_behind(store)
    marks = Marks([store], clock=clock)
    await marks.look()
    await left_behind(store, counter=2)
    await marks.settle()
    assert clock.passed == 0
    assert marks.word(NAME)
    clock.passed += TTL * 0.9
    assert marks.word(NAME)


async def test_a_process_of_this_machine_that_ended_is_not_waited_for() -> None:
    store, clock = MemoryStore(), FastClock()
    holder = Holder.here(clock.now())
    gone = Holder(holder.host, 2**22 + 1, holder.started, holder.machine, 5, holder.instance, "restore")
    await store.put(f"use/{NAME}/0000000b", Heartbeat.of(gone, 1, clock.now()).encode())
    marks = Marks([store], clock=clock)
    await marks.settle()
    assert (marks.word(NAME), clock.passed) == ("", 0)


async def test_time_in_which_nobody_looked_proves_nothing() -> None:
    store, clock = MemoryStore(), FastClock()
    await left_behind(store)
    marks = Marks([store], clock=clock)
    await marks.look()
    clock.passed += 10 * TTL
    assert marks.word(NAME)
    await marks.look()
    assert not marks.word(NAME)


async def test_who_writes_at_one_destination_keeps_his_marks_at_all() -> None:
    stores, clock = [MemoryStore("a"), MemoryStore("b")], FastClock()
    keys = [await left_behind(store) for store in stores]
    marks = Marks(stores, clock=clock)
    await marks.look()
    clock.passed += TTL
    await left_behind(stores[0], counter=2)
    await marks.look()
    await marks.bury()
    assert await names(stores[1]) == keys[1:]
    assert marks.backups == {NAME}


async def test_what_cannot_be_read_as_a_mark_counts_as_one() -> None:
    store = MemoryStore()
    await store.put(f"use/{NAME}/0000000c", MemoryBody([b"?"]))
    marks = Marks([store], clock=FastClock())
    await marks.look()
    assert "somebody" in marks.word(NAME)


async def test_whoever_was_taken_for_gone_is_told_before_he_declares_his_backup_complete() -> None:
    store, clock = MemoryStore(), Held()
    async with using([store], NAME, clock=clock, tell=lambda _: None, what="backup") as use:
        await use.check()
        await store.delete(await names(store))
        with pytest.raises(SourceError, match="given up"):
            await use.check()


async def test_a_store_that_may_only_be_read_is_told_of_once_and_is_no_error() -> None:
    refused = StoreError("a: AccessDenied")
    store, told = Faulty(MemoryStore("a"), down={"put": refused}), list[str]()
    async with using([store], NAME, "base_2", clock=Held(), tell=told.append, what="restore") as use:
        await use.check()
    assert len(told) == 1
    assert "AccessDenied" in told[0]
    assert store.count("put") == 1


async def test_who_deletes_and_who_uses_see_each_other_in_either_order() -> None:
    store, clock = MemoryStore(), Held()
    marks = Marks([store], clock=clock)
    async with (
        using([store], NAME, clock=clock, tell=lambda _: None, what="backup") as use,
        marks.claim(NAME, what="expire") as user,
    ):
        assert "(backup)" in user
        waiting = asyncio.create_task(use.going(NAME))
        await asyncio.sleep(0.05)
        assert not waiting.done()  # it is watched whether it is alive
        waiting.cancel()
    async with marks.claim(NAME, what="expire") as user:
        assert user == ""
        async with Marks([store], clock=clock).claim(NAME, what="expire") as other:
            assert "(expire)" in other
    assert await names(store) == []


async def test_who_uses_a_backup_waits_for_no_other_user() -> None:
    """Neither for himself: each incremental backup would begin with the wait for his own next sign of life."""
    store, clock = MemoryStore(), Held()
    async with (
        using([store], NAME, clock=clock, tell=lambda _: None, what="backup") as use,
        using([store], NAME, clock=clock, tell=lambda _: None, what="restore"),
        asyncio.timeout(10),
    ):
        assert await use.going(NAME) == ""


async def test_a_destination_that_cannot_be_asked_stops_the_deletion() -> None:
    store = Faulty(MemoryStore(), down={"list": StoreError("it is away")})
    with pytest.raises(StoreError):
        async with Marks([store], clock=FastClock()).claim(NAME, what="expire"):
            raise AssertionError


async def test_who_deletes_a_large_backup_is_not_taken_for_gone_meanwhile() -> None:
    """Parts of terabytes take hours to delete: who thought the deleter dead would build on what is half gone."""
    store, clock = MemoryStore(), FastClock()
    async with Marks([store], clock=clock).claim(NAME, what="expire"):
        began, others = clock.monotonic(), Marks([store], clock=clock)
        (key,) = await names(store)
        while clock.monotonic() < began + 3 * TTL:
            before = joined(await store.get(key))
            await others.look(NAME)
            assert "(expire)" in others.word(NAME, going=True)
            async with asyncio.timeout(20):
                while joined(await store.get(key)) == before:  # its maker's own pauses move the time
                    await asyncio.sleep(0)
    assert await names(store) == []
