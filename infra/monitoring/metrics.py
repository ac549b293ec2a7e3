"""What Prometheus sees: a listener that keeps numbers, and makes samples of them when it is asked.

    pipeline ── notices ──> Metrics.notify        numbers only: nothing here can fail or wait
    Prometheus ── GET ────> Metrics.page          samples, as of this moment

Samples are made at the scrape and not at the notice, because the most important ones change while nothing happens: a
lag grows as long as nobody says that the bytes are safe. What is not known is NaN and never 0, and every series is
there from the start. ``docs/metrics.md`` says what each one means.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

from infra.monitoring.missing import Missing
from pipeline.contracts import Clock
from pipeline.events import (
    DestinationFailed,
    FileSetAside,
    GapClosed,
    GapOpened,
    Notice,
    ObjectStored,
    StreamLost,
    StreamStarted,
    SyncDegraded,
    SyncRestored,
    WalMoved,
)
from pipeline.wal import Lsn

if TYPE_CHECKING:  # only the service pays for loading it
    from prometheus_client.core import Metric

#: Kinds of objects, by the folder that they are in; ``other`` are keys and repository.json.
KINDS = ("tail", "wal", "base", "other")

#: Upper ends in seconds of the histogram of upload times: from a local disk to a store that has to be tried again.
BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

_HOUR, _DAY = 3600.0, 86400.0


@dataclass(slots=True)
class _Uploads:
    """Objects of one kind at one destination."""

    stored: int = 0
    failed: int = 0
    #: Bytes as stored.
    size: int = 0
    #: Seconds in all, and how many uploads fell between two ends of BUCKETS (the last: beyond them).
    seconds: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))


@dataclass(slots=True)
class _Destination:
    required: bool
    uploads: dict[str, _Uploads] = field(default_factory=lambda: {kind: _Uploads() for kind in KINDS})
    #: Tails of the last hour: (minute, how many).
    tails: deque[tuple[int, int]] = field(default_factory=deque)
    degraded: bool = False
    durable: Lsn | None = None
    #: Age in seconds of the oldest byte that it lacked when the stream last told, and when that was.
    age: float = 0.0
    told: float = 0.0


class Metrics:
    """All that is measured in one service. Notices come in the service's loop, and pages are made there."""

    def __init__(self, destinations: Mapping[str, bool], *, put_price: float, clock: Clock) -> None:
        """``destinations``: name → whether it is required; ``put_price``: of 1,000 PUT requests, in dollars."""
        from prometheus_client import CollectorRegistry, ProcessCollector

        self._destinations = {name: _Destination(required) for name, required in destinations.items()}
        self._put_price = put_price
        self._clock = clock
        self._began = clock.monotonic()
        #: Since when a server's WAL is asked for: before, nothing is known and nothing is late.
        self._streaming: float | None = None
        self._connected = False
        #: The stream was lost, and has not told since where the server is.
        self._in_the_dark = False
        self._current: Lsn | None = None
        #: PostgreSQL's default, until ``opened`` says it.
        self._segment_size = 16 << 20
        self._missing: dict[int, Missing] = defaultdict(Missing)
        self._set_aside = 0
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def opened(self, segment_size: int) -> None:
        """The repository is open; its segments have so many bytes, without which a gap cannot be counted."""
        self._segment_size = segment_size

    def closed(self) -> None:
        """The repository is closed, and nobody streams until it is opened again: a lag of 0 is no longer known."""
        self._connected = False
        self._in_the_dark = True

    def page(self, accept: str = "") -> tuple[bytes, str]:
        """The samples of this moment as text, and its content type. ``accept``: that header of the request."""
        from prometheus_client.exposition import choose_encoder

        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def notify(self, notice: Notice) -> None:
        """A listener of the pipeline. What is not counted passes by."""
        match notice:
            case ObjectStored():
                self._count_stored(notice)
            case DestinationFailed():
                self._of(notice.destination).uploads[_kind(notice.name)].failed += 1
            case SyncDegraded() | SyncRestored():
                self._of(notice.destination).degraded = isinstance(notice, SyncDegraded)
            case GapOpened() | GapClosed():
                self._count_gap(notice)
            case WalMoved() | StreamStarted() | StreamLost():
                self._follow(notice)
            case FileSetAside():
                self._set_aside += 1
            case _:
                pass

    def _of(self, name: str) -> _Destination:
        return self._destinations.setdefault(name, _Destination(required=False))

    def _count_stored(self, notice: ObjectStored) -> None:
        destination, kind = self._of(notice.destination), _kind(notice.name)
        uploads = destination.uploads[kind]
        uploads.stored += 1
        uploads.size += notice.size
        uploads.seconds += notice.seconds
        uploads.counts[bisect_left(BUCKETS, notice.seconds)] += 1
        if kind == "tail":
            minute, tails = int(self._clock.monotonic() // 60), destination.tails
            count = tails.pop()[1] if tails and tails[-1][0] == minute else 0
            tails.append((minute, count + 1))
            while tails[0][0] <= minute - 60:
                tails.popleft()

    def _count_gap(self, notice: GapOpened | GapClosed) -> None:
        size = self._segment_size
        if isinstance(notice, GapOpened):
            self._missing[notice.timeline].add(notice.first.start(size) // size, notice.last.end(size) // size)
        else:
            self._missing[notice.file.timeline].remove(notice.file.start(size) // size)

    def _follow(self, notice: WalMoved | StreamStarted | StreamLost) -> None:
        now = self._clock.monotonic()
        if self._streaming is None:
            self._streaming = now
        self._connected = not isinstance(notice, StreamLost)
        if isinstance(notice, StreamLost):
            self._in_the_dark = True
        elif isinstance(notice, WalMoved):
            self._in_the_dark = False
            self._current = notice.current
            for name, durable in notice.durable.items():
                destination = self._of(name)
                destination.durable = durable
                destination.age, destination.told = notice.age.get(name, 0.0), now

    def _lag_bytes(self, destination: _Destination) -> float:
        if self._current is None or destination.durable is None:
            return math.nan
        return max(0, self._current - destination.durable)

    def _lag_seconds(self, destination: _Destination, now: float) -> float:
        """0 only while the stream is up and told that nothing is outstanding; else it grows until it tells again."""
        if self._streaming is None:
            return math.nan
        if self._current is None or destination.durable is None:
            return now - self._streaming
        if self._in_the_dark or destination.age > 0 or destination.durable < self._current:
            return destination.age + now - destination.told
        return 0.0

    def _tail_cost(self, name: str, destination: _Destination, now: float) -> float:
        """Dollars a day at the pace of the last hour; a folder of this machine takes no money for a PUT."""
        if name.startswith("file://"):
            return 0.0
        puts = sum(count for minute, count in destination.tails if minute > now // 60 - 60)
        span = min(_HOUR, max(60.0, now - self._began))
        return puts / span * _DAY * self._put_price / 1000

    def collect(self) -> Iterator[Metric]:
        """The samples of this moment. A ``prometheus_client.registry.Collector``."""
        yield from self._collect_stream()
        yield from self._collect_destinations()
        yield from self._collect_uploads()

    def _collect_stream(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        yield InfoMetricFamily("walship_build", "What runs here.", {"version": version("walship")})
        yield GaugeMetricFamily(
            "walship_stream_connected", "1 while WAL is streamed from a server.", float(self._connected)
        )
        yield GaugeMetricFamily(
            "walship_wal_current_lsn_bytes",
            "End of the server's WAL when it last told.",
            math.nan if self._current is None else self._current,
        )
        yield GaugeMetricFamily(
            "walship_wal_gaps",
            "WAL segments that the server no longer has and that were never stored, as found since the start.",
            sum(map(len, self._missing.values())),
        )
        yield CounterMetricFamily(
            "walship_files_set_aside",
            "Archived histories and the like whose names were taken by other bytes.",
            self._set_aside,
        )

    def _collect_destinations(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        now = self._clock.monotonic()
        required = GaugeMetricFamily(
            "walship_destination_required", "1 if WAL is acknowledged only once it is there.", labels=["destination"]
        )
        durable = GaugeMetricFamily(
            "walship_wal_durable_lsn_bytes", "Up to where the destination has all WAL.", labels=["destination"]
        )
        lag_bytes = GaugeMetricFamily(
            "walship_wal_lag_bytes", "WAL of the server that the destination lacks.", labels=["destination"]
        )
        lag_seconds = GaugeMetricFamily(
            "walship_wal_lag_seconds",
            "Age of the oldest byte that the destination lacks, or may lack while the stream is lost; 0 when none.",
            labels=["destination"],
        )
        degraded = GaugeMetricFamily(
            "walship_sync_degraded", "1 while commits no longer wait for the destination.", labels=["destination"]
        )
        puts = CounterMetricFamily("walship_tail_puts", "Tails stored.", labels=["destination"])
        cost = GaugeMetricFamily(
            "walship_tail_cost_dollars_per_day",
            "What the PUT requests of tails cost at the pace of the last hour.",
            labels=["destination"],
        )
        for name, each in self._destinations.items():
            required.add_metric([name], each.required)
            durable.add_metric([name], math.nan if each.durable is None else each.durable)
            lag_bytes.add_metric([name], self._lag_bytes(each))
            lag_seconds.add_metric([name], self._lag_seconds(each, now))
            degraded.add_metric([name], each.degraded)
            puts.add_metric([name], each.uploads["tail"].stored)
            cost.add_metric([name], self._tail_cost(name, each, now))
        yield from (required, durable, lag_bytes, lag_seconds, degraded, puts, cost)

    def _collect_uploads(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        labels = ["destination", "kind"]
        attempts = CounterMetricFamily(
            "walship_upload_attempts", "Objects that a destination was given, or refused.", labels=labels
        )
        errors = CounterMetricFamily(
            "walship_upload_errors", "Objects that a destination did not take, after all retries.", labels=labels
        )
        sizes = CounterMetricFamily("walship_upload_bytes", "Bytes stored, as stored.", labels=labels)
        durations = HistogramMetricFamily(
            "walship_upload_duration_seconds", "From the first attempt to the confirmation.", labels=labels
        )
        for name, destination in self._destinations.items():
            for kind, uploads in destination.uploads.items():
                attempts.add_metric([name, kind], uploads.stored + uploads.failed)
                errors.add_metric([name, kind], uploads.failed)
                sizes.add_metric([name, kind], uploads.size)
                durations.add_metric([name, kind], _buckets(uploads.counts), uploads.seconds)
        yield from (attempts, errors, sizes, durations)


def _kind(name: str) -> str:
    folder = name.partition("/")[0]
    return folder if folder in KINDS else "other"


def _buckets(counts: list[int]) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them."""
    total = 0
    buckets: list[tuple[str, float]] = []
    for end, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
        total += count
        buckets.append((end, total))
    return buckets
