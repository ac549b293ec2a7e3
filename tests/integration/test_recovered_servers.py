"""Servers after a restore: forks, timelines without a history, interruptions, and what they leave behind."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from handlers.fetch import Fetcher
from infra.postgres.recovery_files import inherited, parse_conf, quoted
from infra.postgres.throwaway import ThrowawayServer
from infra.postgres.wal_script import FOLDER, SCRIPT
from infra.restore import check_place, make_plan, restore
from pipeline.catalog import wal_key
from pipeline.contracts import Fetched
from pipeline.errors import ConfigError, RecoveryError
from pipeline.objects import MAX_PLAIN
from pipeline.targets import Target
from pipeline.wal import WalFile
from tests.integration.test_recovery_rules import (
    small_history,
)
from tests.integration.test_restore import ask, rows, stopped_after
from tests.restoring import Bank, archiving
from tests.servers import NEWEST, StartServer, new_server, server_folder, start_server

__all__ = ["server_folder", "start_server"]  # fixtures


async def test_both_sides_of_a_fork(start_server: StartServer, server_folder: Path) -> None:
    """Timeline 2 leaves timeline 1 inside a segment; both go on writing there; both come back, and never mixed."""
    bank = await small_history(start_server, server_folder)
    fork = bank.server.query("select pg_current_wal_insert_lsn()")[0][0]
    bank.server.query("insert into t values (10)")
    await bank.ship_wal()
    plan = await make_plan(bank.repository(), Target.parse(lsn=fork, exclusive=True))
    heir = replace(bank.place("heir"), settings={})
    restored = await restore(bank.repository(), plan, heir)
    with stopped_after(restored.server):
        assert rows(heir) == [1, 2, 3]
        ask(heir, "insert into t values (20) returning n")
        switched = ask(heir, "select pg_walfile_name(pg_switch_wal())")[0][0]
        ask(heir, "select 1 from pg_switch_wal()")
    history = (heir.directory / "pg_wal/00000002.history").read_bytes()
    first = WalFile.parse(switched)
    assert first is not None
    assert first.timeline == 2

    # The history is stored, timeline 2's first segment is not yet: the latest is what timeline 1 has.
    await bank.shelf("wal/00000002.history", history)
    plan = await make_plan(bank.repository(), Target())
    assert plan.timeline == 1
    assert any("nothing of it is stored: it is not followed" in notice for notice in plan.notices)
    # Whoever wants timeline 2 all the same gets nothing that is behind the fork.
    plan = await make_plan(bank.repository(), Target(timeline=2))
    assert any("--timeline 1 brings them back" in notice for notice in plan.notices)
    early = bank.place("early")
    restored = await restore(bank.repository(), plan, early)
    with stopped_after(restored.server):
        assert rows(early) == [1, 2, 3]
        assert ask(early, "select timeline_id from pg_control_checkpoint()") == [(3,)]

    await bank.shelf(wal_key(first), (heir.directory / "pg_wal" / switched).read_bytes())
    new = bank.place("new")
    restored = await restore(bank.repository(), await make_plan(bank.repository(), Target()), new)
    with stopped_after(restored.server):
        assert rows(new) == [1, 2, 3, 20]

    old = bank.place("old")
    plan = await make_plan(bank.repository(), Target(timeline=1))
    assert "timeline 2 is newer than timeline 1, which is restored" in plan.notices
    restored = await restore(bank.repository(), plan, old)
    with stopped_after(restored.server):
        assert rows(old) == [1, 2, 3, 10]
        # 2 is taken, and the server was told so: it does not make a second timeline 2.
        assert ask(old, "select timeline_id from pg_control_checkpoint()") == [(3,)]


async def test_a_timeline_whose_history_was_never_archived(start_server: StartServer, server_folder: Path) -> None:
    """The cluster had been promoted long before it was archived: PostgreSQL would refuse the timeline as a number."""
    bank = await small_history(start_server, server_folder)
    heir = bank.place("heir")
    restored = await restore(bank.repository(), await make_plan(bank.repository(), Target()), heir)
    with stopped_after(restored.server):
        assert rows(heir) == [1, 2, 3]
    archive = server_folder / "later"
    with ThrowawayServer(bank.server.bin_dir, heir.directory) as server:
        await asyncio.to_thread(server.start, archiving(archive))
        later = Bank(server, archive)
        await later.back_up()
        server.query("insert into t values (4)")
        later.shipped.add("00000002.history")
        await later.ship_wal()
        plan = await make_plan(later.repository(), Target())
        assert (plan.timeline, plan.timeline_setting) == (2, "current")
        place = later.place("again")
        restored = await restore(later.repository(), plan, place)
        with stopped_after(restored.server):
            assert rows(place) == [1, 2, 3, 4]


async def test_a_server_that_cannot_recover_says_why_and_can_be_replaced(
    start_server: StartServer, server_folder: Path
) -> None:
    bank = await small_history(start_server, server_folder)
    plan = await make_plan(bank.repository(), Target())
    place = bank.place("broken")
    broken = replace(place, options={**place.options, "max_connections": "20"})
    with pytest.raises(RecoveryError, match=r"ended before .* insufficient parameter settings \(max_conn") as caught:
        await restore(bank.repository(), plan, broken)
    assert f"raise that setting, in {place.directory}/postgresql.conf" in caught.value.hint
    with pytest.raises(RecoveryError, match="is not empty"):
        await restore(bank.repository(), plan, place)
    restored = await restore(bank.repository(), plan, replace(place, force=True))
    with stopped_after(restored.server):
        assert rows(place) == [1, 2, 3]


async def test_a_killed_server_is_told_from_one_that_runs(start_server: StartServer, server_folder: Path) -> None:
    """By its shared memory, as PostgreSQL does; its process number is the same before and after."""
    bank = await small_history(start_server, server_folder)
    plan = await make_plan(bank.repository(), Target())
    other = new_server(NEWEST, server_folder, name="other", segment_mb=1)
    place = replace(bank.place("unused"), directory=other.data_dir, force=True)
    with other:
        other.start()
        pid_file = other.data_dir / "postmaster.pid"
        lines = pid_file.read_text().split("\n")
        # As it looks from a container of its own that shares the memory only: the number is nobody.
        for number in (lines[0], "999999999"):
            pid_file.write_text("\n".join([number, *lines[1:]]))
            with pytest.raises(RecoveryError, match=f"belongs to a running server, process {number}"):
                await check_place(plan, place)
        pid_file.write_text("\n".join(lines))
        other.kill9()
        assert pid_file.exists()
        pid_file.write_text("\n".join(["999999999", *lines[1:]]))
        with pytest.raises(RecoveryError, match="may be running elsewhere"):
            await check_place(plan, place)
        pid_file.write_text("\n".join(lines))
        assert (await check_place(plan, place)).full == (other.data_dir,)


async def test_a_port_in_use_is_found_before_anything_is_touched(
    start_server: StartServer, server_folder: Path
) -> None:
    bank = await small_history(start_server, server_folder)
    plan = await make_plan(bank.repository(), Target())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = replace(bank.place("beside"), start=True, port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"port {place.port} is in use here"):
            await check_place(plan, place)
    await check_place(plan, place)


async def test_an_interrupted_start_leaves_no_server(start_server: StartServer, server_folder: Path) -> None:
    bank = await small_history(start_server, server_folder)
    plan = await make_plan(bank.repository(), Target())
    place = bank.place("interrupted")
    repository = bank.repository()
    stuck = asyncio.Event()

    class Never(Fetcher):
        """WAL never comes."""

        async def __call__(self, name: str, *, backup: str | None = "", most: int = MAX_PLAIN) -> Fetched:
            if backup == "" and "history" not in name:
                stuck.set()
                await asyncio.Event().wait()
            return await super().__call__(name, backup=backup, most=most)

    assert isinstance(repository.fetch, Fetcher)
    never = Never(repository.stores, repository.fetch._chain, repository.system_id)
    task = asyncio.create_task(restore(replace(repository, fetch=never), plan, place))
    async with asyncio.timeout(60):
        await stuck.wait()
        while not (place.directory / "postmaster.pid").exists():
            await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (place.directory / "postmaster.pid").exists()
    assert not list((place.directory / FOLDER / "feed" / "ready").iterdir())


def test_settings_are_quoted_as_postgresql_reads_them(server_folder: Path) -> None:
    value = "a 'quoted' \\ back\\nslash and #"
    server = new_server(NEWEST, server_folder)
    with (server.data_dir / "postgresql.auto.conf").open("a") as conf:
        conf.write(f"cluster_name = {quoted(value)}\nshow.it = 1\nArchive_Mode on # why\n")
    settings = parse_conf((server.data_dir / "postgresql.auto.conf").read_text())
    assert (settings["cluster_name"], settings["archive_mode"]) == (value, "on")
    assert [n.name for n in inherited(server.data_dir)] == ["archive_mode"]
    with server:
        server.start()
        assert server.query("show cluster_name") == [(value,)]
        assert server.query("show archive_mode") == [("on",)]


def test_the_folder_is_closed_to_others(tmp_path: Path) -> None:
    from infra.postgres.recovery_files import write_recovery_files

    (tmp_path / "standby.signal").touch()
    write_recovery_files(tmp_path, {}, segment_size=1, fetch=("x",), context=b"secret", owner=None)
    assert (tmp_path / FOLDER).stat().st_mode & 0o777 == 0o700
    for name in ("context.json", SCRIPT):
        assert (tmp_path / FOLDER / name).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "recovery.signal").exists()
    assert not (tmp_path / "standby.signal").exists()
