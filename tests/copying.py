"""A repository with one of everything, and where it goes: for tests of copying."""

from __future__ import annotations

import asyncio

from handlers.difference import Wanted
from infra.copying import Ends
from infra.repository import RepositoryFacts
from infra.storage.memory import MemoryStore
from pipeline.catalog import REPOSITORY, info_key, part_key
from pipeline.contracts import Body, Span, Store
from pipeline.errors import ConfigError
from pipeline.objects import MemoryBody
from tests import keys
from tests.clock import FastClock
from tests.keys import SYSTEM_ID

ALL = Wanted(beside=True, sizes=True)
BACKUPS = ("base_20260101_000000", "base_20260102_000000")
SEGMENTS = [f"wal/0000000100000000/0000000100000000000000{number:02X}" for number in range(1, 5)]
LACKING = [
    "wal/00000002.history", "wal/0000000100000000/000000010000000000000002.00000028.backup",
    "wal/0000000100000000/000000010000000000000005.partial", "conflict/00000003.history.0123456789abcdef",
    "tail/000000010000000000000006/00000001-00000000-00000400", f"pin/{BACKUPS[0]}",
    "log/20260102T000000Z-backup-ok-01234567",
]  # fmt: skip
#: Of no use at another place.
STAYS = ["tail/000000010000000000000001/00000001-00000000-00000400", "lease/00000001", "use/x/00000001", "log/check-1",
         "wal/0000000100000000/README", "verified/0123/00000001"]  # fmt: skip
TORSO = "base/base_20260103_000000/data/base/00000001"


def content(store: MemoryStore) -> dict[str, bytes]:
    return {name: held for name, (held, _) in store._objects.items()}


async def source(name: str = "a") -> MemoryStore:
    """A repository with one of everything."""
    store = MemoryStore(name)
    ring = keys.encrypting_keys()
    assert ring.key_object is not None
    chain = keys.chain(ring, cipher="aes-256-gcm")
    key_name, key_body = ring.key_object
    await store.put(key_name, key_body)
    await store.put(REPOSITORY, facts().encode())
    backups = [
        object_name
        for backup in BACKUPS
        for object_name in (part_key(backup, "base", 1), part_key(backup, "base", 2), f"base/{backup}/index/00000001",
                            f"base/{backup}/backup_manifest", info_key(backup))
    ]  # fmt: skip
    for object_name in [*SEGMENTS, *LACKING, *STAYS, TORSO, *backups]:
        await store.put(object_name, MemoryBody([keys.stored(chain, object_name, object_name.encode() * 20)]))
    return store


class Still(FastClock):
    """Nobody's heart beats again while a copy takes no time."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(3600 if seconds else 0)


def facts() -> RepositoryFacts:
    return RepositoryFacts(SYSTEM_ID, 17, 1 << 20, "2026-01-14T12:00:00+00:00")


def expected(from_store: MemoryStore) -> dict[str, bytes]:
    return {name: held for name, held in content(from_store).items() if name not in (*STAYS, TORSO, REPOSITORY)}


def ends(origin: object, target: object, *others: object) -> Ends:
    root = target if isinstance(target, MemoryStore) else MemoryStore("unused")
    no_key = ConfigError("there is no key")
    return Ends(facts(), (origin, *others), target, root, None, no_key, Still())  # type: ignore[arg-type]


def rooting(store: MemoryStore) -> Store:
    """What holds the cluster's folder, as far as ``repository.json`` is looked for there."""

    class Root(MemoryStore):
        async def get(self, key: str, span: Span | None = None) -> Body:
            return await store.get(key.removeprefix(f"{SYSTEM_ID}/"), span)

    return Root()
