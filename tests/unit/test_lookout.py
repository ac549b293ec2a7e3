"""What the service tells of itself: nothing is green that was not looked at, or not for long."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from handlers.outlet import Backlog, Outlet
from handlers.upload import Uploader
from infra.holdings import hold
from infra.lookout import SAMPLES, Lookout
from infra.postgres.kept import Kept
from infra.status import look_outside
from infra.wiring import Site
from pipeline.events import DestinationFailed
from pipeline.wal import Lsn
from tests.clock import FastClock
from tests.unit.test_status import SIZE, archive, back_up, repository_shelf, site_of


@dataclass
class Told:
    """Positions, as the metrics keep them; NaN is not known."""

    lag: float = math.nan
    missing: float = math.nan
    reached: float = math.nan
    asked: list[str] = field(default_factory=list)

    def lag_seconds(self, destination: str) -> float:
        self.asked.append(destination)
        return self.lag

    def lag_bytes(self, destination: str) -> float:
        return self.missing if destination else math.nan

    def end(self) -> float:
        return self.reached

    def durable(self, destination: str) -> float:
        return self.reached if destination else math.nan


@pytest.fixture
async def site() -> Site:
    shelf = await repository_shelf()
    await archive(shelf, range(3, 9))
    await back_up(shelf, 3)
    return site_of(shelf, shelf.store)


def api(lookout: Lookout) -> Any:
    return json.loads(lookout.api())


async def looked(site: Site, told: Told) -> tuple[Lookout, FastClock]:
    """One that has looked at everything once; the server does not answer."""
    clock = FastClock()
    kept = Kept(site.settings, clock)
    lookout = Lookout(site.settings, told, kept=kept, clock=clock)
    lookout._site, lookout._outside, lookout._looked = site, await look_outside(site, kept), clock.monotonic()
    lookout.listed(await hold(site.stores[0], site, {}, required=True))
    return lookout, clock


async def test_before_anything_was_looked_at_nothing_is_safe(site: Site) -> None:
    clock = FastClock()
    lookout = Lookout(site.settings, Told(), kept=Kept(site.settings, clock), clock=clock)
    found = api(lookout)
    assert (found["state"], found["healthy"]) == ("unsafe", False)
    assert found["sentence"] == "Not safe: nothing is shipped: the service is starting."
    assert lookout.not_ready() == "the service is starting"
    lookout._site, lookout._waits = site, ""
    assert api(lookout)["state"] == "unknown"
    assert "for the first time" in lookout.not_ready()


async def test_a_service_that_waits_says_why(site: Site) -> None:
    lookout, _ = await looked(site, Told())
    lookout.waits("s3://b does not answer")
    assert api(lookout)["sentence"] == "Not safe: nothing is shipped: s3://b does not answer."
    assert lookout.not_ready() == "s3://b does not answer"


async def test_positions_are_those_of_this_moment(site: Site) -> None:
    told = Told()
    lookout, _ = await looked(site, told)
    (place,) = api(lookout)["destinations"]
    assert (place["lag_seconds"], place["lag_bytes"], place["durable_lsn"]) == (None, None, str(Lsn(9 * SIZE)))
    told.lag, told.missing, told.reached = 3.0, 77.0, 9 * SIZE + 500
    (place,) = api(lookout)["destinations"]
    assert (place["lag_seconds"], place["lag_bytes"], place["tail_bytes"]) == (3.0, 77, 500)
    assert place["durable_lsn"] == str(Lsn(9 * SIZE + 500))
    told.lag = 4000.0
    site.settings.sources = ("stream",)
    assert any("what was written 4000 s ago is not there yet" in reason for reason in api(lookout)["reasons"])


async def test_what_a_destination_is_still_to_be_filled_with_is_told_and_stops_nothing(site: Site) -> None:
    lookout, clock = await looked(site, Told(lag=0.0, missing=0.0))
    outlet = Outlet(site.stores[0])
    lookout._uploader = Uploader([outlet], clock=clock, notify=lambda _: None)
    (before,) = api(lookout)["destinations"]
    outlet.backlog = Backlog(12, 34 << 20)
    (place,) = api(lookout)["destinations"]
    assert (before["lacks"], place["lacks"]) == ("", "12 objects (34 MB) that others have are not there yet")
    assert place["lacks"] not in lookout.not_ready()


async def test_what_was_not_looked_at_for_long_is_not_known(site: Site) -> None:
    lookout, clock = await looked(site, Told(lag=0.0, missing=0.0))
    assert api(lookout)["unknown"] == []
    await clock.sleep(50)
    assert api(lookout)["unknown"] == ["the server was last looked at 50 s ago"]
    await clock.sleep(1400)
    assert api(lookout)["unknown"][1] == "memory was last listed 1450 s ago"
    assert "memory was last listed" in lookout.not_ready()


async def test_the_history_is_bounded(site: Site) -> None:
    lookout, _ = await looked(site, Told(lag=1.234))
    for number in range(SAMPLES + 50):
        lookout._samples.append((number, lookout._lags()))
    history = api(lookout)["lag_history"]
    assert (history["destinations"], len(history["samples"])) == (["memory"], SAMPLES)
    assert history["samples"][-1] == [SAMPLES + 49, 1.2]
    lookout.heard(DestinationFailed("memory", "wal/x", "503", "wait"))
    assert lookout._refused == {"memory": ("503", "wait")}


async def test_where_all_may_be_lost_with_this_host_is_said_with_safe(site: Site) -> None:
    site.settings.destinations = ("file:///near",)
    lookout, _ = await looked(site, Told(lag=0.0, missing=0.0))
    assert api(lookout)["exposed"] is None
    looking = asyncio.create_task(lookout._look_where())
    async with asyncio.timeout(60):
        while (found := api(lookout)["exposed"]) is None:
            await asyncio.sleep(0.01)
    looking.cancel()
    assert (found["where"], "file:///near is a local folder" in found["fact"]) == ("this host", True)
