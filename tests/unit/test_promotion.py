"""From one timeline to the next: what has to be stored where before the stream goes on, and before a history goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from infra.settings import Settings
from infra.sources.announced import Announced
from infra.sources.assembly import Assembly
from infra.sources.primary import Primary, parting
from infra.sources.promotion import Promotion
from pipeline.durable import Durable
from pipeline.errors import SourceError
from pipeline.events import HistoryReady, Notice, TimelineLeft
from pipeline.lineage import Leg, Lineage
from pipeline.openwal import OpenWal
from pipeline.wal import Lsn, WalFile

SIZE = 1 << 20
START = 10 * SIZE


def primary(*forks: int) -> Primary:
    """A server that was promoted once at each fork."""
    legs, begin = [], Lsn(0)
    for timeline, fork in enumerate(forks, 1):
        legs.append(Leg(timeline, begin, Lsn(fork)))
        begin = Lsn(fork)
    legs.append(Leg(len(forks) + 1, begin, None))
    return Primary("db:5432", Lineage(tuple(legs), SIZE), Lsn(START + 9 * SIZE), b"history %d" % (len(forks) + 1))


async def history_of(timeline: int) -> bytes:
    return b"history %d" % timeline


class Stream:
    """Everything behind the connection, begun on timeline 1 at ``START``."""

    def __init__(self, **required: bool) -> None:
        self.notices: list[Notice] = []
        self.wal = OpenWal()
        self.announced = Announced(Settings(), SIZE)
        self.assembly = Assembly(self.wal, SIZE, self.announced.segment)
        self.wake = asyncio.Event()
        self.promotion = Promotion(
            self.assembly, self.announced, segment_size=SIZE, wake=self.wake, notify=self.notices.append
        )
        self.durable = Durable(required or {"a": True, "b": True}, Lsn(START), notify=self.notices.append)
        self.promotion.agree(primary(), None)
        self.assembly.begin_at(1, Lsn(START))

    def follow(self, server: Primary) -> None:
        self.promotion.agree(server, self.durable)

    def receive(self, end: int) -> None:
        """Everything up to there, on the timeline where the stream is."""
        at = self.assembly.received
        self.assembly.take(at, bytes(end - at), 0.0)

    def store(self, destination: str, start: int, end: int) -> None:
        self.durable.stored(destination, start, end)
        self.wake.set()

    def flush(self) -> Lsn:
        return self.durable.flush(self.assembly.received, 0.0)

    def histories(self) -> list[int]:
        """What was announced since the last look."""
        events = []
        while not self.announced._queue.empty():
            events.append(self.announced._queue.get_nowait())
        return [event.file.timeline for event in events if isinstance(event, HistoryReady)]

    @asynccontextmanager
    async def going_over(self, server: Primary, timeline: int) -> AsyncIterator[asyncio.Task[None]]:
        """From the end of that timeline; what is awaited must be stored within the block."""
        leg = server.lineage.legs[timeline - 1]
        task = asyncio.create_task(self.promotion.go_over(server, leg, self.durable, history_of))
        await asyncio.sleep(0)
        yield task
        async with asyncio.timeout(5):
            await task


async def test_one_destination_with_the_end_is_enough_to_go_over() -> None:
    stream, fork = Stream(), START + 100
    server = primary(fork)
    stream.receive(fork)
    stream.follow(server)
    async with stream.going_over(server, 1) as task:
        stream.store("b", START, fork - 1)
        await asyncio.sleep(0.01)
        assert not task.done(), "a byte is missing"
        stream.store("b", fork - 1, fork)
    assert (stream.assembly.timeline, stream.assembly.received) == (2, START)
    # The end of timeline 1 stays in memory for the others.
    assert [segment.file.timeline for segment in stream.wal.segments] == [1]
    stream.receive(fork + 50)
    stream.promotion.tell_history(stream.durable)
    assert stream.histories() == [], "not before the first bytes are stored"
    stream.store("b", START, fork + 50)
    stream.promotion.tell_history(stream.durable)
    assert stream.histories() == [2]
    stream.durable.release("b")
    assert stream.flush() == START, "a lacks it all"
    stream.store("a", START, fork + 50)
    assert stream.flush() == fork, "a lacks the history"
    stream.durable.release("a")
    assert stream.flush() == fork + 50


async def test_also_one_that_lacks_older_wal_or_is_not_required_is_enough() -> None:
    stream, fork = Stream(a=True, b=False), START + 3 * SIZE
    server = primary(fork)
    stream.follow(server)
    stream.receive(fork)
    async with stream.going_over(server, 1):
        stream.store("b", fork - SIZE, fork)
    assert (stream.assembly.timeline, stream.assembly.received) == (2, fork)


async def test_positions_that_came_from_elsewhere_are_taken_back_behind_the_fork() -> None:
    """The old primary archived its segment whole, and the stream had not got as far as the fork."""
    stream, fork = Stream(a=True), START + 1000
    stream.receive(START + 200)
    stream.store("a", START, START + SIZE)
    assert stream.flush() == START + SIZE
    server = primary(fork)
    stream.follow(server)
    assert stream.flush() == fork
    assert stream.notices == [TimelineLeft(1, Lsn(fork), Lsn(START + SIZE))]
    stream.receive(fork)
    async with stream.going_over(server, 1):
        pass
    stream.receive(fork + 10)
    stream.promotion.tell_history(stream.durable)
    assert stream.histories() == []
    assert stream.flush() == fork
    stream.follow(server)
    assert len(stream.notices) == 1, "told once"


async def test_two_promotions_while_nobody_was_there() -> None:
    stream, first, second = Stream(a=True), START + 100, START + SIZE + 100
    server = primary(first, second)
    stream.follow(server)
    stream.receive(first)
    async with stream.going_over(server, 1):
        stream.store("a", START, first)
    assert stream.assembly.timeline == 2
    stream.receive(second)
    async with stream.going_over(server, 2):
        stream.store("a", START, second)
    assert stream.assembly.timeline == 3
    assert stream.histories() == [2], "it may be restored to as well"
    stream.promotion.history_done(WalFile.history(2), stream.durable)
    stream.receive(second + 10)
    stream.promotion.tell_history(stream.durable)
    assert stream.histories() == [], "nothing of timeline 3 is stored"
    stream.store("a", START + SIZE, second + 10)
    assert stream.flush() == second, "history 2 leads nowhere behind the second fork"
    stream.promotion.tell_history(stream.durable)
    assert stream.histories() == [3]
    stream.promotion.history_done(WalFile.history(3), stream.durable)
    assert stream.flush() == second + 10


async def test_a_second_promotion_before_the_first_is_through() -> None:
    """Timeline 2 is being streamed, its history is on its way, and the server is on timeline 3."""
    stream, first, second = Stream(a=True), START + 100, START + 300
    stream.receive(first)
    stream.follow(primary(first))
    async with stream.going_over(primary(first), 1):
        stream.store("a", START, first)
    stream.receive(START + 500)
    stream.store("a", START, START + 500)
    assert stream.flush() == first
    server = primary(first, second)
    stream.follow(server)
    assert TimelineLeft(2, Lsn(second), Lsn(START + 500)) in stream.notices
    async with stream.going_over(server, 2):
        pass
    assert stream.histories() == [2]
    stream.receive(START + 400)
    stream.store("a", START, START + 400)
    stream.promotion.history_done(WalFile.history(2), stream.durable)
    assert stream.flush() == first
    stream.promotion.tell_history(stream.durable)
    assert stream.histories() == [3]
    stream.promotion.history_done(WalFile.history(3), stream.durable)
    assert stream.flush() == START + 400


def test_where_a_lineage_leaves_another() -> None:
    one, two, three = (primary(*forks).lineage for forks in [(), (100,), (100, 200)])
    assert parting(one, one) is None
    assert parting(two, two) is None
    assert parting(one, two) == (1, 100)
    assert parting(one, three) == (1, 100)
    assert parting(two, three) == (2, 200)
    assert parting(two, primary(150, 200).lineage) == (1, 100)
    other = Lineage((Leg(1, Lsn(0), Lsn(100)), Leg(3, Lsn(100), None)), SIZE)
    assert parting(two, other) == (1, 100)


async def test_at_a_border_of_segments_the_one_before_is_compared() -> None:
    """A server that was put back sends nothing a second time there."""
    stream = Stream()
    before = [stream.assembly.before]
    stream.receive(START + SIZE)
    before.append(stream.assembly.before)
    file = WalFile.segment(1, Lsn(START), SIZE)
    assert before == [None, file]
    segment = stream.assembly.whole(file)
    assert segment is not None
    stream.assembly.drop(segment)
    assert stream.assembly.rewind() == START + SIZE
    stream.assembly.compare(bytearray(SIZE))
    with pytest.raises(SourceError, match="other bytes of segment 00000001000000000000000A than before"):
        stream.assembly.compare(bytearray(SIZE - 1) + b"x")
    stream.receive(START + SIZE + 1)
    assert stream.assembly.before is None, "what is open is sent again, and compared then"


async def test_the_end_of_a_timeline_is_held_until_what_comes_behind_it_is_stored() -> None:
    stream = Stream()
    stream.receive(START + SIZE + 100)
    whole, open_end = stream.wal.segments
    stream.assembly.begin_at(2, Lsn(START + SIZE))
    stream.assembly.drop(whole)
    assert stream.wal.segments == [open_end], "a segment before it is stored: that says nothing of it"
    stream.receive(START + 2 * SIZE)
    stream.assembly.drop(stream.wal.segments[-1])
    assert stream.wal.segments == []
