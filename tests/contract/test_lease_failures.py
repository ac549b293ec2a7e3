"""The lease on bad days: holders that have ended, were paused or cancelled, and destinations that fail."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from handlers.body import joined
from infra.clock import SystemClock
from infra.storage.heartbeat import Heartbeat
from infra.storage.lease import Lease, LeaseHeldError, lease_key
from infra.storage.local import LocalStore
from infra.storage.memory import MemoryStore
from pipeline.contracts import Store
from pipeline.errors import StoreError
from tests.clock import FastClock
from tests.leases import DOWN, TTL, Meanwhile, beat, numbers, process, said, silent, take, write
from tests.stores import Faulty

# -- holders that have ended, or were paused


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_holder_that_was_killed_here_is_not_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    clock = FastClock()
    with process(tmp_path) as holder:
        holder.send_signal(number)
        if number == signal.SIGKILL:
            # Ended, and not yet noticed by its parent.
            await asyncio.to_thread(os.waitid, os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
            assert (await take(LocalStore(tmp_path), clock=clock)).epoch == 2
            holder.wait()
            ended = Heartbeat.decode(joined(await LocalStore(tmp_path).get(lease_key(1))))
            assert ended is not None
            assert ended.holder.ended(), "and once it is noticed"
        else:
            assert (await take(LocalStore(tmp_path), clock=clock)).epoch == 2
    assert (clock.passed >= TTL) == (number == signal.SIGSTOP), "what is stopped may wake"


@pytest.mark.parametrize(
    ("changed", "waits"),
    [
        ({"birth": 1}, False),  # the number is ours now; whoever had it began at another time
        ({"pid": 2**31 - 1}, False),
        ({"pid": 2**31 - 1, "machine": "another"}, True),  # whether it lives there cannot be seen from here
        ({"pid": 2**31 - 1, "machine": ""}, True),
        ({"birth": 0}, True),
        ({"pid": 0}, True),
        ({"pid": -1}, True),
        ({"pid": -(2**31) + 1}, True),
        ({}, True),
    ],
)
async def test_only_a_process_of_this_machine_can_be_known_to_have_ended(
    changed: dict[str, object], waits: bool
) -> None:
    store, clock = MemoryStore(), FastClock()
    await take(store)
    await write(store, 1, json.dumps(await said(store, 1) | changed).encode())
    assert (await take(store, clock=clock)).epoch == 2
    assert (clock.passed > 0) == waits


async def test_where_machines_cannot_be_told_apart_nobody_is_known_to_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("infra.storage.heartbeat._machine", str)  # as where there is no /proc
    store, clock = MemoryStore(), FastClock()
    await take(store)
    await write(store, 1, json.dumps(await said(store, 1) | {"pid": 2**31 - 1}).encode())
    await take(store, clock=clock)
    assert clock.passed >= TTL


async def test_a_process_that_was_paused_past_its_lease_stops_when_it_wakes(tmp_path: Path) -> None:
    with process(tmp_path, ttl=1.2) as holder:
        holder.send_signal(signal.SIGSTOP)
        second = await Lease.acquire([LocalStore(tmp_path)], clock=SystemClock(), ttl=1.2, tell=silent)
        assert second.epoch == 2
        holder.send_signal(signal.SIGCONT)
        last, _ = await asyncio.to_thread(holder.communicate, timeout=30)
    assert last.startswith(
        f"True another service writes to this repository: {second.holder.words} holds lease/00000002"
    )
    assert holder.returncode == 0


# -- destinations that fail


async def test_a_destination_that_is_down_gets_the_lease_when_it_is_back() -> None:
    away, here, told = Faulty(MemoryStore("away")), MemoryStore("here"), list[str]()
    away.down = {"list": DOWN}
    lease = await take(away, here, tell=told.append)
    assert (lease.epoch, await numbers(here)) == (1, [1])
    away.down = {"list": DOWN, "put": DOWN}
    turns = 0

    async def mend() -> None:
        nonlocal turns
        turns += 1
        if turns == 20:
            away.down = {}
        if turns == 40:
            raise StoreError("enough")

    lease._clock = Meanwhile(mend)
    with pytest.raises(StoreError, match="enough"):
        await lease.run()
    assert await numbers(away) == [1]
    assert (await said(away.store, 1))["instance"] == lease.holder.instance
    assert told == ["the lease cannot be renewed at away: nobody answers", "the lease is renewed at away again"]


async def test_a_store_that_lets_nothing_be_written_is_passed_over_and_one_must_let() -> None:
    sealed, here = Faulty(MemoryStore("sealed"), down={"put": DOWN}), MemoryStore("here")
    assert (await take(sealed, here)).epoch == 1
    with pytest.raises(StoreError) as refused:
        await take(sealed)
    assert refused.value is DOWN
    sealed.down = {"list": DOWN}
    with pytest.raises(StoreError) as refused:
        await take(sealed)
    assert refused.value is DOWN


async def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.storage.lease.ANSWER", 0.1)
    slow, here = Faulty(MemoryStore("slow"), delay={"list": 60}), MemoryStore("here")
    await write(here, 1, b"?")
    assert (await take(slow, here)).epoch == 2
    assert slow.count("list") == 1, "not at each look"
    with pytest.raises(StoreError, match="slow has not answered in 0 s") as refused:
        await take(slow)
    assert refused.value.passing


async def test_the_highest_number_anywhere_counts() -> None:
    low, high = MemoryStore("low"), MemoryStore("high")
    await write(low, 3, b"?")
    await write(high, 9, b"?")
    lease = await take(low, high)
    assert lease.epoch == 10
    assert (await numbers(low), await numbers(high)) == ([3, 10], [9, 10])


async def test_a_change_at_any_destination_is_life() -> None:
    stores = [MemoryStore("one"), MemoryStore("two")]
    first = await take(*stores)
    first._places[0].store = Faulty(stores[0], down={"list": DOWN})
    with pytest.raises(LeaseHeldError, match="lease/00000001 at two"):
        await take(*stores, clock=Meanwhile(lambda: beat(first)))


async def test_who_takes_over_while_we_watch_is_watched_anew() -> None:
    store, clock, taken = MemoryStore(), FastClock(), False
    await take(store)

    async def overtake() -> None:
        nonlocal taken
        if clock.passed > TTL / 2 and not taken:
            taken = True
            await write(store, 2, b"?")

    clock = Meanwhile(overtake)
    assert (await take(store, clock=clock)).epoch == 3
    assert clock.passed >= TTL * 1.5


async def test_who_loses_at_one_destination_gives_back_what_it_took_at_others() -> None:
    one, two = MemoryStore("one"), MemoryStore("two")

    class Race(Faulty):
        """Somebody else, for whom this destination is down, takes the number at the other one meanwhile."""

        async def _begin(self, operation: str, key: str) -> int:
            if (operation, key) == ("put", lease_key(1)) and not await numbers(two):
                await write(two, 1, b"?")
            return await super()._begin(operation, key)

    lease = await take(Race(one), two)
    assert lease.epoch == 2
    assert (await said(one, 1))["released"] is True


# -- cancelled


@dataclass
class Cancelling(Faulty):
    """Cancels a task when its turn has come: before a call, or when the call is done."""

    task: asyncio.Task[Any] | None = None
    at: int = 0
    after: bool = False

    async def _begin(self, operation: str, key: str) -> int:
        number = await super()._begin(operation, key)
        self._strike(after=False)
        return number

    def _end(self, operation: str, number: int) -> None:
        super()._end(operation, number)
        self._strike(after=True)

    def _strike(self, *, after: bool) -> None:
        if self.task and len(self.calls) == self.at and after == self.after:
            self.task.cancel()


@pytest.mark.parametrize("after", [False, True])
async def test_cancelled_at_any_call_it_leaves_no_task_and_no_holder(after: bool) -> None:
    async def work(store: Store) -> None:
        lease = await take(store, MemoryStore("other"))
        try:
            await lease.run()
        finally:
            await lease.release()

    for at in range(1, 30):
        store = Cancelling(MemoryStore(), at=at, after=after)
        await write(store, 1, b"?")
        store.calls.clear()
        store.task = asyncio.create_task(work(store))
        with pytest.raises(asyncio.CancelledError):
            await store.task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        clock = FastClock()
        lease = await take(store.store, clock=clock)
        assert (lease.epoch, clock.passed > 0) in ((2, True), (3, False)), f"cancelled at call {at}: {store.calls}"
