"""What somebody has left of finished segments: it goes where the finished segment holds it as well, and only there."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection

import pytest

from pipeline.catalog import wal_key
from pipeline.errors import StoreError
from pipeline.events import DeleteRefused, SourcesDiffer, TailsRemoved
from pipeline.objects import MemoryBody
from pipeline.tail import TailName
from pipeline.wal import WalFile
from tests.stores import Faulty
from tests.tailing import FILE, SIZE, Tails, running, tails, until

NEXT = FILE.next(SIZE)
LOCKED = StoreError("the store answered 403 AccessDenied to DeleteObject")
WAL = random.Random(3).randbytes(SIZE)
RANGES = [(0, 10), (10, 500), (10, 20), (400, 70_000), (70_000, SIZE)]


async def put(it: Tails, name: str, plain: bytes) -> None:
    await it.store.store.put(name, it.parcel(name, plain).body)


async def put_tails(it: Tails, file: WalFile, wal: bytes = WAL, *, epoch: int = 1) -> None:
    """Tails of ``RANGES``, as a writer of those bytes cuts them."""
    for start, end in RANGES:
        plain = hashlib.sha256(wal[:start]).digest() + wal[start:end]
        await put(it, TailName(file, epoch, start, end).key, plain)


async def finish(it: Tails, *files: WalFile, wal: bytes = WAL) -> None:
    for file in files:
        await put(it, wal_key(file), wal)


async def everything(it: Tails) -> list[str]:
    return sorted([info.key async for info in it.store.store.list("")])


async def test_left_overs_of_finished_segments_go_and_all_else_stays() -> None:
    it, _ = await tails()
    done, far, opened = FILE, WalFile.segment(1, 5 << 32, SIZE), NEXT
    forked = WalFile.segment(2, 3 * SIZE, SIZE)
    for file in (done, far, opened, forked):
        await put_tails(it, file)
    await finish(it, done, far)
    await it.store.store.put(f"tail/{done.name}/notes.txt", MemoryBody([b"not ours"]))
    await it.store.store.put("tail/README", MemoryBody([b"not ours"]))
    before = await everything(it)
    left_overs = it.left_overs()
    assert await left_overs.clean() == 10
    kept = [key for key in before if not (TailName.parse(key) and (done.name in key or far.name in key))]
    assert await everything(it) == kept
    assert it.told(TailsRemoved) == [TailsRemoved("memory", 5)] * 2
    assert await left_overs.clean() == 0
    assert it.told(SourcesDiffer) == []


@pytest.mark.parametrize("offset", [5, 15, 450, 69_999, SIZE - 1])
async def test_tails_of_other_bytes_than_the_finished_segment_stay_and_are_told_once(offset: int) -> None:
    """A clone has taken the finished name: what was acknowledged to us is in our tails alone."""
    it, _ = await tails()
    ours = WAL[:offset] + bytes([WAL[offset] ^ 1]) + WAL[offset + 1 :]
    await put_tails(it, FILE, ours, epoch=2)
    await put_tails(it, FILE, epoch=1)
    await put_tails(it, NEXT)
    await finish(it, FILE, NEXT)
    left_overs = it.left_overs()
    assert await left_overs.clean() == 5, "those of the next segment"
    assert len(await it.names()) == 10
    (told,) = it.told(SourcesDiffer)
    assert isinstance(told, SourcesDiffer)
    assert FILE.name in told.fact
    assert "memory" in told.fact
    assert wal_key(FILE) in told.hint
    read = it.store.count("get")
    assert await left_overs.clean() == 0
    assert len(it.told(SourcesDiffer)) == 1
    assert it.store.count("get") == read, "it is not read again each hour"
    assert (await it.recover()).content == ours


async def test_a_tail_that_only_claims_to_begin_with_the_same_bytes_stays() -> None:
    it, _ = await tails()
    await finish(it, FILE)
    await put(it, TailName(FILE, 1, 100, 200).key, hashlib.sha256(b"another past").digest() + WAL[100:200])
    assert await it.left_overs().clean() == 0
    assert len(it.told(SourcesDiffer)) == 1


async def test_once_the_foreign_segment_is_moved_away_the_right_one_lets_its_tails_go() -> None:
    it, _ = await tails()
    await put_tails(it, FILE)
    await finish(it, FILE, wal=bytes(SIZE))
    left_overs = it.left_overs()
    assert await left_overs.clean() == 0
    await it.store.store.delete([wal_key(FILE)])
    assert await left_overs.clean() == 0
    await finish(it, FILE)
    assert await left_overs.clean() == 5


@pytest.mark.parametrize("name", [wal_key(FILE), TailName(FILE, 1, 10, 500).key])
async def test_what_cannot_be_compared_stays(name: str) -> None:
    it, _ = await tails()
    await put_tails(it, FILE)
    await finish(it, FILE)
    it.store.flip[name] = 800
    assert await it.left_overs().clean() == 0
    assert len(await it.names()) == 5
    (told,) = it.told(SourcesDiffer)
    assert isinstance(told, SourcesDiffer)
    assert name in told.fact


class Unsure(Faulty):
    """Shows in listings what it has no more."""

    async def delete(self, keys: Collection[str]) -> None:
        raise AssertionError(f"{keys} must stay")


async def test_a_listing_alone_deletes_nothing() -> None:
    it, _ = await tails()
    await put_tails(it, FILE)
    await finish(it, FILE)
    it.store = it.outlet.store = Unsure(it.store.store)
    it.store.fail = {("head", 1): StoreError("no answer", passing=True)}
    with pytest.raises(StoreError, match="no answer"):
        await it.left_overs().clean()


async def test_where_deletes_are_refused_cleaning_says_so_once_and_reads_no_more() -> None:
    it, clock = await tails()
    for file in (FILE, NEXT):
        await put_tails(it, file)
    await finish(it, FILE, NEXT)
    it.store.down = {"delete": LOCKED}
    left_overs = it.left_overs()
    assert await left_overs.clean() == 0
    assert it.store.count("delete") == 1
    read = it.store.count("get")
    for _ in range(3):
        assert await left_overs.clean() == 0
    assert it.store.count("get") == read
    async with running(it):  # nor does the shipper at the same destination say so again
        segment = it.begin(NEXT.next(SIZE))
        it.grow(segment, WAL[:100])
        await clock.pass_by(1)
        await until(lambda: it.stored)
        it.grow(segment, WAL[100:])
        await it.finish(segment)
        deletes = it.store.count("delete")
        await clock.pass_by(0.3)
        await until(lambda: it.store.count("delete") > deletes)
    assert len(it.told(DeleteRefused)) == 1
    it.store.down.clear()
    assert await left_overs.clean() == 11
    it.store.down = {"delete": LOCKED}
    await put_tails(it, FILE)
    assert await left_overs.clean() == 0
    assert len(it.told(DeleteRefused)) == 2, "it had been allowed in between"
