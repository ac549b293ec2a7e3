"""What goes wrong during a base backup: told in words, nothing is left on the server, and what is stored stays good."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any

import pytest

from infra import backups
from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import ThrowawayServer, make_folder
from infra.settings import load
from pipeline.backup import BackupInfo
from pipeline.errors import StoreError
from tests.backups import Running, local, names, nothing_left, rig, said
from tests.proxy import Proxy
from tests.rig import Rig

__all__ = ["rig"]  # a fixture

_PROGRESS = "select count(*) from pg_stat_progress_basebackup where phase = 'streaming database files'"
#: A session that sits between pg_backup_start and pg_backup_stop has seen to the first of them.
_READING = (
    "select count(*) from pg_stat_activity where application_name = 'walship_backup' and state = 'idle'"
    " and query like '%min_recovery_end_timeline%'"
)
#: Bytes a second: whatever is to happen in the middle has time to.
_SLOW = {"WALSHIP_BACKUP_RATE": "3000000"}


@pytest.fixture
def first(rig: Rig) -> Iterator[list[str]]:
    """The backups before a test, which are those after it: it fails to make one."""
    before = names(rig)
    yield before
    assert names(rig) == before


def under_way(server: ThrowawayServer, query: str) -> Callable[[], bool]:
    return lambda: server.query(query) != [(0,)]


_MODES: dict[str, tuple[tuple[str, ...], bool, str]] = {
    "through the server": ((), False, _PROGRESS),
    "local": ((), True, _READING),
    "incremental": (("--incremental",), False, _PROGRESS),
}


def begin(rig: Rig, mode: str, server: ThrowawayServer | None = None, **changed: str) -> Running:
    """A slow backup that is in the middle of it."""
    words, reads, query = _MODES[mode]
    where = server or rig.server
    running = Running(rig, "backup", *words, **_SLOW, **(local(where) if reads else {}), **changed)
    running.until(under_way(where, query))
    return running


@pytest.mark.parametrize("mode", _MODES)
def test_stopped_it_leaves_no_trace(rig: Rig, first: list[str], mode: str) -> None:
    rig.sql("update t set filler = md5(filler)")  # an increment of more than what fits between server and client
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        running = begin(rig, mode)
        began = time.monotonic()
        running.signal(number)
        running.end(code)
        assert time.monotonic() - began < 20
        nothing_left(rig.server)
    assert names(rig) == first


@pytest.mark.parametrize("mode", ["through the server", "local"])
def test_the_connection_is_lost(rig: Rig, first: list[str], mode: str) -> None:
    assert rig.server.port
    with Proxy(rig.server.port) as proxy:
        running = begin(rig, mode, POSTGRES_PORT=str(proxy.port))
        proxy.cut()
        words = running.end(10).stderr
    assert "connection" in words
    # Whichever of its connections notices first: the one that reads, or the one that holds others off.
    assert "no backup was made" in words or "while processing the request" in words
    nothing_left(rig.server)
    assert names(rig) == first


def test_the_server_is_killed_and_comes_back(rig: Rig, first: list[str]) -> None:
    running = begin(rig, "local")
    rig.server.kill9()
    rig.server.start()
    words = running.end(10).stderr
    assert "PostgreSQL" in words
    assert "no backup was made" in words
    nothing_left(rig.server)
    assert names(rig) == first


@pytest.mark.parametrize("mode", ["through the server", "local"])
def test_the_standby_is_promoted(rig: Rig, first: list[str], mode: str) -> None:
    standby = ThrowawayServer(rig.bin_dir, rig.folder / f"standby {mode}".replace(" ", "_"))
    rig.server.run("pg_basebackup", "-D", str(standby.data_dir), "-d", rig.server.dsn(), "-R", "-c", "fast")
    with standby:
        standby.start({"archive_mode": "off"})
        host = f"127.0.0.1:{standby.port}"
        running = begin(rig, mode, standby, WALSHIP_BACKUP_HOST=host)
        standby.query("select pg_promote()")
        words = running.end(10).stderr
        assert "promoted" in words or "timeline" in words, words
        nothing_left(standby)
        # And from then on it is refused before anything begins.
        assert "is no standby any more, but a primary" in said(rig, WALSHIP_BACKUP_HOST=host)
    assert names(rig) == first


async def test_what_comes_behind_a_finished_backup_is_no_failure(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, or Ctrl-C, while parts of unfinished backups are looked for: the backup is there, and is told."""
    for name, value in rig.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(rig.folder)
    monkeypatch.setattr(os, "nice", lambda _: 0)  # it would hold for all tests behind this one
    told: list[str] = []
    reached = asyncio.Event()

    async def fail(*_: object, **__: object) -> int:
        raise StoreError("the listing has no end")

    async def hang(*_: object, **__: object) -> int:
        reached.set()
        return await asyncio.Event().wait()

    def take() -> Coroutine[Any, Any, BackupInfo]:
        rig.next_second()
        return backups.backup(load(), label="behind", report=lambda _: None, tell=told.append)

    monkeypatch.setattr(backups, "clean_unfinished", fail)
    taken = await take()
    assert told[-1] == f"{taken.name} is complete; the clearing up behind it failed: the listing has no end"
    monkeypatch.setattr(backups, "clean_unfinished", hang)
    task = asyncio.create_task(take())
    async with asyncio.timeout(60):
        await reached.wait()
    task.cancel()
    stopped = await task
    assert told[-1] == f"{stopped.name} is complete; the clearing up behind it was stopped"
    assert {taken.name, stopped.name} < set(names(rig))
    nothing_left(rig.server)


