"""The stream of WAL from real servers, as far as it is about the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from infra.postgres.connect import RefusedError, connect, place
from infra.postgres.processes import give, run_as
from infra.postgres.replication import ReplicationConnection
from infra.postgres.slots import create, look
from infra.postgres.throwaway import ThrowawayServer
from infra.postgres.walstream import Keepalive, TimelineEnded, WalData, WalStream, fetch_segment
from infra.settings import Settings
from pipeline.errors import SourceError
from pipeline.wal import Lsn, WalFile
from tests.servers import NEWEST, SERVER_VERSIONS, StartServer, programs, server_folder, start_server

__all__ = ["server_folder", "start_server"]

SEGMENT = 1 << 20
OLDEST_AND_NEWEST = [SERVER_VERSIONS[0], NEWEST]


def settings_for(*servers: ThrowawayServer) -> Settings:
    return Settings(
        POSTGRES_HOST=",".join(server.host for server in servers),
        POSTGRES_PORT=",".join(str(server.port) for server in servers),
    )


@contextlib.asynccontextmanager
async def streaming(
    server: ThrowawayServer, lsn: int, *, slot: str | None = None, timeline: int = 1
) -> AsyncIterator[WalStream]:
    async with await ReplicationConnection.open(settings_for(server), application_name="walship") as connection:
        stream = await WalStream.start(connection, slot=slot, timeline=timeline, lsn=Lsn(lsn))
        assert isinstance(stream, WalStream)
        try:
            yield stream
        finally:
            await stream.close()


async def pause(stream: WalStream, seconds: float = 5.0, *, reading: bool = True) -> None:
    """Wait for the stream alone."""
    await stream.wait(asyncio.Event(), reading=reading, seconds=seconds)


async def receive(stream: WalStream, size: int) -> tuple[bytes, list[Keepalive | TimelineEnded]]:
    """At least that many bytes, or fewer if the timeline ends before; and what else was said."""
    got, said = bytearray(), list[Keepalive | TimelineEnded]()
    position: int | None = None
    async with asyncio.timeout(20):
        while len(got) < size:
            message = stream.take()
            if message is None:
                await pause(stream)
            elif isinstance(message, WalData):
                assert position in (None, message.start)
                got += message.data
                position = message.start + len(message.data)
                assert position <= message.server_end
            else:
                said.append(message)
                if isinstance(message, TimelineEnded):
                    break
    return bytes(got), said


async def acknowledging(stream: WalStream) -> None:
    """Report whatever arrives, until an error ends it."""
    end = Lsn(0)
    async with asyncio.timeout(20):
        while True:
            while (message := stream.take()) is not None:
                if isinstance(message, WalData):
                    end = message.start + len(message.data)
            await stream.report(end, now=datetime.now(UTC))
            await pause(stream, 0.1)


async def until_gone(stream: WalStream) -> SourceError:
    """Without reading: the buffers are full, so it takes a report that nobody takes."""

    async def go_on() -> None:
        async with asyncio.timeout(10):
            while True:
                await stream.report(Lsn(0), now=datetime.now(UTC))
                await pause(stream, 0.05, reading=False)

    with pytest.raises(SourceError) as caught:
        await go_on()
    return caught.value


async def until_refused(stream: WalStream) -> SourceError:
    with pytest.raises(SourceError) as caught:
        await receive(stream, 1 << 40)
    return caught.value


def flushed(server: ThrowawayServer) -> Lsn:
    return Lsn.parse(server.query("select pg_current_wal_flush_lsn()::text")[0][0])


def segment_start(lsn: int) -> Lsn:
    return Lsn(lsn // SEGMENT * SEGMENT)


def wal_file(server: ThrowawayServer, lsn: int, timeline: int = 1) -> bytes:
    return (server.data_dir / "pg_wal" / WalFile.segment(timeline, lsn, SEGMENT).name).read_bytes()


def write_wal(server: ThrowawayServer, megabytes: int) -> None:
    server.query(
        f"select pg_logical_emit_message(false, 'fill', repeat(md5(n::text), 1000)) "
        f"from generate_series(1, {megabytes * 32}) n"
    )


@pytest.mark.parametrize("major", OLDEST_AND_NEWEST)
async def test_the_bytes_are_those_of_the_servers_files_from_below_restart_lsn_on(
    major: int, start_server: StartServer
) -> None:
    server = start_server(major, segment_mb=1)
    async with await ReplicationConnection.open(settings_for(server)) as connection:
        await create(connection, "walship")
    async with await connect(settings_for(server)) as control:
        slot = await look(control, "walship")
    assert slot is not None
    assert slot.restart_lsn is not None
    start = segment_start(slot.restart_lsn)
    assert start < slot.restart_lsn
    write_wal(server, 3)
    server.query("select pg_switch_wal()")
    async with streaming(server, start, slot="walship") as stream:
        got, _ = await receive(stream, flushed(server) - start)
    whole = len(got) // SEGMENT
    assert whole >= 3
    for number in range(whole):
        at = number * SEGMENT
        assert got[at : at + SEGMENT] == wal_file(server, start + at)
    second = WalFile.segment(1, start + SEGMENT, SEGMENT)
    assert await fetch_segment(settings_for(server), second, SEGMENT) == got[SEGMENT : 2 * SEGMENT]
    with pytest.raises(SourceError, match="is asked for up to"):  # it is not whole yet
        await fetch_segment(settings_for(server), WalFile.segment(1, flushed(server), SEGMENT), SEGMENT, timeout=0.2)


async def test_tls_brings_the_same_and_holds_nothing_back(start_server: StartServer, server_folder: Path) -> None:
    certificate, key = server_folder / "server.crt", server_folder / "server.key"
    self_signed(certificate, key)
    server = start_server(
        segment_mb=1,
        settings={"ssl": "on", "ssl_cert_file": str(certificate), "ssl_key_file": str(key), "wal_keep_size": "100MB"},
    )
    start = segment_start(flushed(server))
    write_wal(server, 8)
    async with await ReplicationConnection.open(settings_for(server)) as connection:
        assert connection.pgconn.ssl_in_use
        stream = await WalStream.start(connection, slot=None, timeline=1, lsn=start)
        assert isinstance(stream, WalStream)
        got, _ = await receive(stream, flushed(server) - start)
        for size in range(0, 40_000, 4_001):  # messages of all sizes, of which none may wait for the next one
            server.query(f"select pg_logical_emit_message(true, '', repeat('x', {size}))")
            began = time.monotonic()
            more, _ = await receive(stream, flushed(server) - start - len(got))
            got += more
            assert time.monotonic() - began < 4
        await stream.close()
    for at in range(0, len(got) // SEGMENT * SEGMENT, SEGMENT):
        assert got[at : at + SEGMENT] == wal_file(server, start + at)


def self_signed(certificate: Path, key: Path) -> None:
    """A certificate that nobody has to trust, for the server's user."""
    private = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, private.public_key(), 1, now, now + timedelta(days=1))
    certificate.write_bytes(made.sign(private, hashes.SHA256()).public_bytes(Encoding.PEM))
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    key.chmod(0o600)
    give(certificate, run_as())
    give(key, run_as())


