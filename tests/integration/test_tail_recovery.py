"""Real servers recover from tails: cut anywhere, of several writers and destinations, damaged, and across a fork."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest

from handlers.fetch import Fetcher
from infra.restore import Repository, make_plan, restore
from infra.storage.memory import MemoryStore
from pipeline.catalog import wal_key
from pipeline.contracts import Store
from pipeline.errors import RecoveryError
from pipeline.recovery import RestorePlan
from pipeline.targets import Target
from pipeline.wal import Lsn, WalFile
from tests.integration.test_restore import ask, rows, stopped_after
from tests.restoring import Bank, archiving
from tests.servers import NEWEST, SERVER_VERSIONS, StartServer, server_folder, start_server
from tests.tails import Range, change, lay, open_up

__all__ = ["server_folder", "start_server"]

SIZE = 1 << 20
PAGE = 8192


@dataclass
class History:
    """Rows in t, and where the WAL was behind each one's commit: the last ones in the open segment."""

    bank: Bank
    ends: dict[int, Lsn]
    #: When the row was there and no later one.
    times: dict[int, str]
    xids: dict[int, str]
    #: The open segment, as it was archived later.
    file: WalFile
    content: bytes

    def offset(self, row: int) -> int:
        return self.ends[row] - self.file.start(SIZE)

    def before(self, offset: int) -> list[int]:
        """The rows that are committed in the segment's first so many bytes."""
        return [row for row, end in self.ends.items() if end <= self.file.start(SIZE) + offset]

    def repository(self, *stores: Store) -> Repository:
        """At these destinations, the bank's own if none is given."""
        whole = self.bank.repository()
        if not stores:
            return whole
        fetch = Fetcher(stores, self.bank.shelf.chain, self.bank.shelf.system_id)
        return replace(whole, stores=stores, fetch=fetch)

    async def lay(self, *ranges: Range, store: Store | None = None, epoch: int = 1) -> list[str]:
        shelf = self.bank.shelf
        return await lay(store or shelf.store, shelf.chain, self.file, self.content, ranges, epoch=epoch)

    async def clear(self) -> None:
        store = self.bank.shelf.store
        await store.delete([info.key async for info in store.list("tail/")])

    async def recover(self, name: str, target: Target | None = None, *stores: Store) -> tuple[RestorePlan, list[int]]:
        """Restore and count."""
        repository = self.repository(*stores)
        plan = await make_plan(repository, target or Target())
        place = self.bank.place(name)
        restored = await restore(repository, plan, place)
        with stopped_after(restored.server):
            return plan, rows(place)


def insert(bank: Bank, row: int) -> tuple[Lsn, str, str]:
    """Commit a row of three kilobytes: its end, a time behind it, its transaction."""
    xid = bank.server.query(
        f"insert into t select {row}, string_agg(md5(n::text), '') from generate_series(1, 90) n"
        " returning pg_current_xact_id()::text"
    )[0][0]
    end, when = bank.server.query("select pg_current_wal_insert_lsn(), clock_timestamp()")[0]
    return Lsn.parse(end), when.isoformat(), xid


async def history(start_server: StartServer, folder: Path, major: int = NEWEST) -> History:
    """A backup, row 1 in a finished segment, rows 2 to 12 in the next one, which is only in ``content``."""
    archive = folder / "archive"
    # Stored as it is, so that each row is as long as it looks.
    server = start_server(major, settings={**archiving(archive), "autovacuum": "off"}, segment_mb=1)
    bank = Bank(server, archive)
    server.query("create table t (n int, filler text)")
    server.query("alter table t alter column filler set storage external")
    await bank.back_up()
    made = {1: insert(bank, 1)}
    await bank.ship_wal()
    for row in range(2, 13):
        made[row] = insert(bank, row)
        if row == 8:
            server.query("select pg_create_restore_point('in the tail')")
    file = WalFile.segment(1, made[12][0], SIZE)
    assert file == WalFile.segment(1, made[2][0], SIZE), "all in one segment"
    await bank.ship_wal()
    content = await open_up(bank.shelf, file, [])
    return History(
        bank, {n: m[0] for n, m in made.items()}, {n: m[1] for n, m in made.items()},
        {n: m[2] for n, m in made.items()}, file, content,
    )  # fmt: skip


