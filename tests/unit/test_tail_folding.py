"""Many tails become one, and all of them go once the finished segment is seen: never before something covers them."""

from __future__ import annotations

import asyncio
from datetime import datetime

import pytest

from pipeline.catalog import wal_key
from pipeline.contracts import Body
from pipeline.errors import StoreError
from pipeline.events import DeleteRefused, DestinationFailed, TailsRemoved
from pipeline.openwal import OpenSegment
from pipeline.tail import TailName
from pipeline.wal import WalFile
from tests.stores import Faulty
from tests.tailing import FILE, SIZE, HandClock, Tails, founded, running, settled, tails, until

NEXT = FILE.next(SIZE)
LOCKED = StoreError("the store answered 403 AccessDenied to DeleteObject")


async def ship(it: Tails, clock: HandClock, segment: OpenSegment, times: int) -> None:
    """So many tails of ten bytes, one after the other."""
    for number in range(times):
        before = len(it.stored)
        it.grow(segment, f"{segment.filled + number:010d}".encode())
        await clock.pass_by(1)
        await until(lambda before=before: len(it.stored) > before)  # type: ignore[misc]  # bound for the loop
        # Folding needs turns of the clock and of threads: it is waited for, so that tests know what to expect.
        await clock.pass_by(0.3)
        await until(lambda: not any(course.folding for course in it.shipper._courses))
        await clock.pass_by(0.3)
        await until(lambda: not any(course.folding for course in it.shipper._courses))


async def test_tails_are_folded_level_by_level() -> None:
    it, clock = await tails(fold_at=4)
    async with running(it):
        segment = it.begin()
        await ship(it, clock, segment, 3)
        assert await it.ranges() == [(0, 10), (10, 20), (20, 30)]
        await ship(it, clock, segment, 1)
        assert await it.ranges() == [(0, 40)]
        await ship(it, clock, segment, 4 + 4 + 2)
        assert await it.ranges() == [(0, 40), (40, 80), (80, 120), (120, 130), (130, 140)]
        await ship(it, clock, segment, 2)
        assert await it.ranges() == [(0, 160)], "four folded ones are folded as well"
        await ship(it, clock, segment, 1)
    assert await it.ranges() == [(0, 160), (160, 170)]
    joined = await it.recover()
    assert (joined.reach, joined.content) == (170, segment.data)


async def test_members_go_only_after_the_joint_tail_is_stored() -> None:
    it, clock = await tails(fold_at=3)
    async with running(it):
        await ship(it, clock, it.begin(), 3)
    joint = TailName(FILE, 7, 0, 30).key
    (put,) = (at for at, call in enumerate(it.store.calls) if call == ("put", joint))
    (delete,) = (at for at, (operation, _) in enumerate(it.store.calls) if operation == "delete")
    assert put < delete


async def test_a_fold_that_fails_keeps_its_members_and_is_tried_again() -> None:
    it, clock = await tails(fold_at=3)
    it.store.fail = {("put", 4): StoreError("the store is full", passing=False)}
    async with running(it):
        segment = it.begin()
        await ship(it, clock, segment, 2)
        it.grow(segment, b"z" * 10)
        await clock.pass_by(1)
        await until(lambda: it.told(DestinationFailed))
        await settled()
        assert await it.ranges() == [(0, 10), (10, 20), (20, 30)]
        await clock.pass_by(2)
        await until(lambda: it.store.count("delete"))
    assert await it.ranges() == [(0, 30)]


async def test_an_overlap_that_a_lost_answer_left_goes_with_the_fold() -> None:
    it, clock = await tails(fold_at=3)
    async with running(it):
        segment = it.begin()
        await ship(it, clock, segment, 1)
        it.store.lose = {("put", 2): StoreError("no answer", passing=True)}
        it.grow(segment, b"a")
        await clock.pass_by(1)
        await until(lambda: it.outlet.down)
        it.grow(segment, b"b")
        await clock.pass_by(3)
        await until(lambda: len(it.stored) == 2)
        assert await it.ranges() == [(0, 10), (10, 11), (10, 12)]
        await ship(it, clock, segment, 1)
    assert await it.ranges() == [(0, 22)]


async def test_refused_deletes_are_told_once_and_stop_nothing() -> None:
    it, clock = await tails(fold_at=3)
    it.store.down = {"delete": LOCKED}
    async with running(it):
        segment = it.begin()
        await ship(it, clock, segment, 12)
        (told,) = it.told(DeleteRefused)
        assert isinstance(told, DeleteRefused)
        assert "403" in told.fact
        assert "docs/durability.md" in told.hint
        assert len(await it.ranges()) == 12 + 4 + 1
        joined = await it.recover()
        assert (joined.reach, joined.content) == (120, segment.data)
        await it.finish(segment)
        following = it.begin(NEXT)
        await ship(it, clock, following, 1)
    assert len(it.told(DeleteRefused)) == 1
    assert it.told(TailsRemoved) == []


