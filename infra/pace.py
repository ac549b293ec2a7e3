"""A limit on bytes per second, for several threads at once."""

from __future__ import annotations

import threading
import time

#: Seconds of unused allowance that may be made up for.
_BURST = 0.25


class Pace:
    """``wait`` before so many bytes are moved; ``rate`` bytes a second in all."""

    def __init__(self, rate: int) -> None:
        #: Bytes a second.
        self.rate = rate
        self._free_at = time.monotonic()
        self._lock = threading.Lock()

    def take(self, size: int) -> float:
        """Seconds to wait until ``size`` more bytes may be moved; they count from now on."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - _BURST) + size / self.rate
            return max(0.0, self._free_at - now)

    def wait(self, size: int, stop: threading.Event) -> None:
        """Blocks the thread, or until ``stop`` is set."""
        if (seconds := self.take(size)) > 0:
            stop.wait(seconds)
