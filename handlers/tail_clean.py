"""Takes tails away at one destination: those that are folded, and those of segments whose finished object is there.

What cannot be deleted is told once and stays: shipping never waits for it, and it harms no restore, which looks at
tails only where there is no finished segment, and joins what overlaps. What failed in passing is taken by
``clean_left_overs`` an hour later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from handlers.outlet import Outlet
from pipeline.catalog import wal_key
from pipeline.errors import ObjectMissing, StoreError
from pipeline.events import DeleteRefused, Notice, TailsRemoved
from pipeline.tail import TailName, tail_folder
from pipeline.wal import WalFile, WalKind

#: Tails that are deleted at once. Less than a destination has connections: the others are for tails that commits
#: wait for, which stood still for most of a second when 256 deletes at once took them all.
WIDTH = 4


class TailCleaner:
    """Deletes tails at one destination. Nothing here raises StoreError but ``clean``."""

    def __init__(self, outlet: Outlet, *, notify: Callable[[Notice], None]) -> None:
        self._outlet = outlet
        self._notify = notify
        #: A delete was refused, and told.
        self.refused = False

    async def delete(self, keys: Collection[str]) -> bool:
        """Delete these; returns whether they are gone."""
        waiting = sorted(keys)
        try:
            while waiting:
                await self._outlet.store.delete(waiting[:WIDTH])
                del waiting[:WIDTH]
        except StoreError as error:
            if not error.passing and not self.refused:
                self.refused = True
                self._notify(
                    DeleteRefused(
                        self._outlet.name,
                        f"tails that are no longer needed cannot be deleted: {error.fact}",
                        "restores are not harmed, but one small object stays for each interval in which the WAL moved:"
                        " allow s3:DeleteObject under tail/, or let a lifecycle rule expire tail/ after some days;"
                        " docs/durability.md says what tails cost where deletes are refused",
                    )
                )
            return False
        return True

    async def remove(self, file: WalFile) -> int:
        """Delete all tails of a segment, if its finished object is seen here; returns how many."""
        try:
            return await self.clean(file)
        except StoreError:
            return 0  # it does not answer now: left to clean_left_overs

    async def clean(self, file: WalFile) -> int:
        """As ``remove``, but raises StoreError when the destination cannot be asked."""
        store = self._outlet.store
        try:
            await store.head(wal_key(file))
        except ObjectMissing:
            return 0
        keys = [info.key async for info in store.list(tail_folder(file)) if TailName.parse(info.key)]
        if not keys or not await self.delete(keys):
            return 0
        self._notify(TailsRemoved(self._outlet.name, len(keys)))
        return len(keys)


async def clean_left_overs(outlet: Outlet, *, notify: Callable[[Notice], None]) -> int:
    """Delete the tails of every segment whose finished object is at this destination; returns how many.

    For the start and once an hour: what a crash, an outage or another writer has left. Tails of unfinished segments
    (the open one, an old timeline's last) stay. Raises StoreError when the destination cannot be asked; a refused
    delete is told once per call (DeleteRefused).
    """
    cleaner, store = TailCleaner(outlet, notify=notify), outlet.store
    folders = [info.key.split("/")[1] async for info in store.list("tail/", shallow=True) if info.key.endswith("/")]
    files = [file for file in map(WalFile.parse, folders) if file and file.kind is WalKind.SEGMENT]
    gone = 0
    # One listing per 16 hex digits, not a question per segment: where deletes are refused there may be very many.
    for shared in sorted({file.name[:16] for file in files}):
        finished = {info.key async for info in store.list(f"wal/{shared}/")}
        for file in sorted(files):
            if wal_key(file) in finished and not cleaner.refused:
                gone += await cleaner.clean(file)
    return gone
