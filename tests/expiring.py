"""Repositories made by hand for tests of expire: real objects, no server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from infra.expire import Outcome, Plan, expire, make_plan, marks_of
from infra.repository import RepositoryFacts
from infra.storage.memory import MemoryStore
from infra.wiring import Site
from pipeline.backup import ArchiveInfo, BackupInfo
from pipeline.catalog import REPOSITORY, index_key, info_key, manifest_key, part_key, wal_key
from pipeline.contracts import Store
from pipeline.objects import MemoryBody
from pipeline.policy import Policy
from pipeline.wal import Lsn, WalFile
from tests.keys import SYSTEM_ID
from tests.sites import site_at
from tests.tails import lay

SIZE = 1 << 20
START = datetime(2026, 1, 1, tzinfo=UTC)


async def put(site: Site, name: str, plain: bytes, *, backup: str = "", stores: Sequence[Store] | None = None) -> str:
    """Store an object at all destinations; its trailer as hex."""
    content = b"".join(bytes(piece) for piece in site.chain.encode(name, plain, backup=backup, created=START))
    for store in site.stores if stores is None else stores:
        await store.put(name, MemoryBody([content]))
    return content[-32:].hex()


async def add_backup(
    site: Site, day: int, first: int, *, timeline: int = 1, parent: BackupInfo | None = None, parts: int = 2
) -> BackupInfo:
    """A backup that ended on that day; its WAL is the segments ``first`` and the next."""
    stopped = START + timedelta(days=day)
    name, number = f"base_{stopped:%Y%m%d_%H%M%S}", f"{day:032x}"
    digests = [await put(site, part_key(name, "base", n + 1), b"part %d" % n, backup=number) for n in range(parts)]
    index = await put(site, index_key(name, 1), b"{}", backup=number)
    manifest = await put(site, manifest_key(name), b"{}", backup=number)
    info = BackupInfo(
        name, number, "incremental" if parent else "full", SYSTEM_ID, 170000, SIZE, timeline, Lsn(first * SIZE + 40),
        Lsn((first + 1) * SIZE + 80), stopped - timedelta(minutes=1), stopped, (),
        (ArchiveInfo("base", 1000, tuple(digests)),), (index,), manifest, 100,
        parent=parent.name if parent else "", parent_id=parent.id if parent else "",
    )  # fmt: skip
    await put(site, info_key(name), info.encode(), backup=number)
    return info


async def add_wal(site: Site, first: int, end: int, *, timeline: int = 1, raw: bool = False) -> None:
    """Segments of zeros; ``raw``: no objects that could be read, for tests that need many."""
    for number in range(first, end):
        name = wal_key(WalFile.segment(timeline, number * SIZE, SIZE))
        if raw:
            for store in site.stores:
                await store.put(name, MemoryBody([b"0123456789"]))
        else:
            await put(site, name, bytes(SIZE))


async def small(*stores: Store) -> tuple[Site, list[BackupInfo]]:
    """Two chains and two more backups, a fork, and WAL of everything: what all rules have something to do with."""
    site = await site_at(*(stores or (MemoryStore("a"), MemoryStore("b"))))
    facts = RepositoryFacts(SYSTEM_ID, 17, SIZE, START.isoformat())
    for store in site.stores:
        await store.put(REPOSITORY, facts.encode())
    full = await add_backup(site, 1, 2)
    backups = [full, await add_backup(site, 2, 5, parent=full), await add_backup(site, 3, 8)]
    backups.append(await add_backup(site, 4, 11, parent=backups[2]))
    backups.append(await add_backup(site, 5, 14, timeline=2))
    await add_wal(site, 0, 14)
    await add_wal(site, 13, 18, timeline=2)
    await put(site, "wal/00000002.history", f"1\t{Lsn(13 * SIZE + 512)}\twhy\n".encode())
    await put(site, wal_key(WalFile.segment(1, 13 * SIZE, SIZE)) + ".partial", bytes(SIZE))
    await put(site, wal_key(WalFile.segment(1, 2 * SIZE, SIZE)) + ".00000028.backup", b"label")
    for store in site.stores:
        await lay(store, site.chain, WalFile.segment(1, 1 * SIZE, SIZE), bytes(SIZE), [(0, 500), (500, 900)])
        await lay(store, site.chain, WalFile.segment(2, 18 * SIZE, SIZE), bytes(SIZE), [(0, 500), (500, 900)])
        for name in ("wal/note.txt", "base/note.txt", f"base/{full.name}/note.txt", "mine/a"):
            await store.put(name, MemoryBody([b"a person's"]))
    return site, backups


async def expired(site: Site, policy: Policy, *, skip: bool = False) -> tuple[Plan, Outcome]:
    """What ``walship expire --yes`` does."""
    marks = marks_of(site)
    plan = await make_plan(site, policy, marks, skip=skip, settle=True)
    return plan, await expire(site, plan, marks, tell=lambda _: None)


def at(site: Site, *stores: Store) -> Site:
    """The same site at other stores."""
    from handlers.fetch import Fetcher

    return replace(site, stores=stores, fetch=Fetcher(stores, site.chain, SYSTEM_ID))


async def names(store: Store, prefix: str = "") -> list[str]:
    return sorted([entry.key async for entry in store.list(prefix)])
