"""Sites for tests: as ``open_site`` makes them, at stores that are there already."""

from __future__ import annotations

from typing import Any

from handlers.fetch import Fetcher
from infra.keys import open_keyring
from infra.repository import Destination, RepositoryFacts
from infra.settings import Settings
from infra.wiring import Listeners, Site, make_chain
from pipeline.contracts import Clock, Store
from tests.clock import FastClock
from tests.keys import NOW, SYSTEM_ID


async def site_at(
    *stores: Store, passphrase: str = "", writer: bool = False, clock: Clock | None = None, **settings: Any
) -> Site:
    """As ``open_site`` makes it, for a process that reads."""
    clock, chosen = clock or FastClock(), Settings(_env_file=None, **settings)
    keys = await open_keyring(stores[0], SYSTEM_ID, passphrase, clock=clock, writer=writer)
    facts = RepositoryFacts(SYSTEM_ID, 17, 1 << 20, NOW.isoformat())
    made = make_chain(chosen, keys, SYSTEM_ID)
    fetch = Fetcher(stores, made, SYSTEM_ID, refresh=lambda: keys.refresh_from(stores))
    destinations = tuple(Destination(store, required=True) for store in stores)
    return Site(chosen, facts, destinations, stores, keys, made, fetch, clock, Listeners())
