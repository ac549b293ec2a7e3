"""A destination fails: what was given up is cut anew, and nothing is said that is not there."""

from __future__ import annotations

import asyncio
import random

import pytest

from infra.storage.memory import MemoryStore
from pipeline.errors import ObjectConflict, StoreError
from pipeline.events import DestinationFailed
from pipeline.tail import TailName
from tests.tailing import (
    FILE,
    SIZE,
    HandClock,
    Held,
    Tails,
    check_order,
    check_recoverable,
    founded,
    passing,
    running,
    stored_keys,
    tails,
    until,
)

START = FILE.start(SIZE)


async def test_a_failure_gives_up_all_that_is_in_flight() -> None:
    held = Held(MemoryStore())
    held.store = (await founded()).store
    clock = HandClock()
    it = Tails(held, clock)
    async with running(it):
        segment = it.begin()
        for _ in range(3):
            it.grow(segment, bytes(10))
            await clock.pass_by(1)
        first, second, third = held.waiting.values()
        await until(lambda: len(stored_keys(it)) == 3)
        third.set_result(None)
        first.set_exception(passing())
        await until(second.cancelled)
        held.open = True
        await clock.pass_by(3)
        await until(lambda: it.stored)
    assert it.stored == [(FILE, START, START + 30)]
    assert await it.ranges() == [(0, 10), (0, 30), (10, 20), (20, 30)]
    await check_recoverable(it, segment)


async def test_what_failed_is_cut_anew_from_the_durable_position_once_the_destination_is_up() -> None:
    it, clock = await tails()
    async with running(it):
        segment = it.begin()
        it.grow(segment, b"safe")
        await clock.pass_by(1)
        await until(lambda: it.stored)
        it.store.down = {"put": passing(), "head": passing()}
        it.grow(segment, b" lost for now")
        await clock.pass_by(1)
        await until(lambda: it.outlet.down)
        it.grow(segment, b" and more")
        await clock.pass_by(300)
        assert len(it.cut) == 2, "nothing is encoded for a destination that is down"
        assert len(it.told(DestinationFailed)) >= 1
        it.store.down.clear()
        await clock.pass_by(31)
        await until(lambda: len(it.stored) == 2)
    assert it.stored[-1] == (FILE, START + 4, START + segment.filled)
    check_order(it)
    await check_recoverable(it, segment)


async def test_a_lost_answer_is_an_overlap_or_the_same_object() -> None:
    it, clock = await tails()
    async with running(it):
        segment = it.begin()
        it.grow(segment, b"one")
        it.store.lose = {("put", 1): passing()}
        await clock.pass_by(1)
        await until(lambda: it.outlet.down)
        await clock.pass_by(2)
        await until(lambda: it.stored)
        assert await it.ranges() == [(0, 3)], "the same bytes under the same key are success"
        it.grow(segment, b"two")
        it.store.lose = {("put", it.store.count("put") + 1): passing()}
        await clock.pass_by(1)
        await until(lambda: it.outlet.down)
        it.grow(segment, b"three")
        await clock.pass_by(2)
        await until(lambda: len(it.stored) == 2)
    assert await it.ranges() == [(0, 3), (3, 6), (3, 11)]
    check_order(it)
    await check_recoverable(it, segment)


async def test_a_store_that_is_up_and_refuses_is_asked_less_and_less_often() -> None:
    it, clock = await tails()
    async with running(it):
        segment = it.begin()
        it.grow(segment, b"one")
        await clock.pass_by(1)
        await until(lambda: it.stored)
        it.store.down = {"put": StoreError("the store does not like it")}
        it.grow(segment, b"two")
        await clock.pass_by(100)
        assert not it.outlet.down
        assert len(it.cut) == 1 + 8, "after 1, 2, 4, 8, 16, 30, 30 seconds"
        it.store.down.clear()
        await clock.pass_by(30)
        await until(lambda: len(it.stored) == 2)


async def test_a_failure_with_many_in_flight_loses_nothing() -> None:
    it, clock = await tails(synchronous=True)
    async with running(it):
        segment = it.begin()
        it.store.fail = {("put", number): passing() for number in (3, 9, 10)}
        it.store.lose = {("put", number): passing() for number in (5, 14)}
        drawn = random.Random(2)
        for _ in range(60):
            it.grow(segment, drawn.randbytes(20))
            await clock.pass_by(drawn.choice((0.001, 0.003, 0.5)))
        await clock.pass_by(10)
        await until(lambda: it.stored and it.stored[-1][2] == START + 1200)
    check_order(it)
    await check_recoverable(it, segment)


