"""What Prometheus is told: lags that grow while nothing happens, gaps, and what uploads and tails come to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra.monitoring.metrics import KINDS, Metrics
from infra.monitoring.missing import Missing
from infra.monitoring.readings import BackupReading, RepositoryReading, ServerReading, SlotReading, SpoolReading
from pipeline.catalog import wal_key
from pipeline.events import (
    BackupReady,
    DestinationCaughtUp,
    DestinationFailed,
    EventFailed,
    FileRefused,
    FileSetAside,
    GapClosed,
    GapOpened,
    ObjectStored,
    StreamLost,
    StreamStarted,
    SyncDegraded,
    SyncRestored,
    WalMoved,
)
from pipeline.wal import Lsn, WalFile
from tests.clock import FastClock

_DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
SIZE = 1 << 20
NEAR, FAR = "file:///backups", "s3://bucket/prefix"
TAIL = "tail/000000010000000000000003/1-00000000-00000100"
STARTED = StreamStarted("127.0.0.1:5432", 1, Lsn(0), synchronous=False)
LOST = StreamLost("the server has gone", "", 1.0)


@pytest.fixture
def clock() -> FastClock:
    return FastClock()


@pytest.fixture
def metrics(clock: FastClock) -> Metrics:
    made = Metrics({NEAR: True, FAR: False}, put_price=0.005, clock=clock)
    made.opened(SIZE)
    return made


def read(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Name and label values of each sample → its value, as Prometheus reads the page."""
    families = text_string_to_metric_families(metrics.page()[0].decode())
    return {
        (sample.name.removeprefix("walship_"), *(sample.labels[k] for k in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }


def moved(current: int, *, near: int, far: int, age: float = 0.0) -> WalMoved:
    ages = {NEAR: 0.0, FAR: age}
    return WalMoved(1, Lsn(current), Lsn(current), Lsn(near), {NEAR: Lsn(near), FAR: Lsn(far)}, ages)


def stored(name: str, *, destination: str = FAR, size: int = 100, seconds: float = 0.03) -> ObjectStored:
    return ObjectStored(destination, name, size, seconds)


def segment(number: int, timeline: int = 1) -> WalFile:
    return WalFile.segment(timeline, number * SIZE, SIZE)


def gap(first: int, last: int, timeline: int = 1) -> GapOpened:
    return GapOpened(timeline, segment(first, timeline), segment(last, timeline), "take a base backup")


def gaps(metrics: Metrics) -> tuple[float, float]:
    page = read(metrics)
    return page["wal_gaps", FAR, "current"], page["wal_gaps", FAR, "old"]


def listed(*, missing: Mapping[int, Missing] | None = None, start: int = 0, backup: bool = True) -> RepositoryReading:
    newest = BackupReading(stopped=1000, seconds=60, size=500, start=start)
    return RepositoryReading(
        durable=Lsn(5000), missing=missing or {}, newest=newest if backup else None, backups=3, first=900, abandoned=0
    )


def test_every_series_is_there_from_the_start_and_what_is_unknown_is_not_zero(metrics: Metrics) -> None:
    page = read(metrics)
    for destination, required in ((NEAR, 1), (FAR, 0)):
        assert page["destination_required", destination] == required
        for name in (
            *("wal_durable_lsn_bytes", "wal_lag_bytes", "wal_segments_pending", "destination_up"),
            *("last_backup_success_timestamp_seconds", "first_recoverable_timestamp_seconds"),
        ):
            assert math.isnan(page[name, destination])
        for kind in ("current", "old"):
            assert math.isnan(page["wal_gaps", destination, kind])
        for name in ("sync_degraded", "tail_puts_total", "tail_cost_dollars_per_day"):
            assert page[name, destination] == 0
        for kind in KINDS:
            for name in ("upload_attempts_total", "upload_errors_total", "upload_bytes_total"):
                assert page[name, destination, kind] == 0
            assert page["upload_duration_seconds_count", destination, kind] == 0
    assert math.isnan(page["wal_current_lsn_bytes",])
    assert (page["shipping",], page["stream_connected",]) == (1, 0)
    for stage in ("compress", "encrypt", "checksum"):
        assert page["stage_duration_seconds_count", stage] == 0
    assert page["build_info", version("walship")] == 1


def test_the_page_tells_of_the_process_too(metrics: Metrics) -> None:
    assert read(metrics)["process_resident_memory_bytes",] > 1e6


def test_two_services_in_one_process_do_not_share_numbers(metrics: Metrics, clock: FastClock) -> None:
    other = Metrics({NEAR: True}, put_price=0.005, clock=clock)
    metrics.notify(stored("wal/x", destination=NEAR))
    assert read(other)["upload_attempts_total", NEAR, "wal"] == 0


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


def test_operations_without_records_are_unknown_and_that_is_told(metrics: Metrics) -> None:
    page = read(metrics)
    assert math.isnan(page["last_verify_success_timestamp_seconds",])
    assert page["reading_up", "", "verify"] == page["reading_up", "", "drill"] == 0
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


def test_the_stages_are_timed(metrics: Metrics) -> None:
    metrics.stage_done("encrypt", 0.25)
    metrics.stage_done("encrypt", 0.5)
    page = read(metrics)
    sums = [page["stage_duration_seconds_sum", stage] for stage in ("compress", "encrypt", "checksum")]
    assert sums == [0, 0.75, 0]
    assert page["stage_duration_seconds_count", "encrypt"] == 2


def test_what_commits_no_longer_wait_for(metrics: Metrics) -> None:
    metrics.notify(SyncDegraded(FAR, "it is silent"))
    assert (read(metrics)["sync_degraded", FAR], read(metrics)["sync_degraded", NEAR]) == (1, 0)
    metrics.notify(SyncRestored(FAR))
    assert read(metrics)["sync_degraded", FAR] == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (TAIL, "tail"),
        ("wal/0000000100000000/000000010000000000000003", "wal"),
        ("wal/00000002.history", "wal"),
        ("base/base_20260114_120000/backup_info", "base"),
        ("repository.json", "other"),
        ("keys/data-1", "other"),
    ],
)
def test_uploads_are_counted_by_kind(metrics: Metrics, name: str, kind: str) -> None:
    metrics.notify(stored(name, size=100, seconds=0.03))
    metrics.notify(stored(name, size=200, seconds=0.05))
    metrics.notify(stored(name, size=300, seconds=90))
    metrics.notify(DestinationFailed(FAR, name, "503", ""))
    page = read(metrics)
    assert page["upload_attempts_total", FAR, kind] == 4
    assert page["upload_errors_total", FAR, kind] == 1
    assert page["upload_bytes_total", FAR, kind] == 600
    assert page["upload_duration_seconds_sum", FAR, kind] == pytest.approx(90.08)
    buckets = [page["upload_duration_seconds_bucket", FAR, kind, end] for end in ("0.02", "0.05", "60.0", "+Inf")]
    assert buckets == [0, 2, 2, 3]
    assert page["upload_duration_seconds_count", FAR, kind] == 3
    assert sum(value for key, value in page.items() if key[0] == "upload_attempts_total") == 4


