"""The stream source on real servers: what it brings, where it goes on, and how it takes bad days."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Mapping

import psycopg
import pytest

from infra.postgres.replication import ReplicationConnection
from infra.postgres.throwaway import ThrowawayServer
from infra.postgres.walstream import WalStream
from infra.sources import receiver, server_watch
from pipeline.errors import SourceError
from pipeline.events import GapOpened, SegmentReady, StreamLost, StreamStarted, WalMoved
from pipeline.wal import Lsn, WalFile
from tests.receiving import SEGMENT, Receiving, Repository, ask, settings_for
from tests.servers import NEWEST, StartServer, server_folder, start_server

__all__ = ["server_folder", "start_server"]

KEEPING = {"wal_keep_size": "256MB", "max_wal_size": "256MB", "checkpoint_timeout": "1h", "autovacuum": "off"}


def started(
    start_server: StartServer, major: int = NEWEST, settings: Mapping[str, str] | None = None
) -> ThrowawayServer:
    server = start_server(major, segment_mb=1, settings={**KEEPING, **(settings or {})})
    server.query("create table t (n serial, filler text)")
    return server


def receiving(
    server: ThrowawayServer, repository: Repository | None = None, *, grace: float = 10.0
) -> Receiving:  # fmt: skip
    system_id = str(server.query("select system_identifier from pg_control_system()")[0][0])
    return Receiving(settings_for(server), repository or Repository(), system_id, grace=grace)


async def write(server: ThrowawayServer, megabytes: float) -> None:
    """So much WAL: rows of a kilobyte that do not compress."""
    rows = int(megabytes * 800)
    await ask(
        server,
        "insert into t (filler) select string_agg(md5((n * 1000 + i)::text || clock_timestamp()::text), '')"
        f" from generate_series(1, {rows}) n, generate_series(1, 32) i group by n",
    )


def assert_as_in_pg_wal(server: ThrowawayServer, repository: Repository, least: int) -> None:
    assert len(repository.segments) >= least
    for file, content in repository.segments.items():
        assert content == (server.data_dir / "pg_wal" / file.name).read_bytes(), file


@pytest.mark.parametrize("major", [15, 18])
async def test_segments_and_the_open_end(start_server: StartServer, major: int) -> None:
    server = started(start_server, major)
    repository = Repository()
    async with receiving(server, repository) as stream:
        await stream.caught_up(server)  # it has begun
        await write(server, 2.3)
        end = await stream.caught_up(server)
        assert stream.receiver.received == end
        # What is durable is what the server is told.
        restart = "select restart_lsn::text from pg_replication_slots where slot_name = 'walship' and active"
        async with asyncio.timeout(60):
            while (told := Lsn.parse((await ask(server, restart))[0][0])) < end:
                await asyncio.sleep(0.01)
        assert told <= stream.stored_to()
        await stream.until(
            lambda: [moved.age for moved in stream.told(WalMoved)][-1:] == [{"store": 0.0}], "it tells how far it is"
        )
        assert [s.synchronous for s in stream.told(StreamStarted)] == [False]
        # What a store has lost is fetched once more, and given back again.
        for file, content in repository.segments.items():
            event = SegmentReady("stream", file, SEGMENT)
            with pytest.raises(SourceError, match="not in memory"):
                stream.receiver.read(event)
            await stream.receiver.ready(event)
            assert stream.receiver.read(event) == content
            await stream.receiver.done(event)
    assert_as_in_pg_wal(server, repository, 2)
    file, tail = max(repository.tails.items())
    assert (server.data_dir / "pg_wal" / file.name).read_bytes()[: len(tail)] == tail
    assert file.start(SEGMENT) + len(tail) >= end, "a server writes something by itself every now and then"

    # Another process goes on at the first byte of the segment that is not stored whole, and through restarts.
    async with receiving(server, repository) as stream:
        await stream.caught_up(server)
        assert stream.told(StreamStarted)[0].lsn == file.start(SEGMENT)
        await write(server, 0.3)
        await asyncio.to_thread(server.restart)
        await write(server, 1.5)
        await asyncio.to_thread(server.kill9)
        await asyncio.to_thread(server.start)
        await write(server, 1.2)
        await stream.caught_up(server)
        assert not stream.told(GapOpened)
    files = repository.timeline(1)
    assert [f.next(SEGMENT) for f in files[:-1]] == files[1:]
    assert_as_in_pg_wal(server, repository, 5)


async def test_commits_wait_for_the_store(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "_REPORT", 50.0)  # what is stored is reported at once, and not when it is time to
    server = started(start_server)
    async with receiving(server) as stream:
        await stream.caught_up(server)
        server.configure({"synchronous_standby_names": "walship"})
        server.reload()
        await stream.until(lambda: stream.receiver.synchronous, "it knows that commits wait")
        assert stream.told(StreamStarted)[-1].synchronous
        stream.storing.clear()
        commit = asyncio.create_task(ask(server, "insert into t (filler) values ('x')"))
        await stream.until(lambda: stream.receiver.received > stream.stored_to(), "it has arrived")
        await asyncio.sleep(0.3)
        assert not commit.done()
        stream.storing.set()
        async with asyncio.timeout(30):
            await commit
        server.configure({"synchronous_standby_names": ""})


async def test_nothing_is_read_while_nothing_is_stored(start_server: StartServer) -> None:
    """Three segments in memory, the connection stays, and a shutdown that waits for the rest does not wait for ever."""
    server = started(start_server, settings={"wal_sender_timeout": "2s"})
    repository = Repository()
    async with receiving(server, repository, grace=1.0) as stream:
        await stream.caught_up(server)
        stream.storing.clear()
        await write(server, 9)
        before = stream.stored_to()
        await stream.until(lambda: len(stream.wal.segments) == 3, "three segments are held")
        await asyncio.sleep(2.5)
        assert stream.most == 3
        assert not stream.told(StreamLost)
        await stream.until(lambda: stream.told(WalMoved)[-1].age["store"] > 1, "it tells how old the oldest is")
        assert stream.told(WalMoved)[-1].flush == before
        began = time.monotonic()
        await asyncio.to_thread(server.stop, timeout=15)
        assert time.monotonic() - began > 0.9
        assert "shutting down" in stream.told(StreamLost)[0].fact
        assert stream.stored_to() == before
        stream.storing.set()
        await asyncio.to_thread(server.start)
        await stream.caught_up(server)
    assert_as_in_pg_wal(server, repository, 7)


async def test_a_shutdown_waits_for_the_store_and_not_for_ever(start_server: StartServer) -> None:
    server = started(start_server)
    async with receiving(server, grace=0.7) as stream:
        await stream.caught_up(server)
        began = time.monotonic()
        await asyncio.to_thread(server.stop, "fast")
        assert time.monotonic() - began < 3, "all is durable, the shutdown checkpoint included: nothing to wait for"
        await asyncio.to_thread(server.start)
        await write(server, 0.1)
        await stream.caught_up(server)
        stream.storing.clear()
        before = stream.stored_to()
        await write(server, 0.2)
        await stream.until(lambda: stream.receiver.received > before, "it has arrived")
        began = time.monotonic()
        await asyncio.to_thread(server.stop, "fast", timeout=15)
        assert time.monotonic() - began > 0.6
        assert any("is shutting down and has waited" in lost.fact for lost in stream.told(StreamLost))
        assert stream.stored_to() == before


async def test_a_smart_shutdown_lets_the_stream_go_on_for_as_long_as_clients_work(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_watch, "_RENEW", 0.0)
    monkeypatch.setattr(server_watch, "_PERIOD", 0.2)
    server = started(start_server)
    async with receiving(server, grace=0.4) as stream:
        await stream.caught_up(server)
        client = await psycopg.AsyncConnection.connect(server.dsn(), autocommit=True)
        async with client:
            stopping = asyncio.create_task(asyncio.to_thread(server.stop, "smart", timeout=15))
            await stream.until(lambda: "smart shutdown" in server.log(), "it has begun")
            await asyncio.sleep(1.2)
            before = stream.stored_to()
            await client.execute("insert into t (filler) values ('still here')")
            await stream.until(lambda: stream.stored_to() > before, "it is streamed and stored")
            assert not stream.told(StreamLost)
            stream.storing.clear()
            await client.execute("insert into t (filler) values ('never stored')")
        await stopping
        assert "is shutting down and has waited" in stream.told(StreamLost)[0].fact


async def test_a_slot_in_use_is_waited_for(start_server: StartServer) -> None:
    server = started(start_server)
    settings = settings_for(server)
    async with contextlib.AsyncExitStack() as stack:
        other = await stack.enter_async_context(await ReplicationConnection.open(settings, application_name="walship"))
        await other.rows("CREATE_REPLICATION_SLOT walship PHYSICAL RESERVE_WAL")
        lsn = Lsn.parse((await ask(server, "select pg_current_wal_flush_lsn()::text"))[0][0])
        taken = await WalStream.start(other, slot="walship", timeline=1, lsn=lsn)
        assert isinstance(taken, WalStream)
        async with receiving(server) as stream:
            await stream.until(lambda: bool(stream.told(StreamLost)), "it is refused")
            assert "slot walship is in use by walship (process" in stream.told(StreamLost)[0].fact
            await taken.close()
            await other.close()
            await stream.caught_up(server)


@pytest.mark.parametrize("major", [15, 18])
async def test_removed_wal_is_a_gap_and_no_loop(start_server: StartServer, major: int) -> None:
    server = started(
        start_server, major, {"max_slot_wal_keep_size": "1MB", "wal_keep_size": "0", "max_wal_size": "2MB"}
    )
    repository = Repository()
    async with receiving(server, repository) as stream:
        await stream.caught_up(server)  # else it may begin behind what is written, and have no whole segment
        await write(server, 1.2)
        end = await stream.caught_up(server)
    first = WalFile.segment(1, end, SEGMENT)
    for _ in range(4):
        await write(server, 2)
        await ask(server, "checkpoint")
    assert (await ask(server, "select wal_status from pg_replication_slots"))[0][0] == "lost"
    async with receiving(server, repository) as stream:
        await stream.caught_up(server)
        (gap,) = stream.told(GapOpened)
        assert (gap.timeline, gap.first) == (1, first)
        assert "base backup" in gap.hint
        await write(server, 0.8)
        await stream.caught_up(server)
        files = repository.timeline(1)
        behind = [file for file in files if file > first]
        assert behind[0] == gap.last.next(SEGMENT)
        assert not [file for file in files if gap.first <= file <= gap.last]
        assert len(stream.told(StreamLost)) <= 2
        status = await ask(server, "select wal_status from pg_replication_slots")
        assert status[0][0] in ("reserved", "extended", "unreserved")


async def test_a_slot_that_is_lost_under_the_stream(start_server: StartServer) -> None:
    """What is in memory is stored; what was not read any more is the gap."""
    server = started(
        start_server, settings={"max_slot_wal_keep_size": "1MB", "wal_keep_size": "0", "max_wal_size": "2MB"}
    )
    repository = Repository()
    async with receiving(server, repository) as stream:
        await write(server, 0.1)
        await stream.caught_up(server)
        stream.storing.clear()
        for _ in range(20):
            await write(server, 3)
            await ask(server, "checkpoint")
            if stream.told(GapOpened):  # not with the slot at once: the WAL may still be there when it is made anew
                break
        # Also while nothing is read, as nothing is stored: people have to know now.
        await stream.until(lambda: bool(stream.told(GapOpened)), "it is told")
        held = [segment.file for segment in stream.wal.segments if segment.whole]
        stream.storing.set()
        for _ in range(20):
            await write(server, 0.6)
            await stream.caught_up(server)
            if stream.told(GapOpened)[-1].last.next(SEGMENT) in repository.segments:
                break
        else:
            raise AssertionError(f"it does not go on behind the gap: {stream.notices[-9:]}")
    assert held
    assert set(held) <= set(repository.segments)
    for gap in stream.told(GapOpened):
        assert not [file for file in repository.segments if gap.first <= file <= gap.last]


async def test_what_is_missing_for_replication_is_said_and_waited_for(start_server: StartServer) -> None:
    server = started(start_server, settings={"wal_level": "minimal", "max_wal_senders": "0"})
    server.query("create role modest login")
    stream = receiving(server)
    stream.receiver._settings = settings_for(server).model_copy(update={"postgres_username": "modest"})
    async with stream:
        await stream.until(lambda: bool(stream.told(StreamLost)), "nobody can stream")
        assert "no free WAL sender" in stream.told(StreamLost)[-1].fact
        server.configure({"wal_level": "replica", "max_wal_senders": "4"})
        await asyncio.to_thread(server.restart)
        await stream.until(lambda: "no REPLICATION right" in stream.told(StreamLost)[-1].fact, "this role may not")
        await ask(server, "alter role modest replication")
        await write(server, 0.1)
        await stream.caught_up(server)


async def test_a_server_that_was_rolled_back_is_not_followed(start_server: StartServer) -> None:
    """Before it has written past what is stored, and after."""
    server = started(start_server)
    async with receiving(server) as stream:
        await ask(server, "select pg_switch_wal()")
        await write(server, 0.1)
        await stream.caught_up(server)
        await asyncio.to_thread(server.stop)
        snapshot = server.data_dir.with_name("snapshot")
        await asyncio.to_thread(shutil.copytree, server.data_dir, snapshot)
        await asyncio.to_thread(server.start)
        await write(server, 0.2)
        await stream.caught_up(server)
        await asyncio.to_thread(server.stop)
        await stream.until(lambda: "cannot be reached" in stream.told(StreamLost)[-1].fact, "all has arrived")
        stored, tails = stream.stored_to(), dict(stream.repository.tails)
        shutil.rmtree(server.data_dir)
        snapshot.rename(server.data_dir)
        await asyncio.to_thread(server.start)
        await stream.until(lambda: "and it has sent up to" in stream.told(StreamLost)[-1].fact, "it is behind")
        await write(server, 0.4)
        await stream.until(lambda: "other bytes of segment" in stream.told(StreamLost)[-1].fact, "it differs")
        assert "earlier state" in stream.told(StreamLost)[-1].hint
        assert (stream.stored_to(), stream.repository.tails) == (stored, tails)
        restart = "select restart_lsn::text from pg_replication_slots"
        assert Lsn.parse((await ask(server, restart))[0][0]) < stored


async def test_a_server_that_was_rolled_back_is_noticed_where_no_segment_is_open(start_server: StartServer) -> None:
    """What comes next would be taken for what follows: nothing is sent a second time at a border of segments."""
    server = started(start_server)
    async with receiving(server) as stream:
        await stream.caught_up(server)
        await asyncio.to_thread(server.stop)
        snapshot = server.data_dir.with_name("snapshot")
        await asyncio.to_thread(shutil.copytree, server.data_dir, snapshot)
        await asyncio.to_thread(server.start)
        await write(server, 0.2)
        await ask(server, "select pg_switch_wal()")
        stored = await stream.caught_up(server)
        assert stored % SEGMENT == 0
        assert stream.receiver.received == stored
        await asyncio.to_thread(server.kill9)
        shutil.rmtree(server.data_dir)
        snapshot.rename(server.data_dir)
        server.configure({"max_wal_senders": "0"})  # nobody looks before it has gone past that position
        await asyncio.to_thread(server.start)
        await write(server, 0.4)
        await ask(server, "select pg_switch_wal()")
        await write(server, 0.1)
        server.configure({"max_wal_senders": "4"})
        await asyncio.to_thread(server.restart)
        await stream.until(lambda: "other bytes of segment" in stream.told(StreamLost)[-1].fact, "it differs")
        assert stream.stored_to() == stored
