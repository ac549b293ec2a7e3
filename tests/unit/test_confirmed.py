"""Up to where WAL was said to be safe: how a service gathers it, and how a lease keeps it."""

from __future__ import annotations

import json
from functools import partial

import pytest

from handlers.body import joined
from infra.clock import SystemClock
from infra.storage.heartbeat import Heartbeat
from infra.storage.lease import Lease, confirmed, lease_key
from infra.storage.memory import MemoryStore
from pipeline.confirmed import Confirmed, Told
from pipeline.events import Acknowledged, HistoryReady, SegmentReady, WalMoved
from pipeline.objects import MemoryBody
from pipeline.wal import Lsn, WalFile

SIZE = 1 << 20


def moved(timeline: int, flush: int) -> WalMoved:
    return WalMoved(timeline, Lsn(99 * SIZE), Lsn(99 * SIZE), Lsn(flush), {}, {})


def segment(timeline: int, number: int) -> Acknowledged:
    return Acknowledged(SegmentReady("spool", WalFile.segment(timeline, number * SIZE, SIZE), SIZE))


def test_what_server_and_archiver_are_told_counts_and_never_goes_back() -> None:
    told = Told(SIZE)
    told.heard(moved(1, 0))  # nothing yet
    told.heard(Acknowledged(HistoryReady("spool", WalFile.history(2), 50)))
    assert told.newest is None
    for notice, newest in (
        (moved(1, 5000), Confirmed(1, Lsn(5000))),
        (segment(1, 3), Confirmed(1, Lsn(4 * SIZE))),
        (moved(1, 3 * SIZE), Confirmed(1, Lsn(4 * SIZE))),
        (moved(2, 2 * SIZE), Confirmed(2, Lsn(2 * SIZE))),  # a new timeline, that begins before
        (segment(1, 7), Confirmed(2, Lsn(2 * SIZE))),
    ):
        told.heard(notice)
        assert told.newest == newest


@pytest.mark.parametrize(
    "text", ["", "1", "1 ", "0/5", "x 0/5", "1 0/x", "1  0/5", "-1 0/5", "12345678901 0/5", "² 0/5"]
)
def test_nothing_else_is_taken_for_a_position(text: str) -> None:
    assert Confirmed.parse(text) is None
    assert str(Confirmed.parse("4294967295 FF/AB0")) == "4294967295 FF/AB0"


async def test_the_last_two_leases_tell_it_and_one_of_an_older_walship_tells_nothing() -> None:
    stores = [MemoryStore("near"), MemoryStore("far")]
    assert await confirmed(stores) == []
    for number in (1, 2, 3):
        lease = await Lease.acquire(stores, clock=SystemClock(), tell=print)
        if number < 3:
            lease.confirmed = partial(Confirmed, number, Lsn(number))
        await lease.release()
    assert await confirmed(stores) == [Confirmed(2, Lsn(2))] * 2
    members = json.loads(joined(await stores[0].get(lease_key(2))))
    assert members.pop("confirmed") == "2 0/2"
    older = json.dumps(members).encode()
    assert Heartbeat.decode(older) is not None, "it is still told from others who holds it"
    await stores[0].put(lease_key(2), MemoryBody([older]), replace=True)
    await stores[1].put(lease_key(3), MemoryBody([b"damaged"]), replace=True)
    assert await confirmed(stores) == [Confirmed(2, Lsn(2))]
