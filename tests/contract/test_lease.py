"""The lease: one of several writers holds it, the others are told who, and it passes on when its holder is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from handlers.body import joined
from infra.clock import SystemClock
from infra.storage.heartbeat import Heartbeat
from infra.storage.lease import KEPT, Lease, LeaseHeldError, lease_key
from infra.storage.local import LocalStore
from infra.storage.memory import MemoryStore
from infra.storage.retry import AT_ONCE, Retrying
from infra.storage.rooted import Rooted
from pipeline.contracts import Clock, Store
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody
from tests.clock import FastClock
from tests.stores import Faulty, s3_store

ROOT = Path(__file__).parents[2]
TTL = 15.0
DOWN = StoreError("nobody answers", passing=True)

#: A process that takes the lease in a folder, says its number, renews it, and says what ended that.
HOLDER = """
import asyncio, sys
from pathlib import Path
from infra.clock import SystemClock
from infra.storage.heartbeat import Heartbeat
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
    command = [sys.executable, "-c", HOLDER, str(folder), str(ttl)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "1\n"
            yield holder
        finally:
            holder.kill()


@pytest.fixture(params=["memory", "local", "s3"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, s3_prefix: str) -> AsyncIterator[Store]:
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
        f"{first.holder.words} has not renewed lease/00000001 at {store.name} for 15 s: taking over",
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


# -- giving it back, and holders that have ended


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
