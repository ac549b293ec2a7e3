"""What a backup tells programs on stderr, where ``--json`` was asked for: a line of JSON per second, and all notes.

    {"progress": "base backup", "phase": "files", "tablespace": "base", "bytes": …, "of_bytes": …,
     "bytes_per_second": …, "seconds_left": …}
    {"note": "waiting for WAL: …"}

``phase``: ``start`` (a checkpoint, of the server's), ``files``, ``manifest``, ``wal`` (what is waited for at the end).
``tablespace``: ``base``, or an oid; null in other phases. What is not known is null.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from pipeline.backup import area_of

#: Seconds between lines.
EVERY = 1.0
#: Lines over which the rate is taken: what a server does in its checkpoint, or at night, says nothing of now.
_LINES = 10


def note(line: str) -> None:
    """Something for people, in a stream that is for programs."""
    _write({"note": line})


def _write(members: dict[str, Any]) -> None:
    # In one piece: two threads write.
    sys.stderr.write(json.dumps(members) + "\n")
    sys.stderr.flush()


class JsonLines:
    """Called like ``infra.cli.progress.Bytes``, within ``with``. Says the same again where nothing moves.

    Its own thread: whoever reads the lines takes silence for a program that hangs.
    """

    def __init__(self, what: str, every: float = EVERY) -> None:
        self._what = what
        self._every = every
        self._seen = deque([(time.monotonic(), 0)], _LINES + 1)
        self._state: tuple[int, int, str] = (0, 0, "")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __call__(self, done: int, total: int = 0, detail: str = "") -> None:
        """``done`` of ``total`` bytes (0 if unknown); ``detail``: as in ``handlers.base_backup.Progress``."""
        self._state = done, total, detail

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._every):
            done, total, detail = self._state
            phase = detail if detail in ("manifest", "wal") else "files" if detail else "start"
            now, (began, before) = time.monotonic(), self._seen[0]
            rate = (done - before) / max(now - began, 0.001)
            self._seen.append((now, done))
            line = {
                "progress": self._what,
                "phase": phase,
                "tablespace": area_of(detail) if phase == "files" else None,
                "bytes": done,
                "of_bytes": max(total, done) if total else None,
                "bytes_per_second": round(rate),
                "seconds_left": round((total - done) / rate) if phase == "files" and total > done and rate else None,
            }
            _write(line)
