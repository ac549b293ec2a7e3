"""What the leases at some destinations say of the WAL that was reported as safe: see ``pipeline.confirmed``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace

from infra.clock import SystemClock
from infra.storage.heartbeat import UNKNOWN, Heartbeat
from infra.storage.lease import Place, ask_all, lease_key
from pipeline.confirmed import Confirmed
from pipeline.contracts import Store
from pipeline.errors import StoreError


async def confirmed(stores: Sequence[Store]) -> list[Confirmed]:
    """What the newest lease says of the WAL that is safe; if it has said nothing yet, the one before. Empty: unknown.

    It is unknown wherever somebody may have shipped since: the newest lease was given back, or cannot be read, or a
    command has shipped without one (``forget_confirmed``).
    """
    places = [Place(store, SystemClock()) for store in stores]
    found = [each for place in await asyncio.gather(*map(_last_two, places)) for each in place]
    newest = max((number for number, _ in found), default=0)
    for number in (newest, newest - 1):
        said = [there for each, there in found if each == number]
        if not all(there is not None and not there.released and there.confirmed != UNKNOWN for there in said):
            return []
        told = [Confirmed.parse(there.confirmed) for there in said if there is not None]
        if positions := [position for position in told if position is not None]:
            return positions
    return []


async def _last_two(place: Place) -> list[tuple[int, Heartbeat | None]]:
    """Numbers and what they say; None for one that says nothing that can be understood."""
    with contextlib.suppress(StoreError):
        return [(number, Heartbeat.decode(await place.read(number))) for number in sorted(await place.numbers())[-2:]]
    return []


async def forget_confirmed(stores: Sequence[Store]) -> None:
    """Before WAL is shipped without a lease: what the newest one says of the WAL that is safe is no longer all.

    The holder of that lease, if he is alive, writes it anew with his next heartbeat.
    """

    async def forget(place: Place) -> None:
        if number := max(await place.numbers(), default=0):
            there = Heartbeat.decode(await place.read(number))
            if there is not None and not there.released:
                await place.store.put(lease_key(number), replace(there, confirmed=UNKNOWN).encode(), replace=True)

    await ask_all([Place(store, SystemClock()) for store in stores], forget)
