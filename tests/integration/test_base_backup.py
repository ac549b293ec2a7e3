"""Base backups of real servers: what is stored is whole, and a backup that fails is none."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
import pytest

from handlers.base_backup import Cluster, take
from infra.clock import SystemClock
from infra.postgres.basebackup import stream
from infra.postgres.connect import connect
from infra.postgres.control import read_facts, switch_wal
from infra.postgres.processes import give, run_as
from infra.postgres.replication import ReplicationConnection
from infra.postgres.throwaway import ThrowawayServer
from infra.settings import Settings
from pipeline.backup import BackupInfo, BackupMessage, BackupStarted, Tablespace
from pipeline.catalog import PART_SIZE
from pipeline.errors import SourceError
from pipeline.index import Slice
from pipeline.tar import Entry, TarReader
from pipeline.wal import Lsn
from tests.parts import Shelf
from tests.servers import NEWEST, SERVER_VERSIONS, StartServer, programs, server_folder, start_server

__all__ = ["server_folder", "start_server"]


def settings_for(server: ThrowawayServer, user: str = "postgres", password: str = "") -> Settings:
    return Settings(
        POSTGRES_HOST=server.host, POSTGRES_PORT=server.port, POSTGRES_USERNAME=user, POSTGRES_PASSWORD=password
    )


async def nothing_to_wait_for(_start: Lsn, _stop: Lsn, _timeline: int) -> None:
    """These tests are about the backup itself; that WAL is waited for is tested where WAL is shipped."""


async def back_up(server: ThrowawayServer, shelf: Shelf | None = None) -> tuple[BackupInfo, Shelf]:
    settings = settings_for(server)
    async with await connect(settings) as control:
        facts = await read_facts(control)
    shelf = shelf or Shelf()
    shelf.system_id = facts.system_identifier
    shelf.chain._system_id = facts.system_identifier
    cluster = Cluster(facts.system_identifier, facts.version_num, facts.segment_size)
    info = await take(stream(settings), ship=shelf, cluster=cluster, wal_safe=nothing_to_wait_for, clock=SystemClock())
    return info, shelf


def enlarge(server: ThrowawayServer, megabytes: int) -> None:
    """A file that is copied with the cluster like any other; full of holes, so quick to make."""
    path = server.data_dir / "base" / "filler"
    path.touch()
    os.truncate(path, megabytes << 20)
    give(path.parent, run_as())


def unpack(data: bytes, folder: Path) -> None:
    """With Python's own tarfile: what is stored can be read without walship."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            path = folder / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if member.isdir():
                path.mkdir(exist_ok=True)
            elif member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                path.write_bytes(content.read())


@pytest.mark.parametrize("major", SERVER_VERSIONS)
async def test_what_is_stored_is_the_cluster(major: int, start_server: StartServer, server_folder: Path) -> None:
    server = start_server(major)
    fast = server_folder / "fast"
    fast.mkdir()
    give(fast, run_as())
    server.query(f"create tablespace fast location '{fast}'")
    server.query("create table a as select g, md5(g::text) from generate_series(1, 20000) g")
    server.query("create table b tablespace fast as select g from generate_series(1, 20000) g")
    info, shelf = await back_up(server)

    oid = int(server.query("select oid from pg_tablespace where spcname = 'fast'")[0][0])
    assert info.tablespaces == (Tablespace(oid, str(fast)),)
    assert [archive.name for archive in info.archives] == [str(oid), "base"]
    assert (info.major, info.segment_size, info.timeline) == (major, 16 << 20, 1)
    assert info.start_lsn < info.stop_lsn
    assert await shelf.info(info.name, info.id) == info

    copy = server_folder / "copy"
    archives = {archive.name: await shelf.archive(info, archive.name) for archive in info.archives}
    unpack(archives["base"], copy)
    unpack(archives[str(oid)], server_folder / "copied_tablespace")
    (copy / "backup_manifest").write_bytes(await shelf.manifest(info))
    assert (copy / "tablespace_map").read_text() == f"{oid} {fast}\n"
    (copy / "pg_tblspc" / str(oid)).symlink_to(server_folder / "copied_tablespace")
    for folder in (copy, server_folder / "copied_tablespace"):
        give(folder, run_as())
    server.run("pg_verifybackup", "--no-parse-wal", str(copy))

    manifest = json.loads(await shelf.manifest(info))
    assert manifest["PostgreSQL-Backup-Manifest-Version"] == (2 if major >= 17 else 1)

    lengths: dict[tuple[str, str], int] = {}
    for line in await shelf.index(info):
        piece = Slice.decode("index", line)
        at = (piece.part - 1) * PART_SIZE + piece.part_offset
        home = copy if piece.archive == "base" else server_folder / "copied_tablespace"
        content = (home / piece.path).read_bytes()
        assert archives[piece.archive][at : at + piece.length] == content[piece.offset : piece.offset + piece.length]
        lengths[piece.archive, piece.path] = lengths.get((piece.archive, piece.path), 0) + piece.length
        assert piece.size == len(content)
    sizes = {
        (name, entry.path): entry.size
        for name, data in archives.items()
        for entry in TarReader(name).feed(data)
        if isinstance(entry, Entry) and entry.kind.value == "file"
    }
    assert lengths == sizes
    assert len(sizes) > 900
    # WAL false: it goes its own way.
    assert not [path for _, path in sizes if path.startswith("pg_wal/") and len(path) == len("pg_wal/") + 24]


