"""Progress for programs: one JSON line per second on stderr, where ``--json`` was asked for."""

from __future__ import annotations

import json
import sys
import threading
import time
from types import TracebackType
from typing import Self

#: Seconds between lines.
EVERY = 1.0


class JsonLines:
    """Called like ``infra.cli.progress.Bytes``, within ``with``. Says the same again where nothing moves.

    Its own thread: whoever reads the lines takes silence for a program that hangs.
    """

    def __init__(self, what: str, every: float = EVERY) -> None:
        self._what = what
        self._every = every
        self._began = time.monotonic()
        self._state: tuple[int, int, str] = (0, 0, "")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __call__(self, done: int, total: int = 0, detail: str = "") -> None:
        """``done`` of ``total`` bytes (0 if unknown); ``detail`` is what is worked on now."""
        self._state = done, total, detail

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._every):
            done, total, detail = self._state
            rate = done / max(time.monotonic() - self._began, 0.001)
            line = {
                "progress": self._what,
                "current": detail,
                "bytes": done,
                "of_bytes": max(total, done) if total else None,
                "bytes_per_second": round(rate),
                "seconds_left": round((total - done) / rate) if total > done and rate else None,
            }
            print(json.dumps(line), file=sys.stderr, flush=True)
