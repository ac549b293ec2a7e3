"""An encrypted repository in memory, of every kind of object, at two destinations: for tests of verify and heal."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from handlers.fetch import Fetcher
from handlers.verify_report import Report
from infra.keyring import RepositoryKeys
from infra.keys import Policy
from infra.repository import Destination, RepositoryFacts
from infra.settings import Settings
from infra.storage.memory import MemoryStore
from infra.verification import Order, verify_site
from infra.wiring import Listeners, Site, make_chain
from pipeline.catalog import index_key, info_key, manifest_key, part_key, wal_key
from pipeline.contracts import Store
from pipeline.objects import MemoryBody
from pipeline.verified import memory_key
from pipeline.wal import Lsn, WalFile
from tests.clock import FastClock
from tests.keys import NOW, SYSTEM_ID, chain, encrypting_keys, plain_keys, stored
from tests.laying import cluster, manifest, store
from tests.parts import Shelf
from tests.tails import lay

SIZE = 1 << 20
NAME = "b"
RING = "keys/ring-00000001"
#: Of which tails are stored.
OPEN = WalFile.segment(1, 4 * SIZE, SIZE)
KEYS = encrypting_keys()
assert KEYS.key_object is not None
DATA_KEY = KEYS.key_object[0]


def segment(number: int) -> str:
    return wal_key(WalFile.segment(1, number * SIZE, SIZE))


#: One of each kind that there is.
KINDS = {
    "wal": segment(2), "part": part_key(NAME, "base", 3), "index": index_key(NAME, 1), "manifest": manifest_key(NAME),
    "info": info_key(NAME), "ring": RING, "data key": DATA_KEY, "tail": f"tail/{OPEN.name}/00000001-000001f4-00000384",
}  # fmt: skip


async def objects(*, wrong: str = "") -> dict[str, bytes]:
    """Name → stored bytes. ``wrong``: a file that the manifest lists with another content than the archive has."""
    shelf = Shelf(SYSTEM_ID)
    shelf.chain = chain(KEYS, cipher="aes-256-gcm")
    archives = {"base": cluster()}
    info = replace(await store(shelf, archives, name=NAME), system_id=SYSTEM_ID)
    if wrong:
        listed = manifest({"base": archives["base"] | {wrong: b"another"}})
        await shelf.store.delete([manifest_key(NAME)])
        info = replace(info, manifest=(await shelf(manifest_key(NAME), listed, backup=info.id)).digest)
    info = replace(info, start_lsn=Lsn(SIZE + 40), stop_lsn=Lsn(SIZE + 80))
    await shelf(info_key(NAME), info.encode(), backup=info.id)
    for number in range(4):
        await shelf(segment(number), bytes(SIZE))
    await shelf("wal/00000002.history", f"1\t{Lsn(4 * SIZE + 100)}\twhy\n".encode())
    await lay(shelf.store, shelf.chain, OPEN, bytes(SIZE), [(0, 500), (500, 900)])
    found = {name: content for name, (content, _) in shelf.store._objects.items()}
    assert KEYS.key_object is not None
    found[DATA_KEY] = b"".join(KEYS.key_object[1].chunks())
    # What is inside a ring matters to whoever opens it; here it is stored bytes.
    found[RING] = stored(chain(plain_keys(), "none"), RING, b"a ring")
    return found


@dataclass
class Ground:
    """The repository at its destinations, and what is said of it."""

    objects: dict[str, bytes]
    stores: list[MemoryStore] = field(default_factory=lambda: [MemoryStore("first"), MemoryStore("second")])
    clock: FastClock = field(default_factory=lambda: FastClock(NOW))
    keys: RepositoryKeys = KEYS
    said: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    async def make(cls, found: dict[str, bytes], count: int = 2) -> Ground:
        ground = cls(found, [MemoryStore(name) for name in ("first", "second", "third")[:count]])
        for place in ground.stores:
            for name, content in found.items():
                await place.put(name, MemoryBody([content]))
        return ground

    def site(self, *stores: Store) -> Site:
        """At these stores, or at all of ours."""
        places = stores or tuple(self.stores)
        chosen = Settings(_env_file=None, **self.settings)
        made = make_chain(chosen, self.keys, SYSTEM_ID)
        facts = RepositoryFacts(SYSTEM_ID, 17, SIZE, NOW.isoformat())
        fetch = Fetcher(places, made, SYSTEM_ID)
        destinations = tuple(Destination(each, required=True) for each in places)
        return Site(chosen, facts, destinations, places, self.keys, made, fetch, self.clock, Listeners())

    async def verify(self, *stores: Store, **order: Any) -> Report:
        """What ``walship verify`` does; what it says is in ``said``."""
        self.said.clear()
        self.clock.passed += 60  # two runs never begin at one moment
        return await verify_site(self.site(*stores), Order(**order), tell=self.said.append)

    def later(self, **span: float) -> None:
        self.clock.passed += timedelta(**span).total_seconds()

    def rot(self, name: str, place: int = 1, *, bit: int = -400) -> None:
        """A bit flips: nobody has written, so size and time stay."""
        content, modified = self.stores[place]._objects[name]
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        self.stores[place]._objects[name] = bytes(changed), modified

    def lose(self, name: str, place: int = 1) -> None:
        del self.stores[place]._objects[name]

    def content(self, place: int = 1) -> dict[str, bytes]:
        """All objects there but what verify remembers."""
        there = self.stores[place]._objects.items()
        return {name: content for name, (content, _) in there if not name.startswith("verified/")}

    def memory(self, place: int = 1) -> str:
        """Name of what is remembered of it."""
        return memory_key(self.stores[place].name)


def writer_keys() -> RepositoryKeys:
    """The same repository, opened by a host that can only write."""
    ring = KEYS.ring
    return RepositoryKeys(
        SYSTEM_ID, getattr(ring, "writer", None), Policy(wal=True, base=True), store=None, allow_unencrypted=False
    )
