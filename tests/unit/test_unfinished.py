"""What failed backups leave behind goes with the next one, and nothing else does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from handlers.expire import Expirer
from handlers.unfinished import clean_unfinished
from infra.storage.in_use import TTL, Marks, using
from infra.storage.local import LocalStore
from pipeline.contracts import Store
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody
from tests.clock import FastClock
from tests.stores import Faulty

PARTS = ("base/base_1/data/base/00000001", "base/base_1/index/00000001")
OTHERS = (
    "base/base_1/note.txt",
    "base/base_9/backup_info",
    "base/note.txt",
    "wal/0000000100000000/000000010000000000000001",
)


@pytest.fixture
def stores(tmp_path: Path) -> list[LocalStore]:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return [LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")]


async def fill(store: Store, *keys: str) -> None:
    for key in keys:
        await store.put(key, MemoryBody((b"content",)))


async def keys(store: Store) -> list[str]:
    return sorted([info.key async for info in store.list("") if not info.key.startswith("use/")])


async def cleaned(stores: Sequence[Store], marks: Marks | None = None) -> tuple[list[str], list[str]]:
    """The backups of which parts went, and what was said."""
    said: list[str] = []
    marks = marks or Marks(stores, clock=FastClock())
    expirer = Expirer(
        stores, claim=lambda name: marks.claim(name, what="backup"), tell=said.append, progress=lambda _: None
    )
    gone = await clean_unfinished(stores, remove=expirer.unlisted, tell=said.append)
    return gone, said + [refusal.fact for refusal in expirer.refusals]


async def test_parts_without_an_info_go_whatever_their_age(stores: list[LocalStore]) -> None:
    for store in stores:
        await fill(store, *PARTS, *OTHERS)
    assert await cleaned(stores) == (["base_1"], [])
    for store in stores:
        assert await keys(store) == sorted(OTHERS)


async def test_what_is_being_taken_stays(stores: list[LocalStore]) -> None:
    clock = FastClock()
    for store in stores:
        await fill(store, *PARTS)
    async with using(stores[1:], "base_1", clock=clock, tell=pytest.fail, what="backup"):
        assert await cleaned(stores) == ([], [])
    assert await keys(stores[0]) == sorted(PARTS)
    assert (await cleaned(stores))[0] == ["base_1"]


async def test_what_a_writer_left_that_died_goes_once_that_is_certain(stores: list[LocalStore]) -> None:
    clock = FastClock()
    await fill(stores[0], *PARTS)
    await fill(stores[1], "use/base_1/0000000a")
    marks = Marks(stores, clock=clock)
    await marks.look()
    assert (await cleaned(stores, marks))[0] == []
    clock.passed += TTL
    await marks.look()
    await marks.bury()
    assert (await cleaned(stores, marks))[0] == ["base_1"]
    assert [info.key async for info in stores[1].list("use/")] == []


async def test_a_backup_that_one_destination_knows_stays_at_all(stores: list[LocalStore]) -> None:
    await fill(stores[0], *PARTS)
    await fill(stores[1], *PARTS, "base/base_1/backup_info")
    assert await cleaned(stores) == ([], [])
    assert await keys(stores[0]) == sorted(PARTS)


@pytest.mark.parametrize("operation", ["head", "list"])
async def test_nothing_goes_while_a_destination_does_not_answer(stores: list[LocalStore], operation: str) -> None:
    await fill(stores[0], *PARTS)
    silent = Faulty(stores[1], down={operation: StoreError("it does not answer")})
    gone, said = await cleaned([stores[0], silent])
    assert gone == []
    assert await keys(stores[0]) == sorted(PARTS)
    assert any("were not looked for: it does not answer" in line for line in said)


async def test_one_that_is_finished_at_the_last_moment_stays(stores: list[LocalStore]) -> None:
    """Its writer lists it and removes its mark between our two looks."""
    await fill(stores[0], *PARTS)

    class Finishing(Faulty):
        async def put(self, key: str, *rest: object, **more: object) -> None:
            await super().put(key, *rest, **more)  # type: ignore[arg-type]  # handed on as they are
            if key.startswith("use/"):
                await fill(stores[0], "base/base_1/backup_info")

    gone, _ = await cleaned([stores[0], Finishing(stores[1])])
    assert gone == []
    assert await keys(stores[0]) == sorted((*PARTS, "base/base_1/backup_info"))
