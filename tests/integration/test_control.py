"""Reaching a server, and what is said when that fails; what is wrong with it, and the words that mend it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from infra.postgres.connect import connect
from infra.postgres.control import create_restore_point, read_facts, switch_wal
from infra.postgres.problems import problems
from infra.postgres.replication import ReplicationConnection
from infra.postgres.throwaway import ThrowawayServer, free_port
from infra.settings import Settings
from pipeline.errors import SourceError
from tests.servers import NEWEST, SERVER_VERSIONS, StartServer, new_server, server_folder, start_server

__all__ = ["server_folder", "start_server"]

SECRET = "s3cret-of-the-role"
#: What is needed by a role that is no superuser.
RIGHTS = """
create role walship login replication password 's3cret-of-the-role';
grant pg_monitor to walship;
grant execute on function pg_switch_wal(), pg_create_restore_point(text) to walship;
"""


def settings_for(server: ThrowawayServer, user: str = "postgres", **more: Any) -> Settings:
    return Settings(POSTGRES_HOST=server.host, POSTGRES_PORT=server.port, POSTGRES_USERNAME=user, **more)


async def refused(settings: Settings, *, replication: bool = False, dbname: str = "postgres") -> SourceError:
    with pytest.raises(SourceError) as caught:
        await connect(settings, replication=replication, dbname=dbname)
    assert SECRET not in caught.value.fact + caught.value.hint
    return caught.value


async def said(server: ThrowawayServer, user: str = "postgres", **more: Any) -> list[tuple[str, str, str]]:
    settings = settings_for(server, user, **more)
    async with await connect(settings) as control:
        return [(p.severity, p.fact, p.hint) for p in problems(await read_facts(control), settings)]


# -- being refused


async def test_nobody_listens() -> None:
    port = free_port()
    error = await refused(Settings(POSTGRES_HOST="127.0.0.1", POSTGRES_PORT=port))
    assert error.fact == f"PostgreSQL at 127.0.0.1:{port} cannot be reached: Connection refused"
    assert "POSTGRES_HOST" in error.hint


async def test_somebody_listens_who_says_nothing() -> None:
    async with await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        error = await refused(Settings(POSTGRES_HOST="127.0.0.1", POSTGRES_PORT=port))
    assert "cannot be reached" in error.fact


async def test_no_socket_there(server_folder: Path) -> None:
    error = await refused(Settings(POSTGRES_HOST=str(server_folder)))
    assert "No such file or directory" in error.fact


async def test_refusals_name_the_remedy(start_server: StartServer) -> None:
    """One server, every way to be turned away at its door."""
    server = start_server(
        settings={"max_connections": "5", "superuser_reserved_connections": "1", "max_wal_senders": "1"}
    )
    server.query(RIGHTS)
    server.query("create role plain login")
    server.query("create role locked nologin")
    server.allow(
        "local all postgres trust",
        "host all postgres,plain,locked 127.0.0.1/32 trust",
        "host replication plain,postgres 127.0.0.1/32 trust",
        "host all walship 127.0.0.1/32 scram-sha-256",
    )
    server.restart()

    error = await refused(settings_for(server, "walship", POSTGRES_PASSWORD=SECRET + "x"))
    assert 'password authentication failed for user "walship"' in error.fact
    assert "POSTGRES_PASSWORD" in error.hint
    error = await refused(settings_for(server, "walship"))
    assert "no password supplied" in error.fact
    error = await refused(settings_for(server, "walship", POSTGRES_PASSWORD=SECRET), replication=True)
    assert "does not let walship in from 127.0.0.1 for replication connections" in error.fact
    assert error.hint.endswith(": host  replication  walship  127.0.0.1/32  scram-sha-256")
    error = await refused(settings_for(server, "stranger"))
    assert error.hint.endswith(": host  postgres  stranger  127.0.0.1/32  scram-sha-256")
    error = await refused(settings_for(server, "plain"), replication=True)
    assert error.fact.startswith("the role plain of PostgreSQL at 127.0.0.1:")
    assert error.hint == 'give it: ALTER ROLE "plain" REPLICATION;'
    error = await refused(settings_for(server, "locked"))
    assert "no role locked that may log in" in error.fact
    error = await refused(settings_for(server), dbname="nowhere")
    assert "has no database nowhere" in error.fact

    async with await ReplicationConnection.open(settings_for(server)):
        error = await refused(settings_for(server), replication=True)
        assert "has no free WAL sender" in error.fact
        assert "max_wal_senders" in error.hint
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(await connect(settings_for(server)))
        error = await refused(settings_for(server, "plain"))
        assert "has no connection left for plain" in error.fact
        assert "max_connections" in error.hint


@pytest.mark.parametrize("major", [15, 16])
async def test_the_right_to_replicate_is_missed_in_either_wording(major: int, start_server: StartServer) -> None:
    """15 says it in other words than 16 and later."""
    server = start_server(major, segment_mb=1)
    server.query("create role plain login")
    error = await refused(settings_for(server, "plain"), replication=True)
    assert "has no REPLICATION right" in error.fact


async def test_a_server_that_shuts_down_says_so(start_server: StartServer) -> None:
    server = start_server(segment_mb=1)
    with psycopg.connect(server.dsn()):
        process = server._process
        assert process is not None
        process.terminate()  # smart: it waits for our session, and takes no other
        deadline = time.monotonic() + 20
        while True:
            try:
                async with await connect(settings_for(server)):
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.02)
            except SourceError as error:
                assert "takes no connections now: the database system is shutting down" in error.fact  # noqa: PT017
                break


async def test_a_server_without_wal_senders(start_server: StartServer) -> None:
    server = start_server(segment_mb=1, settings={"max_wal_senders": "0", "wal_level": "minimal"})
    error = await refused(settings_for(server), replication=True)
    assert "has no free WAL sender" in error.fact
    told = await said(server)
    assert ("error", "wal_level is minimal: such WAL cannot be replayed onto a backup") in [t[:2] for t in told]
    assert any(fact.startswith("max_wal_senders is 0") for _, fact, _ in told)
    assert any(fact.startswith("archive_mode is off") for _, fact, _ in told)


# -- looking around


@pytest.mark.parametrize("major", SERVER_VERSIONS)
async def test_facts_of_a_server(major: int, start_server: StartServer, server_folder: Path) -> None:
    server = start_server(
        major, segment_mb=1, settings={
            "archive_mode": "on", "archive_library": "basic_archive", "archive_timeout": "60", "fsync": "on",
            "basic_archive.archive_directory": str(server_folder),
        },
    )  # fmt: skip
    server.query(RIGHTS)
    async with await connect(settings_for(server)) as control:
        facts = await read_facts(control)
    assert facts.major == major
    assert facts.system_identifier == server.query("select system_identifier::text from pg_control_system()")[0][0]
    assert (facts.segment_size, facts.timeline, facts.in_recovery) == (1 << 20, 1, False)
    assert (facts.archive_mode, facts.archive_library, facts.archive_command) == ("on", "basic_archive", "")
    assert (facts.archive_directory, facts.archive_timeout) == (str(server_folder), 60)
    assert facts.data_directory == str(server.data_dir)
    assert facts.role.superuser
    assert problems(facts, Settings(WALSHIP_SPOOL_DIR=server_folder)) == []

    # A role with just the rights that the documentation asks for sees the same, but for what it may not see.
    settings = settings_for(server, "walship", POSTGRES_PASSWORD=SECRET, WALSHIP_SPOOL_DIR=str(server_folder))
    async with await connect(settings) as control:
        modest = await read_facts(control)
        assert problems(modest, settings) == []
        await switch_wal(control, segment_size=modest.segment_size)
        assert await create_restore_point(control, "before the worst") > facts.wal_lsn
    assert (modest.system_identifier, modest.archive_directory) == (facts.system_identifier, str(server_folder))
    assert (modest.role.superuser, modest.role.replication, modest.role.missing_functions) == (False, True, ())


async def test_missing_rights_come_with_the_grant(start_server: StartServer) -> None:
    server = start_server(settings={"archive_mode": "on", "archive_command": "cp %p /spool/%f", "archive_timeout": "9"})
    server.query('create role "od""d" login')
    told = await said(server, 'od"d', WALSHIP_SPOOL_DIR="/spool")
    assert [severity for severity, _, _ in told] == sorted(severity for severity, _, _ in told)
    hints = [hint for _, _, hint in told]
    assert 'ALTER ROLE "od""d" REPLICATION;' in hints
    assert 'GRANT pg_monitor TO "od""d";' in hints
    for function in ("pg_switch_wal()", "pg_create_restore_point(text)"):
        assert f'GRANT EXECUTE ON FUNCTION {function} TO "od""d";' in hints
    async with await connect(settings_for(server, 'od"d')) as control:
        with pytest.raises(SourceError, match="permission denied for function pg_switch_wal") as caught:
            await switch_wal(control, segment_size=16 << 20)
        assert "walship check" in caught.value.hint


async def test_a_database_of_no_encoding_still_gives_text(start_server: StartServer) -> None:
    """A SQL_ASCII database returns bytes unless the client says what it wants."""
    server = start_server(segment_mb=1)
    server.query("create database ascii encoding 'SQL_ASCII' template template0")
    async with await connect(settings_for(server), dbname="ascii") as control:
        facts = await read_facts(control)
    assert facts.server_encoding == "SQL_ASCII"
    assert facts.archive_mode == "off"


@pytest.mark.parametrize("major", [15, NEWEST])
async def test_two_ways_to_archive_at_once(major: int, start_server: StartServer, server_folder: Path) -> None:
    server = start_server(
        major, settings={
            "archive_mode": "on", "archive_library": "basic_archive", "archive_command": "cp %p /nowhere/%f",
            "basic_archive.archive_directory": str(server_folder), "archive_timeout": "60", "fsync": "on",
        },
    )  # fmt: skip
    told = await said(server, WALSHIP_SPOOL_DIR=str(server_folder))
    if major == 15:
        assert [(severity, "ignored" in fact) for severity, fact, _ in told] == [("warning", True)]
        return
    assert [(severity, "both set" in fact) for severity, fact, _ in told] == [("error", True)]
    server.query("select pg_switch_wal()")
    deadline = time.monotonic() + 20
    while "FATAL:  both" not in server.log(100_000).replace('"', ""):
        assert time.monotonic() < deadline, "the archiver did not complain"
        await asyncio.sleep(0.02)


WAYS: tuple[tuple[dict[str, str], str | None, str], ...] = (
        ({"archive_command": "test ! -f {0}/%f && cp %p {0}/%f"}, None, ""),
        ({"archive_command": "cp %p {0}/%f"}, "warning", "a plain cp, which does not wait for the disk"),
        ({"archive_command": "cp %p /elsewhere/%f"}, "error", "but walship watches"),
        ({"archive_command": "cp %p {0}-other/%f"}, "error", "but walship watches"),
        ({"archive_command": "a_script %p %f"}, "warning", "but walship watches"),
        ({"archive_command": "true"}, "error", "without both %p and %f"),
        ({"archive_command": ""}, "error", "neither archive_library nor archive_command is set"),
        ({"archive_library": "basic_archive"}, "error", "basic_archive.archive_directory is not set"),
        ({"archive_library": "basic_archive", "basic_archive.archive_directory": "{0}/sub"}, "error", "watches"),
        ({"archive_library": "basic_archive", "basic_archive.archive_directory": "{0}"}, None, ""),
        ({"archive_library": "other"}, "warning", "which walship does not know"),
)  # fmt: skip


async def test_ways_to_archive(start_server: StartServer, server_folder: Path) -> None:
    """One server, every way: all but the mode can be set anew while it runs."""
    (server_folder / "sub").mkdir(mode=0o777)
    server = start_server(settings={"archive_mode": "on", "archive_timeout": "60", "fsync": "on"}, segment_mb=1)
    unset = {"archive_library": "", "archive_command": "", "basic_archive.archive_directory": ""}
    for number, (archiving, severity, words) in enumerate(WAYS):
        chosen = {name: value.format(server_folder) for name, value in archiving.items()}
        # A setting that nobody knows, last in the file, tells when the server has read it.
        server.configure({**unset, **chosen, "test.way": str(number)})
        server.reload()
        deadline = time.monotonic() + 30
        while server.query("select current_setting('test.way', true)") != [(str(number),)]:
            assert time.monotonic() < deadline, "the server did not read its settings again"
            await asyncio.sleep(0.01)
        told = await said(server, WALSHIP_SPOOL_DIR=str(server_folder))
        expected = [] if severity is None else [(severity, True)]
        assert [(t[0], words in t[1]) for t in told] == expected, chosen


async def test_an_archiver_that_fails_is_a_problem_with_a_name(start_server: StartServer, server_folder: Path) -> None:
    server = start_server(
        settings={"archive_mode": "on", "archive_command": f"test -e {server_folder}/%f%p", "archive_timeout": "60"}
    )
    server.query("create table t as select 1")
    server.query("select pg_switch_wal()")
    deadline = time.monotonic() + 20
    while not (told := await said(server, WALSHIP_SPOOL_DIR=str(server_folder))):
        assert time.monotonic() < deadline, "the archiver did not try"
        await asyncio.sleep(0.05)
    assert "archiving fails: 0000000100000000000000" in told[0][1]


async def test_a_standby_cannot_be_asked_to_switch(server_folder: Path) -> None:
    with new_server(NEWEST, server_folder) as server:
        (server.data_dir / "standby.signal").touch()
        server.start()
        async with await connect(settings_for(server)) as control:
            facts = await read_facts(control)
            assert facts.in_recovery
            assert facts.timeline == 1
            with pytest.raises(SourceError, match="recovery is in progress") as caught:
                await switch_wal(control, segment_size=facts.segment_size)
            assert caught.value.hint == "this server is a standby; ask its primary"
