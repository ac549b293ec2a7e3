"""Archive lag, measured from outside: how long each finished segment lies in the spool.

PostgreSQL puts it there, and walship takes it away only when every destination has confirmed it. So the time in between
is how far behind the offsite copy is, whatever walship says of itself.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from pipeline.wal import WalFile, WalKind

#: Seconds between two looks; no lag is known better than that.
_PAUSE = 0.01


class SpoolLag:
    """Watches a spool in a thread, from ``start`` to ``stop``."""

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._arrived: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="spool lag", daemon=True)
        #: Seconds that each segment waited, in the order in which they left.
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

    def _watch(self) -> None:
        while not self._stop.wait(_PAUSE):
            now = time.monotonic()
            there = {name for name in os.listdir(self._spool) if _is_segment(name)}  # noqa: PTH208 - names suffice
            for name in there - self._arrived.keys():
                self._arrived[name] = now
            for name in self._arrived.keys() - there:
                self.waited.append(now - self._arrived.pop(name))


def _is_segment(name: str) -> bool:
    file = WalFile.parse(name)
    return file is not None and file.kind is WalKind.SEGMENT
