"""A destination fails: what was given up is cut anew, and nothing is said that is not there."""

from __future__ import annotations

import random

import pytest

from infra.storage.memory import MemoryStore
from pipeline.errors import ObjectConflict, StoreError
from pipeline.events import DestinationFailed
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
