"""The lease: one of several writers holds it, the others are told who, and it passes on when its holder is gone."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from handlers.body import joined
from infra.clock import SystemClock
from infra.storage.lease import KEPT, Lease, LeaseHeldError, lease_key
from infra.storage.local import LocalStore
from infra.storage.memory import MemoryStore
from infra.storage.retry import AT_ONCE, Retrying
from infra.storage.rooted import Rooted
from pipeline.contracts import Store
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody
from tests.clock import FastClock
from tests.leases import DOWN, TTL, Meanwhile, beat, numbers, said, silent, take, write
from tests.stores import Faulty, s3_store


@pytest.fixture(params=["memory", "local", "s3"])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Store]:
    monkeypatch.setattr("infra.storage.lease.ANSWER", 60.0)  # a busy machine's server may take more than the five
    made: Store
    if request.param == "memory":
        made = MemoryStore()
    elif request.param == "local":
        made = LocalStore(tmp_path)
    else:
        made = Rooted(s3_store(request.getfixturevalue("seaweed")), s3_prefix)
    yield made
    await made.close()


# -- taking it


async def test_the_first_writer_takes_the_first_number_everywhere_at_once(store: Store) -> None:
    clock, other = FastClock(), MemoryStore("other")
    lease = await take(store, other, clock=clock)
    assert lease.epoch == 1
    assert clock.passed == 0
    for place in (store, other):
        members = await said(place, 1)
        assert (members["pid"], members["released"], members["server"]) == (os.getpid(), False, "spool /spool")
        assert members["started"] == "2026-01-14T12:00:00Z"
    assert (
        lease.holder.words == f"process {os.getpid()} on {lease.holder.host} (spool /spool), since 2026-01-14T12:00:00Z"
    )


async def test_a_lease_that_does_not_change_for_its_time_to_live_is_taken_over(store: Store) -> None:
    clock, told = FastClock(), list[str]()
    first = await take(store)
    second = await take(store, clock=clock, tell=told.append)
    assert second.epoch == 2
    assert TTL <= clock.passed < TTL * 1.2
    assert told == [
        f"{first.holder.words} holds lease/00000001 at {store.name}: watching for 15 s whether it is alive",
        f"{first.holder.words} has not renewed lease/00000001 at {store.name} for 15 s, and counts as gone",
    ]
    with pytest.raises(LeaseHeldError) as refused:
        await first.run()
    assert first.lost.is_set()
    assert refused.value.fact == (
        f"another service writes to this repository: {second.holder.words} holds lease/00000002 at {store.name},"
        " and this one held lease/00000001"
    )


async def test_a_lease_that_changes_is_refused_in_words(store: Store) -> None:
    first = await take(store)
    clock = Meanwhile(lambda: beat(first))
    with pytest.raises(LeaseHeldError) as refused:
        await take(store, clock=clock)
    assert refused.value.fact == (
        f"this repository is written already by {first.holder.words}, which was seen alive just now"
        f" (lease/00000001 at {store.name})"
    )
    assert "a clone of the server needs a repository of its own" in refused.value.hint
    assert clock.passed < TTL
    assert await numbers(store) == [1]
    assert (await said(store, 1))["instance"] == first.holder.instance


async def test_of_eight_that_race_one_wins_and_the_others_name_it(store: Store) -> None:
    stores, clock, running = [store, MemoryStore("other")], SystemClock(), list[asyncio.Task[None]]()

    async def race() -> Lease | LeaseHeldError:
        try:
            lease = await Lease.acquire(stores, clock=clock, ttl=2.4, tell=silent)
        except LeaseHeldError as error:
            return error
        running.append(asyncio.create_task(lease.run()))
        return lease

    results = await asyncio.gather(*(race() for _ in range(8)))
    for task in running:
        task.cancel()
    ends = await asyncio.gather(*running, return_exceptions=True)
    (winner,) = (result for result in results if isinstance(result, Lease))
    assert winner.epoch == 1
    refused = [result.fact for result in results if isinstance(result, LeaseHeldError)]
    assert len(refused) == 7
    assert all("seen alive just now (lease/00000001" in fact for fact in refused)
    assert [type(end) for end in ends] == [asyncio.CancelledError]


async def test_a_create_whose_answer_was_lost_is_ours() -> None:
    store = Faulty(MemoryStore(), lose={("put", 1): DOWN})
    lease = await take(Retrying(store, FastClock(), AT_ONCE))
    assert lease.epoch == 1
    assert store.count("put") == 2


async def test_wall_clocks_do_not_matter() -> None:
    store, back = MemoryStore(), FastClock()
    first = await take(store, clock=back)

    async def renew() -> None:
        back.passed = -86400.0  # and stands still
        await beat(first)

    with pytest.raises(LeaseHeldError):
        await take(store, clock=Meanwhile(renew))


async def test_what_cannot_be_read_is_somebody_until_it_has_not_changed_for_a_time_to_live() -> None:
    store = MemoryStore()
    for content in (b"", b"{}", b"\xff" * 100_000, json.dumps({"host": "h", "pid": "1"}).encode()):
        await write(store, 7, content)
        clock = FastClock()
        assert (await take(store, clock=clock)).epoch == 8
        assert clock.passed >= TTL
        await store.delete([lease_key(8)])
    counted = 0

    async def scribble() -> None:
        nonlocal counted
        counted += 1
        await write(store, 7, b"%d" % counted)

    with pytest.raises(LeaseHeldError, match="a process that cannot be told from its lease"):
        await take(store, clock=Meanwhile(scribble))


async def test_what_is_no_lease_is_left_alone_and_the_last_number_is_an_error() -> None:
    store = MemoryStore()
    for key in ("lease/notes", "lease/0000000g", "lease/00000003/x", "lease/0000000A"):
        await store.put(key, MemoryBody((b"?",)))
    assert (await take(store)).epoch == 1
    await write(store, 0xFFFFFFFF, b"?")
    with pytest.raises(StoreError, match="lease/ffffffff at memory has the last number"):
        await take(store)


async def test_a_name_from_a_lease_cannot_play_tricks_on_a_terminal() -> None:
    store = MemoryStore()
    await take(store)
    members = await said(store, 1)
    members |= {"host": "\x1b[2J\n" + "h" * 500, "server": "a\tb", "machine": ""}
    await write(store, 1, json.dumps(members).encode())
    told = list[str]()
    await take(store, tell=told.append)
    assert "?[2J?hhh" in told[0]
    assert "(a?b)" in told[0]
    assert told[0].isprintable()
    assert len(told[0]) < 400


# -- giving it back


async def test_after_a_release_the_next_writer_need_not_wait(store: Store) -> None:
    clock = FastClock()
    first = await take(store)
    await first.release()
    assert (await said(store, 1))["released"] is True
    assert (await take(store, clock=clock)).epoch == 2
    assert clock.passed == 0


async def test_given_back_at_one_destination_is_given_back() -> None:
    away, clock, told = Faulty(MemoryStore("away")), FastClock(), list[str]()
    here = MemoryStore("here")
    first = await take(away, here, tell=told.append)
    away.down = {"get": DOWN, "put": DOWN}
    await first.release()
    assert told == ["the lease cannot be given back at away: nobody answers"]
    away.down = {}
    assert (await take(away, here, clock=clock)).epoch == 2
    assert clock.passed == 0


async def test_a_release_touches_no_lease_of_another() -> None:
    store, other = MemoryStore(), MemoryStore()
    first = await take(store)
    second = await take(other)
    content = joined(await other.get(lease_key(1)))
    await write(store, 1, content)
    await first.release()
    assert joined(await store.get(lease_key(1))) == content
    await store.delete([lease_key(1)])
    await first.release()
    assert await numbers(store) == []
    assert second.epoch == 1


# -- holding it


async def test_a_higher_number_at_one_destination_ends_it() -> None:
    one, two = MemoryStore("one"), MemoryStore("two")
    lease = await take(one, two)
    await beat(lease)
    await write(two, 5, b"?")
    with pytest.raises(LeaseHeldError, match="holds lease/00000005 at two, and this one held lease/00000001"):
        await lease.run()
    assert lease.lost.is_set()


async def test_of_two_that_hold_one_number_at_different_halves_one_gives_way() -> None:
    one, two = MemoryStore("one"), MemoryStore("two")
    away = StoreError("cut off", passing=True)
    cut_two, cut_one = Faulty(two, down={"list": away}), Faulty(one, down={"list": away})
    first, second = await take(one, cut_two), await take(cut_one, two)
    assert first.epoch == second.epoch == 1
    cut_two.down, cut_one.down = {}, {}
    with pytest.raises(LeaseHeldError, match="holds lease/00000001 at two, and this one held lease/00000001"):
        await first.run()
    await first.release()
    await beat(second)
    for store in (one, two):
        members = await said(store, 1)
        assert (members["instance"], members["released"]) == (second.holder.instance, False)


async def test_heartbeats_go_on_and_old_leases_are_deleted(store: Store) -> None:
    for number in range(1, 20):
        await write(store, number, b"?")
    lease = await take(store)
    assert lease.epoch == 20
    seen = set[int]()

    async def look() -> None:
        seen.add((await said(store, 20))["counter"])
        if len(seen) == 4:
            raise StoreError("enough")

    clock = Meanwhile(look)
    lease._clock = clock
    with pytest.raises(StoreError, match="enough"):
        await lease.run()
    assert clock.passed == TTL  # three pauses of a third
    assert await numbers(store) == list(range(20 - KEPT, 21))


async def test_after_a_heartbeat_that_took_long_the_next_one_is_due_at_once() -> None:
    clock = FastClock()

    class Slow(Faulty):
        async def _begin(self, operation: str, key: str) -> int:
            number = await super()._begin(operation, key)
            if operation == "list":
                clock.passed += 2 * TTL
            if number > 3:
                raise LeaseHeldError("enough")
            return number

    lease = await take(MemoryStore(), clock=clock)
    lease._places[0].store = Slow(lease._places[0].store)
    with pytest.raises(LeaseHeldError, match="enough"):
        await lease.run()
    assert clock.passed == 4 * 2 * TTL


async def test_a_store_that_refuses_deletes_keeps_old_leases_and_nothing_else_happens() -> None:
    store = Faulty(MemoryStore(), down={"delete": StoreError("locked")})
    for number in range(1, 12):
        await write(store, number, b"?")
    lease = await take(store)
    for _ in range(3):
        await beat(lease)
    assert store.count("delete") == 1
    assert await numbers(store) == list(range(1, 13))


async def test_a_lease_that_was_deleted_or_damaged_is_written_again() -> None:
    store = MemoryStore()
    lease = await take(store)
    await store.delete([lease_key(1)])
    await beat(lease)
    assert (await said(store, 1))["instance"] == lease.holder.instance
    await write(store, 1, b"?")
    await beat(lease)
    assert (await said(store, 1))["instance"] == lease.holder.instance
