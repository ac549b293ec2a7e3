"""What is read again and again: what it told stays, and that it failed is told; what will be full."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from infra.monitoring.metrics import Metrics
from infra.monitoring.readings import ServerReading, SlotReading, SpoolReading
from pipeline.events import (
    BackupReady,
    EventFailed,
)
from pipeline.wal import Lsn
from tests.clock import FastClock
from tests.scraped import (
    FAR,
    NEAR,
    clock,
    listed,
    metrics,
    read,
)

__all__ = ["clock", "metrics"]


async def test_a_reading_that_fails_is_a_metric_and_what_it_told_stays(metrics: Metrics, clock: FastClock) -> None:
    metrics.repository_read(FAR, listed())
    then = clock.now().timestamp()
    await clock.sleep(100)
    metrics.readings.failed("repository", FAR)
    page = read(metrics)
    assert (page["reading_up", FAR, "repository"], page["reading_failures_total", FAR, "repository"]) == (0, 1)
    assert page["reading_timestamp_seconds", FAR, "repository"] == then
    assert page["last_backup_success_timestamp_seconds", FAR] == 1000
    assert (page["backup_duration_seconds", FAR], page["backup_size_bytes", FAR], page["backups", FAR]) == (60, 500, 3)
    assert page["first_recoverable_timestamp_seconds", FAR] == 900
    metrics.repository_read(FAR, listed(backup=False))
    page = read(metrics)
    assert (page["reading_up", FAR, "repository"], page["reading_failures_total", FAR, "repository"]) == (1, 1)
    assert page["last_backup_success_timestamp_seconds", FAR] == 0, "none at all is older than any"


def test_the_last_recoverable_moment_is_a_transaction_or_the_end_of_the_backup(metrics: Metrics) -> None:
    for moment, expected in ((2000.0, 2000), (None, 1000), (500.0, 1000)):
        metrics.repository_read(FAR, listed())
        metrics.readings.last_commit_read(FAR, moment)
        assert read(metrics)["last_recoverable_timestamp_seconds", FAR] == expected


def test_a_backup_that_was_given_up_is_told_by_notice_and_by_what_it_left(metrics: Metrics, clock: FastClock) -> None:
    metrics.repository_read(FAR, replace(listed(), abandoned=1234.0))
    page = read(metrics)
    assert page["last_backup_failure_timestamp_seconds", FAR] == 1234
    assert page["last_backup_failure_timestamp_seconds", NEAR] == 0
    metrics.notify(EventFailed(BackupReady("watch", "/spool/base"), "it is cut", ""))
    assert read(metrics)["last_backup_failure_timestamp_seconds", NEAR] == clock.now().timestamp()


def test_operations_are_as_their_records_say_and_unknown_before(metrics: Metrics) -> None:
    page = read(metrics)
    assert math.isnan(page["last_verify_success_timestamp_seconds",])
    assert math.isnan(page["reading_up", "", "verify"])
    metrics.readings.failed("verify")
    metrics.readings.operation_read("drill", success=5000, failure=4000, rto_seconds=12, rpo_seconds=0.5)
    page = read(metrics)
    assert (page["last_drill_success_timestamp_seconds",], page["last_drill_failure_timestamp_seconds",]) == (5e3, 4e3)
    assert (page["last_drill_rto_seconds",], page["last_drill_rpo_seconds",]) == (12, 0.5)
    assert (page["reading_up", "", "drill"], page["reading_up", "", "verify"]) == (1, 0)


async def test_what_will_be_full_is_forecast_at_the_present_pace(metrics: Metrics, clock: FastClock) -> None:
    def server(safe: int | None, free: int | None) -> ServerReading:
        return ServerReading(Lsn(5000), 60, SlotReading(active=True, retained=700, safe=safe), free)

    metrics.server_read(server(10_000, 4_000))
    assert math.isnan(read(metrics)["full_seconds", "slot"])
    await clock.sleep(10)
    metrics.server_read(server(9_000, 4_000))
    page = read(metrics)
    assert (page["full_seconds", "slot"], page["full_seconds", "wal_volume"]) == (90, math.inf)
    assert (page["slot_active",], page["slot_retained_bytes",], page["slot_safe_bytes",]) == (1, 700, 9000)
    assert page["wal_volume_free_bytes",] == 4000
    metrics.server_read(server(None, None))
    page = read(metrics)
    assert math.isnan(page["full_seconds", "slot"])
    assert math.isnan(page["full_seconds", "wal_volume"])
    metrics.readings.failed("server")
    assert math.isnan(read(metrics)["slot_active",]), "a slot that nobody sees is not active"


async def test_the_pace_is_that_of_the_last_ten_minutes(metrics: Metrics, clock: FastClock) -> None:
    def look(free: int) -> float:
        metrics.spool_read(SpoolReading(files=0, bytes=0, free=free, volume=100_000, oldest=0, refused=0))
        return read(metrics)["full_seconds", "spool"]

    look(50_000)
    for number in range(1, 61):
        await clock.sleep(10)
        left = look(50_000 - 100 * number)
    assert left == pytest.approx(4_400)
    for _ in range(61):
        await clock.sleep(10)
        left = look(44_000)
    assert left == math.inf
    assert look(0) == 0
