"""Progress for programs: one JSON line per second on stderr, where ``--json`` was asked for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

#: Seconds between lines.
EVERY = 1.0


class JsonLines:
    """Called like ``infra.cli.progress.Bytes``."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._began = self._said = clock()

    def __call__(self, done: int, total: int = 0, detail: str = "") -> None:
        now = self._clock()
        if now - self._said < EVERY:
            return
        self._said = now
        rate = done / max(now - self._began, 0.001)
        line = {
            "progress": self._what,
            "current": detail,
            "bytes": done,
            "of_bytes": max(total, done) if total else None,
            "bytes_per_second": round(rate),
            "seconds_left": round((total - done) / rate) if total > done and rate else None,
        }
        print(json.dumps(line), file=sys.stderr, flush=True)
