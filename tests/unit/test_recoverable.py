"""What can be restored: stretches of time between holes and forks, over all destinations together."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import pytest

from handlers.fetch import Fetcher
from infra.holdings import Holding, Known, hold, together
from infra.recoverable import Moments, Recoverable, read_moments, recoverable
from infra.status import places_of_backups
from infra.storage.memory import MemoryStore
from pipeline.catalog import info_key
from pipeline.errors import StoreError
from pipeline.wal import Lsn
from tests.keys import SYSTEM_ID
from tests.parts import Shelf
from tests.stores import Faulty
from tests.unit.test_status import NOON, SIZE, archive, back_up, repository_shelf, site_of

LATER = NOON + timedelta(hours=1)


@pytest.fixture
async def shelf() -> Shelf:
    return await repository_shelf()


async def holding(shelf: Shelf, known: Known | None = None) -> Holding:
    return await hold(shelf.store, site_of(shelf, shelf.store), {} if known is None else known, required=True)


def found(holdings: Iterable[Holding], moments: Moments | None = None) -> Recoverable:
    several = list(holdings)
    return recoverable(together(several), places_of_backups(several), until=LATER, moments=moments or {})


async def test_from_the_backup_to_what_is_stored_now(shelf: Shelf) -> None:
    await archive(shelf, range(3, 9))
    name = await back_up(shelf, 3)
    stored = found([await holding(shelf)])
    (stretch,) = stored.stretches
    assert (stretch.begins, stretch.ends, stretch.ended_by) == (NOON, LATER, "open")
    assert (stretch.backups, stretch.end_lsn) == ((name,), str(Lsn(9 * SIZE)))
    assert (stored.first, stored.last, stored.holes) == (NOON, LATER, ())
    assert [backup.destinations for backup in stored.backups] == [("memory",)]


async def test_a_hole_makes_two_stretches_and_the_first_ends_when_its_wal_does(shelf: Shelf) -> None:
    await archive(shelf, (3, 4, 5, 7, 8))
    await back_up(shelf, 3)
    await back_up(shelf, 7, "base_20260114_130000")
    first, second = found([await holding(shelf)], {(1, Lsn(6 * SIZE)): NOON + timedelta(minutes=5)}).stretches
    assert (first.ended_by, first.missing, first.ends) == (
        "hole", "000000010000000000000006", NOON + timedelta(minutes=5)
    )  # fmt: skip
    assert (second.ended_by, second.ends) == ("open", LATER)
    unread = found([await holding(shelf)])
    assert unread.stretches[0].ends is None, "not known, and not now"
    assert unread.missing_segments == 1


async def test_what_one_destination_lacks_another_has(shelf: Shelf) -> None:
    other = await repository_shelf()
    await archive(shelf, (3, 4, 6, 7))
    await archive(other, (5, 6))
    await back_up(shelf, 3)
    stored = found([await holding(shelf), await holding(other)])
    assert stored.holes == ()
    assert [stretch.end_lsn for stretch in stored.stretches] == [str(Lsn(8 * SIZE))]


async def test_a_timeline_that_was_left_can_be_restored_on_its_own(shelf: Shelf) -> None:
    await archive(shelf, range(3, 9))
    await archive(shelf, (6, 7), timeline=2)
    await back_up(shelf, 3)
    await shelf("wal/00000002.history", f"1\t{Lsn(6 * SIZE + 100)}\tno recovery target specified\n".encode())
    stored = found([await holding(shelf)], {(1, Lsn(9 * SIZE)): NOON})
    assert stored.newest_timeline == 2
    assert [(each.timeline, each.ended_by) for each in stored.stretches] == [(1, "left"), (2, "open")]
    assert [(each.timeline, each.parent) for each in stored.timelines] == [(1, 0), (2, 1)]


async def test_descriptions_are_read_once_and_forgotten_with_their_backups(shelf: Shelf) -> None:
    await archive(shelf, range(3, 9))
    names = [await back_up(shelf, 3), await back_up(shelf, 4, "base_20260114_130000")]
    watched = Faulty(shelf.store)
    known: Known = {}
    for _ in range(3):
        there = await hold(watched, site_of(shelf, watched), known, required=True)
        assert [backup.name for backup in there.catalog.backups] == names
    assert [key for called, key in watched.calls if called == "get"] == [info_key(name) for name in names]
    await shelf.store.delete([info_key(names[0])])
    there = await hold(watched, site_of(shelf, watched), known, required=True)
    assert [backup.name for backup in there.catalog.backups] == names[1:]
    assert [name for _, name in known] == names[1:]


async def test_what_does_not_answer_holds_nothing(shelf: Shelf) -> None:
    store = Faulty(MemoryStore(), down={"list": StoreError("the store is away", passing=True)})
    assert (await hold(store, site_of(shelf, store), {}, required=True)).error == "the store is away"


async def test_wal_that_cannot_be_read_is_told_and_tried_again(shelf: Shelf) -> None:
    """What is stored here is no WAL at all."""
    await archive(shelf, (3, 4, 5, 7))
    await back_up(shelf, 3)
    catalog = (await holding(shelf)).catalog
    moments: Moments = {}
    fetch = Fetcher([shelf.store], shelf.chain, SYSTEM_ID)
    for _ in range(2):
        (problem,) = await read_moments(catalog, fetch, moments, opened=False)
        assert problem.startswith("the last WAL of timeline 1 cannot be read: ")
    assert moments == {}
