"""The real clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any

from pipeline.contracts import Clock


class SystemClock:
    """Time as this machine tells it. See ``pipeline.contracts.Clock``."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def sleep_or(clock: Clock, seconds: float, event: Coroutine[Any, Any, object]) -> None:
    """For so long, or until ``event`` returns."""
    waits = [asyncio.create_task(event), asyncio.create_task(clock.sleep(seconds))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