def test_a_file_that_the_server_cannot_read(rig: Rig, first: list[str]) -> None:
    ((database,),) = rig.sql("select oid from pg_database where datname = 'postgres'")
    closed = rig.server.data_dir / "base" / str(database) / "99998"
    closed.write_bytes(bytes(8192))
    closed.chmod(0)
    try:
        words = said(rig)
        assert f'base/{database}/99998": Permission denied' in words
        assert "no backup was made" in words
        assert names(rig) == first
    finally:
        closed.unlink()


def test_a_link_in_the_place_of_a_table(rig: Rig) -> None:
    ((database,),) = rig.sql("select oid from pg_database where datname = 'postgres'")
    stray = rig.server.data_dir / "base" / str(database) / "99999"
    stray.symlink_to("/nowhere")
    try:
        before = names(rig)
        words = said(rig, WALSHIP_DATA_DIR=str(rig.server.data_dir))
        assert f"{stray} cannot be read: it is no file and no folder but a link" in words
        assert names(rig) == before
        # The server leaves it out, and says so: that is not kept from people.
        done = rig.run("backup")
        assert "PostgreSQL warns: skipping special file" in done.stderr
    finally:
        stray.unlink()


def test_a_tablespace_outside_the_mounted_paths(rig: Rig, first: list[str]) -> None:
    place, mounted = rig.folder / "space", rig.folder / "mounted"
    for folder in (place, mounted):
        folder.mkdir()
        give(folder, run_as())
    rig.sql(f"create tablespace space location '{place}'")
    try:
        for entry in rig.server.data_dir.iterdir():
            if entry.name != "pg_tblspc":
                (mounted / entry.name).symlink_to(entry)
        words = said(rig, WALSHIP_DATA_DIR=str(mounted))
        assert f"is at {place} on the server, and {mounted}/pg_tblspc/" in words
        assert f"mount {place} here under the same path" in words
        check = rig.run("check", expect=10, environment=rig.environment(WALSHIP_DATA_DIR=str(mounted)))
        assert f"is at {place} on the server" in check.stdout + check.stderr
    finally:
        rig.sql("drop tablespace space")
    assert names(rig) == first


def test_check_tells_how_backups_are_taken(rig: Rig) -> None:
    words = rig.run("check", environment=rig.environment(**local(rig.server))).stdout
    assert f"{rig.server.data_dir} is the server's: base backups read it directly" in words
    assert "summarize_wal is on: incremental backups are possible" in words
    words = said_by_check(rig, WALSHIP_BACKUP_HOST=f"127.0.0.1:{rig.server.port}")
    assert "is no standby any more, but a primary" in words


def said_by_check(rig: Rig, **changed: str) -> str:
    done = rig.run("check", expect=10, environment=rig.environment(**changed))
    return done.stdout + done.stderr


def test_a_role_of_its_own_is_enough(rig: Rig) -> None:
    rig.sql("create role walship login replication")
    rig.sql("grant pg_monitor to walship")
    rig.sql("grant execute on function pg_switch_wal(), pg_create_restore_point(text) to walship")
    changed = {"POSTGRES_USERNAME": "walship", "WALSHIP_DATA_DIR": str(rig.server.data_dir)}
    words = said_by_check(rig, **changed)
    assert "the role walship" in words
    grant = re.search(r"GRANT EXECUTE ON FUNCTION pg_backup_start.*;", words)
    assert grant is not None, words
    rig.sql(grant[0])
    rig.run("check", environment=rig.environment(**changed))
    rig.run("backup", environment=rig.environment(**changed))


