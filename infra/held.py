"""A backup that is copied is marked as in use at the place it is copied from: see ``storage.in_use``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from infra.storage.in_use import Marks, using
from pipeline.contracts import Clock, Store
from pipeline.errors import StoreError


@asynccontextmanager
async def held(
    stores: Sequence[Store], backup: str, *, clock: Clock, tell: Callable[[str], None]
) -> AsyncIterator[str]:
    """Keep others from deleting it for as long as the block lasts. Yields who is doing so already; empty: nobody."""
    async with using(stores, backup, clock=clock, tell=tell, what="copy") as use:
        marks = Marks(stores, clock=clock)
        who = ""
        with suppress(StoreError):  # who cannot be asked cannot delete there either
            await marks.look(backup)
            who = marks.word(backup, going=True)
        yield await use.going(backup) if who else ""  # whether they live takes a while to find out
