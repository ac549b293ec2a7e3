"""What PostgreSQL does with what a restore hands it, on real servers: exit statuses, settings, timelines, our files."""

from __future__ import annotations

import asyncio
import io
import subprocess
import tarfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from handlers.body import joined
from infra.postgres.processes import give, run_as
from infra.postgres.recovery_files import neutral, parse_conf
from infra.postgres.throwaway import ThrowawayServer
from infra.postgres.wal_script import FOLDER, SCRIPT, script
from infra.restore import FETCH_WAL, Place, Watch, make_plan, restore
from infra.storage.local import LocalStore
from pipeline.catalog import wal_key
from pipeline.errors import IntegrityError, RecoveryError
from pipeline.objects import MemoryBody
from pipeline.recovery import RestorePlan
from pipeline.targets import Target
from pipeline.wal import WalFile
from tests.clock import FastClock
from tests.integration.test_restore import ask, rows, stopped_after
from tests.restoring import Bank, archiving
from tests.servers import NEWEST, SERVER_VERSIONS, StartServer, new_server, server_folder, start_server

__all__ = ["server_folder", "start_server"]


async def small_history(
    start_server: StartServer, folder: Path, major: int = NEWEST, *, before: tuple[str, ...] = (), **settings: str
) -> Bank:
    """A backup with one row in t, and segments behind it that bring 2 and 3."""
    archive = folder / "archive"
    server = start_server(major, settings={**archiving(archive), **settings}, segment_mb=1)
    bank = Bank(server, archive)
    server.query("create table t (n int)")
    server.query("insert into t values (1)")
    for statement in before:
        server.query(statement)
    await bank.back_up()
    for number in (2, 3):
        server.query(f"insert into t values ({number})")
        await bank.ship_wal()
    return bank


async def laid_down(bank: Bank, name: str, target: Target | None = None) -> tuple[Place, RestorePlan]:
    plan = await make_plan(bank.repository(), target or Target())
    place = bank.place(name, start=False)
    await restore(bank.repository(), plan, place)
    return place, plan


def fetching(bank: Bank, place: Place, body: str) -> None:
    """Let ``fetch-wal`` be these sh lines; $3 is the file's name, $4 where it goes."""
    fetch = place.directory / "fetch.sh"
    fetch.write_text(f"{body}\n")
    (place.directory / FOLDER / SCRIPT).write_text(script(("/bin/sh", "./fetch.sh"), bank.segment_size))
    give(place.directory, run_as(place.directory))


def serving(bank: Bank, missing: str, status: int) -> str:
    """From the archive; one segment ends with that status."""
    return (
        f'[ "$3" = {missing} ] && exit {status}\n[ -f "{bank.archive}/$3" ] || exit 44\ncp "{bank.archive}/$3" "$4"\n'
    )


async def test_only_absent_ends_recovery(start_server: StartServer, server_folder: Path) -> None:
    """What decides is a script of ours: one version of the server is enough."""
    bank = await small_history(start_server, server_folder)
    last = max(name for name in bank.shipped if len(name) == 24)

    async def recover(status: int) -> None:
        place, _ = await laid_down(bank, f"s{status}")
        fetching(bank, place, serving(bank, last, status))
        server = ThrowawayServer(bank.server.bin_dir, place.directory)
        try:
            if status == 44:
                await asyncio.to_thread(server.start)
                await until_promoted(server)
                assert [row[0] for row in server.query("select n from t order by n")] == [1, 2]
            else:
                server.begin()
                await until_ended(server)
                assert "could not restore file" in server.log()
                assert (place.directory / "recovery.signal").exists(), "nothing was promoted"
        finally:
            server.close()

    await asyncio.gather(*map(recover, (44, 1, 2, 200)))


def runnable_by_the_server() -> bool:
    """As root the server's user may not reach this Python; then only the feed serves."""
    try:
        done = subprocess.run([*FETCH_WAL[:-1], "--version"], cwd="/", capture_output=True, check=False, **run_as())
    except PermissionError:
        return False
    return done.returncode == 0


