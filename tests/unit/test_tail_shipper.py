"""The open end at one destination: when tails are cut, and what is said to be durable."""

from __future__ import annotations

import asyncio
import random

from handlers.outlet import Outlet
from infra.storage.memory import MemoryStore
from pipeline.contracts import Abilities, Body
from pipeline.events import DestinationHampered, ObjectStored
from pipeline.tail import TailName
from pipeline.wal import Lsn, WalFile
from tests.stores import Faulty
from tests.tailing import (
    FILE,
    SIZE,
    HandClock,
    Held,
    Tails,
    check_order,
    check_recoverable,
    founded,
    running,
    settled,
    tails,
    until,
)

NEXT = FILE.next(SIZE)
START = FILE.start(SIZE)


async def test_a_tail_goes_an_interval_after_its_first_byte() -> None:
    it, clock = await tails()
    async with running(it):
        segment = it.begin()
        await clock.pass_by(10)
        it.grow(segment, b"first")
        await clock.pass_by(0.6)
        it.grow(segment, b" second")
        await clock.pass_by(0.39)
        assert it.cut == []
        await clock.pass_by(0.01)
        await until(lambda: it.stored)
        assert await it.ranges() == [(0, 12)]
        assert it.stored == [(FILE, START, START + 12)]
        it.grow(segment, b"!")
        await clock.pass_by(0.99)
        assert len(it.cut) == 1
        await clock.pass_by(0.01)
        await until(lambda: len(it.stored) == 2)
    assert await it.ranges() == [(0, 12), (12, 13)]
    check_order(it)
    await check_recoverable(it, segment)


async def test_a_tail_is_named_after_segment_epoch_and_range_and_is_told() -> None:
    it, clock = await tails(epoch=0x2A)
    async with running(it):
        it.grow(it.begin(), bytes(300))
        await clock.pass_by(1)
        await until(lambda: it.stored)
    (told,) = it.told(ObjectStored)
    assert isinstance(told, ObjectStored)
    assert told.name == f"tail/{FILE.name}/0000002a-00000000-0000012c"


async def test_an_idle_server_makes_no_tails() -> None:
    it, clock = await tails()
    async with running(it):
        it.grow(it.begin(), b"once")
        await clock.pass_by(2)
        await until(lambda: it.stored)
        await clock.pass_by(10_000)
    assert len(it.cut) == 1


async def test_steady_writing_makes_one_tail_per_interval() -> None:
    it, clock = await tails()
    async with running(it):
        segment = it.begin()
        for step in range(100):
            it.grow(segment, b"x" * 50)
            await clock.pass_by(0.1)
            await until(lambda: len(it.stored) == len(it.cut))
            waiting = segment.filled - sum(end - start for _, start, end in it.stored)
            assert waiting <= 11 * 50, f"older than the interval at step {step}"
    assert 8 <= len(it.cut) <= 10
    check_order(it)


