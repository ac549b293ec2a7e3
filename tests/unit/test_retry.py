from __future__ import annotations

import asyncio
import random
import time

import pytest

from handlers.body import joined
from infra.storage.memory import MemoryStore
from infra.storage.retry import LOOK, Retrying, RetryPolicy
from infra.storage.telling import Telling
from pipeline.errors import ObjectConflict, StoreError
from pipeline.objects import MemoryBody
from tests.clock import FastClock
from tests.stores import Faulty

BODY = MemoryBody((b"x",))
PASSING = StoreError("the store cannot be reached", hint="look", passing=True)
FINAL = StoreError("access is denied", hint="ask")
POLICY = RetryPolicy(attempts=5, total=100.0, first=1.0, most=6.0)


def parts(
    policy: RetryPolicy = POLICY, draw: float = 1.0
) -> tuple[Faulty, FastClock, Retrying, list[StoreError | None]]:
    faulty, clock = Faulty(MemoryStore()), FastClock()
    seen: list[StoreError | None] = []
    store = Retrying(faulty, clock, policy, draw=lambda: draw, observe=lambda _, __, error: seen.append(error))
    return faulty, clock, store, seen


async def test_what_passes_is_tried_until_it_is_over() -> None:
    faulty, clock, store, seen = parts()
    faulty.fail = {("put", 1): PASSING, ("put", 2): PASSING}
    await store.put("a", BODY)
    assert faulty.count("put") == 3
    assert clock.passed == 1.0 + 2.0
    assert seen == [PASSING, PASSING, None]


async def test_delays_double_up_to_a_bound_and_attempts_end() -> None:
    faulty, clock, store, seen = parts()
    faulty.down = {"get": PASSING}
    with pytest.raises(StoreError, match=r"cannot be reached \(5 attempts in 13\.0 s\)") as raised:
        await store.get("a")
    assert clock.passed == 1 + 2 + 4 + 6
    assert (raised.value.hint, raised.value.passing) == ("look", True)
    assert seen == [PASSING] * 5


async def test_time_ends_before_attempts_do() -> None:
    faulty, clock, store, _ = parts(RetryPolicy(attempts=1000, total=10.0, first=1.0, most=2.0))
    faulty.down = {"head": PASSING}
    with pytest.raises(StoreError, match=r"\(6 attempts in 9\.0 s\)"):
        await store.head("a")
    assert clock.passed <= 10.0


async def test_what_does_not_pass_is_told_at_once() -> None:
    faulty, clock, store, seen = parts()
    faulty.down = {"delete": FINAL}
    with pytest.raises(StoreError) as raised:
        await store.delete(["a"])
    assert raised.value is FINAL
    assert faulty.count("delete") == 1
    assert clock.passed == 0
    assert seen == [FINAL]


async def test_a_create_whose_answer_was_lost_meets_itself() -> None:
    faulty, _, store, _ = parts()
    faulty.lose = {("put", 1): PASSING}
    with pytest.raises(ObjectConflict):
        await store.put("a", BODY)
    assert joined(await store.get("a")) == b"x"


async def test_a_listing_that_breaks_goes_on_behind_its_last_key() -> None:
    faulty, _, store, _ = parts()
    names = [f"k{number}" for number in range(5)]
    for name in names:
        await store.put(name, BODY)
    faulty.fail = {("list", 1): PASSING}
    faulty.lose = {("list", number): PASSING for number in range(2, 30)}  # each gives one line and breaks
    assert [info.key async for info in store.list("k")] == names


async def test_a_listing_that_never_begins_ends() -> None:
    faulty, _, store, _ = parts()
    faulty.down = {"list": PASSING}
    with pytest.raises(StoreError, match="5 attempts"):
        await anext(aiter(store.list("k")))


@pytest.mark.parametrize("failed", range(1, 60))
def test_jitter_is_full_and_bounded(failed: int) -> None:
    policy, draw = RetryPolicy(), random.Random(failed).random()
    assert 0 <= policy.delay(failed, draw) <= policy.most
    assert policy.delay(failed, 0.0) == 0.0
    assert policy.delay(1, 1.0) == policy.first


