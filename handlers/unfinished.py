"""Parts of backups that were never finished: without a backup_info they are of no use, and nobody lists them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from pipeline.catalog import backup_of, info_key
from pipeline.contracts import Store
from pipeline.errors import ObjectMissing, StoreError


async def clean_unfinished(
    stores: Sequence[Store], *, remove: Callable[[str], Awaitable[str]], tell: Callable[[str], None]
) -> list[str]:
    """Delete them at every destination; the backups of which parts went. What cannot be told for sure stays.

    ``remove`` deletes the parts of one, unless somebody is at work on it or has finished it, and says why they stay: no
    age tells that, but the mark that its writer keeps alive.

    A backup that any destination has a backup_info of is one, wherever else its parts lie. So nothing goes while a
    destination does not answer.
    """
    try:
        names = await _unlisted(stores)
    except StoreError as error:
        tell(f"parts of unfinished backups were not looked for: {error.fact}")
        return []
    return [name for name in names if not await remove(name)]


async def _unlisted(stores: Sequence[Store]) -> list[str]:
    """Folders of backups that no destination lists. Raises StoreError where one does not answer."""
    folders = [[info.key async for info in store.list("base/", shallow=True)] for store in stores]
    names = {key.removeprefix("base/").rstrip("/") for keys in folders for key in keys if key.endswith("/")}
    return [name for name in sorted(names) if backup_of(info_key(name)) and await _is_nowhere(stores, info_key(name))]


async def _is_nowhere(stores: Sequence[Store], key: str) -> bool:
    for store in stores:
        try:
            await store.head(key)
        except ObjectMissing:
            continue
        return False
    return True