async def test_another_writer_of_our_epoch_is_an_error() -> None:
    it, clock = await tails()
    stranger = Tails(it.store, clock)
    other = stranger.wal.begin(FILE, SIZE)
    other.append(b"other bytes", 0)
    async with running(stranger):
        stranger.wal.tell()
        await clock.pass_by(1)
        await until(lambda: stranger.stored)
    async with running(it) as task:
        it.grow(it.begin(), b"these bytes")
        await clock.pass_by(1)
        with pytest.raises(ObjectConflict, match="with other bytes"):
            await task
    assert it.stored == []
    assert (await it.recover()).content[:11] == b"other bytes"


async def test_another_epoch_meets_nobody() -> None:
    it, clock = await tails(epoch=2)
    old = Tails(it.store, clock, epoch=1)
    for tail in (old, it):
        async with running(tail):
            tail.grow(tail.begin(), b"the same bytes")
            await clock.pass_by(1)
            await until(lambda tail=tail: tail.stored)  # type: ignore[misc]  # bound for the loop
    assert sorted(name.epoch for name in await it.names()) == [1, 2]


async def test_a_segment_let_go_elsewhere_is_not_held_in_memory_for_a_destination_that_is_away() -> None:
    it, clock = await tails()
    async with running(it):
        it.store.down = {"put": passing(), "head": passing()}
        segment = it.begin()
        it.grow(segment, b"x")
        await clock.pass_by(1)
        await until(lambda: it.outlet.down)
        for _ in range(5):
            it.grow(segment, bytes(SIZE - segment.filled))
            it.wal.drop(segment)
            segment = it.begin(segment.file.next(SIZE))
        await clock.pass_by(1)
        assert [course.segment for course in it.shipper._courses] == [segment]
        it.store.down.clear()
        it.grow(segment, b"fresh")
        await clock.pass_by(40)
        await until(lambda: it.stored)
    assert it.stored == [(segment.file, segment.start, segment.start + 5)]


async def test_after_an_outage_finished_segments_come_by_themselves_first() -> None:
    it, clock = await tails()
    async with running(it):
        it.store.down = {"put": passing(), "head": passing()}
        segment = it.begin()
        it.grow(segment, b"begun")
        await clock.pass_by(1)
        await until(lambda: it.outlet.down)
        it.grow(segment, bytes(SIZE - 5))
        await clock.pass_by(600)
        it.store.down.clear()
        while it.outlet.down:
            await clock.pass_by(0.1)
        await clock.pass_by(4.5)
        assert len(it.cut) == 1, "what is owed is copied now"
        await clock.pass_by(1)
        await until(lambda: it.stored)
    assert it.stored == [(FILE, START, START + SIZE)]


async def outage(it: Tails, clock: HandClock) -> None:
    """Somebody finds the destination down, and it is up again."""
    await it.uploader.failed(it.outlet, "wal/any", passing())
    assert it.outlet.down
    while it.outlet.down:
        await clock.pass_by(0.1)


@pytest.mark.parametrize("synchronous", [False, True])
@pytest.mark.parametrize("idle", [False, True])
async def test_one_that_comes_back_emptied_gets_all_tails_anew(*, synchronous: bool, idle: bool) -> None:
    it, clock = await tails(synchronous=synchronous)
    async with running(it):
        segment = it.begin()
        for _ in range(3):
            before = len(it.stored)
            it.grow(segment, b"x" * 100)
            await clock.pass_by(1)
            await until(lambda before=before: len(it.stored) > before)  # type: ignore[misc]  # bound for the loop
        await it.store.store.delete([name.key for name in await it.names()])
        await outage(it, clock)
        if not idle:
            it.grow(segment, b"y" * 100)
        await clock.pass_by(6)
        await until(lambda: len(it.stored) > 3 and it.stored[-1][2] == segment.end)
    assert it.lost == [(FILE, START, START + 300)]
    assert it.stored[3][1] == START
    assert (await it.recover()).content == segment.data
    assert (await it.recover()).reach == segment.filled


async def test_one_that_comes_back_as_it_was_goes_on_where_it_was() -> None:
    it, clock = await tails()
    async with running(it):
        segment = it.begin()
        it.grow(segment, b"one")
        await clock.pass_by(1)
        await until(lambda: it.stored)
        await outage(it, clock)
        it.grow(segment, b"two")
        await clock.pass_by(2)
        await until(lambda: len(it.stored) == 2)
        looks = [key for operation, key in it.store.calls if operation == "head" and key.startswith("tail/")]
        assert looks == [TailName(FILE, 7, 0, 3).key]
    assert it.lost == []
    assert await it.ranges() == [(0, 3), (3, 6)]


