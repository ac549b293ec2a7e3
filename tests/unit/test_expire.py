"""Expire on whole repositories in memory: what goes, in which order, and what every interruption leaves."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from datetime import timedelta

import pytest

from handlers.expire import WalGoing, find_wal
from handlers.fetch import read_catalog
from handlers.verify import objects_of, verify
from infra.expire import expire, make_plan, marks_of
from infra.pins import pin, pins_of, unpin
from infra.repository import Destination
from infra.storage.in_use import TTL, using
from infra.storage.memory import MemoryStore
from infra.wiring import Site
from pipeline.catalog import info_key, wal_key
from pipeline.contracts import ObjectInfo, Store
from pipeline.errors import ConfigError, IntegrityError, StoreError
from pipeline.objects import MemoryBody
from pipeline.policy import Policy
from pipeline.runs import Runs
from pipeline.wal import WalFile
from pipeline.wal_needs import WalNeeds
from tests.clock import FastClock
from tests.dying import Dying, Killed
from tests.expiring import SIZE, START, add_backup, add_wal, at, expired, names, small
from tests.keys import SYSTEM_ID
from tests.sites import site_at
from tests.stores import Faulty

LAST = Policy(last=1)
UNKNOWN = ["base/note.txt", "mine/a", "wal/note.txt"]


def segment(number: int, timeline: int = 1) -> str:
    return wal_key(WalFile.segment(timeline, number * SIZE, SIZE))


async def check_listed(site: Site) -> None:
    """Every backup that a destination lists is whole there: parts, chain, and WAL as far as there is any."""
    for store in site.stores:
        alone = at(site, store)
        catalog = await read_catalog(alone.stores, alone.fetch, site.facts.system_id, segment_size=SIZE)
        there = set(await names(store, "base/"))
        assert not [problem for problem in catalog.problems if "builds on" in problem]
        for backup in catalog.backups:
            assert {wanted.name for wanted in objects_of(backup)} <= there
            for lineage in catalog.heirs(backup):
                path = catalog.wal_path(lineage, backup.start_lsn)
                assert path.missing is None
                assert path.end == catalog.known_end(lineage) > backup.stop_lsn
        assert catalog.backups[-1].timeline == 2


def copied(store: MemoryStore) -> MemoryStore:
    made = MemoryStore(store.name)
    made._objects = dict(store._objects)
    return made


async def kept_names(store: Store) -> list[str]:
    """All that matters: without marks and records."""
    return [name for name in await names(store) if not name.startswith(("use/", "log/"))]


async def test_what_nobody_needs_goes_and_nothing_else() -> None:
    site, backups = await small()
    before = await names(site.stores[0])
    plan, outcome = await expired(site, Policy(last=2))
    assert [b.name for b in plan.decision.going] == [backups[1].name, backups[0].name]
    assert outcome.gone == [backups[1].name, backups[0].name]
    assert not outcome.refusals
    for store in site.stores:
        gone = [name for name in before if name not in await names(store)]
        folders = tuple(f"base/{b.name}/" for b in backups[:2])
        assert [n for n in gone if n.startswith("base/")] == [
            n for n in before if n.startswith(folders) and not n.endswith("note.txt")
        ]
        assert [n for n in gone if n.startswith("wal/")] == sorted(
            [*(segment(n) for n in range(8)), f"{segment(2)}.00000028.backup"]
        )
        assert [n for n in gone if n.startswith("tail/")] == [n for n in before if n.startswith("tail/00000001")]
        assert set(UNKNOWN) <= set(await names(store))
        freed = outcome.freed[store.name]
        assert freed.objects == len(gone)
    await check_listed(site)
    catalog = await read_catalog(site.stores, site.fetch, site.facts.system_id, segment_size=SIZE)
    assert (await verify(catalog, site.stores)).ok, "stored bytes: these backups hold no files"
    # And then there is nothing left to do.
    again, _ = await expired(site, Policy(last=2))
    assert again.empty
    assert again.size == 0


async def test_the_process_may_die_at_any_step() -> None:
    site, _ = await small()
    assert isinstance(site.stores[0], MemoryStore)
    before = [copied(store) for store in site.stores if isinstance(store, MemoryStore)]
    # A crash before has left parts of a backup that nobody lists.
    for store in before:
        await store.put("base/base_20251231_000000/data/base/00000001", MemoryBody([b"part"]))
    finished = at(site, *map(copied, before))
    _, outcome = await expired(finished, LAST)
    assert (len(outcome.gone), len(outcome.leftovers)) == (4, 1)
    wanted = [await kept_names(store) for store in finished.stores]
    steps, died = 0, True
    while died:
        calls: list[str] = []
        stores, died = [*map(copied, before)], False
        try:
            await expired(at(site, *(Dying(store, calls, steps) for store in stores)), LAST)
        except Killed:
            died = True
        living = at(site, *stores)
        await check_listed(living)
        await expired(living, LAST)
        assert [await kept_names(store) for store in stores] == wanted
        assert not [name for store in stores for name in await names(store, "use/")]
        steps += 1
    assert steps > 100  # each change that it makes at the two destinations


async def test_the_order_is_infos_everywhere_then_parts_then_wal_then_tails() -> None:
    site, _ = await small()
    calls: list[str] = []
    await expired(at(site, *(Dying(store, calls, 10**6) for store in site.stores)), LAST)
    deleted = [call.removeprefix("delete ") for call in calls if call.startswith("delete ") and "use/" not in call]
    kinds = ["info" if name.endswith("backup_info") else name.split("/", 1)[0] for name in deleted]
    assert kinds[:2] == ["info", "info"]
    assert kinds.index("wal") > max(n for n, kind in enumerate(kinds) if kind in ("info", "base"))
    wal = [name for name in deleted if name.startswith("wal/")]
    numbers = [int(name.split("/")[2][16:24], 16) for name in wal[: len(wal) // 2]]  # at the first destination
    assert numbers == sorted(numbers)
    assert kinds[-2:] == ["tail", "tail"]


async def test_a_pin_at_one_destination_keeps_the_chain_and_its_wal() -> None:
    site, backups = await small()
    await pin(at(site, site.stores[1]), backups[1].name, reason="audit", until=None, tell=pytest.fail)
    plan, _ = await expired(site, LAST)
    reasons = {kept.backup.name: kept.reasons for kept in plan.decision.kept}
    assert reasons[backups[1].name] == ("pinned: audit",)
    assert reasons[backups[0].name] == (f"{backups[1].name} builds on it",)
    assert segment(2) in await names(site.stores[0])
    said: list[str] = []
    assert await pins_of(site, tell=said.append) == {backups[1].name: ["pinned: audit"]}
    await site.stores[0].put(f"pin/{backups[4].name}", MemoryBody([b"damaged"]))
    assert (await pins_of(site, tell=said.append))[backups[4].name] == ["pinned, by a pin that cannot be read"]
    assert len(said) == 1
    await unpin(site, backups[4].name)
    await unpin(site, backups[1].name)
    _, outcome = await expired(site, LAST)
    assert outcome.gone == [backups[1].name, backups[0].name]
    with pytest.raises(ConfigError, match="not pinned"):
        await unpin(site, backups[1].name)
    with pytest.raises(ConfigError, match="there is no backup"):
        await pin(site, backups[1].name, reason="", until=None, tell=pytest.fail)
    with pytest.raises(ConfigError, match="over already"):
        await pin(site, backups[4].name, reason="", until=START, tell=pytest.fail)


async def test_a_pin_that_is_set_between_plan_and_deletion_counts() -> None:
    site, backups = await small()
    marks = marks_of(site)
    plan = await make_plan(site, LAST, marks)
    assert len(plan.decision.going) == 4
    await pin(site, backups[1].name, reason="", until=None, tell=pytest.fail)
    outcome = await expire(site, plan, marks, tell=lambda _: None)
    assert outcome.stayed == {backups[1].name: "pinned", backups[0].name: f"{backups[1].name} builds on it, and stays"}
    assert outcome.gone == [backups[3].name, backups[2].name]
    await check_listed(site)


async def test_what_is_in_use_stays_also_when_that_begins_after_the_plan() -> None:
    site, backups = await small()
    marks = marks_of(site)
    plan = await make_plan(site, LAST, marks)
    async with using(site.stores, backups[1].name, clock=site.clock, tell=pytest.fail, what="restore"):
        outcome = await expire(site, plan, marks, tell=lambda _: None)
        assert "(restore)" in outcome.stayed[backups[1].name]
        await check_listed(site)
        looked = await make_plan(site, LAST, marks_of(site))
        assert "in use by" in looked.decision.kept[1].reasons[0]
    _, outcome = await expired(site, LAST)
    assert backups[0].name in outcome.gone


async def test_what_is_being_taken_is_no_leftover() -> None:
    site, _ = await small()
    name = "base_20260107_000000"
    for store in site.stores:
        await store.put(f"base/{name}/data/base/00000001", MemoryBody([b"part"]))
    async with using(site.stores, name, clock=site.clock, tell=pytest.fail, what="backup"):
        plan = await make_plan(site, LAST, marks_of(site))
        assert plan.seen.leftovers == ()
        assert plan.held.being_taken
    _, outcome = await expired(site, LAST)
    assert outcome.leftovers == [name]
    assert await names(site.stores[0], f"base/{name}/") == []


REFUSED = StoreError("b: AccessDenied")


async def test_what_a_store_refuses_is_listed_everywhere_as_before() -> None:
    a, b = MemoryStore("a"), MemoryStore("b")
    site, backups = await small(a, b)
    before = [name for name in await names(a) if name.startswith("base/")]
    refusing = at(site, a, Faulty(b, down={"delete": REFUSED}))
    _, outcome = await expired(refusing, LAST)
    assert outcome.gone == []
    assert set(outcome.stayed) == {backup.name for backup in backups[:4]}
    assert all("AccessDenied" in reason or "builds on it" in reason for reason in outcome.stayed.values())
    assert {each.destination for each in outcome.refusals} == {"b"}
    for store in (a, b):
        assert [name for name in await names(store) if name.startswith("base/")] == before
    await check_listed(site)
    # Only what lies before the first backup went, where it was let go.
    assert segment(0) not in await names(a)
    assert segment(2) in await names(a)


async def test_one_object_that_is_held_keeps_its_backup_and_no_other() -> None:
    a, b = MemoryStore("a"), MemoryStore("b")
    site, backups = await small(a, b)
    held = info_key(backups[3].name)

    class Holding(Faulty):
        async def delete(self, keys: Collection[str]) -> None:
            if held in keys:
                raise StoreError("b: the object is under legal hold")
            await super().delete(keys)

    _, outcome = await expired(at(site, a, Holding(b)), LAST)
    assert outcome.gone == [backups[1].name, backups[0].name]
    assert "legal hold" in outcome.stayed[backups[3].name]
    assert outcome.stayed[backups[2].name] == f"{backups[3].name} builds on it, and stays"
    assert held in await names(a)
    await check_listed(site)


async def test_a_destination_that_is_away_postpones_everything_unless_it_is_left_out() -> None:
    a, b = MemoryStore("a"), MemoryStore("b")
    site, _ = await small(a, b)
    before = await names(b)
    away = at(site, a, Faulty(b, down={"list": StoreError("b is away"), "get": StoreError("b is away")}))
    with pytest.raises(StoreError, match="b cannot be listed, so nothing is deleted"):
        await expired(away, LAST)
    assert len(await names(a)) == len(before)
    plan, outcome = await expired(away, LAST, skip=True)
    assert list(plan.seen.away) == ["b"]
    assert len(outcome.gone) == 4
    assert await names(b) == before
    await check_listed(site)
    # It is back: the rest goes.
    _, outcome = await expired(site, LAST)
    assert len(outcome.gone) == 4
    assert await kept_names(a) == await kept_names(b)


async def test_a_destination_of_a_newer_format_is_refused_by_name() -> None:
    """Whoever only reads passes it over; here it would lose what this walship does not know."""
    site, _ = await small()
    newer = MemoryStore("newer")
    facts = {**json.loads(next(site.facts.encode().chunks())), "format": 2}
    await newer.put(f"{SYSTEM_ID}/repository.json", MemoryBody([json.dumps(facts).encode()]))
    site = replace(site, destinations=(*site.destinations, Destination(newer, required=False)))
    with pytest.raises(IntegrityError, match="newer is of format 2"):
        await expired(site, LAST)
    # And so is a single backup of that kind.
    site, backups = await small()
    for store in site.stores:
        await store.put(info_key(backups[0].name), MemoryBody([b"WALSHIP\x02and more"]), replace=True)
    _, outcome = await expired(site, LAST)
    assert backups[0].name not in outcome.gone
    assert info_key(backups[0].name) in await names(site.stores[0])


async def test_the_newest_one_is_not_the_last_good_one_if_a_part_of_it_is_lost() -> None:
    site, backups = await small()
    for store in site.stores:
        await store.delete([f"base/{backups[4].name}/data/base/00000002"])
    plan, _ = await expired(site, LAST)
    assert [kept.backup.name for kept in plan.decision.kept] == [b.name for b in backups[2:]]
    assert f"base/{backups[4].name}/data/base/00000002 is missing everywhere" in plan.decision.notes[0]
    # Damage in the description of one keeps it, and the WAL it may need.
    site, backups = await small()
    for store in site.stores:
        await store.put(info_key(backups[2].name), MemoryBody([b"damaged"]), replace=True)
    _, outcome = await expired(site, LAST)
    assert info_key(backups[2].name) in await names(site.stores[0])
    assert segment(5) in await names(site.stores[0])
    assert backups[2].name not in outcome.gone


async def test_the_same_numbers_of_another_timeline_stay() -> None:
    going = WalGoing(SIZE, {1: Runs(((3, 5),)), 2: Runs(((4, 6),))}, [(4, 2, f"{segment(4, 2)}.partial")])
    assert [*going.keys()] == [
        segment(3), segment(4), segment(4, 2), f"{segment(4, 2)}.partial", segment(5, 2)
    ]  # fmt: skip


async def test_a_repository_without_backups_keeps_all_its_wal() -> None:
    site = await site_at(MemoryStore())
    await add_wal(site, 0, 5, raw=True)
    plan, _ = await expired(site, LAST)
    assert plan.empty
    assert len(await names(site.stores[0], "wal/")) == 5


async def test_old_records_go_with_it() -> None:
    site, _ = await small(MemoryStore())
    old = START - timedelta(days=500)
    for number in range(1002):
        name = f"log/{old:%Y%m%dT%H%M%SZ}-expire-ok-{number:08x}"
        await site.stores[0].put(name, MemoryBody([b"?"]))
    await expired(site, LAST)
    assert len(await names(site.stores[0], "log/")) == 1000


async def test_ten_thousand_segments_and_sixty_backups_take_seconds() -> None:
    """By the number of questions that are asked: what a far store takes its time for."""
    site = await site_at(MemoryStore(), clock=FastClock(START + timedelta(days=60)))
    await add_wal(site, 0, 10_000, raw=True)
    for day in range(1, 61):
        await add_backup(site, day, day * 100)
    counting = Faulty(site.stores[0])
    plan = await make_plan(at(site, counting), Policy(window=timedelta(days=7)), marks_of(at(site, counting)))
    assert len(plan.decision.going) == 52
    assert sum(len(runs) for runs in plan.wal["memory"].segments.values()) == 5300
    assert counting.count("get") <= 70
    assert counting.count("list") <= 15
    assert counting.count("delete") == 0


async def test_many_segments_are_a_few_ranges() -> None:
    class Endless(MemoryStore):
        async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
            assert (after, shallow) == ("", False)
            for number in range(30_000) if prefix == "wal/" else ():
                yield ObjectInfo(segment(number), 10)

    going = await find_wal(Endless(), WalNeeds({1: ((25_000, None),)}), SIZE)
    assert [number for _, _, number in going.ranges()] == [25_000]
    assert going.size == 250_000
    keys = going.keys()
    assert next(keys) == segment(0)


async def test_a_mark_of_a_process_that_is_gone_is_waited_for_once() -> None:
    site, backups = await small()
    await site.stores[0].put(f"use/{backups[0].name}/0000000a", MemoryBody([b"whatever its maker wrote"]))
    before = site.clock.monotonic()
    looked = await make_plan(site, LAST, marks_of(site))
    assert backups[0].name not in [backup.name for backup in looked.decision.going]
    assert site.clock.monotonic() == before  # to look only is quick
    _, outcome = await expired(site, LAST)
    assert backups[0].name in outcome.gone
    assert site.clock.monotonic() - before >= TTL
    assert await names(site.stores[0], "use/") == []