async def test_a_store_that_did_not_answer_is_left_alone_for_a_while() -> None:
    """A service has others to look after: only the first call waits for one that accepts and never answers."""
    faulty, clock, store, _ = parts(RetryPolicy(rest=10.0))

    async def hang() -> None:
        clock.passed += 15.0
        raise PASSING

    with pytest.raises(StoreError, match="cannot be reached"):
        await store._try("put", hang)
    with pytest.raises(StoreError, match="cannot be reached"):
        await store.put("a", BODY)
    with pytest.raises(StoreError, match="cannot be reached"):
        [info async for info in store.list("")]
    assert not faulty.calls, "nobody else waited"
    clock.passed += 10.0
    await store.put("a", BODY)
    assert faulty.count("put") == 1


async def test_a_listing_that_got_no_answer_is_not_asked_for_twice() -> None:
    faulty, clock, _, _ = parts()
    faulty.down = {"list": PASSING}

    class Hanging(Faulty):
        async def _begin(self, operation: str, key: str) -> int:
            clock.passed += 15.0
            return await super()._begin(operation, key)

    hanging = Hanging(faulty.store, down=faulty.down)
    store = Retrying(hanging, clock, LOOK)
    for _ in range(2):
        with pytest.raises(StoreError, match="cannot be reached"):
            [info async for info in store.list("")]
    assert hanging.count("list") == 1


async def test_a_person_is_told_once_whom_the_command_waits_for() -> None:
    said: list[str] = []
    faulty = Faulty(MemoryStore())
    await Telling(faulty, said.append, patience=60.0).put("a", BODY)
    assert said == [], "who answers at once is not waited for"
    store = Telling(faulty, said.append, patience=0.01)
    faulty.delay = {"list": 0.05, "head": 0.05}
    assert [info.key async for info in store.list("")] == ["a"]
    assert (await store.head("a")).size == BODY.size
    assert said == ["waiting for memory"]


async def test_a_person_who_waits_long_for_one_answer_is_told_again() -> None:
    said: list[str] = []
    faulty = Faulty(MemoryStore(), delay={"head": 600.0})
    store = Telling(faulty, said.append, patience=0.01, again=0.05)
    began = time.monotonic()
    asking = [asyncio.create_task(store.head("a")) for _ in range(4)]
    async with asyncio.timeout(20):
        while len(said) < 3:
            await asyncio.sleep(0.01)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    heard = len(said)
    assert said[0] == "waiting for memory"
    again = "still waiting for memory: no answer for 0 seconds"
    assert said[1:] == [again] * (heard - 1)
    assert heard - 1 <= (time.monotonic() - began) / 0.05, "one line each time, however many wait"
    await asyncio.sleep(0.1)
    assert len(said) == heard, "nobody waits any longer"


async def test_a_store_that_refuses_quickly_is_tried_again_also_for_a_service() -> None:
    faulty, _, store, _ = parts(RetryPolicy(rest=10.0))
    faulty.fail = {("put", 1): PASSING}
    await store.put("a", BODY)
    assert faulty.count("put") == 2


@pytest.mark.parametrize(("operation", "passed", "left_alone"), [
    ("head", 5.0, True), ("get", 5.0, True), ("list", 5.0, True),
    ("head", 2.0, False),  # whoever has asked no longer wants to know: that says nothing of the store
    ("put", 30.0, False),  # an object on its way may be slow, and the store well
])  # fmt: skip
async def test_who_gives_up_on_a_silent_store_spares_others_the_wait(
    operation: str, passed: float, left_alone: bool
) -> None:
    faulty, clock, store, _ = parts(RetryPolicy(rest=10.0))
    await store.put("a", BODY)
    faulty.delay = {operation: 60.0}

    async def ask() -> None:
        match operation:
            case "list":
                [info async for info in store.list("")]
            case "put":
                await store.put("b", BODY)
            case _:
                await getattr(store, operation)("a")

    asking = asyncio.create_task(ask())
    while not faulty.count(operation) or faulty.calls[-1][0] != operation:
        await asyncio.sleep(0)
    clock.passed += passed
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    faulty.delay = {}
    if not left_alone:
        await store.head("a")
        return
    with pytest.raises(StoreError, match="memory has not answered for 5 seconds") as raised:
        await store.head("a")
    assert raised.value.passing
    clock.passed += 10.0
    await store.head("a")
