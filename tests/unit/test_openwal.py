"""The WAL in memory: what was begun, what has arrived and when, and who is woken."""

from __future__ import annotations

import asyncio
import random

import pytest

from pipeline.openwal import OpenSegment, OpenWal
from pipeline.wal import Lsn, WalFile

SIZE = 1 << 20


def segment(number: int, timeline: int = 1) -> WalFile:
    return WalFile.segment(timeline, number * SIZE, SIZE)


def test_a_segment_fills_from_its_first_byte_on() -> None:
    wal = OpenWal()
    opened = wal.begin(segment(3), SIZE)
    assert (opened.start, opened.end, opened.whole) == (Lsn(3 * SIZE), Lsn(3 * SIZE), False)
    opened.append(b"abc", 1.0)
    opened.append(memoryview(b"defg"), 1.0)
    assert bytes(opened.view(1, 6)) == b"bcdef"
    assert (opened.filled, opened.end) == (7, Lsn(3 * SIZE + 7))
    opened.append(bytes(SIZE - 7), 2.0)
    assert opened.whole
    assert len(opened.data) == SIZE


def test_more_than_fits_is_refused_and_changes_nothing() -> None:
    opened = OpenWal().begin(segment(1), SIZE)
    opened.append(bytes(SIZE - 1), 1.0)
    with pytest.raises(AssertionError):
        opened.append(b"ab", 1.0)
    assert (opened.filled, len(opened.data)) == (SIZE - 1, SIZE)


def test_what_has_not_arrived_is_not_shown() -> None:
    opened = OpenWal().begin(segment(1), SIZE)
    opened.append(b"abc", 1.0)
    with pytest.raises(AssertionError):
        opened.view(0, 4)


def test_a_view_stays_right_while_more_arrives() -> None:
    opened = OpenWal().begin(segment(1), SIZE)
    opened.append(b"abc", 1.0)
    view = opened.view(0, 3)
    opened.append(b"def", 1.0)
    assert bytes(view) == b"abc"


def test_arrivals_are_known_to_the_hundredth_of_a_second_and_never_too_late() -> None:
    opened = OpenWal().begin(segment(1), SIZE)
    drawn = random.Random(3)
    now, truth = 50.0, []
    for _ in range(3000):
        now += drawn.choice((0.0, 0.001, 0.004, 0.02, 1.5))
        truth.append((opened.filled, now))
        opened.append(bytes(drawn.randint(1, 9)), now)
    for offset, moment in truth:
        assert moment - 0.0101 <= opened.arrived(offset) <= moment


def test_a_segment_that_is_open_for_weeks_remembers_the_last_seconds_exactly() -> None:
    opened = OpenWal().begin(segment(1), SIZE)
    for second in range(100_000):
        opened.append(b"x", float(second))
    assert len(opened._marks) <= 4096
    assert [opened.arrived(at) for at in range(99_000, 100_000)] == [float(at) for at in range(99_000, 100_000)]
    assert all(opened.arrived(at) <= at for at in range(0, 99_000, 97)), "an older byte may look older, never younger"
    assert opened.arrived(0) == 0.0


def test_segments_follow_each_other_across_drops_and_timelines() -> None:
    wal = OpenWal()
    assert wal.following(None) is None
    a, b, c = (wal.begin(file, SIZE) for file in (segment(4), segment(5), segment(5, timeline=2)))
    assert (wal.following(None), wal.following(a), wal.following(b), wal.following(c)) == (a, b, c, None)
    wal.drop(b)
    wal.drop(b)
    assert wal.following(a) is c
    assert wal.following(b) is c, "one that was dropped is still a place to go on from"
    assert wal.segments == [a, c]


async def test_every_change_wakes_whoever_has_not_seen_it() -> None:
    wal = OpenWal()
    opened = wal.begin(segment(1), SIZE)
    wal.tell()
    seen = await wal.changed(0)
    assert seen == wal.version
    waiting = [asyncio.create_task(wal.changed(seen)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    opened.append(b"x", 1.0)
    wal.tell()
    wal.tell()
    async with asyncio.timeout(5):
        assert await asyncio.gather(*waiting) == [seen + 2] * 3
        before = wal.version
        waiter = asyncio.create_task(wal.changed(before))
        await asyncio.sleep(0)
        wal.drop(opened)
        assert await waiter == before + 1, "a drop is a change"
    wal.drop(opened)
    assert wal.version == before + 1, "and a second one is none"


def test_whoever_holds_a_dropped_segment_reads_on() -> None:
    wal = OpenWal()
    opened: OpenSegment = wal.begin(segment(1), SIZE)
    opened.append(b"abc", 1.0)
    wal.drop(opened)
    assert bytes(opened.view(0, 3)) == b"abc"
