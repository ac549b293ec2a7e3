"""Tails read from several destinations, and what a recovering server is given where no finished segment is stored."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

import pytest

from handlers.fetch import Fetcher, read_catalog
from handlers.serve_wal import WalServer
from handlers.verify import Report, verify
from infra.storage.memory import MemoryStore
from pipeline.catalog import wal_key
from pipeline.contracts import Body, ObjectInfo, Span, Store
from pipeline.errors import IntegrityError, ObjectMissing, StoreError
from pipeline.lineage import Leg, Lineage, Stretch
from pipeline.objects import MemoryBody
from pipeline.tail import TailName
from pipeline.wal import Lsn, WalFile
from tests.parts import Shelf
from tests.stores import Faulty
from tests.tails import change, lay
from tests.waldata import Writer

SIZE = 1 << 20
NUMBER = 7
FILE = WalFile.segment(1, NUMBER * SIZE, SIZE)
TRUTH = random.Random(3).randbytes(SIZE)
ONE = Lineage((Leg(1, Lsn(0), None),), SIZE)
ABC = [(0, 1000), (1000, 3000), (3000, 5000)]
NOW = datetime(2026, 1, 14, 12, tzinfo=UTC)
DOWN = StoreError("it does not answer", passing=True)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def fetcher(shelf: Shelf, *stores: Store) -> Fetcher:
    return Fetcher(stores or [shelf.store], shelf.chain, shelf.system_id)


async def laid(shelf: Shelf, *ranges: tuple[int, int], name: str = "other", epoch: int = 1) -> MemoryStore:
    """A destination with these tails."""
    store = MemoryStore(name)
    await lay(store, shelf.chain, FILE, TRUTH, ranges, epoch=epoch)
    return store


def key(start: int, end: int, epoch: int = 1) -> str:
    return TailName(FILE, epoch, start, end).key


async def test_each_destination_has_a_part(shelf: Shelf) -> None:
    here, there = await laid(shelf, (0, 1000), (3000, 5000)), await laid(shelf, (0, 700), (700, 3500), epoch=2)
    made = await fetcher(shelf, here, there).tail(FILE, SIZE)
    assert made is not None
    assert (made.reach, made.notices) == (5000, ())
    assert made.content == TRUTH[:5000] + bytes(SIZE - 5000)
    alone = await fetcher(shelf, here).tail(FILE, SIZE)
    assert alone is not None
    assert alone.reach == 1000
    assert "bytes 1000 to 3000 are in no tail" in alone.notices[0]


async def test_none_means_that_every_destination_answered(shelf: Shelf) -> None:
    empty, whole = MemoryStore("empty"), await laid(shelf, *ABC)
    assert await fetcher(shelf, empty, empty).tail(FILE, SIZE) is None
    down = Faulty(MemoryStore("down"), down={"list": DOWN})
    for stores in ((empty, down), (down, whole)):
        with pytest.raises(StoreError, match="does not answer"):
            await fetcher(shelf, *stores).tail(FILE, SIZE)
    made = await fetcher(shelf, down, whole).tail(FILE, SIZE, lenient=True)
    assert made is not None
    assert made.reach == 5000
    assert made.notices == (f"the tails of segment {FILE} at down are not known: it does not answer",)
    with pytest.raises(StoreError):
        await fetcher(shelf, down).tail(FILE, SIZE, lenient=True)


@pytest.mark.parametrize("damage", [{"cut": 1}, {"flip": 300}, {"cut": 700}, {"flip": 3}])
async def test_a_damaged_copy_is_served_by_the_other_destination(shelf: Shelf, damage: dict[str, int]) -> None:
    bad, good = await laid(shelf, *ABC), await laid(shelf, *ABC)
    await change(bad, key(1000, 3000), **damage)
    made = await fetcher(shelf, bad, good).tail(FILE, SIZE)
    assert made is not None
    assert (made.reach, made.notices) == (5000, ())
    alone = await fetcher(shelf, bad).tail(FILE, SIZE)
    assert alone is not None
    assert alone.reach == 1000
    assert alone.notices[0].startswith(f"other: {key(1000, 3000)}")
    # Something else covers it.
    await lay(bad, shelf.chain, FILE, TRUTH, [(900, 3001)], epoch=2)
    covered = await fetcher(shelf, bad).tail(FILE, SIZE)
    assert covered is not None
    assert (covered.reach, covered.notices) == (5000, ())


async def test_a_copy_that_could_not_be_read_may_be_the_good_one(shelf: Shelf) -> None:
    bad = await laid(shelf, *ABC)
    await change(bad, key(1000, 3000), cut=1)
    failing = Faulty(await laid(shelf, *ABC), down={"get": DOWN})
    with pytest.raises(StoreError, match="does not answer"):
        await fetcher(shelf, bad, failing).tail(FILE, SIZE)


async def test_what_a_fold_holds_is_not_read_again(shelf: Shelf) -> None:
    store = Faulty(await laid(shelf, *ABC, (0, 3000), (0, 700)))
    made = await fetcher(shelf, store).tail(FILE, SIZE)
    assert made is not None
    assert made.reach == 5000
    assert sorted(name for call, name in store.calls if call == "get") == [key(0, 3000), key(3000, 5000)]
    # Unless the fold is damaged.
    await change(store.store, key(0, 3000), cut=1)
    made = await fetcher(shelf, store).tail(FILE, SIZE)
    assert made is not None
    assert (made.reach, made.notices) == (5000, ())


async def test_what_is_only_in_a_fold_that_does_not_fit_is_read(shelf: Shelf) -> None:
    """A clone with the same epoch has a tail that holds the range of a true one, and other bytes in it."""
    store = await laid(shelf, *ABC)
    await lay(store, shelf.chain, FILE, TRUTH[:900] + bytes(SIZE - 900), [(950, 9000)])
    made = await fetcher(shelf, store).tail(FILE, SIZE)
    assert made is not None
    assert (made.reach, bytes(made.content[:5000])) == (5000, TRUTH[:5000])
    assert "came from another fork" in made.notices[0]


async def test_a_tail_with_another_size_than_its_name_says_is_damaged(shelf: Shelf) -> None:
    pieces = [bytes(p) for p in shelf.chain.encode(key(0, 1000), bytes(32 + 999), created=NOW)]
    await shelf.store.put(key(0, 1000), MemoryBody(pieces))
    made = await fetcher(shelf).tail(FILE, SIZE)
    assert made is not None
    assert (made.reach, made.notices) == (0, (f"memory: {key(0, 1000)} holds 999 bytes, not 1000",))


class Vanishing(Faulty):
    """As soon as the tails are listed they go, because the finished segment has been stored; ``after`` times."""

    finished: bytes | None = None
    after = 0

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        infos = [info async for info in self.store.list(prefix, after=after, shallow=shallow)]
        for info in infos:
            yield info
        if self.after == 0 and any(info.key.startswith("tail/") for info in infos):
            await self.store.delete([info.key for info in infos if info.key.startswith("tail/")])
            if self.finished is not None:
                await self.store.put(wal_key(FILE), MemoryBody([self.finished]))
        self.after -= 1


async def vanishing(shelf: Shelf, *, finished: bool, after: int = 0) -> Vanishing:
    store = Vanishing(await laid(shelf, *ABC))
    store.after = after
    if finished:
        store.finished = b"".join(bytes(p) for p in shelf.chain.encode(wal_key(FILE), TRUTH, created=NOW))
    return store


async def test_a_tail_that_goes_while_it_is_read_means_look_for_the_finished_segment(shelf: Shelf) -> None:
    with pytest.raises(ObjectMissing, match="was listed and is gone"):
        await fetcher(shelf, await vanishing(shelf, finished=True)).tail(FILE, SIZE)
    fetch = fetcher(shelf, await vanishing(shelf, finished=True))
    assert await WalServer(fetch, ONE).read(FILE.name) == TRUTH
    # The catalog lists tails, wal and backups, then the tails of the segment once more.
    for after in (0, 3):
        store = await vanishing(shelf, finished=True, after=after)
        catalog = await read_catalog([store], fetcher(shelf, store), shelf.system_id, segment_size=SIZE)
        assert (catalog.has_segment(1, NUMBER), catalog.tails, catalog.problems) == (True, {}, ()), after


async def test_tails_that_went_for_good_are_not_taken_for_absent_where_they_were_planned(shelf: Shelf) -> None:
    fetch = fetcher(shelf, await vanishing(shelf, finished=False))
    assert await WalServer(fetch, ONE).read(FILE.name) is None
    planned = [Stretch(1, NUMBER, NUMBER + 1, tail=5000)]
    for ranges, now in (((), "is gone"), (((0, 4999),), "has 4999")):
        store = await laid(shelf, *ranges)
        with pytest.raises(IntegrityError, match=f"had 5000 bytes in tails when the restore was planned, and {now}"):
            await WalServer(fetcher(shelf, store), ONE, planned).read(FILE.name)
    longer = await laid(shelf, (0, 5001))
    assert await WalServer(fetcher(shelf, longer), ONE, planned).read(FILE.name) == TRUTH[:5001] + bytes(SIZE - 5001)
    await shelf(wal_key(FILE), TRUTH)
    assert await WalServer(fetcher(shelf), ONE, planned).read(FILE.name) == TRUTH
    # A finished segment that was planned, and of which only tails are left.
    with pytest.raises(IntegrityError, match="was there when the restore was planned, and has 5001"):
        await WalServer(fetcher(shelf, longer), ONE, [Stretch(1, NUMBER, NUMBER + 1)]).read(FILE.name)


async def test_tails_that_always_go_are_an_error_and_not_absent(shelf: Shelf) -> None:
    class Restless(Faulty):
        async def get(self, key: str, span: Span | None = None) -> Body:
            if key.startswith("tail/"):
                raise ObjectMissing(f"{key} is gone")
            return await super().get(key, span)

    store = Restless(await laid(shelf, *ABC))
    with pytest.raises(StoreError, match="went 5 times while they were read") as caught:
        await WalServer(fetcher(shelf, store), ONE).read(FILE.name)
    assert not isinstance(caught.value, ObjectMissing)
    catalog = await read_catalog([store], fetcher(shelf, store), shelf.system_id, segment_size=SIZE)
    assert "cannot be read" in catalog.problems[0]


async def test_a_tail_is_never_cached_and_the_finished_segment_goes_first(shelf: Shelf) -> None:
    store = await laid(shelf, *ABC[:1])
    server = WalServer(fetcher(shelf, store), ONE)
    for reach, ranges in ((1000, []), (3000, ABC[1:2]), (5000, ABC[2:])):
        await lay(store, shelf.chain, FILE, TRUTH, ranges)
        assert await server.read(FILE.name) == TRUTH[:reach] + bytes(SIZE - reach)
    await store.put(
        wal_key(FILE), MemoryBody([bytes(p) for p in shelf.chain.encode(wal_key(FILE), TRUTH, created=NOW)])
    )
    assert await server.read(FILE.name) == TRUTH


async def test_less_than_a_page_header_is_nothing(shelf: Shelf) -> None:
    store = await laid(shelf, (0, 39))
    assert await WalServer(fetcher(shelf, store), ONE).read(FILE.name) is None
    catalog = await read_catalog([store], fetcher(shelf, store), shelf.system_id, segment_size=SIZE)
    assert catalog.tails == {1: {NUMBER: 0}}


def records(count: int) -> bytes:
    writer = Writer(FILE.start(SIZE))
    for _ in range(count):
        writer.add(b"z" * 100)
    return writer.segment()


@pytest.mark.parametrize(("partial", "tail", "wanted"), [(9, 5, 9), (5, 9, 9), (5, 5, 5)])
async def test_of_partial_and_tail_of_the_last_timeline_the_one_with_more_records(
    shelf: Shelf, partial: int, tail: int, wanted: int
) -> None:
    await shelf(f"{wal_key(FILE)}.partial", records(partial))
    await lay(shelf.store, shelf.chain, FILE, records(tail), [(0, 4000)])
    assert await WalServer(fetcher(shelf), ONE).read(FILE.name) == records(wanted)


FORK = 2500
FORKED = Lineage((Leg(1, Lsn(0), Lsn(NUMBER * SIZE + FORK)), Leg(2, Lsn(NUMBER * SIZE + FORK), None)), SIZE)
NEW = WalFile.segment(2, NUMBER * SIZE, SIZE)


async def test_behind_a_fork_nothing_of_the_old_tail_is_served(shelf: Shelf) -> None:
    """Replayed, those bytes would be commits that the new timeline never had."""
    await lay(shelf.store, shelf.chain, FILE, TRUTH, ABC)
    server = WalServer(fetcher(shelf), FORKED)
    assert await server.read(FILE.name) == TRUTH[:FORK] + bytes(SIZE - FORK)
    # Without its beginning, or without a byte of its own, the new timeline's tail is not used.
    await lay(shelf.store, shelf.chain, NEW, TRUTH[:FORK] + bytes(SIZE - FORK), [(2000, 4000), (0, 1000)])
    assert await server.read(NEW.name) is None
    await lay(shelf.store, shelf.chain, NEW, TRUTH[:FORK] + bytes(SIZE - FORK), [(1000, 2000)])
    assert await server.read(NEW.name) == TRUTH[:FORK] + bytes(SIZE - FORK)
    # The .partial of the old one is complete up to the fork: its tail is not even looked at.
    await shelf(f"{wal_key(FILE)}.partial", TRUTH[:FORK] + bytes(SIZE - FORK))
    down = Faulty(shelf.store, down={"list": DOWN})
    assert await WalServer(fetcher(shelf, down), FORKED).read(FILE.name) == TRUTH[:FORK] + bytes(SIZE - FORK)


async def test_a_catalog_takes_the_furthest_of_all_destinations(shelf: Shelf) -> None:
    await shelf(wal_key(WalFile.segment(1, (NUMBER - 1) * SIZE, SIZE)), bytes(SIZE))
    await lay(shelf.store, shelf.chain, FILE, TRUTH, ABC[:1])
    finished = WalFile.segment(1, (NUMBER - 1) * SIZE, SIZE)
    await lay(shelf.store, shelf.chain, finished, TRUTH, [(500, 1000)])
    other = Faulty(await laid(shelf, (0, 900), (900, 4000), (4100, 4200)))
    catalog = await read_catalog([shelf.store, other], fetcher(shelf, shelf.store, other), shelf.system_id)
    assert catalog.tails == {1: {NUMBER: 4000}}
    end = Lsn(NUMBER * SIZE + 4000)
    assert catalog.known_end(catalog.lineage(1)) == catalog.wal_path(ONE, Lsn((NUMBER - 1) * SIZE)).end == end
    assert catalog.tail_notices[0].startswith(f"the tails of segment {FILE} reach LSN {end} and no further: ")
    assert catalog.problems == ()


async def report(shelf: Shelf, *stores: Store, decode: bool = True) -> Report:
    places: Sequence[Store] = stores or [shelf.store]
    catalog = await read_catalog(places, fetcher(shelf, *places), shelf.system_id, segment_size=SIZE)
    return await verify(catalog, places, chain=shelf.chain if decode else None)


@pytest.mark.parametrize("decode", [True, False])
async def test_verify_of_good_tails_is_ok(shelf: Shelf, decode: bool) -> None:
    await lay(shelf.store, shelf.chain, FILE, TRUTH, ABC)
    found = await report(shelf, decode=decode)
    assert (found.ok, found.objects, found.warnings) == (True, 3, ())


@pytest.mark.parametrize("decode", [True, False])
async def test_verify_says_up_to_where_recovery_gets_with_a_damaged_tail(shelf: Shelf, decode: bool) -> None:
    await lay(shelf.store, shelf.chain, FILE, TRUTH, ABC)
    await change(shelf.store, key(1000, 3000), flip=200)
    found = await report(shelf, decode=decode)
    assert not found.ok
    ((fault,), (problem,)) = found.faults, found.problems
    assert (fault.name, fault.kind) == (key(1000, 3000), "damaged")
    assert fault.fact.endswith(f"recovery gets to LSN {Lsn(NUMBER * SIZE + 1000)}")
    assert f"reach LSN {Lsn(NUMBER * SIZE + 1000)} and no further" in problem
    # Another destination has it.
    other = await laid(shelf, *ABC)
    found = await report(shelf, shelf.store, other, decode=decode)
    assert (found.ok, len(found.warnings)) == (True, 1)
    assert found.warnings[0].startswith(f"memory: {key(1000, 3000)}")


async def test_verify_only_warns_of_tails_of_a_finished_segment(shelf: Shelf) -> None:
    await shelf(wal_key(FILE), TRUTH)
    await lay(shelf.store, shelf.chain, FILE, TRUTH, [*ABC, (6000, 7000)])
    await change(shelf.store, key(1000, 3000), cut=1)
    found = await report(shelf)
    assert (found.ok, found.faults, found.problems) == (True, (), ())
    assert len(found.warnings) == 2
    assert "has a hole: bytes 1000 to 3000" in found.warnings[1]
