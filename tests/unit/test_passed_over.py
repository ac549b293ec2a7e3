"""Every kind of object that a restore reads: lost, damaged or not handed out at one destination, served by the next.

And each time the person who waits is told.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import structlog

from handlers.fetch import Fetcher, read_catalog
from infra.keys import Policy, RepositoryKeys, open_keyring, open_keys
from infra.ring import fresh_ring, ring_name, seal_ring
from infra.settings import Settings
from infra.storage.memory import MemoryStore
from pipeline.backup import ArchiveInfo, BackupInfo
from pipeline.catalog import REPOSITORY, index_key, info_key, manifest_key, part_key, wal_key
from pipeline.contracts import Body, Span
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody
from pipeline.wal import Lsn, WalFile
from tests.clock import FastClock
from tests.keys import NOW, SYSTEM_ID, chain, plain_keys, stored
from tests.stores import Faulty
from tests.tails import lay

SIZE = 1 << 20
NAME = "base_20260114_120000"
FULL, OPEN = (WalFile.segment(1, number * SIZE, SIZE) for number in (3, 4))
PART, INDEX, MANIFEST = part_key(NAME, "base", 1), index_key(NAME, 1), manifest_key(NAME)
HISTORY = "wal/00000002.history"
RING = ring_name(1)
ID = "b" * 32
PASSPHRASE = "correct horse"
CLOCK = FastClock()


class Refusing(Faulty):
    """Does not hand out one object."""

    refused = ""

    async def get(self, key: str, span: Span | None = None) -> Body:
        if key == self.refused:
            raise StoreError(f"first does not hand out {key}", passing=True)
        return await super().get(key, span)


@functools.cache
def ring_object() -> bytes:
    """Cheap to open."""
    sealed = seal_ring(fresh_ring(SYSTEM_ID, Policy(wal=True, base=True)), [PASSPHRASE], [], NOW, scrypt_n=1024)
    return stored(chain(plain_keys(), "none"), RING, sealed)


@dataclass
class Twins:
    """Two destinations with the same encrypted repository; the first one is read first."""

    first: Refusing
    second: MemoryStore
    #: Of the part, as backup_info lists it.
    digest: str
    tail: str
    data_key: str

    async def read_all(self) -> list[str]:
        """All that a restore reads, compared; returns what people were told."""
        said: list[str] = []
        stores = (self.first, self.second)
        settings = Settings(BACKUP_ENCRYPTION_PASSWORD=PASSPHRASE)
        with structlog.testing.capture_logs() as logged:
            keys = await open_keys(stores, settings, SYSTEM_ID, CLOCK, writer=False, allow_unencrypted=False)
        said += [f"{entry['destination']}: {entry['error']}" for entry in logged]
        fetch = Fetcher(stores, chain(keys, "zstd", "aes-256-gcm"), SYSTEM_ID, notify=said.append)
        catalog = await read_catalog(stores, fetch, SYSTEM_ID)
        assert [backup.name for backup in catalog.backups] == [NAME]
        assert catalog.histories.keys() == {2}
        assert catalog.tails == {1: {4: 4096}}
        assert (catalog.problems, catalog.tail_notices) == ((), ())
        for key in (PART, INDEX, MANIFEST):
            assert bytes((await fetch(key, backup=ID)).plain) == key.encode() * 9
        pieces: list[bytes] = []
        await fetch.into(PART, lambda plain: pieces.extend(map(bytes, plain)), digest=self.digest, backup=ID)
        assert b"".join(pieces) == PART.encode() * 9
        assert len((await fetch(wal_key(FULL))).plain) == SIZE
        made = await fetch.tail(OPEN, SIZE)
        assert made is not None
        assert (made.reach, made.notices) == (4096, ())
        return said


@pytest.fixture
async def twins() -> Twins:
    first, second = MemoryStore("first"), MemoryStore("second")
    await first.put(REPOSITORY, MemoryBody([b"{}"]))
    await first.put(RING, MemoryBody([ring_object()]))
    keys: RepositoryKeys = await open_keyring(first, SYSTEM_ID, PASSPHRASE, writer=True, clock=CLOCK)
    assert keys.key_object is not None
    await first.put(*keys.key_object)
    encode = chain(keys, "zstd", "aes-256-gcm")
    digest = ""
    for key in (PART, INDEX, MANIFEST):
        content = stored(encode, key, key.encode() * 9, backup=ID)
        digest = content[-32:].hex() if key == PART else digest
        await first.put(key, MemoryBody([content]))
    info = BackupInfo(
        NAME, ID, "full", SYSTEM_ID, 170000, SIZE, 1, Lsn(3 * SIZE + 40), Lsn(3 * SIZE + 80), NOW, NOW, (),
        (ArchiveInfo("base", 1000, (digest,)),), (digest,), digest, 100,
    )  # fmt: skip
    await first.put(info_key(NAME), MemoryBody([stored(encode, info_key(NAME), info.encode(), backup=ID)]))
    await first.put(HISTORY, MemoryBody([stored(encode, HISTORY, b"1\t0/500000\twhy\n")]))
    await first.put(wal_key(FULL), MemoryBody([stored(encode, wal_key(FULL), bytes(SIZE))]))
    (tail,) = await lay(first, encode, OPEN, b"x" * SIZE, [(0, 4096)])
    async for entry in first.list(""):
        await second.put(entry.key, await first.get(entry.key))
    return Twins(Refusing(first), second, digest, tail, keys.key_object[0])


async def test_nothing_is_told_where_all_is_well(twins: Twins) -> None:
    assert await twins.read_all() == []
    assert not any(operation == "put" for operation, _ in twins.first.calls)


@pytest.mark.parametrize("how", ["lost", "damaged", "refused"])
@pytest.mark.parametrize(
    "what", ["info", PART, INDEX, MANIFEST, HISTORY, wal_key(FULL), "tail", RING, "data_key"], ids=str
)
async def test_the_next_destination_serves_it_and_that_is_told(twins: Twins, what: str, how: str) -> None:
    key = {"info": info_key(NAME), "tail": twins.tail, "data_key": twins.data_key}.get(what, what)
    if how == "lost":
        await twins.first.delete([key])
    elif how == "damaged":
        twins.first.flip[key] = 4 * (await twins.first.head(key)).size
    else:
        twins.first.refused = key
    said = await twins.read_all()
    if (what, how) == ("tail", "lost"):
        return  # each destination has tails of its own cut: one that the other lacks is nothing to tell
    assert said, "nobody was told"
    assert all("first" in line for line in said)


async def test_a_destination_that_lacks_much_is_not_told_object_by_object(twins: Twins) -> None:
    async for entry in twins.second.list("base/"):
        await twins.first.delete([entry.key])
    said: list[str] = []
    keys = await open_keyring(twins.second, SYSTEM_ID, PASSPHRASE, clock=CLOCK)
    fetch = Fetcher((twins.first, twins.second), chain(keys), SYSTEM_ID, notify=said.append)
    for _ in range(20):
        await fetch(PART, backup=ID)
    assert len(said) == 6
    assert said[0] == f"first lacks {PART}; second served it instead"
    assert said[-1] == "first has more that others have to serve; that is not told one by one"
