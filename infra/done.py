"""When verify, drill and expire last went well, and wrong, by the records that they leave in the repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from infra.records import Listed, listed, read
from infra.wiring import Site
from pipeline.errors import WalshipError
from pipeline.operations import Record, RecordName

VERBS = ("verify", "drill", "expire")
#: Figures of a drill that are shown.
_FIGURES = ("rto_seconds", "rpo_seconds")
#: A record of later than this from now on was made by a clock that is wrong: it would be the newest one for years.
_AHEAD = timedelta(hours=1)
#: So many failures are looked into, whether they were more than interruptions.
_MOST = 10


@dataclass(frozen=True, slots=True)
class Done:
    """One verb. Moments by the clocks of the hosts that did it."""

    #: None: never.
    success: datetime | None = None
    failure: datetime | None = None
    #: What the last one that went well has measured, as far as it can be read.
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def failing(self) -> datetime | None:
        """When it failed, if none has gone well since."""
        good = self.success is not None and (self.failure is None or self.failure < self.success)
        return None if good else self.failure


async def last_done(site: Site) -> dict[str, Done]:
    """For each of ``VERBS``, and for ``backup``. Raises StoreError if no destination answers."""
    found = await listed(site.stores)
    latest = site.clock.now() + _AHEAD
    found = replace(found, names=tuple(name for name in found.names if name.ended <= latest))
    return {verb: await _last(verb, found, site) for verb in (*VERBS, "backup")}


async def _last(verb: str, found: Listed, site: Site) -> Done:
    good = found.newest(verb, ok=True)
    failure = await _failure([name for name in found.names if name.verb == verb and not name.ok], good, site)
    record = await _content(good, site) if good and verb == "drill" else None
    figures = {
        name: float(value)
        for name in _FIGURES
        if record is not None and isinstance(value := record.summary.get(name), int | float)
    }
    return Done(good.ended if good else None, failure, figures)


async def _failure(failed: list[RecordName], good: RecordName | None, site: Site) -> datetime | None:
    """One that was only interrupted says nothing of what is stored; one that cannot be read may have found damage."""
    for name in failed[:_MOST]:  # the newest in front
        if good is not None and name < good:
            return name.ended
        record = await _content(name, site)
        if record is None or not record.stopped:
            return name.ended
    return None


async def _content(name: RecordName, site: Site) -> Record | None:
    """None where it cannot be read: a host may be able to write only."""
    try:
        return await read(site.fetch, name)
    except WalshipError:
        return None
