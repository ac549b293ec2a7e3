"""Parts of backups that were never finished: without a backup_info they are of no use, and nobody lists them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from pipeline.catalog import backup_of, info_key
from pipeline.contracts import Store
from pipeline.errors import ObjectMissing, StoreError

#: A folder whose newest object is younger may be a backup that somebody is taking: it stores a part every few seconds,
#: and waits for its WAL for minutes.
SETTLED = timedelta(hours=24)


async def clean_unfinished(stores: Sequence[Store], *, finished: str, tell: Callable[[str], None]) -> int:
    """Delete them at every destination; how many objects went. What cannot be told for sure stays.

    ``finished``: the backup that has just been finished. The time of its backup_info at a destination is what time it
    is there: our own clock may be hours ahead of the store's. A destination that does not have it is left alone.

    A backup that any destination has a backup_info of is one, wherever else its parts lie.
    """
    gone = 0
    for store in stores:
        try:
            now = (await store.head(info_key(finished))).modified
            names = [info.key.removeprefix("base/").rstrip("/") async for info in store.list("base/", shallow=True)]
            for name in names:
                if now and backup_of(info_key(name)) and await _is_nowhere(stores, info_key(name)):
                    gone += await _clean(store, name, now, tell)
        except ObjectMissing:
            continue
        except StoreError as error:
            tell(f"{store.name} was not searched for the parts of unfinished backups: {error.fact}")
    return gone


async def _is_nowhere(stores: Sequence[Store], key: str) -> bool:
    """Raises StoreError where a destination does not answer: it may be the one that has it."""
    for store in stores:
        try:
            await store.head(key)
        except ObjectMissing:
            continue
        return False
    return True


async def _clean(store: Store, name: str, now: datetime, tell: Callable[[str], None]) -> int:
    found = [info async for info in store.list(f"base/{name}/")]
    if not found or any(info.modified is None or now - info.modified < SETTLED for info in found):
        return 0
    await store.delete([info.key for info in found])
    size = sum(info.size for info in found)
    tell(f"{store.name}: {len(found)} objects ({size / 1e6:.0f} MB) of {name}, which was never finished, were deleted")
    return len(found)
