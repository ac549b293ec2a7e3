"""What failed backups leave behind goes in the end, and nothing else does."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest

from handlers.unfinished import SETTLED, clean_unfinished
from infra.storage.local import LocalStore
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody
from tests.stores import Faulty

#: The backup behind which is cleaned up, and what tells the time at a store.
FINISHED = "base_9"
INFO = f"base/{FINISHED}/backup_info"


@pytest.fixture
def stores(tmp_path: Path) -> list[LocalStore]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return [LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")]


async def fill(store: LocalStore, *keys: str) -> None:
    for key in keys:
        await store.put(key, MemoryBody((b"content",)))


def age(store: LocalStore, by: timedelta, *keys: str) -> None:
    """They were stored so long before the time at the store."""
    folder = Path(store.name.removeprefix("file://"))
    moment = (folder / INFO).stat().st_mtime - by.total_seconds()
    for key in keys:
        os.utime(folder / key, (moment, moment))


async def keys(store: LocalStore) -> list[str]:
    return sorted([info.key async for info in store.list("")])


PARTS = ("base/base_1/data/base/00000001", "base/base_1/index/00000001")
LONG = SETTLED + timedelta(hours=1)


async def test_parts_without_an_info_go_once_they_have_settled(stores: list[LocalStore]) -> None:
    for store in stores:
        await fill(store, *PARTS, INFO, "wal/0000000100000000/000000010000000000000001")
    said: list[str] = []
    assert await clean_unfinished(stores, finished=FINISHED, tell=said.append) == 0
    for store in stores:
        age(store, LONG, *PARTS)
    assert await clean_unfinished(stores, finished=FINISHED, tell=said.append) == 4
    assert len(said) == 2
    assert "2 objects" in said[0]
    for store in stores:
        assert await keys(store) == [INFO, "wal/0000000100000000/000000010000000000000001"]


async def test_what_time_it_is_the_store_tells(stores: list[LocalStore]) -> None:
    """A store whose clock is a day behind ours: what somebody stores there now is young all the same."""
    for store in stores:
        await fill(store, *PARTS, INFO)
        folder = Path(store.name.removeprefix("file://"))
        behind = (folder / INFO).stat().st_mtime - timedelta(days=2).total_seconds()
        os.utime(folder / INFO, (behind, behind))
        age(store, timedelta(minutes=1), *PARTS)
    assert await clean_unfinished(stores, finished=FINISHED, tell=lambda _: None) == 0
    for store in stores:
        assert await keys(store) == sorted((*PARTS, INFO))


async def test_a_part_that_is_young_keeps_the_others(stores: list[LocalStore]) -> None:
    await fill(stores[0], *PARTS, INFO)
    age(stores[0], LONG, PARTS[0])
    age(stores[0], timedelta(hours=23), PARTS[1])
    assert await clean_unfinished(stores, finished=FINISHED, tell=lambda _: None) == 0


async def test_a_destination_without_the_backup_is_left_alone(stores: list[LocalStore]) -> None:
    """It was away: nothing there tells what time it is."""
    for store in stores:
        await fill(store, *PARTS, INFO)
        age(store, LONG, *PARTS)
    await stores[1].delete([INFO])
    assert await clean_unfinished(stores, finished=FINISHED, tell=lambda _: None) == 2
    assert await keys(stores[1]) == sorted(PARTS)


async def test_a_backup_that_one_destination_knows_stays_at_all(stores: list[LocalStore]) -> None:
    await fill(stores[0], *PARTS, INFO)
    await fill(stores[1], *PARTS, INFO, "base/base_1/backup_info")
    for store in stores:
        age(store, LONG, *PARTS)
    assert await clean_unfinished(stores, finished=FINISHED, tell=lambda _: None) == 0
    assert await keys(stores[0]) == sorted((*PARTS, INFO))


async def test_nothing_goes_while_a_destination_does_not_answer(stores: list[LocalStore]) -> None:
    await fill(stores[0], *PARTS, INFO)
    age(stores[0], LONG, *PARTS)
    silent = Faulty(stores[1], fail={("head", 1): StoreError("it does not answer")})
    said: list[str] = []
    assert await clean_unfinished([stores[0], silent], finished=FINISHED, tell=said.append) == 0
    assert await keys(stores[0]) == sorted((*PARTS, INFO))
    assert any("was not searched" in line for line in said)
