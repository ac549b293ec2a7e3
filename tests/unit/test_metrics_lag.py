"""Lags that grow while nothing happens, gaps, and destinations that are away."""

from __future__ import annotations

import math

from infra.monitoring.metrics import Metrics
from infra.monitoring.missing import Missing
from pipeline.catalog import wal_key
from pipeline.events import (
    DestinationCaughtUp,
    DestinationFailed,
    GapClosed,
    SyncDegraded,
    SyncRestored,
)
from tests.clock import FastClock
from tests.scraped import (
    FAR,
    LOST,
    NEAR,
    SIZE,
    STARTED,
    TAIL,
    clock,
    gap,
    gaps,
    listed,
    metrics,
    moved,
    read,
    segment,
    stored,
)

__all__ = ["clock", "metrics"]


def test_positions_and_lag_are_what_the_stream_told(metrics: Metrics) -> None:
    metrics.notify(STARTED)
    metrics.notify(moved(5000, near=5000, far=3000, age=2.5))
    page = read(metrics)
    assert page["stream_connected",] == 1
    assert page["wal_current_lsn_bytes",] == 5000
    assert (page["wal_durable_lsn_bytes", NEAR], page["wal_durable_lsn_bytes", FAR]) == (5000, 3000)
    assert (page["wal_lag_bytes", NEAR], page["wal_lag_bytes", FAR]) == (0, 2000)
    assert (page["wal_lag_seconds", NEAR], page["wal_lag_seconds", FAR]) == (0, 2.5)


async def test_a_lag_grows_while_the_stream_is_silent(metrics: Metrics, clock: FastClock) -> None:
    metrics.notify(STARTED)
    metrics.notify(moved(5000, near=5000, far=3000, age=2.5))
    await clock.sleep(60)
    page = read(metrics)
    assert (page["wal_lag_seconds", NEAR], page["wal_lag_seconds", FAR]) == (0, 62.5)
    metrics.notify(moved(5000, near=5000, far=5000))
    await clock.sleep(60)
    assert read(metrics)["wal_lag_seconds", FAR] == 0


async def test_bytes_that_have_not_even_arrived_are_outstanding(metrics: Metrics, clock: FastClock) -> None:
    metrics.notify(STARTED)
    metrics.notify(moved(5000, near=4000, far=5000))
    await clock.sleep(7)
    page = read(metrics)
    assert (page["wal_lag_seconds", NEAR], page["wal_lag_seconds", FAR]) == (7, 0)


async def test_a_lost_stream_is_not_lag_zero(metrics: Metrics, clock: FastClock) -> None:
    """Nobody knows what the server has written since; that it answers again does not tell yet."""
    metrics.notify(STARTED)
    metrics.notify(moved(5000, near=5000, far=5000))
    await clock.sleep(1)
    metrics.notify(LOST)
    await clock.sleep(10)
    page = read(metrics)
    assert page["stream_connected",] == 0
    assert page["wal_lag_seconds", NEAR] == page["wal_lag_seconds", FAR] == 11
    metrics.notify(STARTED)
    page = read(metrics)
    assert (page["stream_connected",], page["wal_lag_seconds", NEAR]) == (1, 11)
    metrics.notify(moved(5000, near=5000, far=5000))
    assert read(metrics)["wal_lag_seconds", NEAR] == 0


async def test_what_is_told_of_uploads_is_no_word_from_the_server(metrics: Metrics, clock: FastClock) -> None:
    """Positions are told each second, connected or not: what was received goes on to be stored."""
    metrics.notify(STARTED)
    metrics.notify(moved(5000, near=5000, far=4000, age=1.0))
    metrics.notify(LOST)
    for _ in range(30):
        await clock.sleep(1)
        metrics.notify(moved(5000, near=5000, far=5000))
    page = read(metrics)
    assert page["stream_connected",] == 0
    assert page["wal_lag_seconds", NEAR] == page["wal_lag_seconds", FAR] == 30
    metrics.notify(moved(5000, near=5000, far=4000, age=45.0))
    assert read(metrics)["wal_lag_seconds", FAR] == 45, "what arrived before and is not stored may be older"
    metrics.notify(STARTED)
    metrics.notify(moved(5000, near=5000, far=5000))
    assert read(metrics)["wal_lag_seconds", FAR] == 0