@pytest.mark.parametrize("major", SERVER_VERSIONS)
async def test_each_refusal_is_told_apart(major: int, start_server: StartServer) -> None:
    server = start_server(major, segment_mb=1)
    settings, here = settings_for(server), segment_start(flushed(server))
    async with await ReplicationConnection.open(settings) as connection:

        async def state(slot: str | None, timeline: int, lsn: int) -> tuple[str, str]:
            with pytest.raises(RefusedError) as caught:
                await WalStream.start(connection, slot=slot, timeline=timeline, lsn=Lsn(lsn))
            return caught.value.state, caught.value.fact

        assert (await state("walship", 1, here))[0] == "42704"
        in_no_history, fact = await state(None, 7, here)
        assert in_no_history == "XX000"
        assert "timeline 7" in fact
        await create(connection, "walship")
        async with streaming(server, here, slot="walship"):
            assert (await state("walship", 1, here))[0] == "55006"
        # The connection has survived all that. What follows is said after COPY BOTH, and ends it.
        assert (await connection.identify_system()).timeline == 1
    async with streaming(server, here + 512 * SEGMENT) as stream:
        error = await until_refused(stream)
    assert isinstance(error, RefusedError)
    assert error.state == "XX000"
    assert "ahead of the WAL flush position" in error.fact
    async with streaming(server, SEGMENT) as stream:
        error = await until_refused(stream)
    assert isinstance(error, RefusedError)
    assert error.state == "58P01"
    assert "000000010000000000000001 has already been removed" in error.fact
    with pytest.raises(RefusedError, match="58P01"):
        await fetch_segment(settings, WalFile.segment(1, SEGMENT, SEGMENT), SEGMENT)