@pytest.mark.parametrize("shipped", [0, 1, 5])
async def test_the_end_of_a_timeline_is_one_tail(shipped: int) -> None:
    it, clock = await tails()
    async with running(it):
        segment = it.begin()
        await ship(it, clock, segment, shipped)
        it.grow(segment, b"the last bytes")
        segment.ended = True
        it.wal.tell()
        await clock.pass_by(0.25)
        end = shipped * 10 + 14
        await until(lambda: it.stored and it.stored[-1][2] == segment.start + end)
        following = it.begin(WalFile.segment(2, 3 * SIZE, SIZE))
        it.grow(following, b"new timeline")
        await clock.pass_by(1)
        await until(lambda: it.stored[-1][0] == following.file)
        await until(lambda: [course.segment for course in it.shipper._courses] == [following])
    assert await it.ranges() == [(0, end)]
    assert (await it.recover()).content == segment.data


async def test_a_timeline_that_ends_when_all_is_shipped_is_folded_too() -> None:
    it, clock = await tails()
    async with running(it):
        segment = it.begin()
        await ship(it, clock, segment, 3)
        await clock.pass_by(100)
        segment.ended = True
        it.wal.tell()
        await until(lambda: it.store.count("delete"))
        await until(lambda: not it.shipper._courses)
    assert await it.ranges() == [(0, 30)]


async def test_tails_go_once_the_finished_segment_is_seen() -> None:
    it, clock = await tails(fold_at=2)
    async with running(it):
        segment = it.begin()
        await ship(it, clock, segment, 5)
        it.grow(segment, bytes(SIZE - 50))
        await clock.pass_by(1)
        assert await it.ranges() == [(0, 40), (40, 50)]
        await it.finish(segment)
        await clock.pass_by(0.3)
        await until(lambda: it.told(TailsRemoved))
        assert not it.shipper._courses, "its memory is let go"
    assert it.told(TailsRemoved) == [TailsRemoved("memory", 2)]
    assert await it.ranges() == []
    head, delete = (("head", wal_key(FILE)), "delete")
    assert it.store.calls.index(head) < max(at for at, call in enumerate(it.store.calls) if call[0] == delete)


async def test_no_tail_goes_on_anybody_s_word() -> None:
    it, clock = await tails()
    async with running(it):
        segment = it.begin()
        await ship(it, clock, segment, 2)
        it.shipper.segment_stored(FILE)
        await clock.pass_by(5)
        await until(lambda: it.store.count("head"))
        await settled()
    assert await it.ranges() == [(0, 10), (10, 20)]


async def test_a_tail_in_flight_when_the_segment_is_finished_goes_as_well() -> None:
    arrived = asyncio.Event()

    class Slow(Faulty):
        """What is put is on its way until it has arrived."""

        async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
            await arrived.wait()
            await super().put(key, body, replace=replace, keep_until=keep_until)

    clock = HandClock()
    it = Tails(Slow((await founded()).store), clock, synchronous=True)
    async with running(it):
        segment = it.begin()
        it.grow(segment, bytes(SIZE))
        await until(lambda: it.cut)
        await it.finish(segment)
        await clock.pass_by(1)
        assert it.store.count("head") == 0, "it would be stored after it was removed"
        arrived.set()
        await until(lambda: it.told(TailsRemoved))
    assert await it.ranges() == []


async def test_what_another_epoch_left_of_the_segment_is_not_taken_unseen() -> None:
    it, clock = await tails(epoch=7)
    foreign = [TailName(FILE, 3, 0, 10), TailName(FILE, 4, 0, 9)]
    for name in foreign:
        await it.store.store.put(name.key, it.parcel(name.key, b"acknowledged to another").body)
    async with running(it):
        segment = it.begin()
        await ship(it, clock, segment, 1)
        it.grow(segment, bytes(SIZE - segment.filled))
        await it.finish(segment)
        await clock.pass_by(0.3)
        await until(lambda: it.told(TailsRemoved))
    assert it.told(TailsRemoved) == [TailsRemoved("memory", 1)]
    assert sorted(await it.names()) == foreign


async def test_segments_without_tails_are_not_asked_for() -> None:
    it, clock = await tails()
    async with running(it):
        file = FILE
        for _ in range(10):
            segment = it.begin(file)
            it.grow(segment, bytes(SIZE))
            await it.finish(segment)
            it.wal.drop(segment)
            await clock.pass_by(0.3)
            file = file.next(SIZE)
    assert it.store.count("list") == 0
    assert it.store.count("head") == 0


async def test_a_store_that_does_not_answer_keeps_tails_for_the_hourly_cleaning() -> None:
    it, clock = await tails()
    it.store.fail = {("delete", 1): StoreError("no answer", passing=True)}
    async with running(it):
        segment = it.begin()
        await ship(it, clock, segment, 2)
        await it.finish(segment)
        await clock.pass_by(0.3)
        await until(lambda: it.store.count("delete"))
        await settled()
        assert it.told(DeleteRefused) == []
    assert len(await it.ranges()) == 2
    assert await it.left_overs().clean() == 2
    assert await it.ranges() == []
    assert it.told(TailsRemoved) == [TailsRemoved("memory", 2)]