@pytest.mark.parametrize("segment_mb", [1, 64])
async def test_any_segment_size(segment_mb: int, start_server: StartServer) -> None:
    server = start_server(segment_mb=segment_mb)
    info, _ = await back_up(server)
    assert info.segment_size == segment_mb << 20


async def test_a_server_without_tcp_is_reached_by_its_socket(start_server: StartServer) -> None:
    server = start_server(tcp=False)
    settings = Settings(POSTGRES_HOST=str(server.socket_dir), POSTGRES_PORT=server.port)
    async with await ReplicationConnection.open(settings) as connection:
        identity = await connection.identify_system()
        assert identity.timeline == 1
        assert identity.system_id.isdigit()
        assert await connection.show("wal_segment_size") == "16MB"
        assert connection.server_version // 10000 == NEWEST
        with pytest.raises(SourceError, match=r"PostgreSQL refused: .*syntax error"):
            await connection.rows("IDENTIFY_SYSTEM nonsense")
        assert (await connection.identify_system()).system_id == identity.system_id


@pytest.mark.parametrize("major", [SERVER_VERSIONS[0], NEWEST])
async def test_failing_archiving_does_not_hold_up_the_stream(major: int, start_server: StartServer) -> None:
    """WAIT false: the server itself would wait for its archiver for ever."""
    server = start_server(major, settings={"archive_mode": "on", "archive_command": "false"}, segment_mb=1)
    info, _ = await asyncio.wait_for(back_up(server), 30)
    assert info.stop_lsn > info.start_lsn


async def test_nothing_blocks_while_the_server_takes_its_time(start_server: StartServer) -> None:
    """A spread checkpoint of dirty pages takes minutes; meanwhile the loop turns, and leaving works at once."""
    server = start_server()
    server.query("create table t as select g, md5(g::text) from generate_series(1, 20000) g")
    ticks = 0

    async def wait_for_start() -> None:
        async with contextlib.aclosing(stream(settings_for(server), fast=False)) as messages:
            async for _ in messages:
                return

    task = asyncio.create_task(wait_for_start())
    begin = time.monotonic()
    while ticks < 20 or time.monotonic() < begin + 0.6:
        await asyncio.sleep(0.01)
        ticks += 1
        assert not task.done()
    task.cancel()
    async with asyncio.timeout(20):
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_leaving_ends_the_backup_on_the_server(start_server: StartServer) -> None:
    server = start_server()
    enlarge(server, 200)
    async with contextlib.aclosing(stream(settings_for(server))) as messages:
        async for message in messages:
            if not isinstance(message, BackupStarted):
                break
        # Back-pressure: nobody takes anything, so it is still there, under its own name.
        assert server.query(
            "select application_name from pg_stat_progress_basebackup join pg_stat_activity using (pid)"
        ) == [("walship_backup",)]
    deadline = time.monotonic() + 20
    while server.query("select 1 from pg_stat_progress_basebackup"):
        assert time.monotonic() < deadline, "the backup goes on on the server"
        await asyncio.sleep(0.02)


async def test_a_server_that_dies_in_the_middle_leaves_no_backup(start_server: StartServer) -> None:
    server = start_server()
    enlarge(server, 200)
    killed: list[str] = []

    def kill(name: str) -> None:
        if not killed:
            killed.append(name)
            server.kill9()

    shelf = Shelf(before=kill)
    with pytest.raises(SourceError, match="the replication connection to PostgreSQL broke") as caught:
        await back_up(server, shelf)
    assert "server closed the connection unexpectedly" in caught.value.fact or "reset by peer" in caught.value.fact
    assert "no backup was made" in caught.value.hint
    assert killed
    assert shelf.backups == []


async def test_an_error_of_the_server_comes_in_its_own_words(start_server: StartServer) -> None:
    """Found only while it streams: a folder that it may not read."""
    server = start_server()
    closed = server.data_dir / "base" / "closed"
    closed.mkdir(mode=0o000)
    shelf = Shelf()
    try:
        with pytest.raises(SourceError, match=r'PostgreSQL refused: could not open directory .*base/closed"') as caught:
            await back_up(server, shelf)
    finally:
        closed.chmod(0o700)
    assert "Permission denied (42501)" in caught.value.fact
    assert shelf.backups == []


