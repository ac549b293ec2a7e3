"""Every kind of target, on both sides of it, before, across and behind a promotion: on the newest server, and each kind
once on the oldest. (``test_whole_path`` brings back each kind of target on every version.)

One history for each version, known to the record: a row for each commit, and of each commit its transaction, its time
and where its record begins. At the fork a server died; its standby was promoted, and the old one ran on for a while,
with the same transaction ids and a restore point of the same name. Every commit writes to three tablespaces.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import ThrowawayServer, free_port, make_folder
from tests.rig import Rig, stop_started
from tests.servers import NEWEST, SERVER_VERSIONS

#: Rows in the backup, then up to the fork, behind it on timeline 2, and behind it on timeline 1, which was left.
BACKED_UP, COMMON, AFTER, LEFT = range(1, 3), range(3, 9), range(9, 13), range(101, 103)
#: The first whose own base backups hold the tablespaces that lie inside the data directory (a developers' option).
IN_PLACE = 16
#: Restores at once: most of each is waiting for its server.
_WIDTH = 3


@dataclass(frozen=True)
class Commit:
    """Of one row: its transaction, when that committed, and where the record of the commit begins."""

    xid: str
    time: str
    lsn: str


@dataclass(frozen=True)
class Case:
    """The words of a restore, and the rows that have to come back."""

    words: tuple[str, ...]
    rows: Sequence[int]

    def __str__(self) -> str:
        return " ".join(self.words)


def commit(server: ThrowawayServer, row: int) -> str:
    """One transaction that writes into all three tables; its id."""
    ((xid,),) = server.query(
        f"with a as (insert into mapped values ({row})), b as (insert into in_place values ({row}))"
        f" insert into t values ({row}, md5('{row}')) returning pg_current_xact_id()::text"
    )
    return str(xid)


def commits(server: ThrowawayServer, since: str, xids: dict[str, int]) -> dict[int, Commit]:
    """Row → what the server's own WAL says of its commit, from position ``since`` on."""
    found = server.query(
        "select r.xid::text, to_char(pg_xact_commit_timestamp(r.xid) at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US'),"
        f" r.start_lsn::text from pg_get_wal_records_info('{since}', pg_current_wal_flush_lsn()) r"
        " where r.resource_manager = 'Transaction' and r.record_type = 'COMMIT'"
    )
    return {xids[xid]: Commit(xid, f"{time}+00", lsn) for xid, time, lsn in found if xid in xids}


def promoted(rig: Rig, place: Path, last: str) -> ThrowawayServer:
    """A standby of the server, which was killed, with a tablespace of its own; promoted where the WAL ends."""
    copy, own = rig.folder / "promoted", place.with_name("of_promoted")
    for source, target in ((rig.server.data_dir, copy), (place, own)):
        subprocess.run(["cp", "-a", "--reflink=auto", source, target], check=True)
    (link,) = (path for path in (copy / "pg_tblspc").iterdir() if path.is_symlink())
    link.unlink()
    link.symlink_to(own)
    (copy / "standby.signal").touch()
    (copy / "postmaster.pid").unlink()
    server = rig.adopt(copy)
    server.start()
    rig.wait(lambda: server.query(f"select pg_last_wal_replay_lsn() > '{last}'") == [(True,)], "replayed")
    assert server.query("select pg_promote()") == [(True,)]
    return server


@dataclass(frozen=True)
class History:
    """A repository of both timelines, and what was committed; no server runs any more."""

    rig: Rig
    tablespace: Path
    commits: dict[int, Commit]

    def restored(self, number: int, case: Case) -> None:
        """Restore and compare. ``number``: of the case, for a folder of its own."""
        target, port = self.rig.target(f"case{number}-"), free_port()
        mapped = target.with_name(f"{target.name}-tablespace")
        result = self.rig.json(
            "restore", "--target-dir", str(target), "--tablespace-map", f"{self.tablespace}={mapped}",
            "--start", "--port", str(port), *case.words,
        )  # fmt: skip
        assert result["state"] == "in production", str(case)
        with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
            found = connection.execute("select n, filler from t order by n").fetchall()
            mine = connection.execute("select n from mapped order by n").fetchall()
            inside = connection.execute("select n from in_place order by n").fetchall()
        stop_started(target)
        assert found == [(n, hashlib.md5(str(n).encode()).hexdigest()) for n in case.rows], str(case)
        assert mine == inside == [(n,) for n in case.rows], str(case)
        assert any(mapped.iterdir()), "the tablespace went where it was told to"
        shutil.rmtree(target)
        shutil.rmtree(mapped)


@pytest.fixture(params=SERVER_VERSIONS, ids=lambda major: f"pg{major}")
def history(request: pytest.FixtureRequest) -> Iterator[History]:
    with ExitStack() as stack:
        folder = make_folder("walship-m-")
        stack.callback(shutil.rmtree, folder)
        settings = {
            "track_commit_timestamp": "on", "allow_in_place_tablespaces": "on", "autovacuum": "off",
            "wal_keep_size": "64MB",
        }  # fmt: skip
        with Rig(folder, request.param, [f"file://{folder}/local"], server_settings=settings) as rig:
            yield made(rig)


