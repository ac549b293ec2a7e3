"""What a destination that is not required lacks of what a command has made: no failure, and nothing to be silent of."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from infra.repository import refuse_emptied
from infra.safety import PATIENCE
from infra.settings import Settings
from infra.storage.retry import LOOK
from infra.storage.rooted import Rooted
from infra.wiring import open_destinations
from pipeline.backup import BackupInfo
from pipeline.catalog import info_key
from pipeline.contracts import Store
from pipeline.errors import ObjectMissing, RepositoryGone, StoreError, WalshipError


def not_yet(name: str, why: WalshipError) -> str:
    """The sentence that tells of it."""
    then = why.hint if isinstance(why, RepositoryGone) else "`walship run` copies it there once it can"
    return f"not yet at {name}, which is not required: {why.fact}. {then[0].upper()}{then[1:]}"


async def where_is(backup: BackupInfo, settings: Settings) -> tuple[list[str], dict[str, WalshipError]]:
    """Names of the destinations that have a backup which was just taken, and of those that have not: name → why.

    The required ones have it, or it would not have been taken; each other one is asked, for a few seconds. If that is
    stopped, it is not known of them: the backup is complete all the same.
    """
    async with open_destinations(settings, policy=LOOK) as destinations:
        others = [Rooted(each.root, backup.system_id) for each in destinations if not each.required]
        stopped = StoreError("it was not asked, for the command was stopped")
        lacking: dict[str, WalshipError] = {store.name: stopped for store in others}
        with suppress(asyncio.CancelledError):
            whys = await asyncio.gather(*(_why(store, backup) for store in others))
            lacking = {store.name: why for store, why in zip(others, whys, strict=True) if why}
        return [each.name for each in destinations if each.name not in lacking], lacking


async def _why(store: Store, backup: BackupInfo) -> WalshipError | None:
    """None if it is there."""
    try:
        async with asyncio.timeout(2 * PATIENCE):
            await refuse_emptied([store])
            await store.head(info_key(backup.name))
    except ObjectMissing:
        return StoreError(f"{backup.name} is not complete there")
    except StoreError as error:
        return error
    except TimeoutError:
        return StoreError(f"{store.name} has not answered for {2 * PATIENCE:g} seconds", passing=True)
    return None
