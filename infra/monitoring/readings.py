"""What is read again and again, because nobody tells: the repository, the server, the spool. The truth after a restart.

A reading that fails leaves the last values as they are, and says so in a metric of its own: ``walship_reading_up`` is 0
until it succeeds again. What was never read is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from infra.monitoring.forecast import Remaining
from infra.monitoring.missing import Missing
from pipeline.contracts import Clock
from pipeline.events import DestinationFilling, Notice
from pipeline.wal import Lsn

if TYPE_CHECKING:  # only the service pays for loading it
    from prometheus_client.core import GaugeMetricFamily, Metric

#: Operations whose last success is read from their records.
OPERATIONS = ("verify", "drill", "expire")
#: What may be full one day.
ROOMS = ("slot", "spool", "wal_volume")


@dataclass(frozen=True, slots=True)
class SlotReading:
    """The replication slot."""

    #: Streamed from by us.
    active: bool
    #: Bytes of WAL that the server keeps for it; None if it is not there.
    retained: int | None
    #: Bytes that may be written before it is in danger; None without a limit, or if it is not there.
    safe: int | None


@dataclass(frozen=True, slots=True)
class ServerReading:
    """The server, asked over SQL."""

    lsn: Lsn
    #: Seconds, 0 is off.
    archive_timeout: float
    #: None where no stream is wanted.
    slot: SlotReading | None
    #: Free bytes of the file system that its WAL lies on; None if that is on another machine, or closed to us.
    wal_volume_free: int | None


@dataclass(frozen=True, slots=True)
class SpoolReading:
    """The spool, and the file system that it lies on; bytes and seconds."""

    files: int
    bytes: int
    free: int
    volume: int
    #: Age of the oldest file, 0 if none waits.
    oldest: float
    #: Files that were moved aside.
    refused: int


@dataclass(frozen=True, slots=True)
class BackupReading:
    """A complete base backup. Moments in seconds since 1970."""

    stopped: float
    seconds: float
    #: Bytes as stored; NaN, like the seconds, where the description of the backup cannot be read.
    size: float
    #: Number of the first segment that it needs.
    start: int


@dataclass(frozen=True, slots=True)
class RepositoryReading:
    """One destination, by its listing."""

    #: Up to here the WAL is there without a hole; None if there is none.
    durable: Lsn | None
    #: timeline → segments that are missing between stored ones.
    missing: Mapping[int, Missing]
    #: None if there is none.
    newest: BackupReading | None
    #: Complete backups, by name.
    backups: int
    #: The earliest moment that can be restored, in seconds since 1970; None if there is none.
    first: float | None
    #: When the newest backup that was begun and never finished stopped growing; 0 if there is none.
    abandoned: float


@dataclass(slots=True)
class _Source:
    """One thing that is read."""

    up: float = math.nan
    failures: int = 0
    #: Of the last success, in seconds since 1970.
    moment: float = math.nan


@dataclass(slots=True)
class _Destination:
    reading: RepositoryReading | None = None
    #: The last transaction that is stored there, in seconds since 1970.
    last: float = math.nan


@dataclass(slots=True)
class _Operation:
    success: float = math.nan
    failure: float = math.nan
    more: dict[str, float] = field(default_factory=dict)


class Readings:
    """What was read last, as samples. Whoever reads calls in; nothing here waits."""

    def __init__(self, destinations: Mapping[str, bool], *, spool: bool, clock: Clock) -> None:
        """``spool``: whether there is one to read."""
        self._clock = clock
        self.destinations = {name: _Destination() for name in destinations}
        #: destination → objects and bytes that others have and it lacks, as was told last.
        self._backlog: dict[str, tuple[float, float]] = dict.fromkeys(destinations, (math.nan, math.nan))
        self.server: ServerReading | None = None
        self.spool: SpoolReading | None = None
        self._operations = {kind: _Operation() for kind in OPERATIONS}
        self._rooms = {room: Remaining() for room in ROOMS}
        self._sources = {(kind, name): _Source() for kind in ("repository", "last_commit") for name in destinations}
        self._sources[("server", "")] = _Source()
        if spool:
            self._sources[("spool", "")] = _Source()
        self._sources |= {(kind, ""): _Source() for kind in OPERATIONS}

    def heard(self, notice: Notice) -> None:
        """A listener of the pipeline."""
        if isinstance(notice, DestinationFilling):
            self._backlog[notice.destination] = notice.objects, notice.size

    def failed(self, kind: str, destination: str = "") -> None:
        """A reading did not succeed; what it told before stays."""
        source = self._sources.setdefault((kind, destination), _Source())
        source.up = 0.0
        source.failures += 1
        if kind in ("server", "spool"):
            for room in ("spool",) if kind == "spool" else ("slot", "wal_volume"):
                self._rooms[room].forget()
        if kind == "server":
            self.server = (
                None  # a position that is not known is not the last one; a slot that is not seen is not active
            )

    def repository_read(self, destination: str, reading: RepositoryReading) -> None:
        self.destinations.setdefault(destination, _Destination()).reading = reading
        self._succeeded("repository", destination)

    def last_commit_read(self, destination: str, moment: float | None) -> None:
        """None: no transaction is stored behind the newest backup."""
        place = self.destinations.setdefault(destination, _Destination())
        newest = place.reading.newest if place.reading else None
        stopped = newest.stopped if newest else math.nan
        place.last = stopped if moment is None else max(moment, stopped) if newest else math.nan
        self._succeeded("last_commit", destination)

    def server_read(self, reading: ServerReading) -> None:
        self.server = reading
        now = self._clock.monotonic()
        safe = reading.slot.safe if reading.slot else None
        for room, left in (("slot", safe), ("wal_volume", reading.wal_volume_free)):
            if left is None:
                self._rooms[room].forget()
            else:
                self._rooms[room].add(now, left)
        self._succeeded("server", "")

    def spool_read(self, reading: SpoolReading) -> None:
        self.spool = reading
        self._rooms["spool"].add(self._clock.monotonic(), reading.free)
        self._succeeded("spool", "")

    def operation_read(self, kind: str, *, success: float, failure: float = 0.0, **more: float) -> None:
        """The records of an operation: when it last went well and wrong, in seconds since 1970, 0 if never.

        ``more``: what else it measured (``rto_seconds``, ``rpo_seconds`` of a drill).
        """
        self._operations[kind] = _Operation(success, failure, more)
        self._succeeded(kind, "")

    def _succeeded(self, kind: str, destination: str) -> None:
        source = self._sources.setdefault((kind, destination), _Source())
        source.up, source.moment = 1.0, self._clock.now().timestamp()

    def is_up(self, kind: str, destination: str = "") -> float:
        """1 or 0 as the last reading went; NaN if there was none."""
        source = self._sources.get((kind, destination))
        return source.up if source else math.nan

    def collect(self) -> Iterator[Metric]:
        yield from self._collect_sources()
        yield from self._collect_backups()
        yield from self._collect_backlog()
        yield from self._collect_rooms()
        yield from self._collect_operations()

    def _collect_sources(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        labels = ["kind", "destination"]
        up = _gauge("walship_reading_up", "1 if the last look at it succeeded, 0 if not.", labels)
        moment = _gauge("walship_reading_timestamp_seconds", "When a look at it last succeeded.", labels)
        failures = CounterMetricFamily("walship_reading_failures", "Looks at it that failed.", labels=labels)
        for (kind, name), source in self._sources.items():
            up.add_metric([kind, name], source.up)
            moment.add_metric([kind, name], source.moment)
            failures.add_metric([kind, name], source.failures)
        yield from (up, moment, failures)

    def _collect_backlog(self) -> Iterator[Metric]:
        text = "that other destinations have and this one lacks, as of the last comparison of their listings."
        objects = _gauge("walship_backlog_objects", f"Objects {text}", ["destination"])
        size = _gauge("walship_backlog_bytes", f"Bytes {text}", ["destination"])
        for name, backlog in self._backlog.items():
            objects.add_metric([name], backlog[0])
            size.add_metric([name], backlog[1])
        yield from (objects, size)

    def _collect_backups(self) -> Iterator[Metric]:
        def of_newest(get: Callable[[BackupReading], float], none: float) -> Callable[[_Destination], float]:
            def value(place: _Destination) -> float:
                if place.reading is None:
                    return math.nan
                return get(place.reading.newest) if place.reading.newest else none

            return value

        def first(place: _Destination) -> float:
            return place.reading.first if place.reading and place.reading.first is not None else math.nan

        stopped = of_newest(lambda backup: backup.stopped, 0.0)
        yield from (
            self._per_destination(name, text, value)
            for name, text, value in (
                ("walship_last_backup_success_timestamp_seconds", "End of the newest base backup; 0: none.", stopped),
                ("walship_backup_duration_seconds", "Of the newest.", of_newest(lambda b: b.seconds, math.nan)),
                ("walship_backup_size_bytes", "Of the newest, as stored.", of_newest(lambda b: b.size, math.nan)),
                ("walship_backups", "Complete ones.", lambda p: p.reading.backups if p.reading else math.nan),
                ("walship_first_recoverable_timestamp_seconds", "The earliest moment that can be restored.", first),
                ("walship_last_recoverable_timestamp_seconds", "The last stored transaction.", lambda p: p.last),
            )
        )

    def _per_destination(self, name: str, text: str, value: Callable[[_Destination], float]) -> GaugeMetricFamily:
        family = _gauge(name, text, ["destination"])
        for destination, place in self.destinations.items():
            family.add_metric([destination], value(place))
        return family

    def _collect_rooms(self) -> Iterator[Metric]:
        spool, server = self.spool, self.server
        slot = server.slot if server else None

        def known(number: float | None) -> float:
            return math.nan if number is None else number

        yield from (
            _gauge(name, text, (), known(number))
            for name, text, number in (
                ("walship_spool_bytes", "Archived files that wait.", spool.bytes if spool else None),
                ("walship_spool_files", "Archived files that wait.", spool.files if spool else None),
                (
                    "walship_spool_oldest_seconds",
                    "Age of the oldest of them; 0 if none.",
                    spool.oldest if spool else None,
                ),
                ("walship_spool_refused_files", "Files that were moved aside.", spool.refused if spool else None),
                ("walship_spool_free_bytes", "Free on the spool's file system.", spool.free if spool else None),
                ("walship_spool_volume_bytes", "Size of the spool's file system.", spool.volume if spool else None),
                ("walship_slot_active", "1 while we stream from the slot.", float(slot.active) if slot else None),
                (
                    "walship_slot_retained_bytes",
                    "WAL that the server keeps for the slot.",
                    slot.retained if slot else None,
                ),
                ("walship_slot_safe_bytes", "WAL until the slot is in danger.", slot.safe if slot else None),
                (
                    "walship_wal_volume_free_bytes",
                    "Free on the file system of pg_wal, where it is this machine's.",
                    server.wal_volume_free if server else None,
                ),
            )
        )
        full = _gauge("walship_full_seconds", "Until it is full at the pace of the last ten minutes.", ["kind"])
        for room, remaining in self._rooms.items():
            full.add_metric([room], remaining.seconds())
        yield full

    def _collect_operations(self) -> Iterator[Metric]:
        for kind, operation in self._operations.items():
            what = f"walship_last_{kind}"
            yield _gauge(
                f"{what}_success_timestamp_seconds", "When it last went well; 0: never.", (), operation.success
            )
            yield _gauge(f"{what}_failure_timestamp_seconds", "When it last failed; 0: never.", (), operation.failure)
        drill = self._operations["drill"].more
        for name, text in (("rto_seconds", "How long a restore took."), ("rpo_seconds", "Age of what was lost.")):
            yield _gauge(f"walship_last_drill_{name}", text, (), drill.get(name, math.nan))


def _gauge(name: str, text: str, labels: list[str] | tuple[()], value: float | None = None) -> GaugeMetricFamily:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(name, text, labels=labels or None, value=value)