@pytest.mark.parametrize("major", OLDEST_AND_NEWEST)
async def test_a_timeline_ends_where_the_next_one_begins(
    major: int, start_server: StartServer, server_folder: Path
) -> None:
    primary = start_server(major, segment_mb=1)
    primary.run("pg_basebackup", "-D", str(server_folder / "standby"), "-R", "-c", "fast", "-d", primary.dsn())
    with ThrowawayServer(programs(major), server_folder / "standby") as standby:
        standby.start()
        write_wal(primary, 1)
        # Of several servers the primary is meant, whichever comes first; somebody who only looks may take any.
        both = settings_for(standby, primary)
        async with await connect(both) as found, await connect(both, any_server=True) as first:
            standby.query("select pg_create_physical_replication_slot('walship', true)")
            slot = await look(first, "walship")  # a standby can be asked, too
            assert slot is not None
            assert (slot.wal_status, slot.lost) == ("reserved", False)
            assert (place(found), place(first)) == (f"127.0.0.1:{primary.port}", f"127.0.0.1:{standby.port}")
        end = flushed(primary)
        primary.stop()
        with pytest.raises(SourceError) as caught:
            await connect(both)
        assert f"PostgreSQL at 127.0.0.1:{standby.port} is a standby" in caught.value.fact
        assert f"PostgreSQL at 127.0.0.1:{primary.port} cannot be reached" in caught.value.fact
        standby.query("select pg_promote()")
        async with await ReplicationConnection.open(both, application_name="walship") as connection:
            assert connection.place == f"127.0.0.1:{standby.port}"
            start = segment_start(end)
            stream = await WalStream.start(connection, slot=None, timeline=1, lsn=start)
            assert isinstance(stream, WalStream)
            old, said = await receive(stream, 1 << 40)
            ended = said[-1]
            assert isinstance(ended, TimelineEnded)
            assert ended.next_timeline == 2
            assert ended.fork == start + len(old) >= end
            assert stream.take() is None
            await stream.close()
            # The connection is good for more. Exactly at the fork nothing is sent at all.
            assert await WalStream.start(connection, slot=None, timeline=1, lsn=ended.fork) == ended
            assert (await connection.timeline_history(2)).startswith(b"1\t")
            with pytest.raises(RefusedError, match="XX000"):  # timeline 1 has no such bytes in this server's history
                await WalStream.start(connection, slot=None, timeline=1, lsn=ended.fork + SEGMENT)
        standby.query("select pg_switch_wal()")
        async with streaming(standby, segment_start(ended.fork), timeline=2) as stream:
            new, _ = await receive(stream, SEGMENT)
        assert new[:SEGMENT] == wal_file(standby, ended.fork, timeline=2)
        behind = ended.fork - segment_start(ended.fork)
        assert old[segment_start(ended.fork) - start :] == new[:behind]
        with pytest.raises(SourceError, match="timeline 1 ended at"):
            await fetch_segment(both, WalFile.segment(1, ended.fork, SEGMENT), SEGMENT)