async def test_a_server_that_is_started_by_hand_fetches_by_itself(
    start_server: StartServer, server_folder: Path
) -> None:
    if not await asyncio.to_thread(runnable_by_the_server):
        pytest.skip("the server's user cannot run this Python")
    bank = await small_history(start_server, server_folder)
    root = server_folder / "repository"
    store = LocalStore(root / bank.shelf.system_id)
    (root / bank.shelf.system_id).mkdir(parents=True)
    async for info in bank.shelf.store.list(""):
        await store.put(info.key, await bank.shelf.store.get(info.key))
    give(root, run_as())
    repository = replace(bank.repository(), urls=(f"file://{root}",))
    place = bank.place("by_hand", start=False)
    await restore(repository, await make_plan(repository, Target()), place)
    server = ThrowawayServer(bank.server.bin_dir, place.directory)
    with server:
        await asyncio.to_thread(server.start)
        await until_promoted(server)
        assert [row[0] for row in server.query("select n from t order by n")] == [1, 2, 3]


async def until_promoted(server: ThrowawayServer) -> None:
    async with asyncio.timeout(60):
        while server.query("select pg_is_in_recovery()") != [(False,)]:
            await asyncio.sleep(0.05)


async def until_ended(server: ThrowawayServer) -> None:
    async with asyncio.timeout(60):
        while server.exit_code is None:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("major", [SERVER_VERSIONS[0], NEWEST])
async def test_what_a_restored_server_inherits_is_switched_off(
    major: int, start_server: StartServer, server_folder: Path
) -> None:
    trigger = {"promote_trigger_file": "/tmp"} if major < 16 else {}
    bank = await small_history(
        start_server, server_folder, major, **trigger, hot_standby="off", recovery_min_apply_delay="1h",
        recovery_target_name="of an earlier restore", recovery_end_command="touch /nowhere/at/all",
        archive_cleanup_command="false", primary_slot_name="old", primary_conninfo="host=old password='it''s'",
        # Not reloaded, so that the old server does not wait for it.
        before=(
            "alter system set synchronous_standby_names = 'gone'", "alter system set archive_timeout = '77s'",
            "create subscription s connection 'host=127.0.0.1 port=1' publication p with (connect = false)",
            "alter subscription s enable",
        ),
    )  # fmt: skip
    archived = {path.name for path in bank.archive.iterdir()}
    plan = await make_plan(bank.repository(), Target())
    place = bank.place("clone")
    restored = await restore(bank.repository(), plan, place)
    with stopped_after(restored.server):
        assert rows(place) == [1, 2, 3]
        for name, value in neutral(major).items():
            wanted = "(disabled)" if name == "archive_command" else value
            assert ask(place, f"show {name}") == [(wanted,)], name
        assert ask(place, "select subenabled from pg_subscription") == [(True,)]
        assert ask(place, "show archive_timeout") == [("77s",)], "what is harmless stays"
        # It would wait for a standby for ever.
        ask(place, "insert into t values (4) returning n")
        ask(place, "select pg_switch_wal()")
    assert {path.name for path in bank.archive.iterdir()} == archived, "a clone never archives into production"
    assert "logical replication" in bank.server.log(1 << 20), "the old server tried to reach its publisher"
    assert restored.server is not None
    assert "logical replication" not in restored.server.log_file.read_text(), "a clone takes nothing from it"
    assert any("RESET max_logical_replication_workers" in notice for notice in restored.notices)
    said = {str(n) for n in restored.neutralised}
    assert "synchronous_standby_names (was 'gone')" in said
    assert "primary_conninfo" in said, "its password is not shown"
    assert "recovery_target_name (was 'of an earlier restore')" in said
    assert any("ALTER SYSTEM RESET archive_mode" in notice for notice in restored.notices)


