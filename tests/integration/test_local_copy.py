"""Backups that read the data directory: file by file what BASE_BACKUP sends, and refusals where it cannot be."""

from __future__ import annotations

import asyncio
import io
import json
import os
import tarfile
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from infra.pace import Pace
from infra.postgres import basebackup, local_copy
from infra.postgres.claim import claimed
from infra.postgres.copy_stream import Stream
from infra.postgres.damage import Damage
from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import ThrowawayServer
from infra.settings import Settings
from pipeline.backup import ArchiveBegan, ArchiveData, BackupMessage, BackupStarted, ManifestData, Tablespace, area_of
from pipeline.errors import SourceError
from pipeline.manifest import read_manifest
from tests.servers import NEWEST, SERVER_VERSIONS, StartServer, server_folder, start_server

__all__ = ["server_folder", "start_server"]


def settings_for(server: ThrowawayServer) -> Settings:
    return Settings(POSTGRES_HOST=server.host, POSTGRES_PORT=server.port, POSTGRES_USERNAME="postgres")


#: The BASE_BACKUP of 15 leaves such tablespaces out.
IN_PLACE = (
    "set allow_in_place_tablespaces = on",
    "create tablespace in_place location ''",
    "create table placed_in_place tablespace in_place as select 1 n",
)


class Taken:
    """All that a backup stream brought."""

    def __init__(self) -> None:
        self.archives: dict[str, bytearray] = {}
        self.manifest = bytearray()
        self.tablespaces: tuple[Tablespace, ...] = ()

    async def take(self, messages: AsyncGenerator[BackupMessage, None]) -> Taken:
        last = ""
        async for message in messages:
            if isinstance(message, ArchiveBegan):
                last = message.archive
                self.archives[last] = bytearray()
            elif isinstance(message, ArchiveData):
                self.archives[message.archive or last] += message.data
                if message.free is not None:
                    message.free()
            elif isinstance(message, ManifestData):
                self.manifest += message.data
            elif isinstance(message, BackupStarted):
                self.tablespaces = message.tablespaces
        return self

    def entries(self) -> dict[tuple[str, str], tuple[object, ...]]:
        """What the archives hold: kind, mode, owner, size."""
        found: dict[tuple[str, str], tuple[object, ...]] = {}
        for name, content in self.archives.items():
            with tarfile.open(fileobj=io.BytesIO(bytes(content))) as tar:
                for entry in tar.getmembers():
                    key = area_of(name), entry.name.removeprefix("./").rstrip("/")
                    found[key] = entry.type, entry.mode, entry.uid, entry.size
        return found

    def files(self) -> dict[str, dict[str, Any]]:
        """Of the manifest, but for what differs in every backup."""
        read_manifest(self.manifest)
        found = {f["Path"]: f for f in json.loads(self.manifest)["Files"]}
        for path in ("backup_label", "tablespace_map"):
            assert found.pop(path)
        for path in ("global/pg_control", "pg_logical/replorigin_checkpoint"):  # of two checkpoints
            del found[path]["Last-Modified"], found[path]["Checksum"]
        return found


def fill(server: ThrowawayServer, folder: Path) -> None:
    """Everything that is left out, or treated in its own way."""
    place = folder / "space"
    for made in (place, server.data_dir / "inside"):
        made.mkdir()
        give(made, run_as())
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        for statement in (
            "create table t as select n, md5(n::text) filler from generate_series(1, 20000) n",
            "create index on t (n)",
            "create unlogged table u as select 1 n",
            f"create tablespace space location '{place}'",
            f"create tablespace inside location '{server.data_dir}/inside'",
            "create table placed_inside tablespace inside as select 1 n",
            *(IN_PLACE if connection.info.server_version >= 160000 else ()),
            "create table placed tablespace space as select * from t",
            "create unlogged table u2 tablespace space as select 1 n",
            "create database other",
            "checkpoint",
        ):
            connection.execute(statement.encode())
        connection.execute("create temp table gone as select 1 n")
    (server.data_dir / "base/pgsql_tmp").mkdir()
    (server.data_dir / "base/pgsql_tmp/pgsql_tmp1.0").write_bytes(b"sorted")
    give(server.data_dir / "base/pgsql_tmp", run_as())


@pytest.mark.parametrize("major", SERVER_VERSIONS)
async def test_it_holds_what_base_backup_sends(start_server: StartServer, server_folder: Path, major: int) -> None:
    server = start_server(major)
    await asyncio.to_thread(fill, server, server_folder)
    settings = settings_for(server)
    theirs = await Taken().take(basebackup.stream(settings))
    ours = await Taken().take(local_copy.stream(settings, server.data_dir, workers=2))
    # The server may write a file anew between two backups, if only for hint bits.
    later = (await Taken().take(basebackup.stream(settings))).files()
    assert ours.entries() == theirs.entries()
    before, files = theirs.files(), ours.files()
    assert set(files) == set(before)
    assert [file for path, file in files.items() if file not in (before[path], later[path])] == []
    assert {area_of(name) for name in ours.archives} == set(theirs.archives)
    # The control file is the last of all: no other is older than it.
    assert bytes(ours.archives["base.1"][-1024 - 8192 - 512 :]).startswith(b"global/pg_control\0")


