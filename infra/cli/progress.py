"""Progress on stderr: a bar on a terminal, otherwise a line every few seconds. Never silent for long."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from infra.cli.verb import human, say

if TYPE_CHECKING:
    from rich.progress import Progress

#: Seconds between lines where there is no terminal.
EVERY = 5.0


class Bytes:
    """Progress of work that is counted in bytes. ``with Bytes("base backup") as progress: progress(done, total)``."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Progress | None = None
        self._began = self._said = time.monotonic()
        self._last = 0

    def __enter__(self) -> Self:
        self._began = self._said = time.monotonic()
        if sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
            self._bar.add_task(self._what, total=None)
        return self

    def begin(self, what: str) -> None:
        """The next piece of work, counted from nothing again."""
        self._what = what
        self._began = self._said = time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._bar.task_ids[0], description=what, total=None)

    def __call__(self, done: int, total: int = 0, detail: str = "") -> None:
        """``done`` of ``total`` bytes (0 if unknown); ``detail`` is what is worked on now."""
        self._last = done
        text = f"{self._what}: {detail}" if detail else self._what
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=max(total, done) or None, description=text)
            return
        now = time.monotonic()
        if now - self._said < EVERY:
            return
        self._said = now
        rate = done / max(now - self._began, 0.001)
        parts = [f"{human(done)} of {human(total)}" if total else human(done), f"{human(rate)}/s"]
        if total > done and rate:
            parts.append(f"{(total - done) / rate:.0f} s left")
        say(f"{text}: {', '.join(parts)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """No more progress; idempotent."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar() -> Progress:
    from rich import progress  # only where there is a terminal: it takes a while to load
    from rich.console import Console

    return progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
