"""Ten minutes of 503 from the only store: nothing is lost, little is held, it is asked seldom, and it is soon over."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

from handlers.ship import Shipper
from infra.storage.retry import SERVICE, Retrying
from infra.wiring import PLACES
from pipeline.catalog import wal_key
from pipeline.contracts import Buffer
from pipeline.dispatcher import Dispatcher, Gate
from pipeline.errors import StoreError
from pipeline.events import Event, SegmentReady
from pipeline.wal import WalFile
from tests.tailing import SIZE, HandClock, Tails, check_recoverable, founded, running

#: Seconds.
OUTAGE = 600
BUSY = StoreError("answered 503 SlowDown: Reduce your rate.", passing=True)

P = ParamSpec("P")
T = TypeVar("T")


class AtOnce(Executor):
    """Its work is done when it is given: no thread takes time that the clock does not know of."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        done = Future[T]()
        done.set_result(fn(*args, **kwargs))
        return done


class Backlog:
    """Segments as a source has them; a new one twice a second. What is done is forgotten."""

    name = "watch"

    def __init__(self, clock: HandClock, count: int) -> None:
        self.files = [WalFile.segment(1, number * SIZE, SIZE) for number in range(100, 100 + count)]
        self.done_files: list[WalFile] = []
        self.reads = 0
        self._clock = clock

    async def events(self) -> AsyncIterator[Event]:
        for file in self.files:
            yield SegmentReady(self.name, file, SIZE)
            await self._clock.sleep(0.5)

    def read(self, event: Event) -> Buffer:
        assert isinstance(event, SegmentReady)
        self.reads += 1
        return event.file.name.encode() * 1000

    async def done(self, event: Event) -> None:
        assert isinstance(event, SegmentReady)
        self.done_files.append(event.file)


async def test_ten_minutes_of_503() -> None:
    clock = HandClock()
    faulty = await founded()
    it = Tails(faulty, clock, synchronous=True)
    # As the service has it: patience around the store, tails and segments to one outlet.
    it.outlet.store = Retrying(faulty, clock, SERVICE, draw=random.Random(1).random)
    source, gate = Backlog(clock, 150), Gate(PLACES)
    shipper = Shipper(it.chain, it.uploader, gate=gate, workers=AtOnce(), clock=clock, patient=True)
    dispatcher = Dispatcher(shipper.carry, clock=clock, notify=it.notices.append)
    async with running(it):
        shipping = asyncio.create_task(dispatcher.run(source))
        segment = it.begin()
        it.grow(segment, os.urandom(1000))
        async with asyncio.timeout(10):
            while not (it.stored and source.done_files):
                await clock.pass_by(0.1)
                await asyncio.sleep(0.001)
        stored, finished = len(it.stored), len(source.done_files)
        before, read = len(faulty.calls), source.reads
        faulty.down = dict.fromkeys(("put", "get", "head", "list", "delete", "probe"), BUSY)
        for _ in range(OUTAGE):
            it.grow(segment, os.urandom(100))
            await clock.pass_by(1.0)
        assert it.outlet.down
        assert (len(it.stored), len(source.done_files)) == (stored, finished), "nothing is safe, nothing is said to be"
        # Two askers with six attempts each over several seconds, and pauses of up to five between them.
        assert (len(faulty.calls) - before) / OUTAGE < 2
        assert source.reads - read <= PLACES, "what the gate lets through, and then nothing is encoded for nobody"

        faulty.down = {}
        began = clock.monotonic()
        async with asyncio.timeout(15):
            while len(source.done_files) < len(source.files) or it.stored[-1][2] < segment.end:
                await clock.pass_by(0.1)
                await asyncio.sleep(0.001)
        assert clock.monotonic() - began < 20
        await shipping
        await check_recoverable(it, segment)
    assert source.done_files == source.files, "each of them, in order"
    names = [info.key async for info in faulty.store.list("wal/")]
    assert names == [wal_key(file) for file in source.files]