def test_summarize_wal_is_off(rig: Rig, first: list[str]) -> None:
    try:
        rig.sql("alter system set summarize_wal = off")
        rig.server.reload()
        rig.wait(lambda: rig.sql("show summarize_wal") == [("off",)], "it is off")
        words = said(rig, "--incremental")
        assert "summarize_wal is off" in words
        assert "ALTER SYSTEM SET summarize_wal = on" in words
        # What ran meanwhile is not summarized, and that is told too.
        assert "summarize_wal is off: `walship backup --incremental` needs it" in rig.run("check").stdout
        scheduled = rig.environment(WALSHIP_SCHEDULE_INCREMENTAL="30 2 * * 1-6", WALSHIP_SCHEDULE_FULL="30 2 * * 0")
        words = rig.run("check", environment=scheduled, expect=10).stdout
        assert words.count("WALSHIP_SCHEDULE_INCREMENTAL is set, and summarize_wal is off") == 1
        # The first one is a full one, which goes well: the person who asked for it learns now that the next will not.
        fresh = rig.folder / "fresh"
        fresh.mkdir()
        elsewhere = rig.environment(WALSHIP_DESTINATIONS=f"file://{fresh}")
        rig.run("init", environment=elsewhere)
        words = rig.run("backup", "--incremental", environment=elsewhere).stderr
        assert "a full one is taken" in words
        assert "summarize_wal is off: the next incremental backup will be refused" in words
    finally:
        rig.sql("alter system reset summarize_wal")
        rig.server.reload()
        rig.wait(lambda: rig.sql("show summarize_wal") == [("on",)], "it is on")
    assert names(rig) == first


def test_the_summaries_are_gone(rig: Rig, first: list[str]) -> None:
    rig.sql("insert into t select n, 'more' from generate_series(1, 20000) n")
    rig.sql("checkpoint")
    (*_, last) = rig.json("list")["backups"]
    behind = f"select summarized_lsn > '{last['stop_lsn']}'::pg_lsn from pg_get_wal_summarizer_state()"
    rig.wait(lambda: rig.sql(behind) == [(True,)], "what was written since the backup is summarized")
    for path in (rig.server.data_dir / "pg_wal/summaries").glob("*.summary"):
        path.unlink()
    words = said(rig, "--incremental")
    assert "WAL summaries are required" in words
    assert "a full backup is possible at any time" in words
    assert names(rig) == first


def test_an_older_server_is_told_what_to_do_instead() -> None:
    folder = make_folder("walship-o-")
    try:
        with Rig(folder, 16, [f"file://{folder}/store"]) as old:
            old.server.start()
            old.run("init")
            words = said(old, "--incremental")
            assert "PostgreSQL 16 makes no incremental backups: that begins with 17" in words
            assert "take full ones less often" in words
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("where", ["through the server", "local"])
def test_a_damaged_page_is_told_and_the_backup_made(rig: Rig, where: str) -> None:
    rig.sql("drop table if exists broken")
    rig.sql("create table broken as select n, repeat('x', 500) from generate_series(1, 500) n")
    rig.sql("checkpoint")
    ((path,),) = rig.sql("select pg_relation_filepath('broken')")
    with (rig.server.data_dir / path).open("r+b") as file:
        for block in (3, 9):
            file.seek(block * 8192 + 5000)
            file.write(b"\xff\xfe")
    changed: Mapping[str, str] = local(rig.server) if where == "local" else {}
    done = rig.run("backup", "--json", environment=rig.environment(**changed))
    result = json.loads(done.stdout)
    assert result["damaged"] == [{"path": path, "blocks": [3, 9]}]
    assert (result["destinations"], result["missing"]) == ([*rig.destinations], {})
    assert f"DAMAGED: {path}: the checksum of blocks 3, 9 is wrong" in done.stderr
    assert result["name"] in names(rig)


@pytest.mark.parametrize("mode", ["through the server", "local"])
def test_two_at_the_same_time(rig: Rig, first: list[str], mode: str) -> None:
    running = begin(rig, mode)
    other = rig.run("backup", expect=10)
    assert f"a base backup of 127.0.0.1:{rig.server.port} is being taken already: from 127.0.0.1, since" in other.stderr
    # What the hint says ends the first one, and not only its lock.
    (statement,) = re.findall(r"select pg_terminate_backend.*", other.stderr)
    rig.sql(statement)
    assert "no backup was made" in running.end(10).stderr
    nothing_left(rig.server)
    assert names(rig) == first


def test_progress_for_programs(rig: Rig) -> None:
    ((size,),) = rig.sql("select sum(pg_tablespace_size(oid))::bigint from pg_tablespace")
    changed = rig.environment(WALSHIP_BACKUP_RATE=str(size // 3), **local(rig.server))
    done = rig.run("backup", "--json", environment=changed)
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert any(line["note"].startswith("no service is running") for line in told if "note" in line)
    lines = [line for line in told if line.get("phase") == "files"]
    assert len(lines) >= 2
    assert all(line["progress"] == "base backup" and line["tablespace"] == "base" for line in lines)
    assert lines[0]["bytes"] < lines[-1]["bytes"] <= lines[-1]["of_bytes"]
    assert lines[-1]["bytes_per_second"] > 0
    assert any(line["seconds_left"] is not None for line in lines)