async def test_a_damaged_page_is_told_and_backed_up(start_server: StartServer) -> None:
    server = start_server(NEWEST)
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("create table t as select n, repeat('x', 500) filler from generate_series(1, 1000) n")
        connection.execute("checkpoint")
        row = connection.execute("select pg_relation_filepath('t')").fetchone()
        assert row is not None
    path = server.data_dir / row[0]
    with path.open("r+b") as file:
        for block in (3, 9):
            file.seek(block * 8192 + 5000)
            file.write(b"\xff\xfe")
    told: list[Damage] = []
    taken = await Taken().take(local_copy.stream(settings_for(server), server.data_dir, damaged=told.append))
    assert told == [Damage(row[0], (3, 9))]
    assert ("base", row[0]) in taken.entries()


async def test_files_that_change_while_they_are_read(start_server: StartServer) -> None:
    """Grown: cut at the size in its header. Shrunk: filled with zeros. Vanished: left out."""
    server = start_server(NEWEST)
    grows, shrinks, vanishes = (server.data_dir / f"base/1/{name}" for name in ("8000001", "8000002", "8000003"))
    for path in (grows, shrinks, vanishes):
        path.write_bytes(bytes([1]) * 8192 * 1000)
        give(path, run_as())
    touched = False

    class Meddler(Pace):
        """Comes between the header of a file and its content."""

        def wait(self, size: int, stop: threading.Event) -> None:  # noqa: ARG002  neither is of matter here
            nonlocal touched
            if not touched:
                touched = True
                with grows.open("ab") as file:
                    file.write(bytes(8192))
                os.truncate(shrinks, 0)
                vanishes.unlink()

    stream = local_copy.stream(settings_for(server), server.data_dir, workers=1, pace=Meddler(1 << 40))
    taken = await Taken().take(stream)
    entries = taken.entries()
    assert ("base", "base/1/8000003") not in entries
    assert entries["base", "base/1/8000001"][3] in (8192 * 1000, 8192 * 1001)
    assert entries["base", "base/1/8000002"][3] in (8192 * 1000, 0)


async def test_the_directory_of_another_server_is_refused(start_server: StartServer) -> None:
    # Servers of these tests are copies: those of one major are of one cluster, as a standby is.
    server, other, stranger = start_server(NEWEST), start_server(NEWEST), start_server(NEWEST - 1)
    with pytest.raises(SourceError, match=r"does not run on .*: its postmaster\.pid tells of another start"):
        await Taken().take(local_copy.stream(settings_for(server), other.data_dir))
    theirs, ours = (
        each.query("select system_identifier from pg_control_system()")[0][0] for each in (stranger, server)
    )
    assert theirs != ours
    with pytest.raises(SourceError, match=f"belongs to the cluster {theirs}, and the server to {ours}") as caught:
        await Taken().take(local_copy.stream(settings_for(server), stranger.data_dir))
    assert "have to mean the same server" in caught.value.hint
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        query = "select count(*) from pg_stat_activity where application_name = 'walship_backup'"
        async with asyncio.timeout(30):  # the server notices the end of a session a moment later
            while connection.execute(query).fetchone() != (0,):
                await asyncio.sleep(0.02)


def create_tablespace(server: ThrowawayServer, place: Path) -> int:
    """Its oid; a table in it has a row."""
    place.mkdir()
    give(place, run_as())
    server.query(f"create tablespace {place.name} location '{place}'")
    server.query(f"create table in_{place.name} tablespace {place.name} as select 1 n")
    ((oid,),) = server.query(f"select oid::bigint from pg_tablespace where spcname = '{place.name}'")
    return int(oid)


