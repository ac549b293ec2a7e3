"""What of the schedule is due when. Pure: times come in, and who tells a cron expression's times is handed in.

Every job has a moment up to which nothing of it is owed any more (``last``), and is due once the first of its times
behind that is reached. So what was missed, be it while nobody ran or while something else did, is caught up once and
not as often as it was missed; and a wall clock that is put back makes nothing run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeAlias

#: The first time of a job behind a moment; None: never again.
Next: TypeAlias = Callable[[datetime], datetime | None]
#: How a run ended. Busy: it could not even begin, as somebody else was at it.
Outcome: TypeAlias = Literal["done", "failed", "busy"]

#: Jobs in the order in which they run where several are due.
ORDER = ("full", "incremental", "expire", "verify", "drill")
#: job → what its records are called.
VERBS = {"full": "backup", "incremental": "backup", "expire": "expire", "verify": "verify", "drill": "drill"}

#: A backup that failed is tried again so often, and after so long; the others at their next time.
RETRIES, RETRY_AFTER = 3, timedelta(minutes=15)
#: Until it is looked whether who was in the way is through.
BUSY_AFTER = timedelta(minutes=1)
#: What is remembered of a time that lies further ahead than this comes from a clock that was wrong.
AHEAD = timedelta(hours=3)


@dataclass(slots=True)
class _Job:
    after: Next
    #: What was due up to here is done, or let go.
    last: datetime
    #: An attempt that belongs to no time of its own.
    again: datetime | None = None
    #: Attempts that failed in a row.
    failures: int = 0
    #: ``last``, and the first time behind it: to find that out takes a while.
    known: tuple[datetime, datetime | None] | None = None

    @property
    def regular(self) -> datetime | None:
        """The first time of its own that is not done."""
        if self.known is None or self.known[0] != self.last:
            self.known = self.last, self.after(self.last)
        return self.known[1]


class Schedule:
    """All jobs, and what is known of each."""

    def __init__(self, jobs: Mapping[str, Next], now: datetime) -> None:
        """``jobs``: those of ``ORDER`` that are wanted. Nothing is owed as yet."""
        self._jobs = {name: _Job(jobs[name], now) for name in ORDER if name in jobs}

    @property
    def jobs(self) -> tuple[str, ...]:
        """Those that are wanted, in order."""
        return tuple(self._jobs)

    def remember(self, job: str, last: datetime, *, failed: bool = False) -> None:
        """It last ran then; ``failed``: and is to be tried again, if that is what is done with such a job."""
        this = self._jobs[job]
        this.last, this.again, this.failures = last, None, 0
        if failed:
            self._fail(job, last)

    def at_once(self, job: str, now: datetime) -> None:
        """Let it run as soon as may be, whatever its times are."""
        self._jobs[job].again = now

    def due_at(self, job: str) -> datetime | None:
        """When it runs next, a moment that has passed if it should be running; None: never."""
        this = self._jobs[job]
        times = [time for time in (this.regular, this.again) if time is not None]
        return min(times, default=None)

    def due(self, now: datetime) -> list[str]:
        """What should be running, in order. Where a full backup is due, no incremental one is."""
        for this in self._jobs.values():
            _mend(this, now)
        found = [job for job in self._jobs if (at := self.due_at(job)) is not None and at <= now]
        return [job for job in found if job != "incremental" or "full" not in found]

    def began(self, job: str, now: datetime) -> None:
        """It is being done: that time is over, even if the clock is put back meanwhile."""
        this = self._jobs[job]
        this.last, this.again = max(this.last, now), None

    def ended(self, job: str, now: datetime, outcome: Outcome) -> None:
        """A run is over, and with it what was due of the same job while it lasted. A full backup is both kinds."""
        this = self._jobs[job]
        if outcome == "busy":
            this.again = now + BUSY_AFTER
        elif outcome == "failed":
            this.last = max(this.last, now)
            self._fail(job, now)
        else:
            both = [this, self._jobs["incremental"]] if job == "full" and "incremental" in self._jobs else [this]
            for each in both:
                each.last, each.again, each.failures = max(each.last, now), None, 0

    def _fail(self, job: str, now: datetime) -> None:
        this = self._jobs[job]
        if VERBS[job] != "backup":
            return
        this.failures += 1
        if this.failures <= RETRIES:
            this.again = now + RETRY_AFTER
        else:
            this.failures = 0  # the next time of its own begins anew


def _mend(this: _Job, now: datetime) -> None:
    """After a clock was wrong: a run in the year 2036 must not be the last for ten years."""
    if this.last > now + AHEAD:
        this.last = now
    if this.again is not None:
        this.again = min(this.again, now + RETRY_AFTER)
