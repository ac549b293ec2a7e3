"""Readings of destinations: each tells of itself alone, and says when it was last looked at."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from infra.done import Done
from infra.monitoring.metrics import Metrics
from infra.records import write
from infra.repository import Destination
from infra.storage.memory import MemoryStore
from infra.survey import Survey
from infra.wiring import Site
from pipeline.catalog import wal_key
from pipeline.errors import StoreError
from pipeline.operations import Record
from pipeline.wal import WalFile
from tests.clock import FastClock
from tests.parts import Shelf
from tests.scraped import read
from tests.stores import Faulty
from tests.unit.test_status import SIZE, archive, back_up, repository_shelf, site_of
from tests.waldata import Writer

_2000 = datetime(2000, 1, 1, tzinfo=UTC).timestamp()


async def commit(shelf: Shelf, number: int, at: datetime) -> None:
    """A finished segment with one transaction, that ended then."""
    writer = Writer(number * SIZE)
    writer.add(struct.pack("<q", round((at.timestamp() - _2000) * 1e6)), xid=700, rmid=1)
    writer.add(rmid=0, info=0x40)
    await shelf(wal_key(WalFile.segment(1, number * SIZE, SIZE)), writer.segment())


@pytest.fixture
async def shelf() -> Shelf:
    made = await repository_shelf()
    await archive(made, range(3, 6))
    await back_up(made, 3)
    return made


class Surveyed:
    """A survey of one destination that may fail, and one that has the same; and the metrics of both."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.near, self.far = Faulty(shelf.store), MemoryStore(name="far")
        self.stores = (self.near, self.far)
        self.clock = FastClock()
        names = {store.name: True for store in self.stores}
        self.metrics = Metrics(names, put_price=0, clock=self.clock)
        self.metrics.opened(SIZE)
        alone = site_of(shelf, self.near)
        destinations = tuple(Destination(store, required=True) for store in self.stores)
        self.site: Site = replace(alone, stores=self.stores, destinations=destinations)
        self.survey = Survey(self.site, self.metrics)

    async def look(self) -> None:
        async for entry in self.shelf.store.list(""):
            await self.far.put(entry.key, await self.shelf.store.get(entry.key), replace=True)
        for store in self.stores:
            await self.survey._read(store, required=True, opens=True)

    def told(self, name: str, store: str, *more: str) -> float:
        return read(self.metrics)[name, store, *more]


async def test_the_last_transaction_is_that_of_the_destination_itself(shelf: Shelf) -> None:
    surveyed = Surveyed(shelf)
    first, second = datetime(2026, 1, 15, 12, tzinfo=UTC), datetime(2026, 1, 15, 13, tzinfo=UTC)
    await commit(shelf, 6, first)
    await surveyed.look()
    for store in surveyed.stores:
        assert surveyed.told("last_recoverable_timestamp_seconds", store.name) == first.timestamp()
    await commit(shelf, 7, second)
    surveyed.near.down["get"] = StoreError("it hangs", passing=True)
    await surveyed.look()
    far, near = surveyed.far.name, surveyed.near.name
    assert surveyed.told("reading_up", far, "last_commit") == 1, "another one's trouble is not its own"
    assert surveyed.told("last_recoverable_timestamp_seconds", far) == second.timestamp()
    assert surveyed.told("reading_up", near, "last_commit") == 0, "nor is what another one has"
    assert surveyed.told("last_recoverable_timestamp_seconds", near) == first.timestamp()


async def test_where_nothing_has_changed_it_was_looked_at_all_the_same(shelf: Shelf) -> None:
    surveyed = Surveyed(shelf)
    await commit(shelf, 6, datetime(2026, 1, 15, 12, tzinfo=UTC))
    await surveyed.look()
    await surveyed.clock.sleep(600)
    surveyed.metrics.readings.failed("last_commit", surveyed.far.name)
    await surveyed.look()
    now = surveyed.clock.now().timestamp()
    assert surveyed.told("reading_timestamp_seconds", surveyed.far.name, "last_commit") == now
    assert surveyed.told("reading_up", surveyed.far.name, "last_commit") == 1


async def test_a_destination_that_does_not_answer_is_a_reading_that_failed(shelf: Shelf) -> None:
    surveyed = Surveyed(shelf)
    surveyed.near.down["list"] = StoreError("it is away", passing=True)
    await surveyed.look()
    near, far = surveyed.near.name, surveyed.far.name
    assert (surveyed.told("destination_up", near), surveyed.told("destination_up", far)) == (0, 1)
    assert math.isnan(surveyed.told("backups", near))
    assert surveyed.told("backups", far) == 1


async def record(site: Site, ended: datetime, verb: str, *, ok: bool, stopped: bool = False) -> None:
    more = {"rto_seconds": 12.5, "rpo_seconds": None} if ok else {}
    made = Record(verb, ended, ended, 1.0, ok, "host", "1", error="" if ok else "no", stopped=stopped, summary=more)
    assert await write(site, made, tell=pytest.fail) is not None


async def test_when_it_was_verified_and_rehearsed_is_what_the_records_say(shelf: Shelf) -> None:
    surveyed = Surveyed(shelf)
    told: list[Mapping[str, Done]] = []
    survey = Survey(surveyed.site, surveyed.metrics, done=told.append)
    moments = [datetime(2026, 1, day, tzinfo=UTC) for day in range(1, 7)]

    def shown(verb: str) -> tuple[float, float, float]:
        page = read(surveyed.metrics)
        last = f"last_{verb}"
        return (
            page["reading_up", "", verb],
            page[f"{last}_success_timestamp_seconds",],
            page[f"{last}_failure_timestamp_seconds",],
        )

    await survey._read_records()
    assert shown("verify") == shown("drill") == (1, 0, 0), "never is older than any"
    await record(surveyed.site, moments[0], "verify", ok=False)
    await record(surveyed.site, moments[1], "verify", ok=True)
    await record(surveyed.site, moments[2], "drill", ok=True)
    await record(surveyed.site, moments[3], "drill", ok=False)
    await record(surveyed.site, moments[4], "verify", ok=False, stopped=True)
    await record(surveyed.site, moments[5], "backup", ok=False)
    for ok in (True, False):
        await record(surveyed.site, datetime(2099, 1, 1, tzinfo=UTC), "verify", ok=ok)  # by a clock that is wrong
    await survey._read_records()
    stamps = [moment.timestamp() for moment in moments]
    assert shown("verify") == (1, stamps[1], stamps[0]), "an interruption is no damage"
    assert shown("drill") == (1, stamps[2], stamps[3])
    page = read(surveyed.metrics)
    assert page["last_drill_rto_seconds",] == 12.5
    assert page["last_backup_failure_timestamp_seconds", "far"] == stamps[5]
    assert math.isnan(page["last_drill_rpo_seconds",])
    assert (told[-1]["drill"].success, told[-1]["verify"].success) == (moments[2], moments[1])

    # One destination is enough; without any, what was read stays, and that it is old is told.
    surveyed.near.down["list"] = StoreError("it is away", passing=True)
    await survey._read_records()
    assert shown("verify") == (1, stamps[1], stamps[0])
    survey = Survey(replace(surveyed.site, stores=(surveyed.near,)), surveyed.metrics)
    await survey._read_records()
    assert shown("verify") == (0, stamps[1], stamps[0])
