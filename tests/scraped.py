"""Metrics of a service with two destinations, and what they tell, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra.monitoring.metrics import Metrics
from infra.monitoring.missing import Missing
from infra.monitoring.readings import BackupReading, RepositoryReading
from pipeline.events import (
    GapOpened,
    ObjectStored,
    StreamLost,
    StreamStarted,
    WalMoved,
)
from pipeline.wal import Lsn, WalFile
from tests.clock import FastClock

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
