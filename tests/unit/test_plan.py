"""Plans made from WAL that was written by hand: what is found, what is not, and what is said then."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from handlers.fetch import Fetcher, read_catalog
from handlers.plan import plan_restore
from pipeline.backup import ArchiveInfo, BackupInfo
from pipeline.catalog import info_key, wal_key
from pipeline.confirmed import Confirmed
from pipeline.errors import RecoveryError
from pipeline.recovery import RestorePlan
from pipeline.targets import Target, TargetKind
from pipeline.wal import Lsn, WalFile
from tests.parts import Shelf
from tests.tails import open_up
from tests.waldata import SEGMENT_SIZE as SIZE
from tests.waldata import Writer

NOON = datetime(2026, 1, 14, 12, tzinfo=UTC)
_POSTGRES_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


def at(minutes: float) -> datetime:
    return NOON + timedelta(minutes=minutes)


def stamp(moment: datetime) -> bytes:
    return struct.pack("<q", (moment - _POSTGRES_EPOCH) // timedelta(microseconds=1))


def point(writer: Writer, name: str, minutes: float) -> int:
    return writer.add(stamp(at(minutes)) + name.encode().ljust(64, b"\0"), rmid=0, info=0x70)


def commit(writer: Writer, xid: int, minutes: float) -> int:
    return writer.add(stamp(at(minutes)), xid=xid, rmid=1)


class Story:
    """A backup in segment 2; then on timeline 1 a transaction each minute, and a fork in segment 4."""

    def __init__(self) -> None:
        self.shelf = Shelf()

    async def written(self) -> Story:
        writer = Writer(2 * SIZE)
        writer.add(b"the backup")
        stop = writer.position
        commit(writer, 701, 1)
        point(writer, "before_migration", 2)
        point(writer, "noon", 2.5)
        await self.put(writer, switch=True)
        writer = Writer(3 * SIZE)
        commit(writer, 702, 3)
        point(writer, "after_migration", 4)
        await self.put(writer, switch=True)
        old, new = Writer(4 * SIZE), Writer(4 * SIZE, timeline=2)
        for each in (old, new):
            each.add(b"both")
        self.fork = new.position
        self.left_behind = point(old, "left_behind", 5)
        commit(old, 703, 6)
        await self.put(old, switch=True)
        for number in (5, 6, 7):
            writer = Writer(number * SIZE)
            commit(writer, 699 + number, number + 2)
            await self.put(writer, switch=True)
        commit(new, 801, 7)
        await self.put(new, switch=False)
        await self.shelf("wal/00000002.history", f"1\t{Lsn(self.fork)}\twhy\n".encode())
        info = BackupInfo(
            "base_20260114_120000", "b" * 32, "full", "7", 170000, SIZE, 1, Lsn(2 * SIZE + 40), Lsn(stop), NOON, NOON,
            (), (ArchiveInfo("base", 1000, ()),), (), "", 100,
        )  # fmt: skip
        await self.shelf(info_key(info.name), info.encode(), backup=info.id)
        self.end = Lsn(new.position)
        return self

    async def put(self, writer: Writer, *, switch: bool) -> None:
        if switch:
            writer.add(rmid=0, info=0x40)
        await self.shelf(wal_key(WalFile.segment(writer.timeline, writer.start, SIZE)), writer.segment())

    async def plan(
        self, target: Target, *, now: datetime | None = None, confirmed: Sequence[Confirmed] = ()
    ) -> RestorePlan:
        fetch = Fetcher([self.shelf.store], self.shelf.chain, "7")
        catalog = await read_catalog([self.shelf.store], fetch, "7")
        return await plan_restore(catalog, target, fetch=fetch, now=now or at(60), confirmed=confirmed)

    async def refusal(self, target: Target) -> RecoveryError:
        with pytest.raises(RecoveryError) as caught:
            await self.plan(target)
        return caught.value


@pytest.fixture
async def story() -> Story:
    return await Story().written()


async def test_each_timeline_has_its_part_of_the_way(story: Story) -> None:
    plan = await story.plan(Target())
    legs = [(leg.timeline, leg.segments, leg.start, leg.end, leg.tail) for leg in plan.legs]
    assert legs == [(1, 2, 2 * SIZE + 40, story.fork, 0), (2, 1, story.fork, 5 * SIZE, 0)]
    assert plan.goal == plan.end == story.end
    alone = await story.plan(Target(timeline=1))
    assert [(leg.timeline, leg.segments) for leg in alone.legs] == [(1, 6)]
    at_once = await story.plan(Target(TargetKind.IMMEDIATE))
    assert at_once.goal == at_once.backup.stop_lsn


async def test_a_name_that_is_not_there_names_those_that_are_like_it(story: Story) -> None:
    found = await story.plan(Target.parse(name="after_migration"))
    assert found.goal == found.found
    assert 3 * SIZE < found.goal < 4 * SIZE
    error = await story.refusal(Target.parse(name="before_migraton"))
    assert "restore point 'before_migraton' is not in the stored WAL" in error.fact
    assert "'before_migration' (2026-01-14 12:02:00 UTC), 'after_migration' (" in error.hint
    assert "and 1 more; timeline 2 can be restored from" in error.hint
    error = await story.refusal(Target.parse(name="x"))
    assert "stored: 'before_migration' (2026-01-14 12:02:00 UTC), 'noon' (2026-01-14 12:02:30 UTC), " in error.hint


async def test_what_only_another_timeline_has_is_found_there(story: Story) -> None:
    error = await story.refusal(Target.parse(name="left_behind"))
    assert error.fact == (
        f"restore point 'left_behind' is on timeline 1, at LSN {Lsn(story.left_behind)}, 2026-01-14 12:05:00 UTC, and"
        " not on timeline 2, which was followed"
    )
    assert error.hint == "--timeline 1 restores to it"
    assert (await story.plan(Target.parse(name="left_behind", timeline=1))).found == story.left_behind
    assert "is on timeline 1, at LSN" in (await story.refusal(Target.parse(xid="703"))).fact
    assert "is on timeline 2, at LSN" in (await story.refusal(Target.parse(xid="801", timeline=1))).fact
    error = await story.refusal(Target.parse(lsn=str(Lsn(7 * SIZE))))
    assert "lies behind the stored WAL of timeline 2" in error.fact
    assert error.hint.startswith(f"timeline 1 has WAL up to LSN {Lsn(8 * SIZE)}: --timeline 1 follows it; timeline 2")


async def test_a_transaction_that_is_not_there_names_the_last_one(story: Story) -> None:
    error = await story.refusal(Target.parse(xid="4000"))
    assert error.hint.startswith("the last transaction that is stored is 801; one that only read, still runs or was")


async def test_a_time_behind_the_last_commit_names_it_also_in_a_tail(story: Story) -> None:
    open_segment = WalFile.segment(2, 4 * SIZE, SIZE)
    await open_up(story.shelf, open_segment, [(0, story.end - 4 * SIZE)])
    plan = await story.plan(Target().to_time(at(30)))
    assert "the last transaction that is stored ended at 2026-01-14 12:07:00 UTC, before" in plan.notices[0]
    assert plan.path.tail == story.end - 4 * SIZE
    assert plan.legs[-1].tail == plan.path.tail
    with pytest.raises(RecoveryError, match=r"in the future; the last .* ended at 2026-01-14 12:07:00 UTC"):
        await story.plan(Target().to_time(at(30)), now=at(20))


async def test_a_time_before_the_backup_names_the_earliest(story: Story) -> None:
    error = await story.refusal(Target().to_time(at(-1)))
    assert "the earliest that can be reached is 2026-01-14 12:00:00 UTC" in error.hint


async def test_what_was_never_reported_as_safe_is_the_end_and_no_hole(story: Story) -> None:
    """Timeline 1 without its segment 6: it was on its way, unless somebody was told that it is safe."""
    gone = WalFile.segment(1, 6 * SIZE, SIZE)
    await story.shelf.store.delete([wal_key(gone)])
    way = Target(timeline=1)
    told = Confirmed(1, Lsn(5 * SIZE + 100))
    plan = await story.plan(way, confirmed=[Confirmed(1, Lsn(4 * SIZE)), told])
    assert plan.path.missing is None
    assert plan.goal <= plan.path.end == 6 * SIZE
    assert f"segment {gone} is not stored whole, and WAL behind it is, up to LSN {Lsn(8 * SIZE)}" in plan.notices[0]
    assert f"reported as safe is LSN {told.lsn}. What lies behind LSN {Lsn(6 * SIZE)} cannot be" in plan.notices[0]
    at_the_edge = await story.plan(way, confirmed=[Confirmed(1, Lsn(6 * SIZE))])
    assert at_the_edge.goal == plan.goal
    with pytest.raises(RecoveryError, match=f"in the future; the last transaction .* {at(7):%H:%M:%S}"):
        await story.plan(replace(way, kind=TargetKind.TIME, time=at(99)), confirmed=[told])
    for positions in (
        [told, Confirmed(1, Lsn(6 * SIZE + 1))],  # a byte of it was
        [Confirmed(2, Lsn(5 * SIZE))],  # of another timeline: nobody knows
        [],
    ):
        with pytest.raises(RecoveryError, match=f"segment {gone} is missing: the latest state cannot be reached"):
            await story.plan(way, confirmed=positions)


async def test_the_reach_of_tails_counts_where_a_segment_was_on_its_way(story: Story) -> None:
    gone = WalFile.segment(1, 6 * SIZE, SIZE)
    await open_up(story.shelf, gone, [(0, 100)])
    for safe, reached in ((6 * SIZE + 100, True), (6 * SIZE + 101, False)):
        confirmed = [Confirmed(1, Lsn(safe))]
        if reached:
            assert (await story.plan(Target(timeline=1), confirmed=confirmed)).path.end == 6 * SIZE + 100
        else:
            with pytest.raises(RecoveryError, match=f"segment {gone} is missing"):
                await story.plan(Target(timeline=1), confirmed=confirmed)
