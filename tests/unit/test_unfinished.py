"""What failed backups leave behind goes in the end, and nothing else does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from handlers.unfinished import clean_unfinished
from infra.storage.local import LocalStore
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody
from tests.stores import Faulty

NOW = datetime.now(UTC)
LATER = NOW + timedelta(hours=25)


@pytest.fixture
def stores(tmp_path: Path) -> list[LocalStore]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return [LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")]


async def fill(store: LocalStore, *keys: str) -> None:
    for key in keys:
        await store.put(key, MemoryBody((b"content",)))


async def keys(store: LocalStore) -> list[str]:
    return sorted([info.key async for info in store.list("")])


PARTS = ("base/base_1/data/base/00000001", "base/base_1/index/00000001")


async def test_parts_without_an_info_go_once_they_have_settled(stores: list[LocalStore]) -> None:
    for store in stores:
        await fill(store, *PARTS, "wal/0000000100000000/000000010000000000000001")
    said: list[str] = []
    assert await clean_unfinished(stores, now=NOW, tell=said.append) == 0
    assert await clean_unfinished(stores, now=LATER, tell=said.append) == 4
    assert len(said) == 2
    assert "2 objects" in said[0]
    for store in stores:
        assert await keys(store) == ["wal/0000000100000000/000000010000000000000001"]


async def test_a_backup_that_one_destination_knows_stays_at_all(stores: list[LocalStore]) -> None:
    await fill(stores[0], *PARTS)
    await fill(stores[1], *PARTS, "base/base_1/backup_info")
    assert await clean_unfinished(stores, now=LATER, tell=lambda _: None) == 0
    assert await keys(stores[0]) == sorted(PARTS)


async def test_nothing_goes_while_a_destination_does_not_answer(stores: list[LocalStore]) -> None:
    await fill(stores[0], *PARTS)
    silent = Faulty(stores[1], fail={("head", 1): StoreError("it does not answer")})
    said: list[str] = []
    assert await clean_unfinished([stores[0], silent], now=LATER, tell=said.append) == 0
    assert await keys(stores[0]) == sorted(PARTS)
    assert any("was not searched" in line for line in said)