_MEASURE = """
import asyncio, resource, sys
from handlers.base_backup import Cluster, take
from infra.clock import SystemClock
from infra.postgres.basebackup import stream
from infra.settings import Settings
from pipeline.contracts import Shipped

async def main():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async def ship(name, plain, *, backup="", encoded=None):
        await asyncio.sleep(0.02)  # slower than the server can send
        return Shipped(name, len(plain), "00" * 32)
    async def safe(start, stop, timeline):
        pass
    settings = Settings(POSTGRES_HOST="127.0.0.1", POSTGRES_PORT=int(sys.argv[1]))
    cluster = Cluster(sys.argv[2], 180000, 16 << 20)
    info = await take(stream(settings), ship=ship, cluster=cluster, wal_safe=safe, clock=SystemClock())
    print(info.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

asyncio.run(main())
"""


async def test_memory_is_bounded_whatever_the_size(start_server: StartServer) -> None:
    """Two parts under way and one being filled are 48 MiB; the cluster is a multiple of that."""
    server = start_server()
    enlarge(server, 400)
    (system_id,) = server.query("select system_identifier::text from pg_control_system()")[0]
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", _MEASURE, str(server.port), system_id],
        capture_output=True, text=True, timeout=100, check=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    size, kilobytes = map(int, done.stdout.split())
    assert size > 400 << 20
    assert kilobytes < 80 << 10


@pytest.mark.parametrize("major", [SERVER_VERSIONS[0], NEWEST])
async def test_a_switch_names_the_segment_that_ended(major: int, start_server: StartServer) -> None:
    server = start_server(major, segment_mb=1)
    async with await connect(settings_for(server)) as control:
        facts = await read_facts(control)
        await control.execute("create table t as select 1")
        (open_name,) = (await (await control.execute("select pg_walfile_name(pg_current_wal_lsn())")).fetchall())[0]
        ended = await switch_wal(control, segment_size=facts.segment_size)
        assert ended.name == open_name
        # Nothing was written since: nothing to end, and the answer stays the same.
        assert await switch_wal(control, segment_size=facts.segment_size) == ended
        await control.execute("select pg_logical_emit_message(false, 'x', repeat('x', 3000000))")
        later = await switch_wal(control, segment_size=facts.segment_size)
        assert later.start(facts.segment_size) >= ended.end(facts.segment_size) + 2 * facts.segment_size


async def test_tablespaces_that_the_server_would_leave_out_are_refused(start_server: StartServer) -> None:
    server = start_server(15)
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("set allow_in_place_tablespaces = on")
        connection.execute("create tablespace within location ''")
    with pytest.raises(SourceError, match="the tablespace within lies within the data directory") as caught:
        await back_up(server)
    assert "set WALSHIP_DATA_DIR" in caught.value.hint


def test_programs_of_every_version_are_there() -> None:
    for major in SERVER_VERSIONS:
        assert (programs(major) / "pg_verifybackup").is_file()


async def _drain(messages: AsyncIterator[BackupMessage]) -> int:
    return len([message async for message in messages])


async def test_two_backups_at_once_do_not_disturb_each_other(start_server: StartServer) -> None:
    server = start_server()
    one, two = await asyncio.gather(_drain(stream(settings_for(server))), _drain(stream(settings_for(server))))
    assert min(one, two) > 100


@pytest.mark.parametrize("major", [SERVER_VERSIONS[0], NEWEST])
async def test_a_standby_can_be_backed_up_and_promoted(
    major: int, start_server: StartServer, server_folder: Path
) -> None:
    primary = start_server(major)
    copy = server_folder / "standby"
    primary.run("pg_basebackup", "-D", str(copy), "-R", "-c", "fast", "-d", primary.dsn())
    with ThrowawayServer(programs(major), copy) as standby:
        standby.start()
        info, shelf = await back_up(standby)
        assert (info.timeline, len(shelf.backups)) == (1, 1)
        assert info.stop_lsn >= info.start_lsn
        assert standby.query("select pg_promote()") == [(True,)]
        async with await connect(settings_for(standby)) as control:
            facts = await read_facts(control)
            assert (facts.timeline, facts.in_recovery) == (2, False)
            assert (await switch_wal(control, segment_size=facts.segment_size)).timeline == 2
        info, _ = await back_up(standby)
        assert info.timeline == 2
        async with await ReplicationConnection.open(settings_for(standby)) as replication:
            with pytest.raises(SourceError, match="58P01"):  # timeline 1 has none
                await replication.timeline_history(1)
            content = await replication.timeline_history(2)
        assert content == (copy / "pg_wal" / "00000002.history").read_bytes()
