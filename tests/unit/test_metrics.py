"""What Prometheus is told: lags that grow while nothing happens, gaps, and what uploads and tails come to."""

from __future__ import annotations

import math
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra.monitoring.metrics import KINDS, Metrics
from pipeline.events import (
    DestinationFailed,
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
        (sample.name.removeprefix("walship_"), *sample.labels.values()): sample.value
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


def test_every_series_is_there_from_the_start_and_what_is_unknown_is_not_zero(metrics: Metrics) -> None:
    page = read(metrics)
    for destination, required in ((NEAR, 1), (FAR, 0)):
        assert page["destination_required", destination] == required
        for name in ("wal_durable_lsn_bytes", "wal_lag_bytes", "wal_lag_seconds"):
            assert math.isnan(page[name, destination])
        for name in ("sync_degraded", "tail_puts_total", "tail_cost_dollars_per_day"):
            assert page[name, destination] == 0
        for kind in KINDS:
            for name in ("upload_attempts_total", "upload_errors_total", "upload_bytes_total"):
                assert page[name, destination, kind] == 0
            assert page["upload_duration_seconds_count", destination, kind] == 0
    assert math.isnan(page["wal_current_lsn_bytes",])
    assert page["wal_gaps",] == page["stream_connected",] == 0
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


async def test_a_server_that_never_answered_is_not_lag_zero(metrics: Metrics, clock: FastClock) -> None:
    await clock.sleep(5)
    metrics.notify(LOST)
    await clock.sleep(30)
    metrics.notify(LOST)
    page = read(metrics)
    assert page["wal_lag_seconds", NEAR] == page["wal_lag_seconds", FAR] == 30
    assert math.isnan(page["wal_lag_bytes", NEAR])


async def test_a_service_that_waits_for_its_store_is_not_lag_zero(metrics: Metrics, clock: FastClock) -> None:
    """Its stream was ended without a word."""
    metrics.notify(STARTED)
    metrics.notify(moved(5000, near=5000, far=5000))
    metrics.closed()
    await clock.sleep(10)
    page = read(metrics)
    assert (page["stream_connected",], page["wal_lag_seconds", NEAR]) == (0, 10)


def test_without_a_stream_there_is_no_lag_to_know(metrics: Metrics) -> None:
    metrics.closed()
    assert math.isnan(read(metrics)["wal_lag_seconds", NEAR])


def test_a_server_that_went_back_is_no_negative_lag(metrics: Metrics) -> None:
    metrics.notify(moved(3000, near=5000, far=5000))
    assert read(metrics)["wal_lag_bytes", NEAR] == 0


def test_gaps_are_segments_and_are_counted_once(metrics: Metrics) -> None:
    """Across a 4 GiB boundary, told twice, and on two timelines."""
    metrics.notify(gap(4094, 4097))
    metrics.notify(gap(4094, 4097))
    metrics.notify(gap(4097, 4099))
    metrics.notify(gap(4096, 4096, timeline=2))
    assert read(metrics)["wal_gaps",] == 7
    for _ in range(2):  # once for each destination
        metrics.notify(GapClosed(segment(4096)))
    assert read(metrics)["wal_gaps",] == 6
    metrics.notify(gap(4094, 4096))
    assert read(metrics)["wal_gaps",] == 7
    for number in range(4000, 4200):
        metrics.notify(GapClosed(segment(number)))
    assert read(metrics)["wal_gaps",] == 1
    metrics.notify(GapClosed(segment(4096, timeline=2)))
    assert read(metrics)["wal_gaps",] == 0


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
            assert labels <= {"destination", "kind", "le"}
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
