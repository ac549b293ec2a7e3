"""A base backup marks itself before its first object, and is not declared complete once it was given up by others."""

from __future__ import annotations

import pytest

from handlers.body import joined
from infra.marked import check_there, marked
from infra.storage.in_use import Marks
from infra.storage.memory import MemoryStore
from pipeline.backup import BackupInfo
from pipeline.catalog import info_key, part_key
from pipeline.contracts import Body, Buffer, Shipped, Span
from pipeline.errors import SourceError, StoreError
from pipeline.objects import MemoryBody
from tests.expiring import add_backup, names
from tests.sites import site_at
from tests.stores import Faulty
from tests.unit.test_in_use import Held

NAME = "base_20260114_120000"


class Ship:
    """Remembers names."""

    def __init__(self) -> None:
        self.names: list[str] = []

    async def __call__(self, name: str, plain: Buffer, **_: object) -> Shipped:
        self.names.append(name)
        return Shipped(name, len(plain), "")


async def test_it_is_marked_before_its_first_object_and_until_the_end() -> None:
    site, sent = await site_at(MemoryStore("a"), MemoryStore("b"), clock=Held()), Ship()
    async with marked(site, sent, tell=pytest.fail) as ship:
        assert await names(site.stores[0]) == []
        await ship(part_key(NAME, "base", 1), b"part", backup="id")
        assert [name.split("/")[1] for name in await names(site.stores[1], "use/")] == [NAME]
        await ship(info_key(NAME), b"info", backup="id")
    assert sent.names == [part_key(NAME, "base", 1), info_key(NAME)]
    assert await names(site.stores[0]) == []


async def test_what_was_given_up_by_others_is_never_complete() -> None:
    site, sent = await site_at(MemoryStore("a"), MemoryStore("b"), clock=Held()), Ship()
    async with marked(site, sent, tell=pytest.fail) as ship:
        await ship(part_key(NAME, "base", 1), b"part")
        await site.stores[1].delete(await names(site.stores[1], "use/"))
        with pytest.raises(SourceError, match=f"{NAME} was given up at b"):
            await ship(info_key(NAME), b"info")
    assert info_key(NAME) not in sent.names


async def test_what_nobody_could_see_being_taken_is_complete_only_with_all_its_objects() -> None:
    """No destination took the mark, as over a line that the parts themselves fill: an expire may have cleared up."""
    store, told = Faulty(MemoryStore("a"), fail={("put", 1): StoreError("too slow", passing=True)}), list[str]()
    site = await site_at(store, clock=Held())

    class Storing(Ship):
        async def __call__(self, name: str, plain: Buffer, **more: object) -> Shipped:
            await store.put(name, MemoryBody([bytes(plain)]))
            return await super().__call__(name, plain, **more)

    sent = Storing()
    async with marked(site, sent, tell=told.append) as ship:
        for number in (1, 2):
            await ship(part_key(NAME, "base", number), b"part", backup="id")
        await store.delete([part_key(NAME, "base", 1)])
        with pytest.raises(SourceError, match=f"1 of 2 objects of {NAME} are gone"):
            await ship(info_key(NAME), b"info", backup="id")
        assert info_key(NAME) not in sent.names
        await store.put(part_key(NAME, "base", 1), MemoryBody([b"part"]))
        await ship(info_key(NAME), b"info", backup="id")
    assert "too slow" in told[0]


async def parent_at(site_stores: MemoryStore) -> BackupInfo:
    return await add_backup(await site_at(site_stores), 1, 2)


async def test_what_builds_on_a_backup_keeps_it_and_is_nothing_without() -> None:
    store, sent = MemoryStore("a"), Ship()
    parent = await parent_at(store)
    site = await site_at(store, clock=Held())
    async with marked(site, sent, parent, tell=pytest.fail) as ship:
        async with Marks([store], clock=site.clock).claim(parent.name, what="expire") as user:
            assert "(backup)" in user
        await store.delete([info_key(parent.name)])
        with pytest.raises(SourceError, match="was deleted meanwhile"):
            await ship(info_key(NAME), b"info")
    with pytest.raises(SourceError, match="was deleted meanwhile"):
        await check_there(site, parent.name)


async def test_nothing_is_built_on_what_is_being_deleted() -> None:
    store = MemoryStore("a")
    parent = await parent_at(store)

    async with Marks([store], clock=Held()).claim(parent.name, what="expire"):  # does not write its mark anew by itself
        (key,) = [name for name in await names(store, "use/") if name.endswith(".going")]

        class Moving(MemoryStore):
            """Its deleter is alive: its mark is another one at each look."""

            looks = 0

            async def get(self, name: str, span: Span | None = None) -> Body:
                body = await store.get(name, span)
                if name != key:
                    return body
                self.looks += 1
                return MemoryBody([joined(body).replace(b'"counter": 1', b'"counter": %d' % self.looks)])

        moving = Moving("a")
        moving._objects = store._objects
        with pytest.raises(SourceError, match=r"is being deleted by process .*expire"):
            async with marked(await site_at(moving), Ship(), parent, tell=pytest.fail):
                raise AssertionError
