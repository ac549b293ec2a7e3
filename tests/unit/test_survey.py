"""Readings of destinations: each tells of itself alone, and says when it was last looked at."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from infra.monitoring.metrics import Metrics
from infra.repository import Destination
from infra.storage.memory import MemoryStore
from infra.survey import Survey
from infra.wiring import Site
from pipeline.catalog import wal_key
from pipeline.errors import StoreError
from pipeline.wal import WalFile
from tests.clock import FastClock
from tests.keys import SYSTEM_ID
from tests.parts import Shelf
from tests.scraped import read
from tests.stores import Faulty
from tests.unit.test_status import SIZE, archive, back_up, site_of
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
    made = Shelf(SYSTEM_ID)
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
