"""How far the offsite copies are behind, measured from outside, whatever walship says of itself.

- A finished segment: how long it lies in the spool. PostgreSQL puts it there, and walship takes it away only when every
  destination has confirmed it.
- Any byte: how long until PostgreSQL is told that every destination has it (``flush_lsn``), in a finished segment or in
  a tail.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from pathlib import Path

import psycopg

from pipeline.wal import WalFile, WalKind

#: Seconds between two looks; no lag is known better than that.
_PAUSE = 0.01
_STREAM_PAUSE = 0.03

_POSITIONS = """
SELECT pg_current_wal_flush_lsn() - '0/0'::pg_lsn, flush_lsn - '0/0'::pg_lsn
FROM pg_stat_replication WHERE application_name = 'walship'
"""


class _Lag(ABC):
    """Looks in a thread, from ``start`` to ``stop``."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lag", daemon=True)
        #: Seconds that each thing waited, in the order in which they became safe.
        self.waited: list[float] = []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Idempotent; what still waits is not counted."""
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()

    @property
    def worst(self) -> float:
        return max(self.waited, default=0.0)

    @property
    def mean(self) -> float:
        return sum(self.waited) / len(self.waited) if self.waited else 0.0

    @abstractmethod
    def _watch(self) -> None:
        """Look until ``_stop`` is set; runs in the thread."""


class SpoolLag(_Lag):
    """Of each finished segment."""

    def __init__(self, spool: Path) -> None:
        super().__init__()
        self._spool = spool
        self._arrived: dict[str, float] = {}

    def _watch(self) -> None:
        while not self._stop.wait(_PAUSE):
            now = time.monotonic()
            there = {name for name in os.listdir(self._spool) if _is_segment(name)}  # noqa: PTH208 - names suffice
            for name in there - self._arrived.keys():
                self._arrived[name] = now
            for name in self._arrived.keys() - there:
                self.waited.append(now - self._arrived.pop(name))


class StreamLag(_Lag):
    """Of the end of the WAL, each time that it has moved. Stop it before the server."""

    def __init__(self, dsn: str) -> None:
        super().__init__()
        self._dsn = dsn

    def _watch(self) -> None:
        ends: deque[tuple[int, float]] = deque()
        last = 0
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._stop.wait(_STREAM_PAUSE):
                row = connection.execute(_POSITIONS).fetchone()
                now = time.monotonic()
                end, safe = (int(row[0]), int(row[1] or 0)) if row else (last, 0)
                if end > last:
                    last = end
                    ends.append((end, now))
                while ends and ends[0][0] <= safe:
                    self.waited.append(now - ends.popleft()[1])


def longest_put(page: str, destination: str, kind: str) -> float:
    """Seconds that the slowest upload of that kind took there, by the service's ``/metrics``: the end of its bucket.

    0 if there was none. ``destination``: how its name begins; ``kind``: ``tail`` or ``wal``.
    """
    from prometheus_client.parser import text_string_to_metric_families

    counts = {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "walship_upload_duration_seconds_bucket"
        and sample.labels["kind"] == kind
        and sample.labels["destination"].startswith(destination)
    }
    most = max(counts.values(), default=0.0)
    return min((end for end, count in counts.items() if count == most), default=0.0) if most else 0.0


def _is_segment(name: str) -> bool:
    file = WalFile.parse(name)
    return file is not None and file.kind is WalKind.SEGMENT
