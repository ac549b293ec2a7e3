"""What tests of drills share."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from handlers.drill import Report


def new_report(target: str = "latest") -> Report:
    """Of a drill that begins now."""
    return Report(datetime.now(UTC), time.monotonic(), "0.1.0", target)
