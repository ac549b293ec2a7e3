"""What Prometheus sees: a listener that keeps numbers, and makes samples of them when it is asked.

    pipeline ── notices ──> Metrics.notify        numbers only: nothing here can fail or wait
    survey ──── readings ─> Metrics.readings      what nobody tells: the repository, the server, the spool
    Prometheus ── GET ────> Metrics.page          samples, as of this moment

Samples are made at the scrape and not at the notice, because the most important ones change while nothing happens: a
lag grows as long as nobody says that the bytes are safe. What is not known is NaN and never 0, and every series is
there from the start. ``docs/metrics.md`` says what each one means.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

from infra.monitoring.missing import Missing
from infra.monitoring.positions import Positions
from infra.monitoring.readings import Readings, RepositoryReading, ServerReading, SpoolReading
from infra.monitoring.stages import STAGES
from pipeline.catalog import parse_wal_key
from pipeline.contracts import Clock
from pipeline.events import (
    BackupReady,
    DestinationCaughtUp,
    DestinationFailed,
    EventFailed,
    FileSetAside,
    GapClosed,
    GapOpened,
    Notice,
    ObjectStored,
    OperationEnded,
    StreamLost,
    StreamStarted,
    SyncDegraded,
    SyncRestored,
    WalMoved,
)
from pipeline.wal import WalKind

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
    #: It has confirmed or refused an object, whichever came last; None: neither yet.
    takes: bool | None = None
    #: timeline → segments that are missing there between stored ones, as its listing told.
    missing: dict[int, Missing] = field(default_factory=lambda: defaultdict(Missing))


class Metrics:
    """All that is measured in one service. Notices come in the service's loop, and pages are made there."""

    def __init__(
        self,
        destinations: Mapping[str, bool],
        *,
        put_price: float,
        clock: Clock,
        streams: bool = True,
        spool: bool = False,
    ) -> None:
        """``destinations``: name → whether it is required; ``put_price``: of 1,000 PUT requests, in dollars.

        ``streams``, ``spool``: where the WAL comes from.
        """
        from prometheus_client import CollectorRegistry, ProcessCollector

        self._destinations = {name: _Destination(required) for name, required in destinations.items()}
        self._put_price = put_price
        self._clock = clock
        self._began = clock.monotonic()
        self._shipping = self._unreachable = False
        self.positions = Positions(destinations, streams=streams, clock=clock)
        #: For what is read again and again; but what other numbers hang on comes in through the methods below.
        self.readings = Readings(destinations, spool=spool, clock=clock)
        #: timeline → segments that nobody ever stored, as the stream told.
        self._missing: dict[int, Missing] = defaultdict(Missing)
        self._set_aside = 0
        self._backup_failed = 0.0
        #: stage → objects, and the seconds they took. Written by worker threads, each under the lock.
        self._stages = dict.fromkeys(STAGES, (0, 0.0))
        self._lock = threading.Lock()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._registry.register(self.readings)
        ProcessCollector(registry=self._registry)

    def opened(self, segment_size: int) -> None:
        """The repository is open; its segments have so many bytes, without which a gap cannot be counted."""
        self._shipping, self._unreachable = True, False
        self.positions.segment_size = segment_size

    def closed(self, *, unreachable: bool = False) -> None:
        """The repository is closed, or cannot be opened: nobody ships, and a lag of 0 is no longer known.

        ``unreachable``: because no destination answers.
        """
        self._shipping, self._unreachable = False, unreachable
        self.positions.closed()
        for name in self._destinations:
            self.readings.failed("repository", name)

    def stage_done(self, stage: str, seconds: float) -> None:
        """An object has passed a stage. From any thread: an ``infra.monitoring.stages.Observe``."""
        with self._lock:
            count, before = self._stages[stage]
            self._stages[stage] = count + 1, before + seconds

    def server_read(self, reading: ServerReading) -> None:
        """The server has answered."""
        self.readings.server_read(reading)
        self.positions.server_at(reading.lsn, archive_timeout=reading.archive_timeout)

    def spool_read(self, reading: SpoolReading) -> None:
        """The spool was looked at."""
        self.readings.spool_read(reading)
        self.positions.spool_waits(reading.oldest)

    def repository_read(self, name: str, reading: RepositoryReading) -> None:
        """A destination was listed."""
        self.readings.repository_read(name, reading)
        self._of(name).missing = defaultdict(Missing, reading.missing)
        if reading.durable is not None:
            self.positions.reached(name, reading.durable)

    def backup_failed(self, moment: float) -> None:
        """One was given up then, in seconds since 1970: as somebody told, or as its record says."""
        self._backup_failed = max(self._backup_failed, moment)

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
                destination = self._of(notice.destination)
                destination.uploads[_kind(notice.name)].failed += 1
                destination.takes = False
            case DestinationCaughtUp():
                self._of(notice.destination).takes = True
            case EventFailed(event=BackupReady()):
                self.backup_failed(self._clock.now().timestamp())
            case OperationEnded(verb="backup") if notice.error:
                self.backup_failed(self._clock.now().timestamp())
            case SyncDegraded() | SyncRestored():
                self._of(notice.destination).degraded = isinstance(notice, SyncDegraded)
            case GapOpened() | GapClosed():
                self._count_gap(notice)
            case WalMoved() | StreamStarted() | StreamLost():
                self.positions.follow(notice)
            case FileSetAside():
                self._set_aside += 1
            case _:
                pass

    def _of(self, name: str) -> _Destination:
        return self._destinations.setdefault(name, _Destination(required=False))

    def _count_stored(self, notice: ObjectStored) -> None:
        destination, kind = self._of(notice.destination), _kind(notice.name)
        destination.takes = True
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
        file = parse_wal_key(notice.name)
        if file is not None and file.kind is WalKind.SEGMENT:
            self.positions.stored(notice.destination, file)
            if file.timeline in destination.missing:
                size = self.positions.segment_size
                destination.missing[file.timeline].remove(file.start(size) // size)

    def _count_gap(self, notice: GapOpened | GapClosed) -> None:
        size = self.positions.segment_size
        if isinstance(notice, GapOpened):
            self._missing[notice.timeline].add(notice.first.start(size) // size, notice.last.end(size) // size)
        else:
            self._missing[notice.file.timeline].remove(notice.file.start(size) // size)

    def _gaps(self, name: str, destination: _Destination) -> tuple[float, float]:
        """Segments that are missing behind the start of the newest backup, and before it."""
        timelines = {*self._missing, *destination.missing}
        reading = self.readings.destinations[name].reading if name in self.readings.destinations else None
        if reading is None and not any(self._missing.values()):
            return math.nan, math.nan
        start = reading.newest.start if reading and reading.newest else 0
        current = everything = 0
        for timeline in timelines:
            union = Missing()
            for ranges in (self._missing.get(timeline), destination.missing.get(timeline)):
                for first, end in ranges.ranges if ranges else ():
                    union.add(first, end)
            everything += len(union)
            current += sum(max(0, end - max(first, start)) for first, end in union.ranges)
        return current, everything - current

    def _is_up(self, name: str, destination: _Destination) -> float:
        """Whether it takes what it is given, and can be listed; NaN if nobody has tried."""
        if not self._shipping:
            return 0.0 if self._unreachable else math.nan
        looks = self.readings.is_up("repository", name)
        if destination.takes is False or looks == 0:
            return 0.0
        return 1.0 if destination.takes or looks == 1 else math.nan

    def _tail_cost(self, name: str, destination: _Destination, now: float) -> float:
        """Dollars a day at the pace of the last hour; a folder of this machine takes no money for a PUT."""
        if name.startswith("file://"):
            return 0.0
        puts = sum(count for minute, count in destination.tails if minute > now // 60 - 60)
        span = min(_HOUR, max(60.0, now - self._began))
        return puts / span * _DAY * self._put_price / 1000

    def collect(self) -> Iterator[Metric]:
        """The samples of this moment. A ``prometheus_client.registry.Collector``."""
        yield from self._collect_service()
        yield from self._collect_destinations()
        yield from self._collect_uploads()

    def _collect_service(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, SummaryMetricFamily

        yield InfoMetricFamily("walship_build", "What runs here.", {"version": version("walship")})
        yield GaugeMetricFamily(
            "walship_shipping", "1 while the repository is open and WAL is shipped to it.", float(self._shipping)
        )
        yield GaugeMetricFamily(
            "walship_stream_connected", "1 while WAL is streamed from a server.", float(self.positions.connected)
        )
        end, told = self.positions.end(), "End of the server's WAL when it last told."
        yield GaugeMetricFamily("walship_wal_current_lsn_bytes", told, end)
        yield CounterMetricFamily(
            "walship_files_set_aside",
            "Archived histories and the like whose names were taken by other bytes.",
            self._set_aside,
        )
        stages = SummaryMetricFamily(
            "walship_stage_duration_seconds", "What an object takes in each stage.", labels=["stage"]
        )
        with self._lock:
            for stage, (count, seconds) in self._stages.items():
                stages.add_metric([stage], count, seconds)
        yield stages

    def _collect_destinations(self) -> Iterator[Metric]:
        now, places = self._clock.monotonic(), self.positions
        values: dict[str, tuple[str, Callable[[str, _Destination], float]]] = {
            "walship_destination_required": (
                "1 if WAL is acknowledged only once it is there.",
                lambda _, each: each.required,
            ),
            "walship_destination_up": ("1 while it takes what it is given, and can be listed.", self._is_up),
            "walship_wal_durable_lsn_bytes": (
                "Up to where the destination has all WAL.",
                lambda name, _: places.durable(name),
            ),
            "walship_wal_lag_bytes": (
                "WAL of the server that the destination lacks.",
                lambda name, _: places.lag_bytes(name),
            ),
            "walship_wal_lag_seconds": (
                "Age of the oldest byte that the destination lacks, or may lack; 0 when none.",
                lambda name, _: places.lag_seconds(name),
            ),
            "walship_wal_segments_pending": (
                "Segments that the server has finished and the destination lacks.",
                lambda name, _: places.pending(name),
            ),
            "walship_sync_degraded": (
                "1 while commits no longer wait for the destination.",
                lambda _, each: each.degraded,
            ),
            "walship_last_backup_failure_timestamp_seconds": (
                "When a base backup was last given up; 0: not known of any.",
                self._last_failure,
            ),
            "walship_tail_cost_dollars_per_day": (
                "What the PUT requests of tails cost at the pace of the last hour.",
                lambda name, each: self._tail_cost(name, each, now),
            ),
        }
        yield from self._collect_gaps()
        yield from (self._per_destination(name, text, value) for name, (text, value) in values.items())

    def _per_destination(self, name: str, text: str, value: Callable[[str, _Destination], float]) -> Metric:
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(name, text, labels=["destination"])
        for destination, each in self._destinations.items():
            family.add_metric([destination], value(destination, each))
        return family

    def _last_failure(self, name: str, _: _Destination) -> float:
        reading = self.readings.destinations[name].reading if name in self.readings.destinations else None
        return max(self._backup_failed, reading.abandoned if reading else 0.0)

    def _collect_gaps(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        gaps = GaugeMetricFamily(
            "walship_wal_gaps",
            "Segments that are missing: behind the start of the newest base backup (current), before it (old).",
            labels=["destination", "kind"],
        )
        puts = CounterMetricFamily("walship_tail_puts", "Tails stored.", labels=["destination"])
        for name, each in self._destinations.items():
            for kind, count in zip(("current", "old"), self._gaps(name, each), strict=True):
                gaps.add_metric([name, kind], count)
            puts.add_metric([name], each.uploads["tail"].stored)
        yield from (gaps, puts)

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
