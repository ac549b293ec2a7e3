"""The spool shipped beside a command that waits until WAL is safe, where no service does that.

Not beside a service of somebody else, though: a clone of a server has its settings, and a spool of its own.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path

from infra.postgres.connect import connect
from infra.postgres.slots import look
from infra.settings import Settings
from infra.sources.spool import holder
from infra.storage.lease import LeaseHeldError, refuse_if_written
from infra.wiring import Shipping, Site


@asynccontextmanager
async def alongside(site: Site, shipping: Shipping, tell: Callable[[str], None]) -> AsyncIterator[None]:
    """Ship the spool during the ``async with`` block, unless a service does that already.

    For commands that wait until WAL is safe: they work whether the service runs or not. Raises LeaseHeldError if a
    service writes to the repository that ships something else.
    """
    spool = site.settings.spool_dir if "watch" in site.settings.sources else None
    streams = "stream" in site.settings.sources
    if (spool is None and not streams) or await _service_runs(site.settings, spool):
        yield
        return
    if await _written_by_ours(site, tell):  # it is about to ship again: its stream was lost, or it has just begun
        yield
        return
    tell(f"no service is running: shipping what arrives {f'in {spool} ' if spool else ''}meanwhile")
    # In one group: where the spool cannot be shipped, the WAL that the command waits for will never be safe.
    async with asyncio.TaskGroup() as group:
        work = group.create_task(_ship(spool, site, shipping))
        yield
        work.cancel()


def what_is_shipped(settings: Settings) -> str:
    """What the holder of a lease calls it, for people."""
    return f"spool {settings.spool_dir}" if "watch" in settings.sources else f"slot {settings.slot}"


async def _written_by_ours(site: Site, tell: Callable[[str], None]) -> bool:
    """Whether the service that writes to the repository, if one does, is the one of these settings on this host.

    Raises LeaseHeldError if it is another one.
    """
    try:
        await refuse_if_written(site.stores, clock=site.clock, tell=tell)
    except LeaseHeldError as error:
        there = error.holder
        if there and (there.host, there.server) == (socket.gethostname(), what_is_shipped(site.settings)):
            return True
        nothing = (
            "; if it ships the WAL of this very server, nothing is to be shipped from here: unset WALSHIP_SPOOL_DIR"
        )
        raise LeaseHeldError(error.fact, hint=f"{error.hint}{nothing}", holder=there) from None
    return False


async def _ship(spool: Path | None, site: Site, shipping: Shipping) -> None:
    # It takes a while to load, and the command has to wait for the server meanwhile.
    await asyncio.to_thread(import_module, "infra.service")
    from infra.service import ship_unless_taken

    await ship_unless_taken(spool, site, shipping)


async def _service_runs(settings: Settings, spool: Path | None) -> bool:
    if spool is not None:
        return holder(spool) is not None
    async with await connect(settings) as connection:
        slot = await look(connection, settings.slot)
    return slot is not None and slot.active
