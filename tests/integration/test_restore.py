"""Restores of real servers: to every kind of target, compared with what was there at that moment."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from infra.postgres.restored import Started
from infra.restore import Place, make_plan, restore
from pipeline.errors import RecoveryError
from pipeline.targets import Target
from tests.clock import FastClock
from tests.restoring import Bank, archiving
from tests.servers import StartServer, server_folder, start_server

__all__ = ["server_folder", "start_server"]


@contextlib.contextmanager
def stopped_after(server: Started | None) -> Iterator[Started]:
    """End the server, which nobody guards: it outlives a restore."""
    assert server is not None
    try:
        yield server
    finally:
        if server.pid:
            os.kill(server.pid, signal.SIGQUIT)
            deadline = time.monotonic() + 30
            while alive(server.pid):
                assert time.monotonic() < deadline
                time.sleep(0.02)


def alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ask(place: Place, sql: str) -> list[tuple[Any, ...]]:
    port = place.options["port"]
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres", autocommit=True) as connection:
        return connection.execute(sql.encode()).fetchall()


def rows(place: Place) -> list[int]:
    return [row[0] for row in ask(place, "select n from t order by n")]


async def test_every_target(start_server: StartServer, server_folder: Path) -> None:
    """On the newest version; the whole path goes to every target on all of them."""
    archive = server_folder / "archive"
    server = start_server(settings=archiving(archive), segment_mb=1)
    bank = Bank(server, archive)
    server.query("create table t (n int)")
    server.query("insert into t values (1)")
    info = await bank.back_up()

    server.query("insert into t values (2)")
    when = server.query("select clock_timestamp()")[0][0]
    server.query("insert into t values (3)")
    server.query("select pg_create_restore_point('here')")
    server.query("insert into t values (4)")
    lsn = server.query("select pg_current_wal_insert_lsn()")[0][0]
    with psycopg.connect(server.dsn()) as connection:
        connection.execute("insert into t values (5)")
        xid = connection.execute("select pg_current_xact_id()::text").fetchall()[0][0]
    server.query("insert into t values (6)")
    await bank.ship_wal()

    expected = {
        "latest": (Target(), [1, 2, 3, 4, 5, 6]),
        "time": (Target.parse(time=when.isoformat()), [1, 2]),
        "name": (Target.parse(name="here"), [1, 2, 3]),
        "lsn": (Target.parse(lsn=lsn, exclusive=True), [1, 2, 3, 4]),
        "xid": (Target.parse(xid=xid), [1, 2, 3, 4, 5]),
        "before_xid": (Target.parse(xid=xid, exclusive=True), [1, 2, 3, 4]),
        "immediate": (Target.parse(immediate=True), [1]),
    }
    for name, (target, wanted) in expected.items():
        plan = await make_plan(bank.repository(), target)
        assert plan.backup == info
        place = bank.place(name)
        restored = await restore(bank.repository(), plan, place)
        with stopped_after(restored.server) as started:
            assert started.state == "in production"
            assert rows(place) == wanted, name
            assert ask(place, "show archive_mode") == [("off",)]
            assert ask(place, "select pg_is_in_recovery()") == [(False,)]
        assert not (place.directory / "pgsql_tmp.walship" / "context.json").exists()


async def test_a_name_is_looked_for_behind_the_newest_backup_first(
    start_server: StartServer, server_folder: Path
) -> None:
    archive = server_folder / "archive"
    server = start_server(settings=archiving(archive), segment_mb=1)
    bank = Bank(server, archive)
    server.query("create table t (n int)")
    first = await bank.back_up()
    server.query("insert into t values (1)")
    server.query("select pg_create_restore_point('early')")
    server.query("select pg_create_restore_point('twice')")
    xid = server.query("insert into t values (2) returning pg_current_xact_id()::text")[0][0]
    second = await bank.back_up(FastClock(datetime.now(UTC) + timedelta(seconds=5)))
    server.query("insert into t values (3)")
    server.query("select pg_create_restore_point('twice')")
    server.query("insert into t values (4)")
    await bank.ship_wal()

    chosen = {}
    for target in (Target.parse(name="early"), Target.parse(name="twice"), Target.parse(xid=xid)):
        plan = await make_plan(bank.repository(), target)
        chosen[str(target)] = plan.backup.name
    assert list(chosen.values()) == [first.name, second.name, first.name]
    place = bank.place("early")
    restored = await restore(bank.repository(), await make_plan(bank.repository(), Target.parse(name="early")), place)
    with stopped_after(restored.server):
        assert rows(place) == [1]
    with pytest.raises(RecoveryError, match="'early' is not in the stored WAL"):
        await make_plan(bank.repository(), Target.parse(name="early"), backup=second.name)
