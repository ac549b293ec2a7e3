"""One operation on a store with so many segments, for ``repository``: a process of its own, so that memory can be told.

    python -m tests.benchmarks.growing OPERATION SEGMENTS FOLDER

Prints seconds of CPU, and the bytes by which the peak of the process has grown.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path

from handlers.fetch import read_catalog
from handlers.verify import Verification
from infra.expire import make_plan, marks_of
from infra.storage.memory import MemoryStore
from infra.wiring import Site
from pipeline.backup import BackupInfo
from pipeline.catalog import Catalog, info_key, wal_key
from pipeline.contracts import ObjectInfo
from pipeline.objects import MemoryBody
from pipeline.policy import Policy
from pipeline.verified import Memory
from pipeline.wal import Lsn, WalFile
from tests.keys import NOW, SYSTEM_ID
from tests.killtest.soak import high_water
from tests.sites import site_at

SIZE = 1 << 20
BACKUPS = 60
#: What is measured, in words for people.
OPERATIONS = {
    "list": "one listing of the WAL, for comparison",
    "catalog": "the catalog (`list`, `status`, restores)",
    "expire": "what expire decides, and finds to delete",
    "remember": "what verify remembers, written once",
    "verify": "verify with nothing new, its memory read",
}


class Growing(MemoryStore):
    """The store in memory, and so many segments that are made up when they are listed."""

    def __init__(self, segments: int) -> None:
        super().__init__("growing")
        self._segments = segments

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        if prefix != "wal/":
            async for info in super().list(prefix, after=after, shallow=shallow):
                yield ObjectInfo(info.key, info.size, NOW)  # the same in each process
            return
        for number in range(self._segments):
            # As a store answers: a thousand at a time.
            if number % 1000 == 0:
                await asyncio.sleep(0)
            yield ObjectInfo(wal_key(WalFile.segment(1, number * SIZE, SIZE)), 100_000 + number % 7, NOW)


async def _filled(segments: int) -> Site:
    site = await site_at(Growing(segments))
    for number in range(BACKUPS):
        stopped = NOW - timedelta(days=30) * (BACKUPS - number) / BACKUPS
        start, name = Lsn(number * segments // BACKUPS * SIZE + 40), f"base_{stopped:%Y%m%d_%H%M%S}"
        info = BackupInfo(
            name, f"{number:032x}", "full", SYSTEM_ID, 170000, SIZE, 1, start, Lsn(start + 80), stopped, stopped, (),
            (), (), "", 100,
        )  # fmt: skip
        pieces = site.chain.encode(info_key(name), info.encode(), backup=info.id, created=NOW)
        await site.stores[0].put(info_key(name), MemoryBody([b"".join(bytes(piece) for piece in pieces)]))
    return site


async def _measured(operation: str, segments: int, folder: Path) -> tuple[float, int]:
    site = await _filled(segments)
    store, kept = site.stores[0], folder / f"memory.{segments}"
    catalog: Catalog | None = None
    if operation == "verify":
        catalog = await read_catalog(site.stores, site.fetch, SYSTEM_ID)

    async def listing() -> None:
        async for _ in store.list("wal/"):
            pass

    async def cataloguing() -> None:
        made = await read_catalog(site.stores, site.fetch, SYSTEM_ID)
        assert len(made.segments[1]) == segments
        assert len(made.windows()) == BACKUPS

    async def deciding() -> None:
        plan = await make_plan(site, Policy(window=timedelta(days=14)), marks_of(site))
        assert sum(len(runs) for runs in plan.wal["growing"].segments.values()) > segments // 3

    async def remembering() -> None:
        memory = _memory(NOW)
        for prefix in ("wal/", "base/"):
            async for info in store.list(prefix):
                memory.add(info, decoded=True)
        kept.write_bytes(memory.encode())

    async def comparing() -> None:
        assert catalog is not None
        memory = _memory(NOW + timedelta(days=1))
        memory.load(kept.read_bytes())
        run = Verification(catalog, site.stores, chain=site.chain, memories={"growing": memory})
        await run.look()
        report = run.report()
        assert (report.ok, report.trusted, report.objects) == (True, segments + BACKUPS, 0), report
        assert not memory.changed

    work: dict[str, Callable[[], Awaitable[None]]] = {
        "list": listing, "catalog": cataloguing, "expire": deciding, "remember": remembering, "verify": comparing,
    }  # fmt: skip
    gc.collect()
    before, began = _peak(), time.process_time()
    await work[operation]()
    return time.process_time() - began, _peak() - before


def _memory(now: datetime) -> Memory:
    return Memory("growing", SYSTEM_ID, now=now, interval=timedelta(days=30))


def _peak() -> int:
    """Bytes. Not what getrusage says: that begins with the peak of whoever has started us."""
    return high_water(os.getpid())


if __name__ == "__main__":
    seconds, size = asyncio.run(_measured(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
    print(json.dumps({"seconds": seconds, "bytes": size}))
