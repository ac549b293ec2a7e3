"""Expire where somebody comes in between: who deletes and who needs, before, while and behind it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from infra.cli import expire as command
from infra.expire import expire, make_plan, marks_of
from infra.pins import pin
from infra.storage.in_use import using
from infra.storage.memory import MemoryStore
from pipeline.catalog import info_key
from pipeline.errors import ConfigError, IntegrityError, StoreError
from pipeline.objects import MemoryBody
from pipeline.wal import Lsn
from tests.expiring import SIZE, START, add_backup, add_wal, expired, names, put, small
from tests.stores import Faulty
from tests.unit.test_expire import LAST, kept_names, segment
from tests.unit.test_in_use import left_behind


async def test_a_pin_is_not_called_set_while_somebody_may_be_deleting_the_backup() -> None:
    """Whoever deletes it may have looked for pins a moment before: only behind that it is known which came first."""
    site, backups = await small()
    name, told = backups[1].name, list[str]()
    async with marks_of(site).claim(name, what="expire"):
        setting = asyncio.create_task(pin(site, name, reason="", until=None, tell=told.append))
        async with asyncio.timeout(10):
            while not told:
                await asyncio.sleep(0.01)
        assert not setting.done()
        for store in site.stores:
            await store.delete([info_key(name)])
    with pytest.raises(ConfigError, match="there is no backup"):
        await setting
    async with marks_of(site).claim(backups[3].name, what="expire"):
        setting = asyncio.create_task(pin(site, backups[3].name, reason="", until=None, tell=told.append))
        await asyncio.sleep(0.05)
    assert (await setting)[1] == ["a", "b"]


async def test_no_wal_goes_while_a_backup_is_taken_that_began_before_one_that_stays() -> None:
    """That of a standby takes hours, in which one of the primary may begin and end; or it is being copied here."""
    site, backups = await small()
    async with using(site.stores, "base_20260105_120000", clock=site.clock, tell=pytest.fail, what="backup"):
        plan, outcome = await expired(site, LAST)
        assert (len(outcome.gone), plan.wal["a"].objects) == (4, 0)
        assert segment(13, 2) in await names(site.stores[0])
    async with using(site.stores, "base_20260107_000000", clock=site.clock, tell=pytest.fail, what="backup"):
        plan, outcome = await expired(site, LAST)
    assert segment(13, 2) not in await names(site.stores[0])
    assert info_key(backups[4].name) in await names(site.stores[0])


async def test_parts_stay_where_the_mark_of_who_left_them_cannot_be_removed() -> None:
    """He may only have been suspended: finding his mark as he left it, he would list them as a whole backup."""
    store = Faulty(MemoryStore("a"))
    site, _ = await small(store)
    name = "base_20260107_000000"
    key = await left_behind(store, backup=name)
    await store.put(f"base/{name}/data/base/00000001", MemoryBody([b"part"]))
    marks = marks_of(site)
    plan = await make_plan(site, LAST, marks, settle=True)
    assert plan.seen.leftovers == (name,)
    store.fail["delete", 1] = StoreError("a: not now")
    outcome = await expire(site, plan, marks, tell=lambda _: None)
    assert "a: not now" in outcome.stayed[name]
    assert {key, f"base/{name}/data/base/00000001"} <= {*await names(store)}
    _, outcome = await expired(site, LAST)
    assert outcome.leftovers == [name]


async def test_what_stays_is_listed_also_where_the_answer_to_its_deletion_was_lost() -> None:
    """Else it would be said to stay, and its parts would go the next time as those of a backup that nobody lists."""
    store = Faulty(MemoryStore("a"))
    site, backups = await small(store)
    store.lose["delete", 1] = StoreError("a: no answer", passing=True)
    _, outcome = await expired(site, LAST)
    (stayed, *above) = sorted(outcome.stayed, reverse=True)
    assert "a: no answer" in outcome.stayed[stayed]
    assert {info_key(each) for each in (stayed, *above)} <= {*await names(store)}
    assert len(outcome.gone) + len(outcome.stayed) == 4
    assert backups[4].name not in outcome.gone


async def test_what_comes_while_somebody_is_asked_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question may stand for hours. What goes by then was shown, and is needed by nothing that came meanwhile."""
    site, backups = await small()
    monkeypatch.setattr(command, "typed", tuple)

    async def somebody_goes_back(_question: str) -> bool:
        await put(site, "wal/00000003.history", f"1\t{Lsn(7 * SIZE + 512)}\twhy\n".encode())
        await add_wal(site, 7, 9, timeline=3)
        return True

    monkeypatch.setattr(command, "_agreed", somebody_goes_back)
    assert await command._run(site, LAST, skip=False, ask=True, as_json=True) is None
    assert {info_key(backup.name) for backup in backups} <= {*await names(site.stores[0], "base/")}
    site, backups = await small()

    async def a_backup_ends(_question: str) -> bool:
        await add_backup(site, 7, 16, timeline=2)
        return True

    monkeypatch.setattr(command, "_agreed", a_backup_ends)
    with pytest.raises(ConfigError, match="more would go by now than was shown"):
        await command._run(site, LAST, skip=False, ask=True, as_json=True)


async def test_nothing_goes_by_a_segment_size_that_is_not_that_of_the_backups() -> None:
    """repository.json is not authenticated: with another size in it, needed WAL would lie "before" all backups."""
    site, _ = await small()
    before = await kept_names(site.stores[0])
    for size in (SIZE // 2, SIZE * 16):
        wrong = replace(site, facts=replace(site.facts, segment_size=size))
        with pytest.raises(IntegrityError, match=f"says that segments have {size} bytes"):
            await expired(wrong, LAST)
    assert await kept_names(site.stores[0]) == before


async def test_a_backup_of_a_clone_takes_no_living_servers_place() -> None:
    """A clone that archives by mistake is the newest timeline; the server that goes on is the one that matters."""
    site, backups = await small()
    for store in site.stores:
        assert isinstance(store, MemoryStore)
        for name, (held, _) in [*store._objects.items()]:
            newest = name == segment(12)
            store._objects[name] = held, START + timedelta(days=6 if newest else 1)
    plan, outcome = await expired(site, LAST)
    assert "timeline 1" in plan.decision.kept[1].reasons[0]
    assert outcome.gone == [backups[1].name, backups[0].name]
    assert segment(12) in await names(site.stores[0])
    for store in site.stores:
        assert isinstance(store, MemoryStore)
        store._objects[segment(12)] = store._objects[segment(12)][0], START + timedelta(days=4)
    _, outcome = await expired(site, LAST)
    assert outcome.gone == [backups[3].name, backups[2].name]
