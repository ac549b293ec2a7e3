"""Killed at any call of the store, whatever it answered before: what was said to be durable can be read back.

The destination fails and loses answers at random; the service dies in or after any of its calls. What it had said until
then must be in the store: as tails that chain from the segment's first byte on, or as the finished segment.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import pytest

from infra.storage.memory import MemoryStore
from pipeline.catalog import wal_key
from pipeline.errors import ObjectMissing, StoreError
from pipeline.openwal import OpenSegment
from pipeline.wal import WalFile
from tests.clock import FastClock
from tests.stores import Faulty
from tests.tailing import FILE, Tails, founded, running, settled

#: Small, so that a scenario goes over several segments.
SIZE = 1 << 20


@dataclass
class Deadly(Faulty):
    """Kills the service in one of its calls: before the call is done, or after it and before the answer is read."""

    victim: asyncio.Task[None] | None = None
    #: Number of the call, of whatever kind.
    at: int = 0
    after: bool = False

    async def _begin(self, operation: str, key: str) -> int:
        number = await super()._begin(operation, key)
        if len(self.calls) == self.at and not self.after:
            self._kill()
            await asyncio.Event().wait()
        return number

    def _end(self, operation: str, number: int) -> None:
        if 0 < self.at <= len(self.calls) and self.after:
            self._kill()
        super()._end(operation, number)

    def _kill(self) -> None:
        if self.victim is not None:
            self.victim.cancel()


class Scenario:
    """Random writing over a few segments, one of which ends its timeline."""

    def __init__(self, seed: int, *, at: int = 0) -> None:
        self.drawn = random.Random(seed)
        self.at = at
        self.segments: list[OpenSegment] = []
        self.alive = True

    async def play(self) -> Tails:
        drawn, clock = self.drawn, FastClock()
        deadly = Deadly((await founded()).store, at=self.at, after=drawn.random() < 0.5)
        it = Tails(deadly, clock, fold_at=drawn.choice((2, 3, 5)), synchronous=drawn.random() < 0.5)
        for operation in ("put", "delete", "head", "list"):
            for number in drawn.sample(range(1, 60), 6):
                error = StoreError("no answer", passing=drawn.random() < 0.7)
                drawn.choice((deadly.fail, deadly.lose))[operation, number] = error
        async with running(it) as task:
            deadly.victim = task
            await self._write(it, task)
            self.alive = not task.done()
            if self.alive:
                await self._check_all_arrives(it, task)
        return it

    async def _write(self, it: Tails, task: asyncio.Task[None]) -> None:
        drawn, file = self.drawn, FILE
        for _ in range(3):
            segment = it.begin(file)
            self.segments.append(segment)
            ends = drawn.random() < 0.3
            for _ in range(drawn.randint(2, 20)):
                it.grow(segment, drawn.randbytes(drawn.randint(1, 300)))
                for _ in range(drawn.choice((0, 1, 5, 40))):
                    await asyncio.sleep(0)
                if task.done():
                    return
            if ends:
                segment.ended = True
                it.wal.tell()
                file = WalFile.segment(file.timeline + 1, segment.start, SIZE)
                continue
            it.grow(segment, drawn.randbytes(64) + bytes(SIZE - segment.filled - 64))
            file = file.next(SIZE)
            if drawn.random() < 0.7:
                await it.finish(segment)
                it.wal.drop(segment)

    async def _check_all_arrives(self, it: Tails, task: asyncio.Task[None]) -> None:
        """Whatever failed in between, a service that lives gets everything there."""
        for segment in self.segments:
            while not task.done() and await reach(it, segment) < segment.filled:
                await asyncio.sleep(0.001)


async def reach(it: Tails, segment: OpenSegment) -> int:
    """How much of the segment can be read back; what can be is right."""
    try:
        await it.store.store.head(wal_key(segment.file))
    except ObjectMissing:
        joined = await it.recover(segment.file)
        assert joined.content[: joined.reach] == segment.data[: joined.reach]
        return joined.reach
    return SIZE


async def check(it: Tails, scenario: Scenario) -> None:
    await settled()
    said: dict[WalFile, int] = {}
    for file, start, end in it.stored:
        assert start == said.get(file, file.start(SIZE)), "in order, without a hole"
        said[file] = end
    for segment in scenario.segments:
        assert segment.start + await reach(it, segment) >= said.get(segment.file, segment.start)


@pytest.mark.parametrize("seed", range(12))
async def test_what_fails_in_between_is_there_in_the_end(seed: int) -> None:
    scenario = Scenario(seed)
    it = await scenario.play()
    assert scenario.alive
    await check(it, scenario)


@pytest.mark.parametrize("seed", range(6))
async def test_killed_at_any_call_what_was_said_can_be_read_back(seed: int) -> None:
    died = 0
    for at in range(1, 41):
        scenario = Scenario(seed * 1000 + at, at=at)
        await check(await scenario.play(), scenario)
        died += not scenario.alive
    assert died > 8, "how many calls a scenario makes depends on how fast this machine is"


async def test_the_next_run_goes_on_where_the_killed_one_left_tails() -> None:
    """A new epoch begins the segment anew, and old and new tails chain."""
    store = await founded()
    assert isinstance(store.store, MemoryStore)
    content = random.Random(4).randbytes(5000)
    for epoch, until_byte in ((1, 2000), (2, 3500), (3, 5000)):
        it = Tails(store, FastClock(), epoch=epoch, fold_at=3)
        async with running(it):
            segment = it.begin()
            while segment.filled < until_byte:
                it.grow(segment, content[segment.filled : min(until_byte, segment.filled + 400)])
                for _ in range(30):
                    await asyncio.sleep(0)
            while not it.stored or it.stored[-1][2] < segment.end:
                await asyncio.sleep(0.001)
            joined = await it.recover()
            assert joined.reach == until_byte
            assert joined.content[:until_byte] == content[:until_byte]
    assert {name.epoch for name in await it.names()} == {1, 2, 3}
