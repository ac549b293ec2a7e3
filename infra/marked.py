"""A backup that is being taken is marked as in use, and so is the one that it builds on: see ``storage.in_use``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from infra.storage.in_use import Use, using
from infra.wiring import Site
from pipeline.backup import BackupInfo
from pipeline.catalog import backup_of, info_key, is_piece
from pipeline.contracts import Buffer, Ship, Shipped
from pipeline.errors import ObjectMissing, SourceError, StoreError


class MarkedShip:
    """A ``pipeline.contracts.Ship`` for the objects of one base backup.

    The backup is marked before its first object is stored. Before its backup_info is, it is made sure that nobody has
    taken us for gone and cleared away what we had stored, and that the backup which it builds on is still there.
    """

    def __init__(self, ship: Ship, use: Use, site: Site, parent: BackupInfo | None) -> None:
        self._ship = ship
        self._use = use
        self._site = site
        self._parent = parent
        self._marked: asyncio.Future[None] | None = None
        #: Objects of the backup that are stored.
        self._count = 0

    async def __call__(self, name: str, plain: Buffer, *, backup: str = "", **more: Any) -> Shipped:
        if self._marked is None:
            self._marked = asyncio.ensure_future(self._use.add(name.split("/")[1]))
        await asyncio.shield(self._marked)
        if backup_of(name) is not None:
            if not await self._use.check():
                await check_pieces(self._site, name.split("/")[1], self._count)
            if self._parent is not None:
                await check_there(self._site, self._parent.name)
        shipped = await self._ship(name, plain, backup=backup, **more)
        self._count += 1
        return shipped


@asynccontextmanager
async def marked(
    site: Site, ship: Ship, parent: BackupInfo | None = None, *, tell: Callable[[str], None]
) -> AsyncIterator[Ship]:
    """What to ship a base backup with. Raises SourceError if the one that it builds on is being deleted."""
    async with using(site.stores, clock=site.clock, tell=tell, what="backup") as use:
        if parent is not None:
            await use.add(parent.name)
            if who := await use.going(parent.name):
                raise SourceError(
                    f"{parent.name}, which the incremental backup would build on, is being deleted by {who}",
                    hint="take it again once that is done",
                )
            await check_there(site, parent.name)
        yield MarkedShip(ship, use, site, parent)


async def check_there(site: Site, backup: str) -> None:
    """Raise SourceError if no destination lists the backup any more. One that does not answer may."""
    for store in site.stores:
        try:
            await store.head(info_key(backup))
        except ObjectMissing:
            continue
        except StoreError:
            pass
        return
    raise SourceError(
        f"{backup} was deleted meanwhile, and what builds on it is of no use",
        hint="take a full backup: walship backup",
    )


async def check_pieces(site: Site, backup: str, count: int) -> None:
    """Raise SourceError if fewer than ``count`` objects of it are stored: whoever saw no mark may have cleared them up.

    StoreError if the destinations that answer have fewer, and another does not answer.
    """
    found, failure = set[str](), None
    for store in site.stores:
        try:
            found |= {e.key async for e in store.list(f"base/{backup}/") if is_piece(e.key, backup)}
        except StoreError as error:
            failure = error
    if len(found) >= count:
        return
    if failure is not None:
        raise failure
    raise SourceError(
        f"{count - len(found)} of {count} objects of {backup} are gone, and no mark could tell others of it",
        hint="the destinations were too slow to take a mark, or refuse what lies below use/; take the backup again",
    )
