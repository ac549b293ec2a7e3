"""What ``check`` says of a server for the stream and for synchronous commits: each wrong setting, on a real server."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from infra.checkup import Finding, examine
from infra.postgres.connect import connect
from infra.postgres.control import read_facts
from infra.postgres.problems import Problem, problems
from infra.postgres.programs import look_at
from infra.postgres.recovery_files import parse_conf
from infra.postgres.replication import ReplicationConnection
from infra.postgres.senders import read_stream_facts
from infra.postgres.stream_problems import stream_problems, stream_words
from infra.postgres.throwaway import ThrowawayServer, make_folder
from infra.settings import Settings
from pipeline.errors import ConfigError
from tests.servers import NEWEST, StartServer, new_server, server_folder, start_server
from tests.unit.test_sync import REFUSED, TAKEN

__all__ = ["server_folder", "start_server"]

_HOME = Path(__file__).resolve().parents[2]
#: With these, nothing is wrong.
RIGHT = {"max_slot_wal_keep_size": "10GB", "wal_keep_size": "16MB", "fsync": "on"}
#: The least rights for the stream, without what base backups need.
ROLE = "create role shipper login replication; grant pg_monitor to shipper"


def settings_for(server: ThrowawayServer, **more: Any) -> Settings:
    return Settings(
        POSTGRES_HOST=server.host, POSTGRES_PORT=str(server.port), POSTGRES_USERNAME="shipper",
        **{"WALSHIP_SOURCES": "stream", "WALSHIP_DESTINATIONS": "s3://bucket", **more},
    )  # fmt: skip


async def told(server: ThrowawayServer, **more: Any) -> tuple[list[Problem], list[str]]:
    """Problems, and what is right."""
    settings = settings_for(server, **more)
    async with await connect(settings) as control:
        facts, stream = await read_facts(control), await read_stream_facts(control, settings.slot)
    return stream_problems(facts, stream, settings), stream_words(facts, stream, settings)


async def briefly(server: ThrowawayServer, **more: Any) -> list[tuple[str, str]]:
    return [(problem.severity, problem.fact) for problem in (await told(server, **more))[0]]


def change(server: ThrowawayServer, settings: Mapping[str, str]) -> None:
    """Set and reload, and wait until a new session sees it."""
    with psycopg.connect(server.dsn(), autocommit=True) as session:
        for name, value in settings.items():
            session.execute(f"alter system set {name} = '{value}'".encode())
        session.execute("select pg_reload_conf()")
    for name, value in settings.items():
        wait_until(server, name, value)


def wait_until(server: ThrowawayServer, name: str, value: str) -> None:
    deadline = time.monotonic() + 20
    query = "select setting = '{1}' or current_setting('{0}') = '{1}' from pg_settings where name = '{0}'"
    while server.query(query.format(name, value)) != [(True,)]:
        assert time.monotonic() < deadline, name
        time.sleep(0.01)


@asynccontextmanager
async def streaming(server: ThrowawayServer, name: str, slot: str = "") -> AsyncIterator[None]:
    """A program that streams under that name, and confirms nothing."""
    async with await ReplicationConnection.open(settings_for(server), application_name=name) as connection:
        start = (await connection.identify_system()).lsn
        await connection.send(f"START_REPLICATION {f'SLOT {slot} ' if slot else ''}PHYSICAL {start}")
        await connection.result()
        count = "select count(*) from pg_stat_replication where application_name = %s and state = 'streaming'"
        before = await senders(server, count, name)
        while await senders(server, count, name) < max(1, before):
            await asyncio.sleep(0.01)
        yield
    async with asyncio.timeout(20):
        while await senders(
            server, "select count(*) from pg_stat_replication where application_name = %s", name
        ) >= max(1, before):
            await asyncio.sleep(0.01)


async def senders(server: ThrowawayServer, query: str, name: str) -> int:
    async with await psycopg.AsyncConnection.connect(server.dsn()) as session:
        row = await (await session.execute(query.encode(), (name,))).fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture(scope="module")
def kept_server() -> Iterator[ThrowawayServer]:
    folder = make_folder("walship-t-")
    try:
        with new_server(NEWEST, folder, segment_mb=1, settings=RIGHT) as started:
            started.start()
            started.query(ROLE)
            yield started
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def server(kept_server: ThrowawayServer) -> Iterator[ThrowawayServer]:
    """One on which nothing is wrong; what a test changes is taken back."""
    yield kept_server
    with psycopg.connect(kept_server.dsn(), autocommit=True) as session:
        session.execute("set synchronous_commit = local")
        session.execute("alter system reset all")
        session.execute("alter role shipper in database template1 reset all")
        session.execute("drop role if exists app")
        session.execute("select pg_drop_replication_slot(slot_name) from pg_replication_slots")
        session.execute("select pg_reload_conf()")
    wait_until(kept_server, "synchronous_standby_names", "")
    wait_until(kept_server, "max_slot_wal_keep_size", RIGHT["max_slot_wal_keep_size"])


async def test_the_setting_is_read_as_the_server_reads_it(server: ThrowawayServer) -> None:
    """Also by a server: what the tests of the parser say."""
    with psycopg.connect(server.dsn(), autocommit=True) as session:
        order = "alter system set synchronous_standby_names = "
        for text, *_ in TAKEN:
            if "\n" not in text:  # nothing that ALTER SYSTEM takes
                session.execute(f"{order}{psycopg.sql.quote(text)}".encode())
        for text in REFUSED:
            with pytest.raises((psycopg.errors.SyntaxError, psycopg.errors.InvalidParameterValue)):
                session.execute(f"{order}{psycopg.sql.quote(text)}".encode())


async def test_a_server_as_it_should_be(server: ThrowawayServer) -> None:
    found, words = await told(server)
    assert found == []
    assert words[0] == "the slot walship is not there yet: `walship run` makes it"
    assert words[1].startswith("commits wait for nobody: synchronous_standby_names is empty; losing this host costs")
    server.query("select pg_create_physical_replication_slot('walship', true)")
    async with streaming(server, "walship", "walship"):
        found, words = await told(server)
    assert found == []
    assert words[0].startswith("the slot walship is in use by ")


async def test_limits_and_time_outs(server: ThrowawayServer) -> None:
    for setting, value, severity, words in (
        ("max_slot_wal_keep_size", "-1", "warning", "keeps all WAL, until its disk is full"),
        ("max_slot_wal_keep_size", "0", "error", "the slot is lost, with WAL that nothing else keeps"),
        ("wal_sender_timeout", "0", "warning", "does not notice a connection that is cut"),
        ("wal_sender_timeout", "2s", "warning", "wal_sender_timeout is 2 s"),
        ("idle_replication_slot_timeout", "1h", "warning", "idle_replication_slot_timeout is 3600 s"),
    ):
        change(server, {setting: value})
        ((found, fact),) = await briefly(server)
        assert (found, words in fact) == (severity, True), fact
        change(server, {setting: {"max_slot_wal_keep_size": "10GB", "wal_sender_timeout": "1min"}.get(setting, "0")})
    change(server, {"max_slot_wal_keep_size": "0"})
    ((severity, fact),) = await briefly(server, WALSHIP_SOURCES="watch,stream")
    assert (severity, "the archive fills the hole" in fact) == ("warning", True)


async def test_the_stream_needs_no_archive_timeout(server: ThrowawayServer, tmp_path: Path) -> None:
    settings = settings_for(server, WALSHIP_SOURCES="watch,stream", WALSHIP_SPOOL_DIR=str(tmp_path))
    async with await connect(settings) as control:
        facts = await read_facts(control)
    archiving: dict[str, Any] = {
        "archive_mode": "on",
        "archive_library": "basic_archive",
        "archive_directory": str(tmp_path),
    }
    facts = replace(facts, archive_timeout=0, **archiving)
    found = {sources: problems(facts, settings.model_copy(update={"sources": sources}))
             for sources in (("watch",), ("watch", "stream"))}  # fmt: skip
    (only,) = (p.fact for p in found["watch",] if p not in found["watch", "stream"])
    assert only.startswith("archive_timeout is 0")
    alone = settings.model_copy(update={"sources": ("stream",), "spool_dir": None})
    (left,) = (p for p in problems(facts, alone) if "archive" in p.fact)
    assert (left.severity, "it fills the disk" in left.fact) == ("warning", True)
    assert left.hint.startswith("ALTER SYSTEM SET archive_mode = off;")
    assert left not in problems(replace(facts, archive_mode="off"), alone)


async def test_slots(server: ThrowawayServer) -> None:
    server.query(
        "select pg_create_physical_replication_slot('idle', true), pg_create_physical_replication_slot('none')"
    )
    ((severity, fact),) = await briefly(server, WALSHIP_SLOT="idle")
    assert (severity, "nobody streams from the slot idle: it keeps " in fact) == ("warning", True)
    ((severity, fact),) = await briefly(server, WALSHIP_SLOT="none")
    assert (severity, "keeps no WAL until somebody has streamed" in fact) == ("warning", True)
    async with streaming(server, "pg_receivewal", "idle"):
        ((severity, fact),) = await briefly(server, WALSHIP_SLOT="idle")
    assert (severity, "in use by another program: pg_receivewal" in fact) == ("error", True)
    # Two segments behind a limit of one, at a checkpoint.
    change(server, {"wal_keep_size": "0", "max_slot_wal_keep_size": "1MB"})
    for _ in range(4):
        server.query("select pg_logical_emit_message(true, '', 'x')")
        server.query("select pg_switch_wal()")
    server.query("checkpoint")
    found = await briefly(server, WALSHIP_SLOT="idle")
    assert [severity for severity, _ in found] == ["error", "error"]
    assert any("the slot idle is lost" in fact for _, fact in found)


@pytest.mark.parametrize("major", [15])
async def test_no_room(major: int, start_server: StartServer) -> None:
    server = start_server(
        major, segment_mb=1,
        settings={**RIGHT, "wal_level": "logical", "max_wal_senders": "2", "max_replication_slots": "1"},
    )  # fmt: skip
    server.query(ROLE)
    server.query("select pg_create_logical_replication_slot('rows', 'pgoutput')")
    assert await briefly(server) == [
        ("error", "there is no room for a slot: 1 exist, max_replication_slots is 1"),
    ]
    assert await briefly(server, WALSHIP_SLOT="rows") == [
        ("error", "the slot rows is a logical one, which sends rows and no WAL")
    ]
    async with streaming(server, "one"), streaming(server, "two"):
        found = await briefly(server)
    assert any(fact.startswith("all 2 WAL senders are in use: one of the role shipper, process ") for _, fact in found)


async def test_a_standby_is_refused(server_folder: Path) -> None:
    with new_server(NEWEST, server_folder, settings={**RIGHT, "max_wal_senders": "1"}) as server:
        server.start()
        server.query(ROLE)
        server.stop()
        (server.data_dir / "standby.signal").touch()
        server.start()
        found = await briefly(server)
    assert [severity for severity, _ in found] == ["error", "error"]
    assert any(fact.startswith("this server is a standby") for _, fact in found)
    assert any(fact.startswith("max_wal_senders is 1") for _, fact in found)


async def test_what_commits_wait_for(server: ThrowawayServer) -> None:
    server.query("alter role shipper in database template1 set synchronous_commit = remote_apply")
    server.query("create role app; alter role app set synchronous_commit = local")
    server.query("select pg_create_physical_replication_slot('walship', true)")
    for names, severity, words in (
        ("replica", "error", "commits wait for replica, not for walship"),
        ("*", "error", "* matches every connection"),
        ("walship, replica", "error", "lets replica release them without walship"),
        ("ANY 1 (walship, replica)", "error", "lets replica release"),
        ("FIRST 2 (walship)", "error", "they wait for ever"),
    ):
        change(server, {"synchronous_standby_names": names})
        found = await briefly(server)
        assert any(s == severity and words in fact for s, fact in found), found

    async with streaming(server, "replica"):
        change(server, {"synchronous_standby_names": "replica"})
        found = await briefly(server)
        assert any(s == "warning" and "what they wait for is not offsite" in fact for s, fact in found)
        assert not any(s == "error" for s, _ in found)

    change(server, {"synchronous_standby_names": "WalShip"})
    found = await briefly(server)
    hang = "commits wait: nobody streams as walship, and they hang until somebody does"
    assert [fact for s, fact in found if s == "error"] == [hang]
    others = [fact for _, fact in found if "is another one for the" in fact]
    assert [fact.rpartition(": ")[2] for fact in others] == ["its commits do not wait", "its commits wait for ever"]
    assert "role app: local" in others[0]

    async with streaming(server, "walship"):  # without the slot: somebody else
        found = await briefly(server)
        assert any(s == "error" and "other connections release them in its place (walship of" in f for s, f in found)
        async with streaming(server, "walship", "walship"):
            found = await briefly(server)
            assert any(s == "error" and "other connections release them" in fact for s, fact in found)
    async with streaming(server, "walship", "walship"):
        wrong, right = await told(server)
        assert {problem.severity for problem in wrong} == {"warning"}
        assert all("is another one for the" in problem.fact for problem in wrong)
        assert any("commits wait until walship has stored them" in word and "a mere WARNING" in word for word in right)
        assert any("WALSHIP_SYNC_TIMEOUT is not set" in word for word in right)
        change(server, {"synchronous_standby_names": "FIRST 2 (walship, replica)"})
        found = await briefly(server)
        said = "commits wait for 2 standbys, and 1 of the named are connected"
        assert any(s == "error" and said in fact for s, fact in found)
        change(server, {"synchronous_standby_names": "walship"})
        for value, severity, say in (
            ("remote_apply", "error", "which it never does"),
            ("local", "warning", "commits do not wait for walship"),
            ("off", "warning", "commits do not wait for walship"),
        ):
            change(server, {"synchronous_commit": value})
            found = await briefly(server)
            assert any(s == severity and say in fact for s, fact in found), found


async def test_the_settings_that_come_with_walship_are_right(start_server: StartServer) -> None:
    text = (_HOME / "infra/deploy/postgres/stream.conf").read_text("utf-8")
    conf = parse_conf(text)
    assert {"max_slot_wal_keep_size", "wal_keep_size", "wal_level"} <= set(conf)
    server = start_server(segment_mb=1, settings={**conf, "synchronous_standby_names": "walship"})
    with psycopg.connect(server.dsn(), autocommit=True) as session:
        session.execute("set synchronous_commit = local")
        for statement in ROLE.split(";"):
            session.execute(statement.encode())
    found = await briefly(server)
    assert found == [("error", "commits wait: nobody streams as walship, and they hang until somebody does")]


async def test_a_stream_alone_needs_no_archive_and_no_spool(server: ThrowawayServer, tmp_path: Path) -> None:
    async def findings(**more: Any) -> list[Finding]:
        settings = settings_for(server, WALSHIP_DESTINATIONS=f"file://{tmp_path}", **more)
        return [finding async for finding in examine(settings) if finding.subject in ("server", "spool", "settings")]

    found = await findings()
    assert not any("archiv" in f.fact or f.subject == "spool" for f in found)
    assert any(f.severity == "ok" and "streams its WAL through the slot walship" in f.fact for f in found)
    found = await findings(WALSHIP_SPOOL_DIR=str(tmp_path))
    assert any(f.severity == "warning" and "nobody empties it" in f.fact for f in found)
    for sources, words in (
        ("watch,stream", "WALSHIP_SPOOL_DIR is not set"),
        ("all", "WALSHIP_SOURCES names no source"),
    ):
        errors = [f.error for f in await findings(WALSHIP_SOURCES=sources) if isinstance(f.error, ConfigError)]
        assert [error.fact for error in errors] == [words]


async def test_programs_that_are_not_where_the_settings_say(server: ThrowawayServer, tmp_path: Path) -> None:
    """Restores are refused with such a folder: on the worst day it is too late to learn of it."""

    async def findings(**more: str) -> list[Finding]:
        settings = settings_for(server, WALSHIP_DESTINATIONS=f"file://{tmp_path}", **more)
        return [finding async for finding in examine(settings) if "PostgreSQL" in finding.fact + finding.hint]

    async def wrong(**more: str) -> list[tuple[str, str]]:
        return [(f.severity, f.fact) for f in await findings(**more) if "were not found" in f.fact]

    there = look_at(server.bin_dir)
    assert there is not None
    words = f"the programs of PostgreSQL {there.major} were not found; no other version is there (looked in /nowhere)"
    refused = "a restore from here, or a drill, would be refused"
    assert await wrong(WALSHIP_PG_BIN_DIR="/nowhere") == [("warning", f"WALSHIP_PG_BIN_DIR: {words}: {refused}")]
    scheduled = {"WALSHIP_PG_BIN_DIR": "/nowhere", "WALSHIP_SCHEDULE_DRILL": "0 3 * * *"}
    assert await wrong(**scheduled) == [("error", f"WALSHIP_SCHEDULE_DRILL is set, and {words}")]
    assert await wrong() == await wrong(WALSHIP_PG_BIN_DIR=str(server.bin_dir)) == []