async def test_the_restored_directory_is_started_and_not_the_one_its_configuration_names(
    start_server: StartServer, server_folder: Path
) -> None:
    bank = await small_history(start_server, server_folder)
    original, other_pid = bank.server.data_dir, server_folder / "other.pid"
    included = server_folder / "included.conf"
    included.write_text(f"data_directory = '{original}'\n")
    bank.server.configure({"data_directory": str(original), "external_pid_file": str(other_pid)})
    with (original / "postgresql.conf").open("a") as conf:
        conf.write(f"include '{included}'\n")
    await bank.back_up(FastClock(datetime.now(UTC) + timedelta(seconds=5)))
    bank.server.query("insert into t values (4)")
    await bank.ship_wal()
    bank.server.stop()  # or its lock would refuse the second server
    place = bank.place("clone")
    async with asyncio.timeout(60):  # of a server on the other directory this one would never hear
        restored = await restore(bank.repository(), await make_plan(bank.repository(), Target()), place)
    with stopped_after(restored.server):
        assert ask(place, "show data_directory") == [(str(place.directory),)]
        assert rows(place) == [1, 2, 3, 4]
        assert not other_pid.exists()
    assert "data_directory" not in parse_conf((place.directory / "postgresql.conf").read_text())


@pytest.mark.parametrize("major", [SERVER_VERSIONS[0], NEWEST])
async def test_our_files_get_into_no_backup(major: int, server_folder: Path) -> None:
    with new_server(major, server_folder, segment_mb=1) as server:
        secret = server.data_dir / FOLDER
        secret.mkdir()
        (secret / "context.json").write_text("the keys")
        server.start()
        bank = Bank(server, server_folder / "no archive")
        info = await bank.back_up()
        data = await bank.shelf.archive(info, "base")
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            names = archive.getnames()
        assert len(names) > 900
        assert not [name for name in names if "walship" in name]


async def test_targets_past_the_end(start_server: StartServer, server_folder: Path) -> None:
    bank = await small_history(start_server, server_folder)
    now = bank.server.query("select clock_timestamp()")[0][0]
    repository = bank.repository()
    # Without the plan all of these end in FATAL: "recovery ended before configured recovery target was reached".
    plan = await make_plan(repository, Target.parse(time=now.isoformat()))
    assert "restoring to that, and no further" in plan.notices[0]
    end = plan.path.end
    plan = await make_plan(repository, Target.parse(lsn=str(end)))
    assert "restoring to that, and no further" in plan.notices[0]
    place = bank.place("latest")
    restored = await restore(repository, plan, place)
    with stopped_after(restored.server):
        assert rows(place) == [1, 2, 3]
    for target, message in (
        (Target.parse(lsn=str(end + 1)), "lies behind the stored WAL"),
        (Target.parse(time="2999-01-01 00:00:00+00"), "lies in the future"),
        (Target.parse(name="nobody made it"), "is not in the stored WAL"),
        (Target.parse(xid="4000000000"), "is not in the stored WAL"),
        (Target.parse(time="2001-01-01 00:00:00+00"), "before the end of the first backup"),
    ):
        with pytest.raises(RecoveryError, match=message) as caught:
            await make_plan(repository, target)
        assert caught.value.hint


async def test_a_hole_names_what_can_be_reached_and_that_is_reached(
    start_server: StartServer, server_folder: Path
) -> None:
    bank = await small_history(start_server, server_folder)
    gone = max(name for name in bank.shipped if len(name) == 24)
    bank.server.query("insert into t values (4)")
    await bank.ship_wal()
    file = WalFile.parse(gone)
    assert file is not None
    await bank.shelf.store.delete([wal_key(file)])
    with pytest.raises(RecoveryError, match=f"segment {gone} is missing") as caught:
        await make_plan(bank.repository(), Target())
    option = caught.value.hint.partition("(--to-lsn ")[2].rstrip(")")
    place = bank.place("reached")
    plan = await make_plan(bank.repository(), Target.parse(lsn=option))
    restored = await restore(bank.repository(), plan, place)
    with stopped_after(restored.server):
        assert rows(place) == [1, 2]