def made(rig: Rig) -> History:
    """Write both timelines."""
    old, place = rig.server, rig.folder / "of_old"
    place.mkdir()
    give(place, run_as())
    old.start()
    rig.run("init")
    old.query(f"create tablespace outside location '{place}'")
    old.query("create table mapped (n int) tablespace outside")
    if rig.major >= IN_PLACE:
        old.query("create tablespace inside location ''")
    old.query(f"create table in_place (n int) tablespace {'inside' if rig.major >= IN_PLACE else 'pg_default'}")
    old.query("create table t (n int primary key, filler text)")
    old.query("create extension pg_walinspect")
    ((start,),) = old.query("select pg_current_wal_flush_lsn()::text")
    xids = {commit(old, row): row for row in BACKED_UP}
    rig.json("backup")
    for row in COMMON:
        xids[commit(old, row)] = row
        if row == 4:
            old.query("select pg_switch_wal()")
        if row == 6:
            old.query("select pg_create_restore_point('one')")
    known = commits(old, start, xids)
    last = known[COMMON[-1]].lsn
    old.kill9()
    new = promoted(rig, place, last)
    old.start()
    of_old = {commit(old, LEFT[0]): LEFT[0]}
    old.query("select pg_create_restore_point('both')")
    of_old[commit(old, LEFT[1])] = LEFT[1]
    known |= commits(old, last, of_old)
    old.stop()  # and with it everything is archived
    of_new = {}
    for row in AFTER:
        of_new[commit(new, row)] = row
        if row == 10:
            new.query("select pg_create_restore_point('both')")
            new.query("select pg_create_restore_point('only here')")
    known |= commits(new, last, of_new)
    new.stop()
    rig.run("push")
    assert known.keys() == {*BACKED_UP, *COMMON, *AFTER, *LEFT}
    assert known[AFTER[0]].xid == known[LEFT[0]].xid, "both timelines have a transaction of this id"
    return History(rig, place, known)


def cases(at: dict[int, Commit]) -> list[Case]:
    """Every target, and the rows that it has to bring back."""

    def up_to(row: int) -> range:
        return range(1, row + 1)

    old = [*up_to(8), *LEFT]
    return [
        Case((), up_to(12)),
        Case(("--immediate",), BACKED_UP),
        Case(("--to-time", at[5].time), up_to(5)),
        Case(("--to-lsn", at[5].lsn, "--exclusive"), up_to(4)),
        Case(("--to-name", "one"), up_to(6)),
        Case(("--to-xid", at[9].xid), up_to(9)),
        Case(("--latest", "--timeline", "1"), old),
        # before the fork, on the other side of the target
        Case(("--to-time", at[5].time, "--exclusive"), up_to(4)),
        Case(("--to-lsn", at[5].lsn), up_to(5)),
        Case(("--to-xid", at[5].xid), up_to(5)),
        Case(("--to-xid", at[5].xid, "--exclusive"), up_to(4)),
        # across: the last commit before it, and the first one behind it
        Case(("--to-time", at[8].time), up_to(8)),
        Case(("--to-time", at[9].time, "--exclusive"), up_to(8)),
        Case(("--to-lsn", at[8].lsn), up_to(8)),
        Case(("--to-lsn", at[9].lsn, "--exclusive"), up_to(8)),
        Case(("--to-xid", at[9].xid, "--exclusive"), up_to(8)),
        # behind it
        Case(("--to-time", at[11].time), up_to(11)),
        Case(("--to-lsn", at[12].lsn, "--exclusive"), up_to(11)),
        Case(("--to-name", "both"), up_to(10)),
        # what was left behind, with the very ids and names of timeline 2
        Case(("--to-xid", at[101].xid, "--timeline", "1"), [*up_to(8), 101]),
        Case(("--to-name", "both", "--timeline", "1"), [*up_to(8), 101]),
        Case(("--to-time", at[102].time, "--exclusive", "--timeline", "1"), [*up_to(8), 101]),
    ]


def refused(history: History) -> None:
    """Targets of the other timeline: said at once, with what this one reaches. Nothing is made."""
    at, target = history.commits, history.rig.target("refused")
    for words, what in (
        (("--to-name", "only here"), "restore point 'only here' is on timeline 2, at LSN "),
        (("--to-xid", at[12].xid), f"transaction {at[12].xid} is on timeline 2, at LSN "),
    ):
        done = history.rig.run("restore", "--target-dir", str(target), *words, "--timeline", "1", expect=13)
        assert what in done.stderr
        assert "and not on timeline 1, which was followed\nhint: --timeline 2 restores to it" in done.stderr
        assert list(target.iterdir()) == []


def test_every_target_brings_back_its_rows_and_no_other(history: History) -> None:
    wanted = cases(history.commits)
    with ThreadPoolExecutor(_WIDTH) as pool:
        for _ in pool.map(history.restored, range(len(wanted)), wanted):
            pass  # raises what the restore raised
    if history.rig.major == NEWEST:
        refused(history)
