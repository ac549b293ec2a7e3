"""What Prometheus is told: every series from the start, and what uploads, tails and stages come to."""

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
)
from pipeline.wal import WalFile
from tests.clock import FastClock
from tests.scraped import (
    FAR,
    NEAR,
    TAIL,
    clock,
    metrics,
    read,
    stored,
)

__all__ = ["clock", "metrics"]

_DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


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


def test_the_stages_are_timed(metrics: Metrics) -> None:
    metrics.stage_done("encrypt", 0.25)
    metrics.stage_done("encrypt", 0.5)
    page = read(metrics)
    sums = [page["stage_duration_seconds_sum", stage] for stage in ("compress", "encrypt", "checksum")]
    assert sums == [0, 0.75, 0]
    assert page["stage_duration_seconds_count", "encrypt"] == 2


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
