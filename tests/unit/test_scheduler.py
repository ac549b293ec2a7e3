"""The schedule of a service: what it starts when, what it knows after a restart, and what becomes of failures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from infra.errand import Ended
from infra.postgres.claim import TAKEN
from infra.records import listed, read, recording, write
from infra.remembered import remembered
from infra.schedule import SETTLED, Scheduler
from infra.standing import Planned
from infra.storage.memory import MemoryStore
from infra.wiring import Site
from pipeline.catalog import info_key
from pipeline.contracts import Store
from pipeline.errors import StoreError
from pipeline.events import Notice, OperationEnded
from pipeline.objects import MemoryBody
from pipeline.operations import Record
from tests.clock import FastClock
from tests.keys import NOW, SYSTEM_ID
from tests.sites import site_at
from tests.stores import Faulty

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
NIGHTLY: dict[str, Any] = {"WALSHIP_SCHEDULE_FULL": "0 3 * * SUN", "WALSHIP_SCHEDULE_INCREMENTAL": "0 3 * * *"}
FAILED = Ended(11, "the store is full", "make room")


async def site_of(*stores: Store, days: int = 0, **settings: Any) -> Site:
    """So many days after the repository was made, on a Wednesday at noon."""
    return await site_at(*(stores or (MemoryStore(),)), clock=FastClock(NOW + days * DAY), **settings)


class Runs:
    """In the place of processes: remembers what was started when, and leaves records as they do."""

    def __init__(self, site: Site, scheduler: Scheduler | None = None) -> None:
        self.site = site
        self.scheduler = scheduler or Scheduler(site, run=self)
        self.began: list[str] = []
        self.words: list[list[str]] = []
        self.outcomes: dict[str, list[Ended]] = {}
        self.leaves_records = True
        #: Done within each run.
        self.meanwhile: Callable[[], Awaitable[None]] | None = None

    async def __call__(self, words: Sequence[str], say: Callable[[str], None]) -> Ended:
        say("at it")
        verb = " ".join(word for word in words[:2] if word not in ("--json", "--yes"))
        self.began.append(f"{self.site.clock.now():%d %H:%M} {verb}")
        self.words.append([*words])
        if self.meanwhile is not None:
            await self.meanwhile()
        await self.site.clock.sleep(600)
        ended = self.outcomes[verb].pop(0) if self.outcomes.get(verb) else Ended(0)
        if self.leaves_records and TAKEN not in ended.error:
            async with recording(self.site, words[0], words[1:], tell=pytest.fail) as entry:
                entry.summary["kind"] = "incremental" if "--incremental" in words else "full"
                if ended.error:
                    entry.fail(ended.error)
        return ended

    async def until(self, hours: float) -> list[str]:
        """What was started in so many hours."""
        task = asyncio.create_task(self.scheduler.run())
        end = self.site.clock.now() + hours * HOUR
        while self.site.clock.now() < end and not task.done():
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return self.began


async def a_backup(site: Site, name: str = "base_20260114_110000") -> None:
    await site.stores[0].put(info_key(name), MemoryBody([b"whole"]))


async def record(site: Site, verb: str, ended: datetime, *, kind: str = "full", **more: bool) -> None:
    ok, stopped = more.get("ok", True), more.get("stopped", False)
    words = ("--incremental",) if kind == "incremental" else ()
    content = Record(verb, ended, ended, 1.0, ok, "db1", "0", words, stopped=stopped, summary={"kind": kind})
    assert await write(site, content, tell=pytest.fail)


async def test_without_a_schedule_nothing_is_done() -> None:
    async with asyncio.timeout(10):
        await Runs(await site_of()).scheduler.run()


async def test_a_fresh_repository_gets_its_first_backup_and_then_keeps_to_its_times() -> None:
    runs = Runs(await site_of(**NIGHTLY, WALSHIP_SCHEDULE_DRILL="0 5 * * *", WALSHIP_SCHEDULE_VERIFY="0 5 * * *"))
    assert await runs.until(48) == [
        "14 12:00 backup",
        "15 03:00 backup --incremental",
        "15 05:00 verify",
        "15 05:10 drill",
        "16 03:00 backup --incremental",
        "16 05:00 verify",
        "16 05:10 drill",
    ]


async def test_the_words_are_those_that_a_person_types(tmp_path: Path) -> None:
    checks: dict[str, Any] = {"WALSHIP_DRILL_CHECKS": str(tmp_path / "c.sql"), "WALSHIP_DRILL_REPORTS": str(tmp_path)}
    runs = Runs(await site_of(WALSHIP_SCHEDULE_DRILL="0 3 * * *", WALSHIP_SCHEDULE_EXPIRE="0 2 * * *", **checks))
    await runs.until(24)
    cluster = ["--json", "--cluster", SYSTEM_ID]
    folder = ["--check", str(tmp_path / "c.sql"), "--report", str(tmp_path)]
    assert runs.words == [["expire", "--yes", *cluster], ["drill", *cluster, *folder]]


async def test_a_repository_that_has_backups_and_no_records_waits_for_the_next_time() -> None:
    site = await site_of(**NIGHTLY)
    await a_backup(site)
    assert await Runs(site).until(16) == ["15 03:00 backup --incremental"]


async def test_what_was_missed_is_caught_up_once_after_the_start() -> None:
    """Also what never ran, in a repository that is older."""
    site = await site_of(days=9, WALSHIP_SCHEDULE_DRILL="0 5 * * *", **NIGHTLY)  # a Friday
    await a_backup(site)
    await record(site, "backup", NOW)
    found = await Runs(site).until(12)
    assert found == ["23 12:00 backup", "23 12:10 drill"]


async def test_a_full_backup_is_not_taken_for_what_incremental_ones_were_and_the_other_way_round() -> None:
    site = await site_of(days=9, **NIGHTLY)
    await a_backup(site)
    await record(site, "backup", NOW + 4 * DAY)  # on Sunday
    for day in range(5, 10):
        await record(site, "backup", NOW + day * DAY - HOUR, kind="incremental")
    schedule = await remembered(site)
    assert schedule.due(site.clock.now()) == []
    assert schedule.due_at("full") == datetime(2026, 1, 25, 3, tzinfo=UTC)


async def test_what_was_stopped_with_the_service_is_still_to_be_done() -> None:
    site = await site_of(days=1, **NIGHTLY)
    await a_backup(site)
    await record(site, "backup", NOW)
    await record(site, "backup", NOW + 15 * HOUR, kind="incremental", ok=False, stopped=True)
    assert (await remembered(site)).due(site.clock.now()) == ["incremental"]


async def test_a_service_that_was_killed_begins_again_with_what_it_was_at() -> None:
    """Whether what it had started was killed with it, or not."""
    site = await site_of(WALSHIP_SCHEDULE_VERIFY="0 3 * * *")
    first = Runs(site)
    first.leaves_records = False
    assert await first.until(15.1) == ["15 03:00 verify"]  # the service is killed while that runs
    again = Runs(site)
    assert len(await again.until(1)) == 1
    assert await Runs(site).until(1) == []


async def test_a_failed_backup_is_told_recorded_and_tried_again() -> None:
    site = await site_of(**NIGHTLY)
    await a_backup(site)
    told: list[Notice] = []
    site.notify.append(told.append)
    runs = Runs(site)
    runs.leaves_records = False  # killed, it could leave none
    runs.outcomes["backup --incremental"] = [FAILED]
    assert await runs.until(16) == ["15 03:00 backup --incremental", "15 03:25 backup --incremental"]
    failed, done = (notice for notice in told if isinstance(notice, OperationEnded))
    assert (failed.verb, failed.error, failed.hint) == ("backup", "the store is full", "make room")
    assert f"{failed.next:%d %H:%M}" == "15 03:25"
    assert not done.error
    (name,) = (await listed(site.stores)).names
    kept = await read(site.fetch, name)
    assert (kept.ok, kept.error, kept.arguments) == (False, "the store is full", ("--incremental",))


async def test_a_failed_drill_is_recorded_once_and_waits_for_its_next_time() -> None:
    site = await site_of(WALSHIP_SCHEDULE_DRILL="0 3 * * *")
    runs = Runs(site)
    runs.outcomes["drill"] = [FAILED]
    assert await runs.until(38) == ["15 03:00 drill"]
    assert len((await listed(site.stores)).names) == 1


async def test_a_manual_backup_is_waited_for_and_makes_a_second_one_needless() -> None:
    site = await site_of(WALSHIP_SCHEDULE_FULL="0 3 * * *")
    await a_backup(site)
    runs = Runs(site)
    busy = Ended(10, f"a base backup of the server {TAKEN}: from db1")
    runs.outcomes["backup"] = [busy] * 3

    async def by_hand() -> None:
        if len(runs.began) == 3:
            await record(site, "backup", site.clock.now())

    runs.meanwhile = by_hand
    assert await runs.until(20) == ["15 03:00 backup", "15 03:11 backup", "15 03:22 backup"]
    assert runs.scheduler.planned() == (Planned("full", datetime(2026, 1, 16, 3, tzinfo=UTC)),)


async def test_a_repository_that_does_not_answer_is_waited_for() -> None:
    store = Faulty(MemoryStore(), down={"list": StoreError("no answer", passing=True)})
    site = await site_at(store.store, clock=FastClock(), **NIGHTLY)
    broken = await site_at(store.store, clock=site.clock, **NIGHTLY)
    object.__setattr__(broken, "stores", (store,))
    runs = Runs(broken)
    assert await runs.until(0.5) == []
    store.down.clear()
    assert await runs.until(0.5) == ["14 12:30 backup"]


async def test_a_destination_that_is_away_is_not_taken_for_one_without_backups() -> None:
    empty, away = MemoryStore("empty"), Faulty(MemoryStore("away"))
    site = await site_of(empty, away, **NIGHTLY)
    away.down["list"] = StoreError("no answer", passing=True)
    assert (await remembered(site)).due(site.clock.now()) == []
    away.down.clear()
    assert (await remembered(site)).due(site.clock.now()) == ["full"]


async def test_a_host_that_can_only_write_goes_by_the_names_of_records() -> None:
    store = Faulty(MemoryStore())
    site = await site_of(store, days=1, **NIGHTLY, WALSHIP_SCHEDULE_DRILL="0 5 * * *")
    await a_backup(site)
    await record(site, "backup", site.clock.now() - HOUR)
    store.down["get"] = StoreError("access denied")
    assert (await remembered(site)).due(site.clock.now()) == ["drill"]


async def test_a_clock_that_jumps_is_noticed_and_runs_nothing_twice() -> None:
    site = await site_of(WALSHIP_SCHEDULE_EXPIRE="0 * * * *")
    clock = site.clock
    assert isinstance(clock, FastClock)
    runs = Runs(site)
    jumps = iter([3600.0, -3600.0])

    async def jump() -> None:
        clock.passed += next(jumps, 0.0)

    runs.meanwhile = jump
    assert await runs.until(5.5) == ["14 13:00 expire", "14 15:00 expire", "14 16:00 expire", "14 17:00 expire"]


async def test_it_settles_before_it_begins() -> None:
    site = await site_of(**NIGHTLY)
    runs = Runs(site)
    await runs.until(0.1)
    assert site.clock.monotonic() >= SETTLED
