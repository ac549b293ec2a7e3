"""A host with a writer file alone: it writes what it cannot read, and nothing that it says takes that for damage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from handlers.fetch import Fetcher, read_catalog
from handlers.verify import verify
from infra import overlap
from infra.at_hand import AtHand
from infra.holdings import hold
from infra.keyring import RepositoryKeys
from infra.keys import Policy, open_keyring
from infra.repository import Destination, RepositoryFacts
from infra.ring import Ring, Writer, fresh_ring, make_data_key, ring_name, seal_ring
from infra.settings import Settings
from infra.storage.memory import MemoryStore
from infra.stored import look_at_stored
from infra.survey import repository_reading
from infra.wiring import Listeners, Site
from pipeline.backup import ArchiveInfo, BackupInfo
from pipeline.catalog import REPOSITORY, data_key_name, info_key, part_key, wal_key
from pipeline.contracts import Store
from pipeline.errors import ConfigError, Sealed, SourceError
from pipeline.lineage import Leg, Lineage
from pipeline.objects import MemoryBody
from pipeline.resume import GoOn
from pipeline.wal import Lsn, WalFile
from tests.clock import FastClock
from tests.keys import NOW, SYSTEM_ID, chain, plain_keys, read, stored
from tests.stores import Faulty
from tests.tails import lay

SIZE = 1 << 20
CLOCK = FastClock()
PASSPHRASE = "correct horse battery"
RING = fresh_ring(SYSTEM_ID, Policy(wal=True, base=True))
WRITER = AtHand(writer=RING.writer)
BACKUP, ID = "base_20260114_120000", "5f" * 16
FULL, OPEN = WalFile.segment(1, 3 * SIZE, SIZE), WalFile.segment(1, 4 * SIZE, SIZE)
HISTORY = "wal/00000002.history"


@pytest.fixture
async def store() -> MemoryStore:
    """A repository that somebody else has written to: a backup, WAL, a history and tails."""
    store = MemoryStore("bucket")
    await put_ring(store, RING)
    keys = await open_keyring(store, SYSTEM_ID, PASSPHRASE, writer=True, clock=CLOCK)
    assert keys.key_object is not None
    await store.put(*keys.key_object)
    encode = chain(keys, "zstd", "aes-256-gcm")
    part = stored(encode, part_key(BACKUP, "base", 1), b"tar" * 99, backup=ID)
    info = BackupInfo(
        BACKUP, ID, "full", SYSTEM_ID, 170000, SIZE, 1, Lsn(3 * SIZE + 40), Lsn(3 * SIZE + 80), NOW, NOW, (),
        (ArchiveInfo("base", 297, (part[-32:].hex(),)),), (), "", 100,
    )  # fmt: skip
    await store.put(part_key(BACKUP, "base", 1), MemoryBody([part]))
    await store.put(info_key(BACKUP), MemoryBody([stored(encode, info_key(BACKUP), info.encode(), backup=ID)]))
    await store.put(HISTORY, MemoryBody([stored(encode, HISTORY, b"1\t0/500000\twhy\n")]))
    await store.put(wal_key(FULL), MemoryBody([stored(encode, wal_key(FULL), bytes(SIZE))]))
    await lay(store, encode, OPEN, b"x" * SIZE, [(0, 4096)])
    return store


async def put_ring(store: Store, ring: Ring, number: int = 1) -> None:

    sealed = seal_ring(ring, [PASSPHRASE], [], NOW, scrypt_n=16)
    await store.put(ring_name(number), MemoryBody([stored(chain(plain_keys(), "none"), ring_name(number), sealed)]))


async def writing(store: MemoryStore) -> RepositoryKeys:
    return await open_keyring(store, SYSTEM_ID, WRITER, writer=True, clock=CLOCK)


def site_of(store: MemoryStore, keys: RepositoryKeys) -> Site:
    facts = RepositoryFacts(SYSTEM_ID, 17, SIZE, "2026-01-14T12:00:00Z")
    joined = chain(keys, "zstd", "aes-256-gcm")
    fetch = Fetcher((store,), joined, SYSTEM_ID, refresh=lambda: keys.refresh_from((store,)))
    settings, destination = Settings(), Destination(store, required=True)
    return Site(settings, facts, (destination,), (store,), keys, joined, fetch, CLOCK, Listeners())


async def test_what_it_writes_others_read_and_it_does_not() -> None:
    store = MemoryStore("bucket")
    await put_ring(store, RING)
    first = await writing(store)
    assert isinstance(first.ring, Writer)
    assert (first.encrypted, first.reads) == (True, False)
    assert first.key_object is not None
    await store.put(*first.key_object)
    await first.confirm(store)
    name = wal_key(FULL)
    sealed = stored(chain(first, "zstd", "aes-256-gcm"), name, b"text")
    reader = await open_keyring(store, SYSTEM_ID, PASSPHRASE, clock=CLOCK)
    assert read(chain(reader), name, sealed) == b"text"
    # After a restart it cannot read what it has written; and tells same from other bytes.
    second = await writing(store)
    await second.refresh()
    assert second.data_keys == {first.current().id: 1}
    with pytest.raises(Sealed, match="this host can only write") as error:
        read(chain(second), name, sealed)
    assert "keys/ring-00000001 opens with a passphrase" in error.value.hint
    assert second.fingerprint(name, b"text") == first.fingerprint(name, b"text") == reader.fingerprint(name, b"text")
    with pytest.raises(ConfigError, match="walship restore reads what is stored, and this host can only write"):
        second.need_reading("walship restore")
    with pytest.raises(ConfigError, match="this host can only write"):
        second.restore_keys()
    reader.need_reading("walship restore")


async def test_a_writer_file_has_to_fit_the_newest_ring(store: MemoryStore) -> None:
    stranger, later = fresh_ring("8", RING.policy).writer, replace(RING.writer, number=2)
    with pytest.raises(ConfigError, match="WALSHIP_WRITER_FILE is for the cluster 8"):
        await open_keyring(store, SYSTEM_ID, AtHand(writer=stranger), clock=CLOCK)
    with pytest.raises(ConfigError, match="no ring newer than keys/ring-00000001"):
        await open_keyring(store, SYSTEM_ID, AtHand(writer=later), clock=CLOCK)
    await put_ring(store, replace(RING, number=2), 2)
    assert not (await writing(store)).reads, "other secrets open it, and what is written stays readable"
    await put_ring(store, replace(fresh_ring(SYSTEM_ID, RING.policy), number=3), 3)
    with pytest.raises(ConfigError, match="another key since keys/ring-00000003: nobody who opens that could read"):
        await writing(store)
    with pytest.raises(ConfigError, match="has no key ring"):
        await open_keyring(MemoryStore("empty"), SYSTEM_ID, WRITER, clock=CLOCK)


async def test_a_listing_says_what_it_cannot_tell_and_calls_nothing_damaged(store: MemoryStore) -> None:
    site = site_of(store, await writing(store))
    catalog = await read_catalog((store,), site.fetch, SYSTEM_ID, segment_size=SIZE)
    assert ([*catalog.sealed], catalog.backups) == ([BACKUP], ())
    assert (catalog.problems, catalog.tail_notices, catalog.unreadable) == ((), (), {})
    assert catalog.has_segment(1, 3)
    report = await verify(catalog, (store,), chain=None)
    assert report.ok
    assert report.objects == 7, "the ring, the data key, a segment, a history, a tail, a part and its backup_info"
    assert any(BACKUP in warning for warning in report.warnings)


async def test_damage_is_found_without_reading(store: MemoryStore) -> None:
    key = part_key(BACKUP, "base", 1)
    content, when = store._objects[key]
    store._objects[key] = (content[:200] + b"X" + content[201:], when)
    site = site_of(store, await writing(store))
    catalog = await read_catalog((store,), site.fetch, SYSTEM_ID, segment_size=SIZE)
    report = await verify(catalog, (store,), chain=None)
    assert [(fault.name, fault.kind) for fault in report.faults] == [(key, "damaged")]


async def test_the_service_counts_backups_by_their_names(store: MemoryStore) -> None:
    site = site_of(store, await writing(store))
    await store.put(REPOSITORY, MemoryBody([b"{}"]))
    holding = await hold(store, site, {}, required=True)
    assert (holding.last_backup, holding.problems(1), holding.error) == (BACKUP, (), "")
    assert holding.reach(1).lsn == Lsn(4 * SIZE + 4096)
    assert holding.reach(2).lsn is None
    reading = repository_reading(holding)
    assert reading.backups == 1
    assert reading.newest is not None
    assert reading.newest.stopped == store._objects[info_key(BACKUP)][1].timestamp()


async def test_the_stream_goes_on_behind_the_last_segments(store: MemoryStore) -> None:
    found = await look_at_stored(site_of(store, await writing(store)))
    assert found.backups == []
    assert 3 in found.anywhere[1]


async def test_tails_that_cannot_be_read_are_not_damaged(store: MemoryStore) -> None:
    site = site_of(store, await writing(store))
    with pytest.raises(Sealed):
        await site.fetch.tail(OPEN, SIZE, lenient=True)


@pytest.mark.parametrize(("byte", "same"), [(b"x", True), (b"y", False)])
async def test_the_open_segment_is_compared_by_fingerprint(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, byte: bytes, same: bool
) -> None:
    asked: list[int] = []

    async def from_server(_settings: Settings, file: WalFile, _size: int, length: int) -> bytearray:
        assert file == OPEN
        asked.append(length)
        return bytearray(byte * length)

    monkeypatch.setattr(overlap, "fetch_part", from_server)
    site = site_of(store, await writing(store))
    lineage, where = Lineage((Leg(1, Lsn(0), None),), SIZE), GoOn(1, Lsn(4 * SIZE))
    if same:
        await overlap.check_overlap(site, lineage, {}, where)
    else:
        with pytest.raises(SourceError, match="segment 000000010000000000000004 at bucket has other bytes"):
            await overlap.check_overlap(site, lineage, {}, where)
    assert asked == [4096]


async def test_keys_that_it_will_never_know_are_read_once() -> None:
    store = Faulty(MemoryStore("bucket"))
    await put_ring(store, RING)
    stranger, sealed = make_data_key(fresh_ring(SYSTEM_ID, RING.policy), NOW)
    name = data_key_name(stranger.id)
    await store.put(name, MemoryBody([stored(chain(plain_keys(), "none"), name, sealed)]))
    keys = await open_keyring(store, SYSTEM_ID, WRITER, clock=CLOCK)
    assert store.calls.count(("get", name)) == 1
    await keys.refresh()
    assert store.calls.count(("get", name)) == 1
    reader = await open_keyring(store, SYSTEM_ID, PASSPHRASE, clock=CLOCK)
    await reader.refresh()
    assert store.calls.count(("get", name)) == 3, "it may have been mended"