def pieces(end: int, *cuts: int) -> list[Range]:
    edges = [0, *cuts, end]
    return list(pairwise(edges))


@pytest.mark.parametrize("major", [SERVER_VERSIONS[0], NEWEST])
async def test_a_tail_that_ends_anywhere_recovers_to_its_last_complete_record(
    major: int, start_server: StartServer, server_folder: Path
) -> None:
    at = await history(start_server, server_folder, major)
    page = -(-at.offset(6) // PAGE) * PAGE
    cuts = {
        "record": at.offset(5),
        "mid_commit": at.offset(5) - 8,
        "mid_record": at.offset(5) + 1000,
        "page": page,
        "page_header": page + 10,
    }
    for name, cut in cuts.items() if major == NEWEST else [("mid_record", cuts["mid_record"])]:
        # Many tails, and bytes behind a hole that nobody can use.
        await at.lay(*pieces(cut, 3000, 3001, page - 2000 if cut >= page else 3500))
        await at.lay((cut + 16, cut + 5000), epoch=2)
        plan, found = await at.recover(name)
        assert found == at.before(cut), name
        assert plan.path.end == at.file.start(SIZE) + cut
        assert any("comes from tails of an open segment" in notice for notice in plan.notices)
        assert any(f"has a hole: bytes {cut} to {cut + 16}" in notice for notice in plan.notices)
        await at.clear()


async def test_every_target_inside_the_tail(start_server: StartServer, server_folder: Path) -> None:
    at = await history(start_server, server_folder)
    end = at.offset(11)
    await at.lay(*pieces(end, 5000, 10_000, 20_000))
    # The segment before is whole, and in tails only: in synchronous mode its finished object may come late.
    before = WalFile.segment(1, at.file.start(SIZE) - 1, SIZE)
    await open_up(at.bank.shelf, before, pieces(SIZE, 70_000, 300_000))
    targets = {
        "time": (Target.parse(time=at.times[4]), 4),
        "lsn": (Target.parse(lsn=str(at.ends[6]), exclusive=True), 6),
        "xid": (Target.parse(xid=at.xids[7]), 7),
        "name": (Target.parse(name="in the tail"), 8),
        "later": (Target.parse(time=at.times[11]), 11),
    }
    for name, (target, last) in targets.items():
        _, found = await at.recover(name, target)
        assert found == [*range(1, last + 1)], name
    for target in (Target.parse(xid=at.xids[12]), Target.parse(lsn=str(at.ends[12]))):
        with pytest.raises(RecoveryError, match=r"is not in the stored WAL|lies behind the stored WAL") as caught:
            await make_plan(at.repository(), target)
        assert str(at.ends[11])[:-3] in caught.value.hint


async def test_what_is_damaged_or_strange_ends_recovery_before_it_unless_something_has_its_bytes(
    start_server: StartServer, server_folder: Path
) -> None:
    at = await history(start_server, server_folder)
    # Overlaps, doubles, three writers, and one of another server that went its own way.
    first, second, third = (at.offset(row) for row in (4, 7, 11))
    keys = await at.lay((0, first), (0, 900), (first, second), (second, third))
    await at.lay((0, 1000), (800, first), (first - 100, first + 50), epoch=2)
    store, chain = at.bank.shelf.store, at.bank.shelf.chain
    forked = at.content[: first + 20] + bytes(SIZE - first - 20)
    await lay(store, chain, at.file, forked, [(first + 40, second), (second, SIZE)])
    await change(store, keys[2], flip=200)
    plan, found = await at.recover("flipped")
    assert found == at.before(first + 50)
    assert any(f"{keys[2]} is damaged" in notice for notice in plan.notices)
    # Another destination has it, and lacks everything else.
    other = MemoryStore("other")
    await at.lay((first, second), store=other)
    plan, found = await at.recover("both", None, store, other)
    assert found == at.before(third)
    assert any("came from another fork" in notice for notice in plan.notices)
    # The segment is finished between plan and restore.
    repository = at.repository()
    plan = await make_plan(repository, Target())
    await at.clear()
    await at.bank.shelf(wal_key(at.file), at.content)
    place = at.bank.place("finished")
    restored = await restore(repository, plan, place)
    with stopped_after(restored.server):
        assert rows(place) == [*range(1, 13)]


@dataclass
class Forked:
    """Timeline 1, and timeline 2 that a restored server has begun in the open segment."""

    at: History
    #: Rows before the fork.
    common: list[int]
    fork: Lsn
    #: The same segment on timeline 2, with row 20 behind the fork, up to ``reach``.
    new: WalFile
    content: bytes
    reach: int


async def forked(start_server: StartServer, folder: Path) -> Forked:
    """Restored up to row 6 and promoted there; timeline 1 went on to row 12."""
    at = await history(start_server, folder)
    await at.lay((0, at.offset(12)))
    repository = at.bank.repository()
    place = at.bank.place("promoted")
    plan = await make_plan(repository, Target.parse(lsn=str(at.ends[6]), exclusive=True))
    restored = await restore(repository, plan, place)
    with stopped_after(restored.server):
        common = rows(place)
        ask(place, "insert into t values (20, '') returning n")
        (end,) = ask(place, "select pg_current_wal_insert_lsn()::text")[0]
        line = (place.directory / "pg_wal" / "00000002.history").read_text()
        new = WalFile.segment(2, at.file.start(SIZE), SIZE)
        content = (place.directory / "pg_wal" / new.name).read_bytes()
    await at.bank.shelf("wal/00000002.history", line.encode())
    reach = Lsn.parse(end) - at.file.start(SIZE)
    return Forked(at, common, Lsn.parse(line.split()[1]), new, content, reach)


async def test_tails_across_a_fork(start_server: StartServer, server_folder: Path) -> None:
    it = await forked(start_server, server_folder)
    shelf = it.at.bank.shelf
    remark = f"timeline 2 began at LSN {it.fork}, nothing of it is stored: it is not followed"

    # Nothing but the history of timeline 2, then its tail without the beginning, then without a byte of its own.
    fork = it.fork - it.at.file.start(SIZE)
    for ranges in ([], [(fork - 100, it.reach)], [(0, fork)]):
        await lay(shelf.store, shelf.chain, it.new, it.content, ranges)
        plan = await make_plan(it.at.repository(), Target())
        assert (plan.timeline, plan.path.end) == (1, it.at.ends[12])
        assert remark in plan.notices
        await shelf.store.delete([info.key async for info in shelf.store.list(f"tail/{it.new}")])

    # Whoever asks for timeline 2 all the same gets what was before the fork, and not one byte of timeline 1 behind it.
    await lay(shelf.store, shelf.chain, it.new, it.content, [(fork - 100, it.reach)])
    plan, found = await it.at.recover("chimera", Target(timeline=2))
    assert plan.path.end == it.fork
    assert found == it.common == [*range(1, 7)]

    await lay(shelf.store, shelf.chain, it.new, it.content, [(0, fork - 50)])
    plan, found = await it.at.recover("new")
    assert (plan.timeline, found) == (2, [*it.common, 20])
    (left,) = [notice for notice in plan.notices if "--timeline 1 brings them back" in notice]
    assert f"timeline 1 has WAL behind LSN {it.fork}" in left
    plan, found = await it.at.recover("left_behind", Target(timeline=1))
    assert (plan.timeline, found) == (1, [*range(1, 13)])