async def test_the_cost_of_tails_is_that_of_the_last_hour(metrics: Metrics, clock: FastClock) -> None:
    """One a second is 86,400 a day: 0.43 dollars at 0.005 for a thousand. A local folder costs nothing."""
    for _ in range(600):
        await clock.sleep(1)
        metrics.notify(stored(TAIL))
        metrics.notify(stored(TAIL, destination=NEAR))
    page = read(metrics)
    assert (page["tail_puts_total", FAR], page["tail_puts_total", NEAR]) == (600, 600)
    assert page["tail_cost_dollars_per_day", FAR] == pytest.approx(0.432)
    assert page["tail_cost_dollars_per_day", NEAR] == 0
    await clock.sleep(2000)
    assert read(metrics)["tail_cost_dollars_per_day", FAR] == pytest.approx(0.432 * 600 / 2600)
    await clock.sleep(1600)
    assert read(metrics)["tail_cost_dollars_per_day", FAR] == 0
    metrics.notify(stored(TAIL))
    assert read(metrics)["tail_cost_dollars_per_day", FAR] == pytest.approx(86400 / 3600 * 0.005 / 1000)


def test_the_first_tail_is_no_fortune(metrics: Metrics) -> None:
    metrics.notify(stored(TAIL))
    assert read(metrics)["tail_cost_dollars_per_day", FAR] == pytest.approx(86400 / 60 * 0.005 / 1000)


def test_files_that_were_set_aside_are_counted(metrics: Metrics) -> None:
    assert b"\nwalship_files_set_aside_total 0.0\n" in metrics.page()[0]
    metrics.notify(FileSetAside(WalFile.history(2), "conflict/00000002.history.0", "other bytes", ""))
    assert b"\nwalship_files_set_aside_total 1.0\n" in metrics.page()[0]


def test_what_is_not_counted_passes_by(metrics: Metrics) -> None:
    def ours() -> list[bytes]:
        return [line for line in metrics.page()[0].splitlines() if line.startswith(b"walship_")]

    before = ours()
    metrics.notify(FileRefused("/spool/x", "it is no segment", ""))
    assert ours() == before


def test_names_keep_the_rules_of_prometheus(metrics: Metrics) -> None:
    families = list(text_string_to_metric_families(metrics.page()[0].decode()))
    for family in families:
        assert family.documentation
        labels = {label for sample in family.samples for label in sample.labels}
        if family.name.startswith("walship_") and family.name != "walship_build_info":
            assert labels <= {"destination", "timeline", "stage", "kind", "le"}
    assert not [family.name for family in families if family.name.endswith("_created")]


def test_the_table_in_the_docs_has_every_metric_with_its_labels(metrics: Metrics) -> None:
    table = re.findall(r"^\| `(walship_\w+)` \| ([a-z, ]*)\|", _DOCS.read_text("utf-8"), re.MULTILINE)
    families = text_string_to_metric_families(metrics.page()[0].decode())
    ours = {
        family.name + ("_total" if family.type == "counter" else ""): {
            label for sample in family.samples for label in sample.labels if label != "le"
        }
        for family in families
        if family.name.startswith("walship_")
    }
    assert {name: set(labels.replace(",", " ").split()) for name, labels in table} == ours
