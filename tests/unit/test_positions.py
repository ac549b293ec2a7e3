"""How far behind a destination is where only finished segments are shipped: what the server says and what is stored."""

from __future__ import annotations

import math

import pytest

from infra.monitoring.positions import Positions
from pipeline.wal import Lsn, WalFile
from tests.clock import FastClock

SIZE = 1 << 20
HERE, THERE = "file:///backups", "s3://bucket"


@pytest.fixture
def clock() -> FastClock:
    return FastClock()


@pytest.fixture
def positions(clock: FastClock) -> Positions:
    made = Positions([HERE, THERE], streams=False, clock=clock)
    made.segment_size = SIZE
    return made


def segment(number: int) -> WalFile:
    return WalFile.segment(1, number * SIZE, SIZE)


async def test_a_service_that_knows_nothing_is_behind_since_its_start(positions: Positions, clock: FastClock) -> None:
    await clock.sleep(40)
    assert positions.lag_seconds(HERE) == 40
    assert math.isnan(positions.lag_bytes(HERE))
    assert math.isnan(positions.pending(HERE))
    assert math.isnan(positions.durable(HERE))


async def test_an_idle_database_is_not_behind(positions: Positions, clock: FastClock) -> None:
    """Also where PostgreSQL has written what does not matter behind the last switch."""
    positions.reached(HERE, Lsn(5 * SIZE))
    for _ in range(50):
        await clock.sleep(15)
        positions.server_at(Lsn(5 * SIZE), archive_timeout=60)
        assert (positions.lag_seconds(HERE), positions.lag_bytes(HERE), positions.pending(HERE)) == (0, 0, 0)
    grown = []
    for _ in range(50):
        await clock.sleep(15)
        positions.server_at(Lsn(5 * SIZE + 200), archive_timeout=60)
        grown.append(positions.lag_seconds(HERE))
    assert grown[0] == 15, "it may have been written right behind the look before"
    assert max(grown) == 180
    assert grown[-1] == 0


async def test_without_archive_timeout_the_open_segment_stays_at_risk(positions: Positions, clock: FastClock) -> None:
    positions.reached(HERE, Lsn(5 * SIZE))
    positions.server_at(Lsn(5 * SIZE + 200), archive_timeout=0)
    for _ in range(1000):
        await clock.sleep(15)
        positions.server_at(Lsn(5 * SIZE + 200), archive_timeout=0)
    assert positions.lag_seconds(HERE) == 15_000


async def test_a_stalled_archive_is_behind_more_and_more(positions: Positions, clock: FastClock) -> None:
    for name in (HERE, THERE):
        positions.reached(name, Lsn(5 * SIZE))
    for number in range(5, 25):
        positions.server_at(Lsn(number * SIZE), archive_timeout=60)
        if number < 15:
            positions.stored(HERE, segment(number - 1))
        await clock.sleep(60)
    assert (positions.pending(HERE), positions.pending(THERE)) == (10, 19)
    assert positions.lag_seconds(THERE) == 20 * 60
    assert positions.lag_seconds(HERE) == 11 * 60
    for number in range(13, 24):
        positions.stored(HERE, segment(number))
    positions.server_at(Lsn(24 * SIZE), archive_timeout=60)
    assert positions.lag_seconds(HERE) == 0
    assert positions.lag_seconds(THERE) == 20 * 60, "what one has is no consolation to the other"


def test_segments_that_come_out_of_order_count_once_the_one_between_is_there(positions: Positions) -> None:
    positions.reached(HERE, Lsn(5 * SIZE + 100))
    positions.stored(HERE, segment(6))
    assert positions.durable(HERE) == 5 * SIZE + 100
    positions.stored(HERE, segment(5))
    assert positions.durable(HERE) == 7 * SIZE


async def test_a_server_that_cannot_be_asked_leaves_the_age_of_the_spool(
    positions: Positions, clock: FastClock
) -> None:
    positions.reached(HERE, Lsn(5 * SIZE))
    positions.spool_waits(33)
    assert positions.lag_seconds(HERE) == 33
    positions.spool_waits(0)
    assert positions.lag_seconds(HERE) == 0
    positions.server_at(Lsn(5 * SIZE), archive_timeout=60)
    await clock.sleep(500)
    assert positions.lag_seconds(HERE) == 500, "nobody knows what it has written since"


async def test_a_long_outage_does_not_fill_the_memory_and_keeps_its_age(positions: Positions, clock: FastClock) -> None:
    positions.reached(HERE, Lsn(0))
    for number in range(20_000):
        positions.server_at(Lsn(number * SIZE), archive_timeout=60)
        await clock.sleep(15)
    assert positions.lag_seconds(HERE) == 20_000 * 15
    assert len(positions._seen) < 5_000


def test_a_server_that_went_back_starts_the_count_anew(positions: Positions) -> None:
    positions.reached(HERE, Lsn(5 * SIZE))
    positions.server_at(Lsn(9 * SIZE), archive_timeout=60)
    positions.server_at(Lsn(4 * SIZE), archive_timeout=60)
    assert (positions.lag_seconds(HERE), positions.lag_bytes(HERE), positions.pending(HERE)) == (0, 0, 0)
