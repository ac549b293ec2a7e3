"""Up to where WAL was said to be safe: how a service gathers it, and how a lease keeps it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from handlers.body import joined
from infra.status import read_status
from infra.storage.heartbeat import Heartbeat
from infra.storage.lease import Lease, lease_key
from infra.storage.memory import MemoryStore
from infra.storage.reported import confirmed, forget_confirmed
from pipeline.catalog import REPOSITORY
from pipeline.confirmed import Confirmed, Told
from pipeline.errors import ObjectConflict, StoreError
from pipeline.events import Acknowledged, HistoryReady, SegmentReady, WalMoved
from pipeline.objects import MemoryBody
from pipeline.wal import Lsn, WalFile
from tests.clock import FastClock
from tests.leases import beat
from tests.stores import Faulty
from tests.verifying import SIZE, Ground, segment
from tests.verifying import objects as made


def moved(timeline: int, flush: int) -> WalMoved:
    return WalMoved(timeline, Lsn(99 * SIZE), Lsn(99 * SIZE), Lsn(flush), {}, {})


def stored(timeline: int, number: int) -> Acknowledged:
    return Acknowledged(SegmentReady("spool", WalFile.segment(timeline, number * SIZE, SIZE), SIZE))


def test_what_server_and_archiver_are_told_counts_and_never_goes_back() -> None:
    told = Told(SIZE)
    told.heard(moved(1, 0))  # nothing yet
    told.heard(Acknowledged(HistoryReady("spool", WalFile.history(2), 50)))
    assert told.newest is None
    for notice, newest in (
        (moved(1, 5000), Confirmed(1, Lsn(5000))),
        (stored(1, 3), Confirmed(1, Lsn(4 * SIZE))),
        (moved(1, 3 * SIZE), Confirmed(1, Lsn(4 * SIZE))),
        (moved(2, 2 * SIZE), Confirmed(2, Lsn(2 * SIZE))),  # a new timeline, that begins before
        (stored(1, 7), Confirmed(2, Lsn(2 * SIZE))),
    ):
        told.heard(notice)
        assert told.newest == newest


@pytest.mark.parametrize(
    "text", ["", "1", "1 ", "0/5", "x 0/5", "1 0/x", "1  0/5", "-1 0/5", "12345678901 0/5", "² 0/5"]
)
def test_nothing_else_is_taken_for_a_position(text: str) -> None:
    assert Confirmed.parse(text) is None
    assert str(Confirmed.parse("4294967295 FF/AB0")) == "4294967295 FF/AB0"


async def test_the_newest_lease_tells_it_or_nobody_does() -> None:
    stores = [MemoryStore("near"), MemoryStore("far")]
    assert await confirmed(stores) == []
    first = await Lease.acquire(stores, clock=FastClock(), tell=print)
    first.confirmed = partial(Confirmed, 1, Lsn(1))
    await beat(first)
    assert await confirmed(stores) == [Confirmed(1, Lsn(1))] * 2
    second = await Lease.acquire(stores[:1], clock=FastClock(), tell=print)  # the first one was killed; far is away
    assert await confirmed(stores) == [Confirmed(1, Lsn(1))] * 2, "the second has said nothing yet"
    second.confirmed = partial(Confirmed, 2, Lsn(2))
    await beat(second)
    assert await confirmed(stores) == [Confirmed(2, Lsn(2))], "the lease before is of no account any more"
    await second.release()
    assert json.loads(joined(await stores[0].get(lease_key(2))))["confirmed"] == "2 0/2"
    assert await confirmed(stores) == [], "and who was killed before that knows nothing of it"


async def test_what_is_shipped_without_a_lease_makes_it_unknown_until_the_holder_says_it_again() -> None:
    store, clock = MemoryStore("near"), FastClock()
    await forget_confirmed([store])  # there is none
    lease = await Lease.acquire([store], clock=clock, tell=print)
    lease.confirmed = partial(Confirmed, 1, Lsn(1))
    await beat(lease)
    await forget_confirmed([store, Faulty(MemoryStore("away"), down={"list": StoreError("away")})])
    assert await confirmed([store]) == []
    await beat(lease)
    assert await confirmed([store]) == [Confirmed(1, Lsn(1))]
    await lease.release()
    released = joined(await store.get(lease_key(1)))
    await forget_confirmed([store])
    assert joined(await store.get(lease_key(1))) == released


async def test_a_lease_of_an_older_walship_or_a_damaged_one_tells_nothing() -> None:
    store = MemoryStore("near")
    lease = await Lease.acquire([store], clock=FastClock(), tell=print)
    lease.confirmed = partial(Confirmed, 1, Lsn(1))
    await beat(lease)
    members = json.loads(joined(await store.get(lease_key(1))))
    del members["confirmed"]
    for content in (json.dumps(members).encode(), b"damaged"):
        await store.put(lease_key(1), MemoryBody([content]), replace=True)
        assert await confirmed([store]) == []
        assert (Heartbeat.decode(content) is None) == (content == b"damaged"), "an older one still tells who holds it"


class Arriving(FastClock):
    """While somebody sleeps, what was on its way is stored."""

    def __init__(self, arrive: Callable[[], Awaitable[object]]) -> None:
        super().__init__()
        self._arrive = arrive

    async def sleep(self, seconds: float) -> None:
        await self._arrive()
        await super().sleep(seconds)


@pytest.fixture
async def busy() -> Ground:
    """A repository that is written to: of segments 2 and 3, the later one is there."""
    ground = await Ground.make(await made(), 1)
    lease = await Lease.acquire(ground.stores, clock=FastClock(), tell=print)
    lease.confirmed = partial(Confirmed, 1, Lsn(2 * SIZE))
    await beat(lease)
    return ground


async def test_verify_waits_for_what_is_on_its_way_and_no_longer(busy: Ground) -> None:
    gone = segment(2)
    kept = busy.objects[gone]
    busy.lose(gone, 0)

    async def arrive() -> None:
        with contextlib.suppress(ObjectConflict):
            await busy.stores[0].put(gone, MemoryBody([kept]))

    busy.clock = Arriving(arrive)
    assert not (await busy.verify()).holes
    assert busy.clock.passed < 70
    busy.lose(gone, 0)
    busy.clock = FastClock()
    (hole,) = (await busy.verify()).holes
    assert gone.endswith(str(hole.first)), "it never came: the service may be gone"
    assert busy.clock.passed == pytest.approx(67)


async def test_verify_does_not_wait_for_what_was_said_to_be_safe(busy: Ground) -> None:
    busy.lose(segment(1), 0)
    assert (await busy.verify()).holes
    assert busy.clock.passed == 60


async def test_status_waits_for_what_is_on_its_way(busy: Ground) -> None:
    gone = segment(2)
    kept = busy.objects[gone]

    async def arrive() -> None:
        with contextlib.suppress(ObjectConflict):
            await busy.stores[0].put(gone, MemoryBody([kept]))

    waits: list[str] = []
    busy.lose(gone, 0)
    busy.settings = {"POSTGRES_HOST": "/nowhere"}
    await busy.stores[0].put(REPOSITORY, MemoryBody([b"{}"]))
    busy.clock = Arriving(arrive)
    (place,) = (await read_status(busy.site(), waits=waits.append)).destinations
    assert place.missing == ""
    assert waits == ["looking again, for up to 6 s: the newest WAL is not yet at first"]
    busy.lose(gone, 0)
    busy.clock = FastClock()
    (place,) = (await read_status(busy.site())).destinations
    assert gone.endswith(place.missing)
    assert place.missing
