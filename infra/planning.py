"""What is said of the schedule: when each job runs next, and which of them can only fail.

``walship check`` says it, and the service's log when it starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime

from infra.postgres import programs
from infra.postgres.basebackup import INCREMENTAL
from infra.postgres.control import ServerFacts
from infra.remembered import jobs_of
from infra.settings import Settings
from pipeline.errors import ConfigError, SourceError, WalshipError
from pipeline.moments import show


def next_runs(settings: Settings, now: datetime) -> str:
    """In a sentence."""
    jobs = jobs_of(settings)
    if not jobs:
        return "nothing is scheduled: backups, expire, verify and drills are somebody else's to start"
    times = [f"{job} {show(time)}" for job, after in jobs.items() if (time := after(now)) is not None]
    return f"scheduled by the clock of {settings.time_zone}, next: {', '.join(times)}"


def contradictions(settings: Settings, server: ServerFacts | None) -> Iterator[WalshipError]:
    """What would fail at each of its times."""
    jobs = jobs_of(settings)
    if "drill" in jobs and server is not None:
        try:
            programs.find(server.major, bin_dir=settings.pg_bin_dir)
        except SourceError as error:
            yield SourceError(f"WALSHIP_SCHEDULE_DRILL is set, and {error.fact}", hint=error.hint)
    if "expire" in jobs and settings.retention is None:
        yield ConfigError(
            "WALSHIP_SCHEDULE_EXPIRE is set, and no retention: each run would fail, and nothing would be deleted",
            hint="say what is kept: WALSHIP_KEEP_WINDOW=14d, for example; `walship expire --dry-run` tells more",
        )
    if "incremental" in jobs and server is not None and server.major < INCREMENTAL:
        yield ConfigError(
            f"WALSHIP_SCHEDULE_INCREMENTAL is set, and PostgreSQL {server.major} has no incremental backups",
            hint=f"PostgreSQL {INCREMENTAL} and later do; take full ones each night in their place:"
            " WALSHIP_SCHEDULE_FULL='30 2 * * *'. Or less often, for WAL bridges the time between them;"
            " then raise the 26 hours of the alert WalshipBackupTooOld (93600 in its rule)",
        )
    if "incremental" in jobs and server is not None and server.summarize_wal is False and not settings.backup_host:
        yield summaries_off()
    if "drill" in jobs and settings.drill_checks is not None and not os.access(settings.drill_checks, os.R_OK):
        yield ConfigError(f"WALSHIP_DRILL_CHECKS: {settings.drill_checks} cannot be read", hint="docs/drill.md has one")
    reports = settings.drill_reports
    if "drill" in jobs and reports is not None and not os.access(reports, os.W_OK | os.X_OK):
        yield ConfigError(
            f"WALSHIP_DRILL_REPORTS: nothing can be written into {reports}", hint="it is a folder of this user's"
        )


def summaries_off() -> SourceError:
    """Of the server that incremental backups are taken from: a standby has a setting of its own."""
    return SourceError(
        "WALSHIP_SCHEDULE_INCREMENTAL is set, and summarize_wal is off: each of them would fail",
        hint="in psql: ALTER SYSTEM SET summarize_wal = on; SELECT pg_reload_conf()",
    )


def doubts(settings: Settings) -> Iterator[tuple[str, str]]:
    """What works, and is not what anybody wants: facts and hints."""
    jobs = jobs_of(settings)
    if "incremental" in jobs and "full" not in jobs:
        yield (
            "WALSHIP_SCHEDULE_INCREMENTAL is set, and WALSHIP_SCHEDULE_FULL is not: a restore lays down long chains",
            "schedule a full backup now and then: WALSHIP_SCHEDULE_FULL='30 2 * * 0', on Sundays",
        )
    if "expire" in jobs and not {"full", "incremental"} & jobs.keys():
        yield (
            "WALSHIP_SCHEDULE_EXPIRE is set, and no backup is scheduled",
            "somebody else has to take them: without new ones nothing can go",
        )
