"""What was verified is remembered, and never makes anything look better than it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.keyring import RepositoryKeys
from infra.ring import Ring
from infra.storage.memory import MemoryStore
from infra.verification import Order, verify_site
from pipeline.chain import Expected
from pipeline.contracts import ObjectInfo
from pipeline.errors import IntegrityError, StoreError
from pipeline.objects import MemoryBody
from pipeline.verified import Memory, mark_of
from tests.keys import SYSTEM_ID, chain, encrypting_keys, stored
from tests.stores import Faulty
from tests.verifying import KEYS, KINDS, Ground, objects, segment, writer_keys

NOON = datetime(2026, 1, 14, 12, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def made() -> dict[str, bytes]:
    return asyncio.run(objects())


@pytest.fixture
async def ground(made: dict[str, bytes]) -> Ground:
    return await Ground.make(made)


#: Read at each run: two keys and two tails.
ALWAYS = 4


async def test_what_was_read_is_not_read_again(ground: Ground) -> None:
    first = await ground.verify()
    everything = len(ground.objects)
    assert (first.ok, first.objects, first.trusted, first.compared) == (True, 2 * everything, 0, 1)
    assert ground.said == []
    again = await ground.verify()
    assert (again.ok, again.objects, again.trusted) == (True, 2 * ALWAYS, 2 * (everything - ALWAYS))
    assert (again.backups[0].good, again.backups[0].usable) == (first.backups[0].objects, True)
    await ground.stores[1].put(segment(7), MemoryBody([stored(chain(KEYS, cipher="aes-256-gcm"), segment(7), b"x")]))
    assert (await ground.verify()).objects == 2 * ALWAYS + 1
    assert (await ground.verify(everything=True)).objects == 2 * everything + 1
    ground.later(days=31)
    assert (await ground.verify()).objects == 2 * everything + 1, "older than the interval"
    assert (await ground.verify(backup="b")).objects == 2 * ALWAYS
    ground.settings["WALSHIP_VERIFY_INTERVAL"] = "0"
    assert (await ground.verify()).objects == 2 * everything + 1


async def test_what_is_new_is_told_from_what_is_old_by_its_run(ground: Ground) -> None:
    await ground.verify()
    ground.later(days=20)
    for place in ground.stores:
        await place.put(segment(5), MemoryBody([stored(chain(KEYS, cipher="aes-256-gcm"), segment(5), b"x")]))
    await ground.verify()
    ground.later(days=15)
    report = await ground.verify()
    assert report.trusted == 2, "segment 5 was read 15 days ago, all else 35"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("ring", "data key", "tail")])
async def test_rot_is_found_when_the_interval_is_over_or_by_all_and_a_replaced_object_at_once(
    ground: Ground, kind: str
) -> None:
    name = KINDS[kind]
    await ground.verify()
    ground.rot(name)
    assert (await ground.verify()).ok, "size and time are as they were"
    found = await ground.verify(everything=True)
    assert [(f.destination, f.name, f.kind) for f in found.faults] == [("second", name, "damaged")]
    again = await ground.verify()
    assert [fault.name for fault in again.faults] == [name], "what is damaged is not trusted any more"
    # Whoever puts it back makes it a new object.
    await ground.stores[1].put(name, MemoryBody([ground.objects[name]]), replace=True)
    assert (await ground.verify()).ok
    ground.rot(name)
    ground.later(days=31)
    assert [fault.name for fault in (await ground.verify()).faults] == [name]
    await ground.stores[1].put(name, MemoryBody([ground.objects[name]]), replace=True)
    await ground.verify()
    await ground.stores[1].put(name, MemoryBody([ground.objects[name][:-1] + b"?"]), replace=True)
    assert [fault.name for fault in (await ground.verify()).faults] == [name], "it was replaced"


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_missing_is_missed_at_once(ground: Ground, kind: str) -> None:
    await ground.verify()
    ground.lose(KINDS[kind])
    report = await ground.verify()
    if kind == "tail":
        assert report.ok, "the other destination has it"
    else:
        assert [(f.destination, f.name, f.kind) for f in report.faults] == [("second", KINDS[kind], "missing")]


async def test_memory_that_is_damaged_or_of_somebody_else_is_not_believed(ground: Ground) -> None:
    everything = 2 * len(ground.objects)
    half = len(ground.objects)
    await ground.verify()
    ground.rot(ground.memory())
    report = await ground.verify()
    assert (report.ok, report.objects) == (True, half + ALWAYS)
    assert "what was verified before at second is not known, so all of it is read: " in ground.said[0]
    assert (await ground.verify()).objects == 2 * ALWAYS, "it was written anew"
    # One without the keys of the repository makes no memory, whatever it says; nor is that of another place ours.
    good = b"".join((await ground.stores[1].get(ground.memory())).chunks())
    plain = chain(KEYS).decode(Expected(ground.memory(), SYSTEM_ID), [good])[1]
    stranger = stored(chain(encrypting_keys()), ground.memory(), plain)
    theirs = stored(chain(KEYS), ground.memory(), plain.replace(b'"second"', b'"thirds"'))
    for forged in (stranger, theirs, b"WALSHIP", b""):
        await ground.stores[1].put(ground.memory(), MemoryBody([forged]), replace=True)
        assert (await ground.verify()).objects == half + ALWAYS
        assert len(ground.said) == 1
    for place in range(2):
        ground.lose(ground.memory(place), place)
    assert (await ground.verify()).objects == everything
    assert ground.said == [], "nobody has verified yet: nothing to tell"


async def test_a_clock_that_is_wrong_makes_nothing_be_trusted_for_longer(ground: Ground) -> None:
    everything = 2 * len(ground.objects)
    await ground.verify()
    ground.later(hours=-1)
    assert (await ground.verify()).objects == everything, "verified in the future"
    assert "by a clock ahead of this one" in ground.said[0]
    ground.later(hours=1)
    assert (await ground.verify()).objects == 2 * ALWAYS
    ground.later(hours=1)
    assert (await ground.verify()).objects == 2 * ALWAYS
    # A host whose clock is a year ahead has verified one new object; then ours again.
    ground.later(days=365)
    await ground.verify()
    ground.later(days=-365)
    assert (await ground.verify()).objects == everything
    assert (await ground.verify()).objects == 2 * ALWAYS, "and only once"
    # Set back by ten days: what is as old as 25 by that clock was read 35 days before the latest that is known.
    memory = Memory("d", "7", now=NOON + 25 * DAY, interval=30 * DAY)
    memory.load(_remembering(NOON, NOON + 35 * DAY))
    assert not memory.knows(ObjectInfo("0", 1), decoded=True)


async def test_a_host_that_only_writes_remembers_stored_bytes(ground: Ground) -> None:
    reader, ground.keys = ground.keys, writer_keys()
    assert not ground.keys.reads
    report = await ground.verify()
    assert report.ok
    assert report.trusted == 0
    assert (await ground.verify()).objects == 2 * ALWAYS
    ground.keys = reader
    report = await ground.verify()
    assert report.objects == 2 * len(ground.objects), "nothing was decoded yet"
    ground.keys = writer_keys()
    assert (await ground.verify()).objects == 2 * ALWAYS
    ground.keys = reader
    assert (await ground.verify()).objects == 2 * ALWAYS, "what was decoded stays so"


async def test_what_cannot_be_written_down_or_listed_is_told(ground: Ground) -> None:
    refusing = Faulty(ground.stores[1], down={"put": StoreError("second: put: access denied")})
    for _ in range(2):
        assert (await ground.verify(ground.stores[0], refusing)).ok
        assert ground.said == [
            "what was verified at second could not be written down, and is read again: second: put: access denied"
        ]
    await ground.verify()
    deaf = Faulty(ground.stores[1], down={"list": StoreError("second: list: it is down")})
    report = await ground.verify(ground.stores[0], deaf)
    assert not report.ok
    assert {(f.destination, f.kind) for f in report.faults} == {("second", "unreadable")}
    assert (await ground.verify()).objects == 2 * ALWAYS, "what was not listed is not forgotten"


async def test_what_was_interrupted_goes_on_where_it_was(ground: Ground) -> None:
    order, everything = Order(), 2 * len(ground.objects)

    def stop(objects: int, _size: int, _trusted: int) -> None:
        if objects == 30:
            running.cancel()

    running = asyncio.create_task(verify_site(ground.site(), order, tell=ground.said.append, progress=stop))
    with pytest.raises(asyncio.CancelledError):
        await running
    report = await ground.verify()
    assert report.ok
    assert everything - 30 <= report.objects <= everything - 20


async def test_what_is_written_under_a_key_of_later_is_read(made: dict[str, bytes]) -> None:
    """A service has started since: its data key was not known when we began."""
    ground = await Ground.make(made)
    ground.keys = RepositoryKeys(SYSTEM_ID, KEYS.ring, KEYS.policy, store=ground.stores[0], allow_unencrypted=False)
    await ground.keys.refresh()
    late = RepositoryKeys(SYSTEM_ID, KEYS.ring, KEYS.policy, store=None, allow_unencrypted=False)
    assert isinstance(KEYS.ring, Ring)
    late._begin_writing(KEYS.ring, NOON)
    assert late.key_object is not None
    content = stored(chain(late, cipher="aes-256-gcm"), segment(5), b"x")
    for place in ground.stores:
        await place.put(*late.key_object)
        await place.put(segment(5), MemoryBody([content]))
    assert (await ground.verify()).faults == ()


async def test_a_backup_that_is_expired_meanwhile_is_no_fault(ground: Ground) -> None:
    """All of it goes once the catalog was read: backup_info, parts and the WAL that only it needed."""

    class Expiring(MemoryStore):
        async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
            if prefix == "base/b/":
                for store in ground.stores:
                    for name in [name for name in store._objects if name.startswith(("base/b/", "wal/0"))]:
                        if not name.endswith(".history"):
                            del store._objects[name]
            async for info in super().list(prefix, after=after, shallow=shallow):
                yield info

    expiring = Expiring("first")
    expiring._objects = ground.stores[0]._objects
    report = await ground.verify(expiring, ground.stores[1])
    assert (report.faults, report.backups, report.ok) == ((), (), True)
    assert "b was deleted while it was verified" in report.warnings


async def test_a_limit_of_bytes_per_second_holds(ground: Ground) -> None:
    before = ground.clock.passed
    report = await ground.verify(rate=100_000)
    assert ground.clock.passed - before > 60 + 0.8 * report.size / 100_000 - 10


async def test_files_that_differ_from_the_manifest_make_a_backup_unusable() -> None:
    ground = await Ground.make(await objects(wrong="base/1/100"))
    for _ in range(2):
        report = await ground.verify()
        (backup,) = report.backups
        assert (report.ok, report.faults, backup.usable, report.compared) == (False, (), False, 0)
        assert backup.differs == (
            "what is stored differs from its backup_manifest: 'base/1/100' has another size or checksum"
        )
    assert (await ground.verify(stored_only=True)).ok


def _remembering(*moments: datetime) -> bytes:
    """Objects ``0``, ``1`` …, each read in a run that began then."""
    content = b""
    for number, moment in enumerate(moments):
        memory = Memory("d", "7", now=moment, interval=999 * DAY)
        if content:
            memory.load(content)
        memory.add(ObjectInfo(str(number), 1), decoded=True)
        content = memory.encode()
    return content


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 3), st.booleans(), st.booleans()), max_size=40).map(
        lambda each: [each[i : i + 5] for i in range(0, len(each), 5)]
    )
)
def test_memory_says_of_each_object_what_the_last_run_said(runs: list[list[tuple[str, int, bool, bool]]]) -> None:
    """Against a dict: name → (size, decoded) of each run, or what was found damaged."""
    told: dict[int, tuple[datetime, bool]] = {}
    content = b""
    for number, run in enumerate(runs):
        now = NOON + number * DAY
        memory = Memory("d", "7", now=now, interval=3 * DAY)
        if content:
            memory.load(content)
        for name, size, decoded, good in {each[:2]: each for each in run}.values():
            info = ObjectInfo(name, size, NOON)
            began, deep = told.get(mark_of(info), (NOON - 9 * DAY, False))
            assert memory.knows(info, decoded=decoded) is (now - began <= 3 * DAY and (deep or not decoded))
            if good:
                memory.add(info, decoded=decoded)
                told[mark_of(info)] = now, decoded
            else:
                memory.drop(info)
                told.pop(mark_of(info), None)
        content = memory.encode()


def test_memory_that_was_cut_is_refused() -> None:
    content = _remembering(NOON, NOON + DAY)
    for changed in (
        content[:-1],
        content + b"x",
        b"{}\n",
        content.replace(b'"walship_verified": 1', b'"walship_verified": 2'),
    ):
        with pytest.raises(IntegrityError, match="what was verified at d cannot be read"):
            Memory("d", "7", now=NOON, interval=DAY).load(changed)
    with pytest.raises(IntegrityError, match="it tells of d"):
        Memory("e", "7", now=NOON, interval=DAY).load(content)