async def test_a_segment_that_fills_within_the_interval_makes_no_tail() -> None:
    it, clock = await tails()
    async with running(it):
        segment = it.begin()
        it.grow(segment, bytes(SIZE // 2))
        await clock.pass_by(0.9)
        it.grow(segment, bytes(SIZE // 2))
        following = it.begin(NEXT)
        it.grow(following, b"next")
        await clock.pass_by(0.99)
        assert it.cut == [], "the finished object is on its way"
        await clock.pass_by(0.01)
        await until(lambda: it.stored)
        assert it.cut == [TailName(NEXT, 7, 0, 4).key], "the next segment's bytes have a time of their own"
        await it.finish(segment)
        await clock.pass_by(60)
        assert len(it.cut) == 1


async def test_the_rest_goes_as_a_tail_when_finished_segments_are_held_up() -> None:
    it, clock = await tails()
    async with running(it):
        segment = it.begin()
        it.grow(segment, b"begun")
        await clock.pass_by(1)
        await until(lambda: it.stored)
        it.grow(segment, bytes(SIZE - 5))
        await clock.pass_by(3)
        it.shipper.segment_stored(WalFile.segment(1, 0, SIZE))  # the uploader makes headway: it is merely busy
        await clock.pass_by(4.9)
        assert len(it.cut) == 1
        await clock.pass_by(0.2)
        await until(lambda: len(it.stored) == 2)
    assert await it.ranges() == [(0, 5), (5, SIZE)]
    await check_recoverable(it, segment)


async def test_synchronous_mode_cuts_at_once_and_the_end_of_a_segment_as_well() -> None:
    it, clock = await tails(synchronous=True)
    async with running(it):
        segment = it.begin()
        it.grow(segment, b"commit")
        await until(lambda: it.stored)
        await clock.pass_by(1)
        it.grow(segment, bytes(SIZE - 6))
        await until(lambda: len(it.stored) == 2)
        assert it.stored[-1] == (FILE, START + 6, START + SIZE)
        await clock.pass_by(1)
        it.grow(it.begin(NEXT), b"more")
        await until(lambda: len(it.stored) == 3)
    check_order(it)
    await check_recoverable(it, segment)


async def test_synchronous_cuts_keep_a_distance() -> None:
    it, clock = await tails(synchronous=True)
    async with running(it):
        segment = it.begin()
        for _ in range(20):
            it.grow(segment, b"x")
            await clock.pass_by(0.0005)
        await until(lambda: len(it.stored) == len(it.cut))
        assert 4 <= len(it.cut) <= 6, "10 ms, 2 ms apart"


async def test_synchronous_mode_waits_for_the_finished_object_when_much_is_left() -> None:
    size = 4 << 20
    it, clock = await tails(synchronous=True, size=size)
    file = WalFile.segment(1, 5 * size, size)
    async with running(it):
        segment = it.begin(file)
        it.grow(segment, bytes(size))
        following = it.begin(file.next(size))
        it.grow(following, b"commit")
        await until(lambda: it.stored)
        assert it.cut == [TailName(following.file, 7, 0, 6).key]
        await it.finish(segment)
        await clock.pass_by(60)
    assert len(it.cut) == 1


async def test_switching_to_synchronous_mode_is_noticed_within_a_quarter_of_a_second() -> None:
    it, clock = await tails(interval=60.0)
    async with running(it):
        it.grow(it.begin(), b"waits")
        await clock.pass_by(1)
        assert it.cut == []
        it.synchronous = True
        await clock.pass_by(0.25)
        await until(lambda: it.stored)


async def test_several_are_in_flight_spaced_and_acknowledged_in_order() -> None:
    clock = HandClock()
    held = Held(MemoryStore())
    faulty = await founded()
    held.store = faulty.store
    it = Tails(held, clock, synchronous=True)
    async with running(it):
        segment = it.begin()
        for _ in range(40):
            it.grow(segment, bytes(10))
            await clock.pass_by(0.001)
        await until(lambda: held.count("put") == 16)
        await clock.pass_by(5)
        assert held.count("put") == 16, "not more at a time"
        order = list(held.waiting)
        random.Random(5).shuffle(order)
        for key in order[:-1]:
            held.waiting.pop(key).set_result(None)
        await until(lambda: len(it.told(ObjectStored)) == 15)
        assert max((end for _, _, end in it.stored), default=START) == START + TailName.parse(order[-1]).start  # type: ignore[union-attr]
        held.open = True
        for turn in held.waiting.values():
            turn.set_result(None)
        await clock.pass_by(1)
        await until(lambda: it.stored and it.stored[-1][2] == START + 400)
    check_order(it)
    await check_recoverable(it, segment)
    assert len(it.cut) < 40, "what gathers meanwhile goes together"


async def test_a_slow_store_does_not_hold_back_the_next_tail() -> None:
    held = Held(MemoryStore())
    held.store = (await founded()).store
    clock = HandClock()
    it = Tails(held, clock)
    async with running(it):
        segment = it.begin()
        for _ in range(8):
            it.grow(segment, bytes(10))
            await clock.pass_by(1)
        assert len(held.waiting) == 4, "the next goes on its own time, up to four at once"
        held.open = True
        for turn in held.waiting.values():
            turn.set_result(None)
        await until(lambda: it.stored and it.stored[-1][2] == START + 80)
        assert len(it.stored) == 5, "what was due meanwhile goes at once, and together"
    check_order(it)


async def test_a_segment_that_was_stored_before_the_stream_brings_it_makes_no_tails() -> None:
    it, clock = await tails()
    it.shipper.segment_stored(FILE)
    async with running(it):
        it.grow(it.begin(), b"known already")
        it.grow(it.begin(NEXT), b"new")
        await clock.pass_by(5)
        await until(lambda: it.stored)
    assert it.cut == [TailName(NEXT, 7, 0, 3).key]


async def test_killed_at_rest_it_leaves_no_task() -> None:
    it, clock = await tails()
    before = asyncio.all_tasks()
    async with running(it):
        it.grow(it.begin(), b"x")
        await clock.pass_by(0.5)
    await settled()
    assert asyncio.all_tasks() == before


async def test_a_store_that_ignores_conditions_is_told_of() -> None:
    it, clock = await tails()
    it.store = Careless(it.store.store)
    it.outlet = Outlet(it.store)
    it.shipper._outlet = it.outlet
    async with running(it):
        segment = it.begin()
        for _ in range(2):
            before = len(it.stored)
            it.grow(segment, b"x")
            await clock.pass_by(1)
            await until(lambda before=before: len(it.stored) > before)  # type: ignore[misc]  # bound for the loop
    assert it.told(DestinationHampered) == [DestinationHampered("memory", "ignores conditions")]


class Careless(Faulty):
    async def probe(self, key: str, body: Body) -> Abilities:
        await super().probe(key, body)
        return Abilities(conditional_put=False, remark="ignores conditions")


async def test_positions_are_of_the_segment() -> None:
    it, clock = await tails()
    file = WalFile.segment(3, 11 * SIZE, SIZE)
    async with running(it):
        it.grow(it.begin(file), bytes(100))
        await clock.pass_by(1)
        await until(lambda: it.stored)
    assert it.stored == [(file, Lsn(11 * SIZE), Lsn(11 * SIZE + 100))]