async def test_a_damaged_segment_stops_recovery_and_is_named(start_server: StartServer, server_folder: Path) -> None:
    bank = await small_history(start_server, server_folder)
    plan = await make_plan(bank.repository(), Target())
    *_, before_last, _ = plan.path.files()
    key = wal_key(before_last)
    content = bytearray(joined(await bank.shelf.store.get(key)))
    content[-1] ^= 1
    await bank.shelf.store.put(key, MemoryBody([bytes(content)]), replace=True)
    place = bank.place("damaged")
    said: list[str] = []
    with pytest.raises(IntegrityError, match=f"memory: {key} is damaged") as caught:
        await restore(bank.repository(), plan, place, watch=Watch(say=said.append))
    assert "run the same restore again with --force" in caught.value.hint
    assert any(f"{before_last} cannot be given to the server" in line for line in said)
    assert (place.directory / "recovery.signal").exists(), "nothing was promoted"


async def test_a_segment_that_vanishes_after_planning_stops_recovery(
    start_server: StartServer, server_folder: Path
) -> None:
    bank = await small_history(start_server, server_folder)
    plan = await make_plan(bank.repository(), Target())
    last = [*plan.path.files()][-1]
    await bank.shelf.store.delete([wal_key(last)])
    place = bank.place("vanished")
    with pytest.raises(IntegrityError, match=f"segment {last} was there when the restore was planned, and is gone"):
        await restore(bank.repository(), plan, place)
    assert (place.directory / "recovery.signal").exists(), "nothing was promoted"


async def test_recovery_that_ends_before_the_plan_does_is_an_error(
    start_server: StartServer, server_folder: Path
) -> None:
    """A segment was archived with a damaged record: stored as it was, so no checksum of ours can notice."""
    bank = await small_history(start_server, server_folder)
    *_, before_last, _ = (file for file in sorted(bank.shipped) if len(file) == 24)
    content = bytearray((bank.archive / before_last).read_bytes())
    content[200:300] = bytes(100)
    file = WalFile.parse(before_last)
    assert file is not None
    await bank.shelf.store.delete([wal_key(file)])
    await bank.shelf(wal_key(file), content)
    plan = await make_plan(bank.repository(), Target())
    place = bank.place("short")
    with pytest.raises(
        RecoveryError, match=f"recovery ended at LSN [0-9A-F/]+, .* goes on to LSN {plan.end}:"
    ) as caught:
        await restore(bank.repository(), plan, place)
    assert "again with --force, and --from another" in caught.value.hint
    assert not (place.directory / "postmaster.pid").exists(), "it was stopped"


@pytest.mark.parametrize("action", ["pause", "shutdown"])
async def test_the_server_does_at_the_target_what_it_was_told(
    action: str, start_server: StartServer, server_folder: Path
) -> None:
    bank = await small_history(start_server, server_folder)
    if action == "pause":  # as it is told where no record is stored behind the backup
        plan = await make_plan(bank.repository(), Target.parse(immediate=True, action=action))
        place = bank.place("immediate")
        restored = await restore(bank.repository(), plan, place)
        with stopped_after(restored.server) as server:
            assert (server.state, rows(place)) == ("paused", [1])
    plan = await make_plan(bank.repository(), Target.parse(action=action))
    place = bank.place(action)
    restored = await restore(bank.repository(), plan, place)
    assert (place.directory / FOLDER / "context.json").exists(), "recovery is not over"
    with stopped_after(restored.server) as server:
        if action == "pause":
            assert server.state == "paused"
            assert rows(place) == [1, 2, 3]
            assert ask(place, "select pg_is_in_recovery()") == [(True,)]
        else:
            assert (server.state, server.pid) == ("shut down", 0)
            assert not (place.directory / "postmaster.pid").exists()
