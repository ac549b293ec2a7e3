"""Reading from several destinations, the listing of a repository, and its verification."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from handlers.fetch import Fetcher, read_catalog
from handlers.verify import verify
from infra.storage.memory import MemoryStore
from pipeline.backup import ArchiveInfo, BackupInfo
from pipeline.catalog import info_key, part_key, wal_key
from pipeline.contracts import Buffer, Store
from pipeline.errors import IntegrityError, ObjectMissing, RecoveryError, StoreError
from pipeline.objects import MemoryBody
from pipeline.recovery import candidates
from pipeline.targets import Target
from pipeline.wal import Lsn, WalFile
from tests.parts import Shelf
from tests.stores import Faulty

SIZE = 1 << 20
SEGMENT = WalFile.segment(1, 3 * SIZE, SIZE)
KEY = wal_key(SEGMENT)


def unreachable(name: str) -> Store:
    """A store that lists but does not hand out anything."""
    return Faulty(MemoryStore(name), down={"get": StoreError(f"{name} does not answer", passing=True)})


async def copy(shelf: Shelf, store: MemoryStore, *, flip: str = "") -> MemoryStore:
    """All objects in another store; one bit in the middle of ``flip`` is another there."""
    async for info in shelf.store.list(""):
        content = bytearray(b"".join((await shelf.store.get(info.key)).chunks()))
        if info.key == flip:
            content[len(content) // 2] ^= 4
        await store.put(info.key, MemoryBody([bytes(content)]))
    return store


def fetcher(shelf: Shelf, *stores: Store, said: list[str] | None = None) -> Fetcher:
    return Fetcher(stores, shelf.chain, shelf.system_id, notify=(said if said is not None else []).append)


@pytest.fixture
async def shelf() -> Shelf:
    shelf = Shelf()
    await shelf(KEY, bytes(range(256)) * (SIZE // 256))
    return shelf


async def test_the_first_good_destination_serves(shelf: Shelf) -> None:
    said: list[str] = []
    damaged = await copy(shelf, MemoryStore("damaged"), flip=KEY)
    fetch = fetcher(shelf, MemoryStore("empty"), damaged, unreachable("down"), shelf.store, said=said)
    fetched = await fetch(KEY)
    assert (fetched.destination, fetched.digest) == ("memory", shelf.digests[KEY])
    assert bytes(fetched.plain) == bytes(range(256)) * (SIZE // 256)
    assert len(said) == 3
    assert said[0] == f"empty lacks {KEY}; memory served it instead"
    assert said[1].startswith("damaged: ")
    assert "down does not answer" in said[2]


async def test_what_is_handed_over_is_the_object_that_was_listed(shelf: Shelf) -> None:
    """A copy that is damaged, or was exchanged for another valid one, is found before anything of it is used."""
    said: list[str] = []
    damaged = await copy(shelf, MemoryStore("damaged"), flip=KEY)
    other = Shelf()
    await other(KEY, bytes(SIZE))
    fetch = fetcher(shelf, MemoryStore("empty"), damaged, other.store, unreachable("down"), shelf.store, said=said)
    calls: list[bytes] = []
    digest = shelf.digests[KEY]
    await fetch.into(KEY, lambda pieces: calls.append(b"".join(map(bytes, pieces))), digest=digest)
    assert calls == [bytes(range(256)) * (SIZE // 256)]
    assert len(said) == 4
    assert any("is not the one that is listed" in line for line in said)
    with pytest.raises(IntegrityError, match="is not the one that is listed"):
        await fetcher(shelf, other.store).into(KEY, lambda _: calls.clear(), digest=digest)
    with pytest.raises(ObjectMissing):
        await fetcher(shelf, MemoryStore()).into(KEY, lambda _: calls.clear(), digest=digest)
    with pytest.raises(IntegrityError, match="belongs to the base backup"):
        await fetch.into(KEY, lambda pieces: calls.extend(map(bytes, pieces)), digest=digest, backup="b" * 32)
    assert len(calls) == 1


async def test_an_error_of_who_uses_it_is_no_fault_of_the_destination(shelf: Shelf) -> None:
    def full(pieces: Iterator[Buffer]) -> None:
        next(pieces)
        raise OSError(28, "No space left on device")

    said: list[str] = []
    with pytest.raises(OSError, match="No space left"):
        await fetcher(shelf, shelf.store, said=said).into(KEY, full, digest=shelf.digests[KEY])
    assert not said


async def test_cancelled_it_ends_once_nobody_uses_it_any_more(shelf: Shelf) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def use(pieces: Iterator[Buffer]) -> None:
        begun.set()
        assert go_on.wait(30)
        for _ in pieces:
            pass
        ended.set()

    task = asyncio.create_task(fetcher(shelf, shelf.store).into(KEY, use, digest=shelf.digests[KEY]))
    assert await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_absent_means_that_all_answered(shelf: Shelf) -> None:
    empty, down = MemoryStore("empty"), unreachable("down")
    with pytest.raises(ObjectMissing, match="missing from empty, empty"):
        await fetcher(shelf, empty, empty)(KEY)
    for stores in ((empty, down), (down, empty)):
        with pytest.raises(StoreError, match="down does not answer") as caught:
            await fetcher(shelf, *stores)(KEY)
        assert not isinstance(caught.value, ObjectMissing)
    damaged = await copy(shelf, MemoryStore("damaged"), flip=KEY)
    with pytest.raises(IntegrityError, match="damaged: "):
        await fetcher(shelf, empty, damaged)(KEY)
    with pytest.raises(StoreError, match="down does not answer"):
        await fetcher(shelf, damaged, down)(KEY)


async def backed_up(shelf: Shelf, name: str = "base_20260114_120000") -> BackupInfo:
    """A complete backup of two parts, and the WAL it needs."""
    moment = datetime(2026, 1, 14, 12, tzinfo=UTC)
    digests = []
    for number in (1, 2):
        shipped = await shelf(part_key(name, "base", number), bytes([number]) * 1000, backup="b" * 32)
        digests.append(shipped.digest)
    info = BackupInfo(
        name, "b" * 32, "full", shelf.system_id, 170000, SIZE, 1, Lsn(3 * SIZE + 40), Lsn(4 * SIZE + 80), moment,
        moment, (), (ArchiveInfo("base", 2000, tuple(digests)),), (), "", 100,
    )  # fmt: skip
    await shelf(info_key(name), info.encode(), backup=info.id)
    for number in (4, 5, 8):
        await shelf(wal_key(WalFile.segment(1, number * SIZE, SIZE)), bytes(SIZE))
    return info


async def test_a_catalog_is_what_any_destination_has(shelf: Shelf) -> None:
    info = await backed_up(shelf)
    await shelf("wal/00000002.history", b"1\t0/500000\twhy\n")
    await shelf("wal/00000003.history", b"not a history\n")
    await shelf.store.put("wal/readme.txt", MemoryBody([b"x"]))
    await shelf.store.put(info_key("base_20260114_130000"), MemoryBody([b"garbage"]))
    await shelf.store.put(part_key("base_20260114_140000", "base", 1), MemoryBody([b"unfinished"]))
    other = MemoryStore("other")
    catalog = await read_catalog([other, shelf.store], fetcher(shelf, other, shelf.store), shelf.system_id)
    assert catalog.backups == (info,)
    assert catalog.segment_size == SIZE
    assert catalog.segments[1].ranges == ((3, 6), (8, 9))
    assert [str(hole.first) for hole in catalog.holes()] == ["000000010000000000000006"]
    assert set(catalog.histories) == {2}
    assert (catalog.unknown, catalog.examples) == (1, ("wal/readme.txt",))
    assert len(catalog.problems) == 2
    assert "backup base_20260114_130000 cannot be used" in catalog.problems[0]
    assert "history of timeline 3" in catalog.problems[1]


async def test_a_history_that_cannot_be_read_is_not_taken_for_none(shelf: Shelf) -> None:
    """Planned without it, timeline 2 would have no ancestors, or the restore would follow timeline 1."""
    await backed_up(shelf)
    history = "wal/00000002.history"
    await shelf(history, b"1\t0/500000\twhy\n")
    damaged = await copy(shelf, MemoryStore("damaged"), flip=history)
    down = Faulty(shelf.store, fail={("get", 2): StoreError("the store does not answer", passing=True)})
    for store, reason in ((damaged, "damaged: "), (down, "the store does not answer")):
        catalog = await read_catalog([store], fetcher(shelf, store), shelf.system_id)
        assert catalog.newest_timeline == 2
        with pytest.raises(RecoveryError, match=f"timeline 2 is stored and cannot be read: {reason}") as caught:
            candidates(catalog, Target(), None)
        assert caught.value.hint.endswith("with --timeline: 1")
        assert candidates(catalog, Target(timeline=1), None)[0].timeline == 1
        assert [window.timeline for window in catalog.windows()] == [1]


async def test_parts_without_a_backup_info_are_no_backup_that_is_lost(shelf: Shelf) -> None:
    """Expired, or never finished, and the only other destination is down: nobody knows whether it was a backup."""
    info = await backed_up(shelf)
    await shelf.store.put(part_key("base_20260114_140000", "base", 1), MemoryBody([b"unfinished"]))
    down = Faulty(MemoryStore("other"), down={"get": StoreError("the folder is not there")})
    catalog = await read_catalog([shelf.store], fetcher(shelf, down, shelf.store), shelf.system_id)
    assert catalog.backups == (info,)
    assert catalog.problems == ("whether base_20260114_140000 is a backup cannot be told now: the folder is not there",)


async def test_a_record_that_only_one_destination_took_is_no_fault_of_the_others(shelf: Shelf) -> None:
    told: list[str] = []
    await shelf("log/20260114T120000Z-backup-ok-0011aabb", b"{}")
    fetch = Fetcher([MemoryStore("other"), shelf.store], shelf.chain, shelf.system_id, notify=told.append)
    assert (await fetch("log/20260114T120000Z-backup-ok-0011aabb")).plain == b"{}"
    assert told == []


async def test_a_backup_info_of_another_backup_is_noticed(shelf: Shelf) -> None:
    info = await backed_up(shelf)
    await shelf(info_key("base_20260114_150000"), info.encode(), backup=info.id)
    catalog = await read_catalog([shelf.store], fetcher(shelf, shelf.store), shelf.system_id)
    assert catalog.backups == (info,)
    assert "describes the backup base_20260114_120000" in catalog.problems[0]


async def test_without_a_backup_the_segment_size_is_measured(shelf: Shelf) -> None:
    catalog = await read_catalog([shelf.store], fetcher(shelf, shelf.store), shelf.system_id)
    assert catalog.segment_size == SIZE


async def test_verify_finds_every_kind_of_fault(shelf: Shelf) -> None:
    info = await backed_up(shelf)
    lost, flipped = part_key(info.name, "base", 1), wal_key(WalFile.segment(1, 4 * SIZE, SIZE))
    bad = await copy(shelf, MemoryStore("bad"), flip=flipped)
    await bad.delete([lost])
    catalog = await read_catalog([shelf.store], fetcher(shelf, shelf.store), shelf.system_id)
    report = await verify(catalog, [shelf.store, bad], chain=shelf.chain)
    assert {(f.destination, f.name, f.kind) for f in report.faults} == {
        ("bad", lost, "missing"), ("bad", flipped, "damaged"),
    }  # fmt: skip
    (verdict,) = report.backups
    assert verdict.usable, "each object is good at one destination"
    assert verdict.hole == "000000010000000000000006"
    assert not report.ok
    alone = await verify(catalog, [bad])
    assert not alone.backups[0].usable
    assert report.summary()["holes"] == [
        {"first": "000000010000000000000006", "last": "000000010000000000000007", "segments": 2}
    ]


async def test_verify_of_what_is_whole_is_ok(shelf: Shelf) -> None:
    info = await backed_up(shelf)
    await shelf.store.delete([wal_key(WalFile.segment(1, 8 * SIZE, SIZE))])
    catalog = await read_catalog([shelf.store], fetcher(shelf, shelf.store), shelf.system_id)
    for backup in (None, info.name):
        report = await verify(catalog, [shelf.store], chain=shelf.chain, backup=backup)
        assert report.ok
        assert report.objects == 6
    # A part in the place of another one is whole by itself.
    first, second = (part_key(info.name, "base", n) for n in (1, 2))
    body = await shelf.store.get(second)
    await shelf.store.put(first, body, replace=True)
    report = await verify(catalog, [shelf.store])
    assert [(f.name, f.kind) for f in report.faults] == [(first, "damaged")]
