"""A clock for tests: time passes only when somebody sleeps, and then at once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta


class FastClock:
    """Sleeping takes one turn of the loop and moves the time by as much as was asked for."""

    def __init__(self, now: datetime = datetime(2026, 1, 14, 12, tzinfo=UTC)) -> None:
        self._start = now
        self.passed = 0.0

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self.passed)

    def monotonic(self) -> float:
        return self.passed

    async def sleep(self, seconds: float) -> None:
        self.passed += seconds
        await asyncio.sleep(0)
