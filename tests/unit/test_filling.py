"""A destination that is new, or was away, is filled in the background: told, bounded, behind what is shipped now."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from handlers import upload
from handlers.copy import estimate
from handlers.outlet import Backlog, Outlet
from handlers.upload import WANTED, Uploader
from infra.storage.memory import MemoryStore
from pipeline.catalog import REPOSITORY
from pipeline.contracts import Store
from pipeline.errors import StoreError
from pipeline.events import DestinationCaughtUp, DestinationFailed, DestinationFilling, Notice
from pipeline.objects import MemoryBody
from tests.benchmarks.comparing import Made
from tests.clock import FastClock
from tests.unit.test_upload import Bench, Switchable, bench, until

WAL = [f"wal/0000000100000000/0000000100000000000000{number:02X}" for number in range(1, 21)]
BACKUP = ["base/base_1/data/base/00000001", "base/base_1/index/00000001", "base/base_1/backup_info"]
TORSO = "base/base_2/data/base/00000001"


class Filling:
    """A service that starts with a destination that is full and a new one."""

    def __init__(self, full: Switchable, new: Switchable) -> None:
        self.full, self.new = full, new
        self.notices: list[Notice] = []
        self.held: list[tuple[str, str]] = []
        self.outlets = [Outlet(full), Outlet(new, required=False)]
        self.uploader = Uploader(self.outlets, clock=FastClock(), notify=self.notices.append, hold=self._hold)

    @asynccontextmanager
    async def _hold(self, store: Store, backup: str) -> AsyncIterator[str]:
        self.held.append((store.name, backup))
        yield ""

    @property
    def lacking(self) -> list[int]:
        """What was told of the new one."""
        return [n.objects for n in self.notices if isinstance(n, DestinationFilling) and n.destination == "new"]

    @property
    def caught_up(self) -> bool:
        return DestinationCaughtUp("new") in self.notices


async def stock(it: Bench, *names: str) -> Switchable:
    """A store with these objects, of one backup where they belong to one."""
    full = Switchable("full")
    await MemoryStore.put(full, REPOSITORY, MemoryBody([b"{}"]))
    for name in names:
        parcel = await it.shipper.encode(name, name.encode() * 9)
        await MemoryStore.put(full, name, parcel.body)
    return full


async def fresh() -> Switchable:
    new = Switchable("new")
    await MemoryStore.put(new, REPOSITORY, MemoryBody([b"{}"]))
    return new


@asynccontextmanager
async def filling(*names: str) -> AsyncIterator[Filling]:
    async with bench() as it:
        filled = Filling(await stock(it, *names), await fresh())
        yield filled


@asynccontextmanager
async def running(filled: Filling) -> AsyncIterator[None]:
    task = asyncio.create_task(filled.uploader.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_new_destination_gets_everything_that_belongs_to_a_repository() -> None:
    async with filling(*WAL, *BACKUP, TORSO) as it, running(it):
        await until(lambda: it.caught_up)
        assert it.new._objects.keys() == {REPOSITORY, *WAL, *BACKUP}
        assert all(it.new.content(name) == it.full.content(name) for name in (*WAL, *BACKUP))
        assert it.new.puts[-1] == BACKUP[-1]
        assert it.held == [("full", "base_1")]
        assert it.lacking[0] == len(WAL) + len(BACKUP)
        assert it.lacking[-1] == 0
        assert it.outlets[1].backlog is None
        assert not any(isinstance(notice, DestinationFailed) for notice in it.notices)


async def test_all_but_tails_is_there_when_the_old_destination_is_taken_away() -> None:
    """Else the next expire would delete what somebody had pinned, and no drill would ever have gone well."""
    aside = ["conflict/000000010000000000000003.0123456789abcdef", "pin/base_1"]
    aside.append("log/20260114T120000Z-drill-ok-0123abcd")
    beside = ["pin/base_9", "tail/000000010000000000000015/00000001-00000000-00000100", "log/20260114T120000Z-a"]
    async with filling(*WAL[:2], *BACKUP, *aside, *beside) as it, running(it):
        await until(lambda: it.caught_up)
        assert it.new._objects.keys() == {REPOSITORY, *WAL[:2], *BACKUP, *aside}
        assert it.new.puts.index("pin/base_1") > it.new.puts.index(BACKUP[-1])


async def test_what_is_shipped_just_now_goes_before_what_is_old() -> None:
    async with filling(*WAL, *BACKUP) as it:
        latest = "wal/0000000100000001/000000010000000100000001"

        class Watching(Switchable):
            async def put(self, key: str, *more: object, **options: object) -> None:
                if key == WAL[2]:
                    it.outlets[1].owe(latest)
                await super().put(key, *more, **options)  # type: ignore[arg-type]

        async with bench() as shipping:
            parcel = await shipping.shipper.encode(latest, b"now")
            await MemoryStore.put(it.full, latest, parcel.body)
        it.new = it.outlets[1].store = Watching("new")
        await MemoryStore.put(it.new, REPOSITORY, MemoryBody([b"{}"]))
        async with running(it):
            await until(lambda: it.caught_up)
        assert it.new.puts.index(latest) < len(WAL) - 5


async def test_what_a_command_has_stored_elsewhere_is_found_an_hour_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "COMPARE_EVERY", 0.05)
    async with filling(*WAL[:3]) as it, running(it):
        await until(lambda: it.caught_up)
        async with bench() as other:
            for name in BACKUP:
                parcel = await other.shipper.encode(name, b"scheduled")
                await MemoryStore.put(it.full, name, parcel.body)
        await until(lambda: BACKUP[-1] in it.new._objects)


async def test_what_cannot_be_copied_is_told_and_stays_in_the_backlog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "COMPARE_EVERY", 0.05)
    async with filling(*WAL, *BACKUP) as it:
        good = it.full.content(WAL[4])
        await MemoryStore.put(it.full, WAL[4], MemoryBody([good[:-40] + b"x" + good[-39:]]), replace=True)
        async with running(it):
            await until(lambda: it.lacking[-1:] == [1])
            assert it.outlets[1].backlog is not None
            assert it.outlets[1].backlog.stuck == {WAL[4]}
            assert BACKUP[-1] in it.new._objects, "all else is there"
            assert not it.caught_up
            (told,) = {(n.name, n.destination) for n in it.notices if isinstance(n, DestinationFailed)}
            assert told == (WAL[4], "new")
            await MemoryStore.put(it.full, WAL[4], MemoryBody([good]), replace=True)
            await until(lambda: it.caught_up)
            assert it.new.content(WAL[4]) == good


async def test_what_is_given_from_elsewhere_is_not_in_the_backlog_any_more() -> None:
    async with filling(WAL[0]) as it, bench() as other:
        outlet = it.outlets[1]
        outlet.backlog = Backlog(2, 100, {WAL[0], WAL[1]})
        await it.uploader.give(await other.shipper.encode(WAL[0], b"from the server"), outlet)
        assert (outlet.backlog.objects, outlet.backlog.stuck) == (1, {WAL[1]})


async def test_one_that_goes_away_meanwhile_is_filled_once_it_is_back() -> None:
    async with filling(*WAL, *BACKUP) as it:

        class Leaving(Switchable):
            async def put(self, key: str, *more: object, **options: object) -> None:
                if key == WAL[9] and not any(isinstance(n, DestinationFailed) for n in it.notices):
                    self.away = True
                await super().put(key, *more, **options)  # type: ignore[arg-type]

        it.new = it.outlets[1].store = Leaving("new")
        await MemoryStore.put(it.new, REPOSITORY, MemoryBody([b"{}"]))
        async with running(it):
            await until(lambda: it.outlets[1].down)
            assert BACKUP[-1] not in it.new._objects
            it.new.away = False
            await until(lambda: it.caught_up)
        assert it.new._objects.keys() == {REPOSITORY, *WAL, *BACKUP}


async def test_who_has_it_may_be_away_at_first() -> None:
    """Then nobody knows what is lacking; it is looked for as soon as somebody answers."""
    async with filling(*WAL) as it:
        it.full.away = True
        it.full.failing_lists = 10_000
        await it.uploader.failed(it.outlets[0], WAL[0], StoreError("full does not answer", passing=True))
        async with running(it):
            await until(lambda: not it.outlets[1].behind.is_set())
            assert it.new.names() == set()
            it.full.away, it.full.failing_lists = False, 0
            await until(lambda: it.new.names() == set(WAL))


async def test_comparing_takes_little_memory() -> None:
    source, target = Made("a", 5_000), Made("b", 5_000, gap=100)
    tracemalloc.start()
    try:
        found = await estimate(source, target, WANTED)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.total.objects == 50
    assert peak < 5_000 * 10 + 200_000, "bytes: a set of all names takes three times as much"
