"""Heal: what another destination has whole comes back, nothing is ever lost, and what it cannot do it says."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest

from handlers.verify_report import Report
from infra.storage.heartbeat import Heartbeat, Holder
from infra.storage.memory import MemoryStore
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody
from tests.dying import Dying, Killed
from tests.keys import NOW, SYSTEM_ID, chain, plain_keys, stored
from tests.stores import Faulty
from tests.verifying import KEYS, KINDS, RING, Ground, objects, segment

CHAIN = chain(KEYS, cipher="aes-256-gcm")


@pytest.fixture(scope="module")
def made() -> dict[str, bytes]:
    return asyncio.run(objects())


@pytest.fixture
async def ground(made: dict[str, bytes]) -> Ground:
    return await Ground.make(made)


def outcomes(report: Report) -> list[tuple[str, str, str]]:
    return [(h.fault.destination, h.fault.name, h.outcome) for h in report.healings]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lost", [False, True], ids=["damaged", "missing"])
async def test_each_kind_of_object_is_healed(ground: Ground, kind: str, lost: bool) -> None:
    name = KINDS[kind]
    await ground.verify()
    ground.lose(name) if lost else ground.rot(name)
    looked = await ground.verify(everything=True, heal=True, dry_run=True)
    if kind == "tail" and lost:
        assert looked.ok, "where one is missing, nobody can say that it was ever there"
        return
    assert outcomes(looked) == [("second", name, "would")]
    assert looked.ok is (kind == "tail"), "another destination has the bytes of a tail: no fault, and yet to be mended"
    assert ground.content() != ground.objects
    healed = await ground.verify(everything=True, heal=True)
    assert outcomes(healed) == [("second", name, "healed")]
    assert (healed.healings[0].source, healed.ok) == ("first", True)
    assert ground.content() == ground.content(0) == ground.objects
    after = await ground.verify()
    assert (after.ok, after.objects) == (True, 8), "what was healed is remembered as well"
    assert (await ground.verify(everything=True)).ok


async def test_both_destinations_damaged_in_different_places(ground: Ground) -> None:
    for place, kinds in enumerate((("wal", "part", "ring"), ("index", "info", "data key", "manifest"))):
        for kind in kinds:
            ground.rot(KINDS[kind], place)
    ground.lose(segment(1), 0)
    healed = await ground.verify(heal=True)
    assert healed.ok
    assert [h.outcome for h in healed.healings] == ["healed"] * 8
    assert [h.fault.name for h in healed.healings][:2] == [RING, KINDS["data key"]], "keys first"
    assert healed.healings[-1].fault.name == KINDS["info"], "and last what makes it a backup"
    assert ground.content(0) == ground.content(1) == ground.objects


@pytest.mark.parametrize("kind", ["wal", "part", "index", "manifest", "ring"])
async def test_damaged_in_the_same_place_everywhere_nothing_can_be_done_and_nothing_is(
    ground: Ground, kind: str
) -> None:
    for place in range(2):
        ground.rot(KINDS[kind], place, bit=-400 - place)
    before = ground.content(0), ground.content(1)
    report = await ground.verify(heal=True)
    assert not report.ok
    assert {outcome for *_, outcome in outcomes(report)} == {"cannot"}
    assert "first: " in next(h.fact for h in report.healings if h.fault.destination == "second")
    assert before == (ground.content(0), ground.content(1))
    third = MemoryStore("third")
    for name, content in ground.objects.items():
        await third.put(name, MemoryBody([content]))
    ground.stores.append(third)
    assert (await ground.verify(heal=True)).ok
    assert ground.content(0) == ground.content(1) == ground.objects


async def test_a_backup_info_waits_for_all_else_of_its_backup(ground: Ground) -> None:
    ground.lose(KINDS["info"])
    for place in range(2):
        ground.rot(KINDS["part"], place)
    report = await ground.verify(heal=True)
    assert [(h.outcome, h.fault.name) for h in report.healings if h.fault.destination == "second"] == [
        ("cannot", KINDS["part"]), ("cannot", KINDS["info"]),
    ]  # fmt: skip
    assert KINDS["info"] not in ground.content()


async def test_what_is_whole_and_differs_is_left_to_people(ground: Ground) -> None:
    # Another segment under the same name that is damaged: a copy of ours would bury what it was.
    other = bytearray(stored(CHAIN, segment(2), b"of another server"))
    other[-40] ^= 1
    ring = stored(chain(plain_keys(), "none"), RING, b"another ring")
    elsewhere = stored(CHAIN, KINDS["part"], b"of another backup", backup="c" * 32)
    foreign = stored(chain(KEYS, cipher="aes-256-gcm", system_id="7"), segment(1), b"")
    changed = {segment(2): bytes(other), RING: ring, KINDS["part"]: elsewhere, segment(1): foreign}
    for name, content in changed.items():
        await ground.stores[1].put(name, MemoryBody([content]), replace=True)
    report = await ground.verify(heal=True)
    assert {(f.name, f.kind) for f in report.faults} == {
        (segment(2), "damaged"), (RING, "conflict"), (KINDS["part"], "conflict"), (segment(1), "conflict"),
    }  # fmt: skip
    assert {outcome for *_, outcome in outcomes(report)} == {"cannot"}
    assert ground.content() == ground.objects | changed
    assert "was never the same" in next(h.fact for h in report.healings if h.fault.name == segment(2))
    assert SYSTEM_ID in next(f.fact for f in report.faults if f.name == segment(1))


async def test_of_two_good_ones_that_differ_none_is_taken(made: dict[str, bytes]) -> None:
    ground = await Ground.make(made, 3)
    ground.lose(segment(2), 0)
    await ground.stores[1].put(segment(2), MemoryBody([stored(CHAIN, segment(2), b"other")]), replace=True)
    report = await ground.verify(heal=True)
    assert outcomes(report) == [("first", segment(2), "cannot")]
    assert report.healings[0].fact == "second and third have it whole, and differ"
    # The same, stored twice by one server, is another matter: two salts, one content.
    await ground.stores[1].put(segment(2), MemoryBody([stored(CHAIN, segment(2), bytes(1 << 20))]), replace=True)
    assert (await ground.verify(heal=True)).ok


async def test_a_data_key_comes_with_what_is_encrypted_under_it(ground: Ground) -> None:
    ground.lose(KINDS["data key"])
    ground.lose(segment(2))
    calls: list[str] = []
    await ground.verify(*(Dying(store, calls, 10**6) for store in ground.stores), heal=True)
    puts = [call for call in calls if call.startswith(("put keys/", "put wal/"))]
    assert puts == [f"put {KINDS['data key']}", f"put {segment(2)}"]


async def test_a_store_that_refuses_is_told(ground: Ground) -> None:
    ground.rot(segment(2))
    locked = Faulty(ground.stores[1], down={"put": StoreError("second: the object is locked")})
    report = await ground.verify(ground.stores[0], locked, heal=True)
    assert [(h.outcome, h.fact) for h in report.healings] == [("cannot", "second: the object is locked")]
    assert [f.name for f in report.faults] == [segment(2)]


async def test_what_comes_back_by_itself_or_lies_on_reading_is_not_called_healed(ground: Ground) -> None:
    ground.rot(segment(2))
    lying = Faulty(ground.stores[1], flip={segment(2): 800})
    report = await ground.verify(ground.stores[0], lying, heal=True)
    assert outcomes(report) == [("second", segment(2), "cannot")], "it was written, and reads badly still"
    assert ground.content() == ground.objects
    assert not report.ok
    flaky = Faulty(ground.stores[1], fail={("get", 1): StoreError("second: broken pipe", passing=True)})
    report = await ground.verify(ground.stores[0], flaky, heal=True, everything=True)
    assert all(f.kind == "unreadable" for f in report.faults), "nothing is known of it: it is left alone"


async def test_a_backup_that_is_being_deleted_is_left_alone(ground: Ground) -> None:
    ground.lose(KINDS["part"])
    mark = "use/b/0123abcd.going"

    async def beat() -> None:
        for number in count():
            heartbeat = Heartbeat.of(Holder.here(NOW, "expire"), number, NOW)
            ground.stores[0]._objects[mark] = b"".join(heartbeat.encode().chunks()), NOW
            await asyncio.sleep(0)

    beating = asyncio.create_task(beat())
    report = await ground.verify(heal=True)
    beating.cancel()
    assert [h.outcome for h in report.healings] == ["cannot"]
    assert "b is being deleted by" in report.healings[0].fact
    assert [entry.key async for entry in ground.stores[0].list("use/")] == [mark]


async def test_killed_at_any_step_each_object_is_as_it_was_or_good(ground: Ground) -> None:
    for place, kinds in enumerate((("wal", "part"), ("info", "tail"))):
        for kind in kinds:
            ground.rot(KINDS[kind], place)
    ground.lose(KINDS["data key"])
    before = [dict(store._objects) for store in ground.stores]
    steps, died = 0, True
    while died:
        calls: list[str] = []
        for store, there in zip(ground.stores, before, strict=True):
            store._objects = dict(there)
        died = False
        try:
            await ground.verify(*(Dying(store, calls, steps) for store in ground.stores), heal=True)
        except (Killed, BaseExceptionGroup):
            died = True
        for place, there in enumerate(before):
            for name, content in ground.content(place).items():
                old = there.get(name, (b"", None))[0]
                assert name.startswith("use/") or content in (old, ground.objects[name])
        assert not [call for call in calls if call.startswith("delete ") and "use/" not in call]
        assert (await ground.verify(heal=True)).ok
        assert all(
            {n: c for n, c in ground.content(p).items() if not n.startswith("use/")} == ground.objects for p in (0, 1)
        )
        steps += 1
    assert steps > 10
