"""The service, watched: its metrics, its status page, and those who look at what they show."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.clock import SystemClock
from infra.settings import Settings
from infra.standing import Planned
from infra.storage.lease import LeaseHeldError
from infra.wiring import Shipping, Site
from pipeline.errors import ObjectConflict, StoreError, WalshipError

if TYPE_CHECKING:  # no command needs to load them
    from infra.lookout import Lookout
    from infra.monitoring.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Monitor:
    """For the life of the service."""

    metrics: Metrics
    lookout: Lookout

    def stage_done(self, stage: str, seconds: float) -> None:
        """An object has passed a stage. From any thread: an ``infra.monitoring.stages.Observe``."""
        self.metrics.stage_done(stage, seconds)

    def waits(self, error: WalshipError) -> None:
        """The service cannot ship because of that, and will try again."""
        lost = isinstance(error, StoreError) and not isinstance(error, LeaseHeldError | ObjectConflict)
        self.metrics.closed(unreachable=lost)
        self.lookout.waits(error.fact)


@asynccontextmanager
async def monitoring(settings: Settings, destinations: dict[str, bool]) -> AsyncIterator[Monitor | None]:
    """Serve ``/metrics`` and the page during the block, unless that is not wanted: None.

    ``destinations``: name → whether it is required.
    """
    if not settings.listens:
        yield None
        return
    from infra.lookout import Lookout
    from infra.monitoring.http import serving
    from infra.monitoring.metrics import Metrics
    from infra.postgres.kept import Kept
    from infra.survey import Surroundings, beside

    streams, spool = ("stream" in settings.sources), ("watch" in settings.sources)
    clock = SystemClock()
    metrics = Metrics(destinations, put_price=settings.put_price, clock=clock, streams=streams, spool=spool)
    kept = Kept(settings, clock)
    lookout = Lookout(settings, metrics.positions, kept=kept, clock=clock)
    chosen = "listen" in settings.model_fields_set
    async with (
        kept,
        serving(settings.listens, metrics, shown=lookout, chosen=chosen),
        beside(Surroundings(settings, metrics, kept=kept, clock=clock).run()),
    ):
        yield Monitor(metrics, lookout)


@asynccontextmanager
async def monitored(
    site: Site,
    shipping: Shipping,
    monitor: Monitor | None,
    *,
    cluster: str = "",
    planned: Callable[[], tuple[Planned, ...]] = tuple,
) -> AsyncIterator[None]:
    """Let the monitor hear and see what happens at the site during the block. ``cluster``: if it had to be chosen.

    ``planned`` knows the schedule.
    """
    if monitor is None:
        yield
        return
    from infra.survey import Survey, beside

    metrics, lookout = monitor.metrics, monitor.lookout
    metrics.opened(site.facts.segment_size)
    lookout.cluster, lookout.planned = cluster, planned
    survey = Survey(site, metrics, listed=lookout.listed, done=lookout.done)
    site.notify.extend([metrics.notify, metrics.readings.heard, lookout.heard, survey.heard])
    try:
        async with beside(survey.run(), lookout.run(site, shipping.uploader)):
            yield
    finally:
        metrics.closed()
