"""Takes tails away at one destination: those of segments whose finished object was seen there.

What cannot be deleted is told once and stays: shipping never waits for it, and it harms no restore, which looks at
tails only where there is no finished segment.
"""

from __future__ import annotations

from collections.abc import Callable

from handlers.outlet import Outlet
from pipeline.events import Notice


async def clean_left_overs(outlet: Outlet, *, notify: Callable[[Notice], None]) -> int:
    """Delete the tails of every segment whose finished object is at this destination; returns how many.

    For the start and once an hour: what a crash, an outage or another writer has left. Tails of unfinished segments
    stay. Raises StoreError when the destination cannot be asked; a refused delete is told (DeleteRefused).
    """
    raise NotImplementedError