async def test_a_server_that_never_answered_is_not_lag_zero(metrics: Metrics, clock: FastClock) -> None:
    await clock.sleep(5)
    metrics.notify(LOST)
    await clock.sleep(30)
    metrics.notify(LOST)
    page = read(metrics)
    assert page["wal_lag_seconds", NEAR] == page["wal_lag_seconds", FAR] == 35, "since the service began"
    assert math.isnan(page["wal_lag_bytes", NEAR])


async def test_a_service_that_waits_for_its_store_is_not_lag_zero(metrics: Metrics, clock: FastClock) -> None:
    """Its stream was ended without a word."""
    metrics.notify(STARTED)
    metrics.notify(moved(5000, near=5000, far=5000))
    metrics.closed()
    await clock.sleep(10)
    page = read(metrics)
    assert (page["stream_connected",], page["wal_lag_seconds", NEAR]) == (0, 10)


def test_a_server_that_went_back_is_no_negative_lag(metrics: Metrics) -> None:
    metrics.notify(moved(3000, near=5000, far=5000))
    assert read(metrics)["wal_lag_bytes", NEAR] == 0


def test_gaps_are_segments_and_are_counted_once(metrics: Metrics) -> None:
    """Across a 4 GiB boundary, told twice, and on two timelines."""
    metrics.notify(gap(4094, 4097))
    metrics.notify(gap(4094, 4097))
    metrics.notify(gap(4097, 4099))
    metrics.notify(gap(4096, 4096, timeline=2))
    assert gaps(metrics) == (7, 0)
    for _ in range(2):  # once for each destination
        metrics.notify(GapClosed(segment(4096)))
    assert gaps(metrics) == (6, 0)
    metrics.notify(gap(4094, 4096))
    assert gaps(metrics) == (7, 0)
    for number in range(4000, 4200):
        metrics.notify(GapClosed(segment(number)))
    assert gaps(metrics) == (1, 0)
    metrics.repository_read(FAR, listed())
    metrics.notify(GapClosed(segment(4096, timeline=2)))
    assert gaps(metrics) == (0, 0)


def test_gaps_are_those_of_the_listing_as_well_and_a_backup_behind_them_makes_them_old(metrics: Metrics) -> None:
    metrics.notify(gap(10, 12))
    missing = Missing()
    missing.add(12, 14)
    metrics.repository_read(FAR, listed(missing={1: missing}))
    assert gaps(metrics) == (4, 0)
    assert (read(metrics)["wal_gaps", NEAR, "current"], read(metrics)["wal_gaps", NEAR, "old"]) == (3, 0)
    metrics.notify(stored(wal_key(segment(13))))
    assert gaps(metrics) == (3, 0), "what is stored again is missing no more, before the next listing"
    missing = Missing()
    missing.add(12, 14)
    metrics.repository_read(FAR, listed(missing={1: missing}, start=13))
    assert gaps(metrics) == (1, 3)


def test_a_destination_is_up_while_it_takes_what_it_is_given_and_can_be_listed(metrics: Metrics) -> None:
    def is_up() -> float:
        return read(metrics)["destination_up", FAR]

    metrics.repository_read(FAR, listed())
    assert is_up() == 1
    metrics.notify(DestinationFailed(FAR, TAIL, "503", ""))
    metrics.repository_read(FAR, listed())
    assert is_up() == 0, "a full disk can still be listed"
    metrics.notify(stored(TAIL))
    assert is_up() == 1
    metrics.notify(DestinationFailed(FAR, TAIL, "503", ""))
    metrics.notify(DestinationCaughtUp(FAR))
    assert is_up() == 1
    metrics.readings.failed("repository", FAR)
    assert is_up() == 0
    metrics.closed()
    assert math.isnan(is_up()), "another writer has the lease: that says nothing of the destination"
    metrics.closed(unreachable=True)
    assert (is_up(), read(metrics)["shipping",]) == (0, 0)
    metrics.opened(SIZE)
    assert read(metrics)["shipping",] == 1


def test_what_commits_no_longer_wait_for(metrics: Metrics) -> None:
    metrics.notify(SyncDegraded(FAR, "it is silent"))
    assert (read(metrics)["sync_degraded", FAR], read(metrics)["sync_degraded", NEAR]) == (1, 0)
    metrics.notify(SyncRestored(FAR))
    assert read(metrics)["sync_degraded", FAR] == 0
