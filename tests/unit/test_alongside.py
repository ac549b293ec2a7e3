"""Commands that ship the spool by themselves, and the service of somebody else that writes to the same repository."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from infra.alongside import alongside, what_is_shipped
from infra.storage.lease import Lease, LeaseHeldError
from infra.storage.memory import MemoryStore
from infra.wiring import open_shipping
from tests.clock import FastClock
from tests.leases import Meanwhile, beat, silent
from tests.sites import site_at


async def held(server: str) -> tuple[MemoryStore, Meanwhile]:
    """A repository that a living service writes, and the clock of whoever looks at it."""
    store = MemoryStore("a")
    lease = await Lease.acquire([store], clock=Meanwhile(_nothing), tell=silent, server=server)
    return store, Meanwhile(lambda: beat(lease))


async def _nothing() -> None: ...


@pytest.mark.parametrize("server", ["spool /another", "slot walship"])
async def test_a_clone_ships_nothing_into_a_repository_that_a_service_writes(tmp_path: Path, server: str) -> None:
    """It was restored with the settings of its original, and has a spool of its own."""
    store, clock = await held(server)
    site = await site_at(store, clock=clock, writer=True, WALSHIP_SPOOL_DIR=str(tmp_path))
    async with AsyncExitStack() as stack:
        shipping = await stack.enter_async_context(open_shipping(site))
        with pytest.raises(
            LeaseHeldError, match=rf"is written already by process \d+ on .* \({server}\), since"
        ) as caught:
            await stack.enter_async_context(alongside(site, shipping, silent))
    assert "a clone of the server needs a repository of its own" in caught.value.hint
    assert "unset WALSHIP_SPOOL_DIR" in caught.value.hint
    assert what_is_shipped(site.settings) == f"spool {tmp_path}"


async def test_our_own_service_that_is_about_to_ship_is_left_to_it(tmp_path: Path) -> None:
    store, clock = await held(f"spool {tmp_path}")
    site = await site_at(store, clock=clock, writer=True, WALSHIP_SPOOL_DIR=str(tmp_path))
    told: list[str] = []
    async with open_shipping(site) as shipping, alongside(site, shipping, told.append):
        pass
    assert not [line for line in told if "shipping what arrives" in line]


@pytest.mark.parametrize("gone", [False, True])
async def test_where_nobody_writes_it_is_shipped(tmp_path: Path, *, gone: bool) -> None:
    """``gone``: nobody has given the lease back, or ever will: commands do not wait for it each time."""
    store, clock = MemoryStore("a"), FastClock()
    if gone:
        await Lease.acquire([store], clock=FastClock(), tell=silent, server="spool /another")
        clock.passed = 3601
    site = await site_at(store, clock=clock, writer=True, WALSHIP_SPOOL_DIR=str(tmp_path))
    told: list[str] = []
    async with open_shipping(site) as shipping, alongside(site, shipping, told.append):
        assert told == [f"no service is running: shipping what arrives in {tmp_path} meanwhile"]
