"""The dispatcher's promises: order of acknowledgement, priority, patience, bounds, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from pipeline.dispatcher import Dispatcher, Gate, endless, none_left
from pipeline.errors import ObjectConflict, SourceError, StoreError
from pipeline.events import Acknowledged, Event, EventFailed, HistoryReady, Notice, SegmentReady
from pipeline.wal import WalFile
from tests.clock import FastClock


def segment(number: int, timeline: int = 1) -> SegmentReady:
    return SegmentReady("list", WalFile.segment(timeline, number << 24, 1 << 24), 1 << 24)


def history(timeline: int) -> HistoryReady:
    file = WalFile.parse(f"{timeline:08X}.history")
    assert file is not None
    return HistoryReady("list", file, 42)


class ListSource:
    """Announces a list of events, then ends, or waits for ever."""

    name = "list"

    def __init__(self, events: Sequence[Event], *, ends: bool = True) -> None:
        self._events = events
        self._ends = ends
        self.taken = 0
        self.finished: list[Event] = []
        self.failing_done = 0

    async def events(self) -> AsyncIterator[Event]:
        for event in self._events:
            self.taken += 1
            yield event
        if not self._ends:
            await asyncio.Event().wait()

    def read(self, event: Event) -> bytes:
        return str(event).encode()

    async def done(self, event: Event) -> None:
        if self.failing_done:
            self.failing_done -= 1
            raise SourceError("the file cannot be removed")
        self.finished.append(event)


def dispatcher(
    handle: object, notices: list[Notice] | None = None, *, window: int = 1024, grace: float = 5.0, service: bool = True
) -> Dispatcher:
    return Dispatcher(
        handle,  # type: ignore[arg-type]  # each test's handler has the right shape
        clock=FastClock(),
        notify=(notices if notices is not None else []).append,
        patience=endless if service else none_left,
        window=window,
        grace=grace,
    )


async def test_acknowledges_only_the_contiguous_beginning_of_a_timeline() -> None:
    events: list[Event] = [segment(1), segment(2), segment(3), segment(1, timeline=2), history(2)]
    source = ListSource(events)
    first = asyncio.Event()

    async def handle(_: ListSource, event: Event) -> None:
        if event == events[0]:
            await first.wait()

    task = asyncio.create_task(dispatcher(handle).run(source))
    async with asyncio.timeout(5):
        while len(source.finished) < 2:
            await asyncio.sleep(0)
    assert set(source.finished) == {events[3], events[4]}, (
        "other lanes do not wait; the blocked one acknowledges nothing"
    )
    first.set()
    await task
    assert [e for e in source.finished if e in events[:3]] == events[:3]


async def test_a_service_tries_until_it_works_and_says_each_failure() -> None:
    notices: list[Notice] = []
    attempts = 0

    async def handle(_: ListSource, __: Event) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 50:
            raise StoreError("down")

    source = ListSource([segment(1)])
    await dispatcher(handle, notices).run(source)
    assert source.finished == [segment(1)]
    assert sum(isinstance(n, EventFailed) for n in notices) == 49
    assert isinstance(notices[-1], Acknowledged)


async def test_a_command_carries_the_rest_and_raises_the_first_failure() -> None:
    bad, behind, other = segment(1), segment(2), segment(1, timeline=2)

    async def handle(_: ListSource, event: Event) -> None:
        if event == bad:
            raise StoreError("refused")

    source = ListSource([bad, behind, other])
    with pytest.raises(StoreError, match="refused"):
        await dispatcher(handle, service=False).run(source)
    assert source.finished == [other], "what lies behind a failure is not acknowledged"


async def test_an_unexpected_error_ends_the_run_and_acknowledges_nothing() -> None:
    async def handle(_: ListSource, __: Event) -> None:
        raise ZeroDivisionError

    source = ListSource([segment(1)])
    with pytest.RaisesGroup(ZeroDivisionError):
        await dispatcher(handle).run(source)
    assert source.finished == []


async def test_a_source_that_cannot_forget_is_asked_again() -> None:
    async def handle(_: ListSource, __: Event) -> None:
        return

    source = ListSource([segment(1), segment(2)])
    source.failing_done = 3
    await dispatcher(handle).run(source)
    assert source.finished == [segment(1), segment(2)]


async def test_takes_no_more_than_the_window_from_a_source() -> None:
    release = asyncio.Event()

    async def handle(_: ListSource, __: Event) -> None:
        await release.wait()

    source = ListSource([segment(n) for n in range(100)])
    task = asyncio.create_task(dispatcher(handle, window=7).run(source))
    for _ in range(1000):
        await asyncio.sleep(0)
    assert source.taken == 8, "seven are under way, the eighth waits in the pump"
    release.set()
    await task
    assert len(source.finished) == 100


async def test_cancelled_it_takes_nothing_new_and_finishes_what_is_under_way() -> None:
    under_way = asyncio.Event()

    async def handle(_: ListSource, __: Event) -> None:
        under_way.set()
        await asyncio.sleep(0.05)

    source = ListSource([segment(1), segment(2)], ends=False)
    task = asyncio.create_task(dispatcher(handle).run(source))
    await under_way.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.finished == [segment(1), segment(2)]


async def test_cancelled_it_gives_up_what_does_not_finish_in_time() -> None:
    async def handle(_: ListSource, __: Event) -> None:
        await asyncio.Event().wait()

    source = ListSource([segment(1)], ends=False)
    task = asyncio.create_task(dispatcher(handle, grace=0.05).run(source))
    while not source.taken:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert source.finished == []


async def test_what_is_durable_somewhere_holds_no_place_and_is_acknowledged_in_its_turn() -> None:
    """One required destination is down for long: the other one gets everything, window or not."""
    owed: list[asyncio.Future[None]] = []

    async def handle(_: ListSource, __: Event) -> asyncio.Future[None]:
        owed.append(asyncio.get_running_loop().create_future())
        return owed[-1]

    source = ListSource([segment(n) for n in range(50)])
    task = asyncio.create_task(dispatcher(handle, window=4).run(source))
    async with asyncio.timeout(5):
        while len(owed) < 50:
            await asyncio.sleep(0)
    assert source.finished == []
    for future in reversed(owed):
        future.set_result(None)
        await asyncio.sleep(0)
    await task
    assert source.finished == [segment(n) for n in range(50)]


async def test_what_was_durable_somewhere_and_is_lost_there_is_handled_anew() -> None:
    handled = 0

    async def handle(_: ListSource, __: Event) -> asyncio.Future[None] | None:
        nonlocal handled
        handled += 1
        if handled > 1:
            return None
        lost = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(lost.set_exception, StoreError("lost", passing=True))
        return lost

    source = ListSource([segment(1)])
    await dispatcher(handle).run(source)
    assert (handled, source.finished) == (2, [segment(1)])


async def test_what_only_a_person_can_mend_is_not_tried_all_the_time() -> None:
    clock = FastClock()
    attempts = 0

    async def handle(_: ListSource, __: Event) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise ObjectConflict("other bytes")

    carrier = Dispatcher(handle, clock=clock, notify=lambda _: None)  # type: ignore[arg-type]  # its source is ours
    await carrier.run(ListSource([segment(1)]))
    assert clock.passed >= 600


async def test_the_gate_lets_the_most_urgent_in_first_and_loses_no_place() -> None:
    gate = Gate(1)
    order: list[int] = []

    async def enter(priority: int) -> None:
        async with gate.place(priority):
            order.append(priority)
            await asyncio.sleep(0)

    async with gate.place(0):
        waiting = [asyncio.create_task(enter(p)) for p in (3, 3, 2, 1, 2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert order == [1, 2, 2, 3]
    async with asyncio.timeout(1), gate.place(3):
        pass


async def test_a_place_handed_to_somebody_who_is_cancelled_at_once_is_passed_on() -> None:
    gate = Gate(1)
    entered = asyncio.Event()

    async def wait_for_place() -> None:
        async with gate.place(0):
            entered.set()

    async with gate.place(0):
        task = asyncio.create_task(wait_for_place())
        await asyncio.sleep(0)
    task.cancel()  # the place is its own already; it has not run since
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not entered.is_set()
    async with asyncio.timeout(1), gate.place(0):
        pass
