"""A standby that is restored from the repository follows the primary through the archive alone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from handlers.fetch import Fetcher
from infra.postgres.wal_script import ABSENT, FEED, FOLDER
from infra.restore import Place, Restored, Watch, make_plan, restore
from pipeline.contracts import Fetched
from pipeline.objects import MAX_PLAIN
from pipeline.recovery import RestorePlan
from pipeline.targets import Target
from pipeline.wal import Lsn, WalFile
from tests.integration.test_restore import alive, ask, rows
from tests.restoring import Bank, archiving
from tests.servers import NEWEST, SERVER_VERSIONS, StartServer, server_folder, start_server
from tests.tails import lay

__all__ = ["server_folder", "start_server"]

SIZE = 1 << 20


class Slow(Fetcher):
    """Histories take their time. While a server is promoted it asks for one when it is no standby any more."""

    async def __call__(self, name: str, *, backup: str | None = "", most: int = MAX_PLAIN) -> Fetched:
        if name.endswith(".history"):
            await asyncio.sleep(0.5)
        return await super().__call__(name, backup=backup, most=most)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(40):
        while not await asyncio.to_thread(true):
            await asyncio.sleep(0.1)


def shows(place: Place, wanted: list[int]) -> Callable[[], bool]:
    return lambda: rows(place) == wanted


async def grow_tail(bank: Bank, start: int) -> int:
    """Store the open segment's bytes from ``start`` on, as far as they are written."""
    end = Lsn.parse(bank.server.query("select pg_current_wal_flush_lsn()")[0][0])
    file = WalFile.segment(1, end, SIZE)
    content = (bank.server.data_dir / "pg_wal" / file.name).read_bytes()
    offset = end - file.start(SIZE)
    await lay(bank.shelf.store, bank.shelf.chain, file, content, [(start, offset)])
    return offset


@pytest.mark.parametrize("major", [SERVER_VERSIONS[0], NEWEST])
async def test_a_standby_follows_through_growing_tails_and_finished_segments(
    major: int, start_server: StartServer, server_folder: Path
) -> None:
    server = start_server(major, settings=archiving(server_folder / "archive"), segment_mb=1)
    bank = Bank(server, server_folder / "archive")
    server.query("create table t (n int)")
    await bank.back_up()
    server.query("insert into t values (1)")
    await bank.ship_wal()
    server.query("insert into t values (2)")
    offset = await grow_tail(bank, 0)
    repository = bank.repository()
    assert isinstance(repository.fetch, Fetcher)
    repository = replace(repository, fetch=Slow(repository.stores, repository.fetch._chain, repository.system_id))
    plan = await make_plan(repository, Target())
    place = replace(bank.place("standby", wal_retrieve_retry_interval="200ms"), standby=True)
    said: list[str] = []
    # No program but mv is started while there is a feed; then this one is, and has nothing.
    other = ("/bin/sh", "-c", f"touch fetched; exit {ABSENT}")
    task = asyncio.create_task(restore(repository, plan, place, watch=Watch(say=said.append), fetch_wal=other))
    pid = 0
    try:
        await until(lambda: task.done() or any("follows timeline 1" in line for line in said))
        assert not task.done(), task.exception()
        pid = int((place.directory / "postmaster.pid").read_text().split()[0])
        assert rows(place) == [1, 2]
        assert ask(place, "show archive_mode") == [("off",)]
        assert ask(place, "select pg_is_in_recovery()") == [(True,)]
        # The tail grows, then the finished segment takes its place.
        server.query("insert into t values (3)")
        await grow_tail(bank, offset)
        await until(shows(place, [1, 2, 3]))
        server.query("insert into t values (4)")
        await bank.ship_wal()
        await until(shows(place, [1, 2, 3, 4]))
        await until(lambda: not any((place.directory / FOLDER / FEED / "failed").iterdir()))
        assert not (place.directory / "fetched").exists()
        if major == NEWEST:
            await asyncio.to_thread(ask, place, "select pg_promote()")  # the feed answers it meanwhile
            async with asyncio.timeout(40):
                restored = await task
            assert restored.server is not None
            assert "restore_command" not in (place.directory / "postgresql.auto.conf").read_text()
        else:
            os.kill(os.getpid(), signal.SIGINT)
            async with asyncio.timeout(40):
                await task
            assert "goes on without" in said[-1]
            assert not (place.directory / FOLDER / FEED / "pid").exists()
            await until((place.directory / "fetched").exists)
        assert alive(pid)
        assert rows(place) == [1, 2, 3, 4]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if pid and alive(pid):
            os.kill(pid, signal.SIGQUIT)
            await until(lambda: not alive(pid))


async def test_a_standby_stays_on_its_timeline_and_says_so_when_the_primary_leaves_it(
    start_server: StartServer, server_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Restored again with --delta it follows the new one."""
    monkeypatch.setattr("infra.following._LOOK", 0.2)
    server = start_server(NEWEST, settings=archiving(server_folder / "archive"), segment_mb=1)
    bank = Bank(server, server_folder / "archive")
    server.query("create table t (n int)")
    await bank.back_up()
    server.query("insert into t values (1)")
    await bank.ship_wal()
    said: list[str] = []

    def begin(place: Place, plan: RestorePlan) -> asyncio.Task[Restored]:
        watch = Watch(say=said.append)
        return asyncio.create_task(
            restore(bank.repository(), plan, place, watch=watch, fetch_wal=("/bin/sh", "-c", "exit 126"))
        )

    async def end(task: asyncio.Task[Restored], place: Place) -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        with suppress(FileNotFoundError, ProcessLookupError):
            pid = int((place.directory / "postmaster.pid").read_text().split()[0])
            os.kill(pid, signal.SIGINT)
            await until(lambda: not alive(pid))

    place = replace(bank.place("standby", wal_retrieve_retry_interval="200ms"), standby=True)
    task = begin(place, await make_plan(bank.repository(), Target()))
    try:
        await until(lambda: task.done() or any("follows timeline 1" in line for line in said))
        server.query("insert into t values (2)")
        await bank.ship_wal()
        await until(shows(place, [1, 2]))
        await asyncio.to_thread(server.stop)
        server.configure({"restore_command": "false"})
        (server.data_dir / "recovery.signal").touch()
        await asyncio.to_thread(server.start)
        await until(lambda: server.query("select pg_is_in_recovery()") == [(False,)])
        server.query("insert into t values (3)")
        await bank.ship_wal()
        assert "00000002.history" in bank.shipped
        await until(lambda: task.done() or any("timeline 2 has left timeline 1 at LSN" in line for line in said))
        assert not task.done(), task.exception()
        assert rows(place) == [1, 2], "as much of timeline 1 as there is, and nothing else"
    finally:
        await end(task, place)
    plan = await make_plan(bank.repository(), Target())
    assert plan.timeline == 2
    task = begin(replace(place, delta=True), plan)
    try:
        await until(lambda: task.done() or any("follows timeline 2" in line for line in said))
        assert not task.done(), task.exception()
        server.query("insert into t values (4)")
        await bank.ship_wal()
        await until(shows(place, [1, 2, 3, 4]))
    finally:
        await end(task, place)