async def test_tablespaces_that_are_created_meanwhile(
    start_server: StartServer, server_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the start: copied, for replay does not make them. Behind it: replay does, and they are in no map."""
    server = start_server(NEWEST)
    oids: list[int] = []
    looked, listed = local_copy.look, local_copy.linked_tablespaces

    async def look(*arguments: Any) -> Any:
        found = await looked(*arguments)
        oids.append(await asyncio.to_thread(create_tablespace, server, server_folder / "before"))
        return found

    monkeypatch.setattr(local_copy, "look", look)
    messages = local_copy.stream(settings_for(server), server.data_dir)
    taken = Taken()

    async def meddled() -> AsyncGenerator[BackupMessage, None]:
        async for message in messages:
            yield message
            if isinstance(message, BackupStarted):
                oids.append(await asyncio.to_thread(create_tablespace, server, server_folder / "behind"))

    await taken.take(meddled())
    before, behind = oids
    assert [found.oid for found in taken.tablespaces] == [before]
    assert any(area == str(before) and kind == tarfile.REGTYPE for (area, _), (kind, *_) in taken.entries().items())
    assert not any(str(behind) in name for _, name in taken.entries())
    with tarfile.open(fileobj=io.BytesIO(bytes(taken.archives["base.1"]))) as tar:
        content = tar.extractfile("tablespace_map")
        assert content is not None
        assert content.read().decode() == f"{before} {server_folder}/before\n"

    # Between the server's list and ours: rare, and no backup.
    def list_late(directory: Path) -> tuple[Tablespace, ...]:
        oids.append(create_tablespace(server, server_folder / "between"))
        return listed(directory)

    monkeypatch.setattr(local_copy, "look", looked)
    monkeypatch.setattr(local_copy, "linked_tablespaces", list_late)
    with pytest.raises(SourceError, match="was created or dropped in the very moment") as caught:
        await Taken().take(local_copy.stream(settings_for(server), server.data_dir))
    assert f"tablespace {oids[-1]} was" in caught.value.fact


async def test_a_file_that_cannot_be_read_ends_the_backup(start_server: StartServer) -> None:
    server = start_server(NEWEST)
    broken = server.data_dir / "base/1/8000002"
    broken.write_bytes(b"x")
    broken.chmod(0)
    ours = os.geteuid()
    try:
        if ours == 0:  # who reads every file
            os.seteuid(server.data_dir.stat().st_uid)
        with pytest.raises(SourceError, match="8000002 cannot be read: Permission denied") as caught:
            await Taken().take(local_copy.stream(settings_for(server), server.data_dir))
    finally:
        os.seteuid(ours)
    assert "as the server's user" in caught.value.hint


async def test_a_tablespace_that_is_not_mounted_is_refused(start_server: StartServer, server_folder: Path) -> None:
    server = start_server(NEWEST)
    await asyncio.to_thread(fill, server, server_folder)
    link = min(path for path in (server.data_dir / "pg_tblspc").iterdir() if path.is_symlink())
    mounted = server_folder / "mounted"
    mounted.mkdir()
    for entry in server.data_dir.iterdir():
        if entry.name != "pg_tblspc":
            (mounted / entry.name).symlink_to(entry)
    with pytest.raises(SourceError, match=f"tablespace {link.name} is at {link.readlink()} on the server"):
        await Taken().take(local_copy.stream(settings_for(server), mounted))


async def test_a_tablespace_that_is_dropped_in_that_moment_is_no_obstacle(
    start_server: StartServer, server_folder: Path
) -> None:
    """Its link is gone before the server stops listing it."""
    server = start_server(NEWEST)
    oid = create_tablespace(server, server_folder / "going")
    server.query("drop table in_going")
    (server.data_dir / f"pg_tblspc/{oid}").unlink()
    async with await psycopg.AsyncConnection.connect(server.dsn(), autocommit=True) as connection:
        looking = asyncio.create_task(local_copy.look(connection, server.data_dir))
        await asyncio.wait([looking], timeout=0.2)
        assert not looking.done(), "it waits"
        await asyncio.to_thread(server.query, "drop tablespace going")
        assert (await looking).tablespaces == ()


async def test_a_second_backup_is_refused_by_name(start_server: StartServer) -> None:
    server = start_server(NEWEST)
    settings = settings_for(server)
    server.query("alter system set idle_session_timeout = '50ms'")  # which is not meant for who holds the lock
    server.query("select pg_reload_conf()")
    async with claimed(settings):
        await asyncio.sleep(0.5)
        with pytest.raises(SourceError, match=r"is being taken already: from 127\.0\.0\.1, since") as caught:
            async with claimed(settings):
                pass
        assert "pg_terminate_backend" in caught.value.hint
    async with claimed(settings):
        pass


async def test_stopped_while_its_end_waits_for_room_it_leaves_no_thread(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, ended = threading.Event(), threading.Event()

    def end(stream: Stream, _content: bytes = b"") -> Iterator[ArchiveData]:
        while stream._copy.room() is not None:  # nobody gives one back
            waits.set()
        ended.set()
        yield from ()

    monkeypatch.setattr(Stream, "end", end)
    server = start_server(NEWEST)
    messages = local_copy.stream(settings_for(server), server.data_dir)
    taking = asyncio.create_task(Taken().take(messages))
    assert await asyncio.to_thread(waits.wait, 60)
    taking.cancel()
    with suppress(asyncio.CancelledError):
        await taking
    await messages.aclose()
    assert await asyncio.to_thread(ended.wait, 10)
