"""Requests that are never answered: what they may hold up, and how much memory they hold."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection

import pytest

from handlers import tail, tail_clean
from infra.storage.memory import MemoryStore
from pipeline.events import DeleteRefused, TailsRemoved
from pipeline.tail import TailName
from tests.stores import Faulty
from tests.tailing import (
    FILE,
    SIZE,
    HandClock,
    Held,
    Tails,
    check_order,
    founded,
    running,
    until,
)


class Mute(Faulty):
    """Deletes are not answered."""

    under_way = 0
    most_under_way = 0
    silent = True

    async def delete(self, keys: Collection[str]) -> None:
        self.calls.append(("delete", " ".join(keys)))
        if not self.silent:
            await self.store.delete(keys)
            return
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.Event().wait()
        finally:
            self.under_way -= 1


async def test_deletes_that_hang_delay_no_tail_and_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail_clean, "ANSWER_WITHIN", 0.2)
    mute, clock = Mute((await founded()).store), HandClock()
    it = Tails(mute, clock, fold_at=3, synchronous=True)
    async with running(it):
        file = FILE
        for _ in range(6):
            segment = it.begin(file)
            for _ in range(10):
                before = len(it.stored)
                it.grow(segment, bytes(10))
                await clock.pass_by(0.01)
                await until(lambda before=before: len(it.stored) > before)  # type: ignore[misc]  # bound for the loop
            it.grow(segment, bytes(SIZE - 100))
            await it.finish(segment)
            await clock.pass_by(0.5)
            it.wal.drop(segment)
            file = file.next(SIZE)
        async with asyncio.timeout(5):
            while it.shipper._courses:  # none of them is held by a delete
                await clock.pass_by(0.1)
                await asyncio.sleep(0.001)
        assert mute.most_under_way <= tail_clean.MOST_UNDER_WAY
        await until(lambda: it.told(DeleteRefused))
        await until(lambda: not mute.under_way)
        deletes = mute.count("delete")
        it.shipper.segment_stored(file)
        segment = it.begin(file.next(SIZE))
        for _ in range(6):
            it.grow(segment, bytes(10))
            await clock.pass_by(0.1)
        await until(lambda: it.stored[-1][2] == segment.end)
        assert mute.count("delete") == deletes, "they rest for a while"
        (told,) = it.told(DeleteRefused)
        assert isinstance(told, DeleteRefused)
        assert "not been answered for 0.2 s" in told.fact
    check_order(it)
    mute.silent = False
    assert await it.left_overs().clean() > 0
    assert len(it.told(TailsRemoved)) == 6
    assert await it.ranges() == []


async def test_a_key_whose_delete_may_still_come_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail_clean, "ANSWER_WITHIN", 0.05)
    mute, clock = Mute((await founded()).store), HandClock()
    it = Tails(mute, clock, fold_at=3)
    async with running(it):
        segment = it.begin()
        for _ in range(3):
            it.grow(segment, bytes(10))
            await clock.pass_by(1)
        await until(lambda: it.told(DeleteRefused))
        await until(lambda: not mute.under_way)
        (course,) = it.shipper._courses
        assert course.spoiled == {TailName(FILE, 7, start, start + 10) for start in (0, 10, 20)}


async def test_a_synchronous_destination_that_is_slow_holds_few_bytes() -> None:
    held, clock = Held(MemoryStore()), HandClock()
    held.store = (await founded()).store
    it = Tails(held, clock, size=16 << 20, synchronous=True)
    content = random.Random(1).randbytes((16 << 20) - 1)
    async with running(it):
        segment = it.begin(FILE.segment(1, 3 * (16 << 20), 16 << 20))
        it.grow(segment, content)
        for _ in range(20):
            await clock.pass_by(0.1)
            await asyncio.sleep(0.01)
        names = [name for key in it.cut if (name := TailName.parse(key))]
        assert max(name.end - name.start for name in names) == tail.LONGEST_SYNCHRONOUS
        assert names[-1].end < tail.MOST_BYTES + tail.LONGEST_SYNCHRONOUS
        held.open = True
        for turn in held.waiting.values():
            turn.set_result(None)
        for _ in range(1000):
            if it.stored and it.stored[-1][2] == segment.end:
                break
            await clock.pass_by(0.1)
            await asyncio.sleep(0.005)
    assert it.stored[-1][2] == segment.end
    check_order(it)
