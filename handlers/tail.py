"""Ships the open end of the WAL to one destination, cut into tails at its own pace."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from handlers.outlet import Outlet, Parcel
from pipeline.contracts import Buffer, Clock
from pipeline.errors import WalshipError
from pipeline.events import Notice
from pipeline.openwal import OpenWal
from pipeline.wal import Lsn, WalFile


class TailShipper:
    """One destination's tails."""

    def __init__(
        self,
        wal: OpenWal,
        outlet: Outlet,
        *,
        encode: Callable[[str, Buffer], Awaitable[Parcel]],
        epoch: int,
        interval: float,
        synchronous: Callable[[], bool],
        clock: Clock,
        notify: Callable[[Notice], None],
        stored: Callable[[str, Lsn, Lsn], None],
        failed: Callable[[Outlet, str, WalshipError], Awaitable[None]],
        fold_at: int = 256,
    ) -> None:
        """``interval`` in seconds; ``stored``: destination, start and end of what is durable there now."""

    async def run(self) -> None:
        """Cut and deliver until cancelled. Raises ObjectConflict when another writer uses our epoch."""
        raise NotImplementedError

    def segment_stored(self, file: WalFile) -> None:
        """The finished segment is stored at this destination: nothing more of it is cut, its tails are removed."""
        raise NotImplementedError
