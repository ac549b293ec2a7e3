"""A standby is promoted: the old timeline's end, the new one's beginning, its history, in this order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.postgres.throwaway import ThrowawayServer
from pipeline.events import GapOpened, StreamLost, StreamStarted, TimelineLeft
from pipeline.wal import Lsn, WalFile, parse_history
from tests.receiving import SEGMENT, Receiving, Repository, ask, settings_for
from tests.servers import NEWEST, StartServer, server_folder, start_server

__all__ = ["server_folder", "start_server"]

KEEPING = {"wal_keep_size": "64MB", "autovacuum": "off", "checkpoint_timeout": "1h"}


class Pair:
    """A primary and its standby."""

    def __init__(self, primary: ThrowawayServer, copy: Path) -> None:
        primary.run("pg_basebackup", "-D", str(copy), "-R", "-c", "fast", "-d", primary.dsn())
        self.primary = primary
        self.standby = ThrowawayServer(primary.bin_dir, copy)
        self.standby.start()
        self.system_id = str(primary.query("select system_identifier from pg_control_system()")[0][0])
        self.repository = Repository()

    def receiving(self) -> Receiving:
        return Receiving(settings_for(self.primary, self.standby), self.repository, self.system_id)

    async def replayed(self) -> None:
        end = (await ask(self.primary, "select pg_current_wal_lsn()::text"))[0][0]
        for _ in range(500):
            if (await ask(self.standby, f"select pg_last_wal_replay_lsn() >= '{end}'"))[0][0]:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("the standby does not catch up")

    async def promote(self) -> Lsn:
        """Returns the fork."""
        assert await ask(self.standby, "select pg_promote()") == [(True,)]
        (fork,) = parse_history("2", (self.standby.data_dir / "pg_wal" / "00000002.history").read_bytes())
        return fork.lsn


@pytest.fixture
def pair(request: pytest.FixtureRequest, start_server: StartServer, server_folder: Path) -> Iterator[Pair]:
    primary = start_server(request.param, segment_mb=1, settings=KEEPING)
    primary.query("create table t (n serial, filler text)")
    pair = Pair(primary, server_folder / "standby")
    yield pair
    pair.standby.close()


async def rows(server: ThrowawayServer, count: int) -> None:
    await ask(server, f"insert into t (filler) select repeat(md5(n::text), 30) from generate_series(1, {count}) n")


@pytest.mark.parametrize("pair", [15, 18], indirect=True)
async def test_a_promotion_is_followed(pair: Pair) -> None:
    repository = pair.repository
    async with pair.receiving() as stream:
        await rows(pair.primary, 2000)
        await stream.caught_up(pair.primary)
        await pair.replayed()
        stream.storing_histories.clear()
        pair.primary.kill9()
        fork = await pair.promote()
        await rows(pair.standby, 200)
        first = WalFile.segment(2, fork, SEGMENT)
        await stream.until(lambda: "00000002.history" in stream.announced(), "the history is announced")
        assert first.name in repository.order, "never before the first bytes of its timeline"
        # What is behind the fork cannot be restored yet, and is not acknowledged.
        assert stream.stored_to() > fork
        assert stream.durable.flush(stream.receiver.received, 0.0) == fork
        stream.storing_histories.set()
        await stream.until(lambda: stream.durable.flush(stream.receiver.received, 0.0) > fork, "it is released")
        await rows(pair.standby, 2000)
        await stream.caught_up(pair.standby)
        assert not stream.told(TimelineLeft)
        assert not stream.told(GapOpened)
        assert stream.told(StreamStarted)[-1].timeline == 2
        # The old primary comes back as if nothing had happened, and the new one is gone for a while.
        await asyncio.to_thread(pair.standby.stop)
        await asyncio.to_thread(pair.primary.start)
        await rows(pair.primary, 10)
        refused = "has gone over to timeline 2 already"
        await stream.until(lambda: any(refused in lost.fact for lost in stream.told(StreamLost)), "refused")
        before = stream.receiver.received
        await asyncio.to_thread(pair.primary.stop)
        await asyncio.to_thread(pair.standby.start)
        await rows(pair.standby, 10)
        assert await stream.caught_up(pair.standby) > before
    assert repository.histories[2] == (pair.standby.data_dir / "pg_wal" / "00000002.history").read_bytes()
    # The end of timeline 1 up to the fork, and the beginning of timeline 2 with the same bytes before it.
    old = repository.tails[WalFile.segment(1, fork, SEGMENT)]
    assert len(old) == fork % SEGMENT
    new = (pair.standby.data_dir / "pg_wal" / first.name).read_bytes()
    assert new[: len(old)] == old
    for file in repository.timeline(2):
        assert repository.segments[file] == (pair.standby.data_dir / "pg_wal" / file.name).read_bytes()
    assert repository.timeline(2)[0] == first


@pytest.mark.parametrize("pair", [18], indirect=True)
async def test_commits_that_the_new_primary_never_had_are_left_behind_and_told(pair: Pair) -> None:
    repository = pair.repository
    async with pair.receiving() as stream:
        await rows(pair.primary, 100)
        await stream.caught_up(pair.primary)
        await pair.replayed()
        pair.standby.kill9()
        await rows(pair.primary, 3000)
        stored = await stream.caught_up(pair.primary)
        pair.primary.kill9()
        await asyncio.to_thread(pair.standby.start)
        fork = await pair.promote()
        assert fork < stored - SEGMENT
        await stream.until(lambda: bool(stream.told(TimelineLeft)), "it is told")
        (left,) = stream.told(TimelineLeft)
        assert (left.timeline, left.fork) == (1, fork)
        assert left.stored >= stored
        await rows(pair.standby, 100)
        end = await stream.caught_up(pair.standby)
        assert stream.stored_to() == end < stored, "what lies behind the fork is nothing that the new primary has"
        await stream.until(lambda: 2 in repository.histories, "the history is stored")
    # Both are stored: timeline 1 as far as it came, timeline 2 from the first byte of its first segment.
    assert len(repository.tails[WalFile.segment(1, stored, SEGMENT)]) >= stored % SEGMENT
    assert repository.order.index(WalFile.segment(2, fork, SEGMENT).name) < repository.order.index("00000002.history")


@pytest.mark.parametrize("pair", [18], indirect=True)
async def test_a_service_that_was_away_stores_the_end_of_the_old_timeline_first(pair: Pair) -> None:
    repository = pair.repository
    async with pair.receiving() as stream:
        await rows(pair.primary, 2000)
        await stream.caught_up(pair.primary)
    await rows(pair.primary, 1000)
    await pair.replayed()
    pair.primary.kill9()
    fork = await pair.promote()
    await rows(pair.standby, 1000)
    async with pair.receiving() as stream:
        await stream.caught_up(pair.standby)
        await stream.until(lambda: 2 in repository.histories, "the history is stored")
        assert not stream.told(GapOpened)
    assert len(repository.tails[WalFile.segment(1, fork, SEGMENT)]) == fork % SEGMENT
    numbers = {file.start(SEGMENT) // SEGMENT for file in repository.segments}
    assert numbers == set(range(min(numbers), max(numbers) + 1))
    # And once more, with nothing new: the history is offered again, as nobody knows whether it was stored.
    async with pair.receiving() as stream:
        await stream.caught_up(pair.standby)
        assert stream.told(StreamStarted)[0].timeline == 2


async def test_two_promotions_while_the_service_was_away(start_server: StartServer) -> None:
    server = start_server(NEWEST, segment_mb=1, settings=KEEPING)
    server.query("create table t (n serial, filler text)")
    system_id = str(server.query("select system_identifier from pg_control_system()")[0][0])
    repository = Repository()
    async with Receiving(settings_for(server), repository, system_id) as stream:
        await rows(server, 500)
        await stream.caught_up(server)
    for _ in range(2):
        await rows(server, 1500)
        await asyncio.to_thread(server.stop)
        (server.data_dir / "standby.signal").touch()
        await asyncio.to_thread(server.start)
        assert await ask(server, "select pg_promote()") == [(True,)]
    await rows(server, 1500)
    async with Receiving(settings_for(server), repository, system_id) as stream:
        end = await stream.caught_up(server)
        await stream.until(lambda: 3 in repository.histories, "the newest history is stored")
        await stream.until(lambda: stream.durable.flush(end, 0.0) >= end, "all of it counts")
        assert [s.timeline for s in stream.told(StreamStarted)] == [1, 2, 3]
        assert not stream.told(GapOpened)
        assert not stream.told(TimelineLeft)
    forks = parse_history("3", repository.histories[3])
    for fork in forks:
        name = f"{fork.timeline + 1:08X}.history"
        assert repository.histories[fork.timeline + 1] == (server.data_dir / "pg_wal" / name).read_bytes()
        first = WalFile.segment(fork.timeline + 1, fork.lsn, SEGMENT)
        assert repository.order.index(first.name) < repository.order.index(name), "never before its first bytes"
        assert len(repository.tails[WalFile.segment(fork.timeline, fork.lsn, SEGMENT)]) == fork.lsn % SEGMENT
    for file, content in repository.segments.items():
        assert content == (server.data_dir / "pg_wal" / file.name).read_bytes(), file
