"""What has to be done now and then beside shipping: backups, expire, verify, drills; at their times, one at a time.

    settings ── cron expressions ──> pipeline.schedule ── what is due ──> one errand at a time
    records  ── what ran last ─────>                                     (a process of its own)

Runs in the service that holds the lease, and so in one of them. What it runs is the same command that a person types;
a record of it stays in the repository, from which the next service knows what was done.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from importlib.metadata import version
from socket import gethostname
from tempfile import TemporaryDirectory
from typing import TypeAlias

import structlog

from infra import errand
from infra.errand import Ended
from infra.postgres.claim import TAKEN
from infra.records import listed, write
from infra.remembered import jobs_of, last_of, remembered
from infra.standing import Planned
from infra.wiring import Site
from pipeline.errors import StoreError
from pipeline.events import OperationEnded
from pipeline.operations import Record
from pipeline.schedule import VERBS, Outcome, Schedule

log = structlog.get_logger()

#: Runs ``walship WORDS``; says its lines.
Errand: TypeAlias = Callable[[Sequence[str], Callable[[str], None]], Awaitable[Ended]]

#: job → what is typed behind its verb. Nobody is there to be asked.
_OPTIONS = {"incremental": ("--incremental",), "expire": ("--yes",)}

#: Seconds after the start, in which the stream connects and the spool is read; and between attempts to begin.
SETTLED, AGAIN = 3.0, 60.0
#: Longest sleep in seconds: a wall clock that was put right is noticed so soon.
POLL = 30.0


class Scheduler:
    """Runs what is due. ``run`` until cancelled, which ends what is running."""

    def __init__(self, site: Site, *, run: Errand = errand.run) -> None:
        self._site = site
        self._run = run
        self._schedule: Schedule | None = None
        #: When it was first found out that somebody else is at the job.
        self._busy: dict[str, datetime] = {}
        #: The job that is being done; empty if none is.
        self._running = ""

    def planned(self) -> tuple[Planned, ...]:
        """When each job runs next; empty until that is known."""
        known = self._schedule
        return tuple(Planned(job, known.due_at(job), job == self._running) for job in known.jobs) if known else ()

    async def run(self) -> None:
        """Returns at once if nothing is scheduled."""
        if not jobs_of(self._site.settings):
            return
        clock = self._site.clock
        await clock.sleep(SETTLED)
        schedule = await self._begin()
        while True:
            if due := schedule.due(clock.now()):
                await self._do(due[0], schedule)
                continue
            times = [time for job in schedule.jobs if (time := schedule.due_at(job)) is not None]
            pause = min((time - clock.now() for time in times), default=timedelta(seconds=POLL)).total_seconds()
            await clock.sleep(min(POLL, max(0.05, pause)))

    async def _begin(self) -> Schedule:
        """Where no destination answers, nothing could be done anyway."""
        while True:
            try:
                schedule = self._schedule = await remembered(self._site)
            except StoreError as error:
                log.warning("schedule", error=error.fact, hint=error.hint, retry_in=AGAIN)
                await self._site.clock.sleep(AGAIN)
                continue
            log.info("schedule", next={job: str(schedule.due_at(job)) for job in schedule.jobs})
            return schedule

    async def _do(self, job: str, schedule: Schedule) -> None:
        clock, verb = self._site.clock, VERBS[job]
        began, start = clock.now(), clock.monotonic()
        schedule.began(job, began)
        if (since := self._busy.pop(job, None)) is not None and await self._done_since(job, since):
            log.info("scheduled_done", job=job, said="it was done by somebody else meanwhile")
            schedule.ended(job, began, "done")
            return
        log.info("scheduled", job=job)
        self._running = job
        try:
            ended = await self._run_job(job)
        finally:
            self._running = ""
        outcome: Outcome = "done" if ended.code == 0 else "busy" if TAKEN in ended.error else "failed"
        schedule.ended(job, clock.now(), outcome)
        if outcome == "busy":
            self._busy[job] = since or began
            log.info("scheduled_waits", job=job, said=ended.error, next=str(schedule.due_at(job)))
            return
        if outcome == "failed":
            await self._keep_record(job, began, clock.monotonic() - start, ended)
        self._site.notify(OperationEnded(verb, ended.error, ended.hint, schedule.due_at(job)))

    async def _run_job(self, job: str) -> Ended:
        unread = ""

        def say(line: str) -> None:
            if not unread or unread not in line:  # the report that goes with the folder
                (log.warning if line.startswith("DAMAGED") else log.info)("said", job=job, line=line)

        words = [VERBS[job], *_OPTIONS.get(job, ()), "--json"]
        if VERBS[job] == "backup":  # of the cluster that the server tells
            return await self._run(words, say)
        words += ["--cluster", self._site.facts.system_id]
        if job != "drill":
            return await self._run(words, say)
        settings = self._site.settings
        words += ["--check", str(settings.drill_checks)] if settings.drill_checks else []
        try:
            with TemporaryDirectory(prefix="walship-drill-", ignore_cleanup_errors=True) as unread:
                return await self._run([*words, "--report", str(settings.drill_reports or unread)], say)
        except OSError as error:
            return Ended(-1, f"no temporary folder can be made: {error.strerror}", "a drill needs one: see TMPDIR")

    async def _done_since(self, job: str, since: datetime) -> bool:
        """Whether whoever was in the way has done what was to be done."""
        try:
            name, _ = await last_of(job, await listed(self._site.stores), self._site.fetch)
        except StoreError:
            return False
        return name is not None and name.ok and name.ended >= since

    async def _keep_record(self, job: str, began: datetime, seconds: float, ended: Ended) -> None:
        """Who was killed, or failed before it knew the repository, has left none."""
        site, verb = self._site, VERBS[job]
        try:
            newest = (await listed(site.stores)).newest(verb, ok=False)
        except StoreError:
            newest = None
        if newest is not None and newest.ended >= began.replace(microsecond=0):
            return
        record = Record(
            verb=verb,
            began=began,
            ended=site.clock.now(),
            seconds=seconds,
            ok=False,
            host=gethostname(),
            version=version("walship"),
            arguments=("--incremental",) if job == "incremental" else (),
            error=ended.error,
            hint=ended.hint,
        )
        await write(site, record, tell=lambda line: log.warning("record", error=line))