async def test_who_does_not_read_but_reports_is_not_given_up(start_server: StartServer) -> None:
    server = start_server(segment_mb=1, settings={"wal_sender_timeout": "1s", "wal_keep_size": "100MB"})
    start = segment_start(flushed(server))
    async with streaming(server, start) as speaking, streaming(server, start) as silent:
        write_wal(server, 24)
        size = flushed(server) - start
        deadline = time.monotonic() + 2.5
        while time.monotonic() < deadline:
            await speaking.report(Lsn(0), now=datetime.now(UTC))
            await pause(speaking, 0.1, reading=False)
            await pause(silent, 0.1, reading=False)
        assert "the server closed it" in (await until_gone(silent)).fact
        held = 0
        while (message := speaking.take()) is not None:
            held += len(message.data) if isinstance(message, WalData) else 0
        assert held <= SEGMENT, "no more than one buffer of libpq was read meanwhile"
        got, _ = await receive(speaking, size - held)
        assert len(got) + held >= size
        await speaking.report(start, now=datetime.now(UTC), ask=True)
        async with asyncio.timeout(10):
            while not isinstance(speaking.take(), Keepalive):
                await pause(speaking)


async def test_a_commit_waits_for_the_report_and_a_report_of_nothing_moves_nothing(start_server: StartServer) -> None:
    server = start_server(segment_mb=1, settings={"synchronous_standby_names": "walship"})
    settings = settings_for(server)
    async with await ReplicationConnection.open(settings) as connection:
        await create(connection, "walship")
    start = segment_start(flushed(server))

    async def restart_lsn() -> Lsn:
        async with await connect(settings) as control:
            slot = await look(control, "walship")
        assert slot is not None
        assert slot.restart_lsn is not None
        return slot.restart_lsn

    async with streaming(server, start, slot="walship") as stream:

        async def told(lsn: int) -> None:
            """Report, and wait until the server has taken it in."""
            async with asyncio.timeout(10):
                await stream.report(Lsn(lsn), now=datetime.now(UTC), ask=True)
                while not isinstance(stream.take(), Keepalive):
                    await pause(stream)

        await told(start)  # not 0, or we are no candidate
        wake = asyncio.Event()
        commit = asyncio.create_task(asyncio.to_thread(server.query, "create table t (n int)"))
        commit.add_done_callback(lambda _: wake.set())
        async with asyncio.timeout(10):
            while not server.query("select 1 from pg_stat_activity where wait_event = 'SyncRep'"):
                await pause(stream, 0.02, reading=False)
        await told(0)
        assert not commit.done()
        end = flushed(server)
        await told(end)
        async with asyncio.timeout(10):
            while not wake.is_set():
                await stream.wait(wake, reading=True, seconds=10)
                while stream.take() is not None:
                    pass
        assert await commit == []
        assert await restart_lsn() == end
        await told(0)
        assert await restart_lsn() == end
        await told(end - 8)  # what must never be sent
        assert await restart_lsn() == end - 8


async def test_the_end_of_a_server_is_told_as_what_it_was(start_server: StartServer) -> None:
    server = start_server(segment_mb=1)
    start = segment_start(flushed(server))
    async with streaming(server, start) as stream:
        # Once all is acknowledged, a server that shuts down sends its last record and takes its leave.
        stopping = asyncio.create_task(asyncio.to_thread(server.stop, "fast"))
        with pytest.raises(SourceError, match="shutting down"):
            await acknowledging(stream)
        await stopping
    server.start()
    async with streaming(server, start) as reading, streaming(server, start) as full:
        await receive(full, 1)
        server.kill9()
        assert "connection to PostgreSQL broke" in (await until_refused(reading)).fact
        assert "connection to PostgreSQL broke" in (await until_gone(full)).fact
        await full.report(start, now=datetime.now(UTC))  # no use, and no harm
        assert "connection to PostgreSQL broke" in (await until_refused(full)).fact


async def try_until_refused(server: ThrowawayServer) -> None:
    async with asyncio.timeout(10):
        while True:
            await (await connect(settings_for(server))).close()


async def test_a_server_that_starts_or_stops_is_no_unreachable_one(start_server: StartServer) -> None:
    server = start_server(segment_mb=1)
    with psycopg.connect(server.dsn()):
        assert server.pid is not None
        stopping = asyncio.create_task(asyncio.to_thread(server.stop, "smart"))  # waits for that client
        with pytest.raises(RefusedError) as caught:
            await try_until_refused(server)
        assert caught.value.state == "57P03"
    await stopping