async def test_what_was_on_its_way_when_the_destination_was_emptied_is_not_told_as_stored() -> None:
    held = Held(MemoryStore())
    held.store = (await founded()).store
    clock = HandClock()
    it = Tails(held, clock)
    async with running(it):
        segment = it.begin()
        it.grow(segment, b"first")
        await clock.pass_by(1)
        held.waiting.popitem()[1].set_result(None)
        await until(lambda: it.stored)
        it.grow(segment, b"second")
        await clock.pass_by(1)
        await until(lambda: held.waiting)
        await it.store.store.delete([TailName(FILE, 7, 0, 5).key])
        await it.uploader.failed(it.outlet, "wal/any", passing())
        held.waiting.popitem()[1].set_result(None)
        held.open = True
        await clock.pass_by(0.5)
        assert len(it.stored) == 1
        await clock.pass_by(6)
        await until(lambda: len(it.stored) == 2)
    assert it.stored[-1] == (FILE, START, START + 11)
    assert (await it.recover()).reach == 11


async def test_a_joint_tail_does_not_hide_that_earlier_ones_are_gone() -> None:
    it, clock = await tails(fold_at=3)
    async with running(it):
        segment = it.begin()
        for number in range(6):
            it.grow(segment, b"x" * 10)
            if number == 5:
                it.store.fail = {("put", it.store.count("put") + 2): StoreError("the store is full")}
            await clock.pass_by(1)
            await until(lambda number=number: len(it.stored) > number)  # type: ignore[misc]  # bound for the loop
            await clock.pass_by(0.3)
        await until(lambda: len(it.told(DestinationFailed)) == 1)  # the joint tail of the last three
        await it.store.store.delete([name.key for name in await it.names()])
        heads = it.store.count("head")
        it.store.fail = {("head", heads + number): StoreError("forbidden for now") for number in (2, 4)}
        await outage(it, clock)
        await clock.pass_by(10)
        await until(lambda: it.lost)
        await until(lambda: it.stored[-1] == (FILE, START, START + 60))
    assert len(it.told(DestinationFailed)) >= 4, "it could be folded before it could be looked for"
    assert (await it.recover()).reach == 60


async def test_a_look_that_fails_is_tried_again_before_anything_is_cut() -> None:
    it, clock = await tails()
    async with running(it):
        segment = it.begin()
        it.grow(segment, b"one")
        await clock.pass_by(1)
        await until(lambda: it.stored)
        await it.store.store.delete([name.key for name in await it.names()])
        await it.uploader.failed(it.outlet, "wal/any", passing())
        # The uploader's look succeeds, ours does not, and so on.
        heads = it.store.count("head")
        it.store.fail = {("head", heads + 2): passing(), ("head", heads + 4): passing()}
        it.grow(segment, b"two")
        await clock.pass_by(30)
        await until(lambda: len(it.stored) == 2)
        assert len(it.cut) == 2
    assert it.lost == [(FILE, START, START + 3)]
    assert (await it.recover()).reach == 6


@pytest.mark.parametrize("synchronous", [False, True])
async def test_a_damaged_tail_under_our_key_stops_nobody(*, synchronous: bool) -> None:
    """It was stored, its answer got lost, and then it was damaged; and nothing more is written."""
    it, clock = await tails(synchronous=synchronous)
    async with running(it):
        segment = it.begin()
        it.grow(segment, bytes(range(100)))
        it.store.lose = {("put", 1): passing()}
        it.store.flip = {TailName(FILE, 7, 0, 100).key: 700, TailName(FILE, 7, 0, 50).key: 700}
        await it.store.store.put(TailName(FILE, 7, 0, 50).key, it.parcel(TailName(FILE, 7, 0, 50).key, b"").body)
        async with asyncio.timeout(10):
            while not (it.stored and it.stored[-1][2] == START + 100):
                await clock.pass_by(0.5)
                await asyncio.sleep(0.001)  # what is there is compared in a thread
    assert (0, 25) in await it.ranges()
    check_order(it)
    await it.store.store.delete([TailName(FILE, 7, 0, 100).key, TailName(FILE, 7, 0, 50).key])
    assert (await it.recover()).reach == 100


async def test_a_damaged_joint_tail_is_made_of_fewer() -> None:
    it, clock = await tails(fold_at=3)
    joint = TailName(FILE, 7, 0, 30).key
    await it.store.store.put(joint, it.parcel(joint, b"").body)
    it.store.flip = {joint: 700}
    async with running(it):
        segment = it.begin()
        for number in range(3):
            it.grow(segment, bytes(10))
            await clock.pass_by(1)
            await until(lambda number=number: len(it.stored) > number)  # type: ignore[misc]  # bound for the loop
        await clock.pass_by(1)
        await until(lambda: it.store.count("delete"))
    assert await it.ranges() == [(0, 20), (0, 30), (20, 30)]


async def test_names_of_finished_segments_are_not_kept_for_ever() -> None:
    """The stream is refused for weeks, and the other source ships on."""
    it, _ = await tails()
    file = FILE
    for _ in range(5000):
        it.shipper.segment_stored(file)
        file = file.next(SIZE)
    assert len(it.shipper._finished) == 4096
    assert min(it.shipper._finished) > FILE
