"""What is wrong with a server for our purpose, each with the words that mend it. ``walship check`` shows them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra.postgres.control import ServerFacts
from infra.settings import Settings
from pipeline.errors import SourceError

_RIGHT_OF = {"pg_switch_wal()": "walship switch", "pg_create_restore_point(text)": "named restore points"}


@dataclass(frozen=True, slots=True)
class Problem:
    """``error``: walship cannot do its work. ``warning``: it can, and somebody should know."""

    severity: Literal["error", "warning"]
    fact: str
    hint: str


def problems(facts: ServerFacts, settings: Settings) -> list[Problem]:
    """All that is wrong, errors first."""
    found = [*_wal(facts), *_role(facts)]
    if "watch" in settings.sources:
        found += _archiving(facts, settings)
    else:
        found += _unwatched(facts)
    return sorted(found, key=lambda problem: problem.severity)


def refuse(found: Iterable[Problem]) -> None:
    """Raise the first error among them as SourceError."""
    for problem in found:
        if problem.severity == "error":
            raise SourceError(problem.fact, hint=problem.hint)


def _error(fact: str, hint: str) -> Problem:
    return Problem("error", fact, hint)


def _warning(fact: str, hint: str) -> Problem:
    return Problem("warning", fact, hint)


def _wal(facts: ServerFacts) -> Iterator[Problem]:
    if facts.wal_level == "minimal":
        yield _error("wal_level is minimal: such WAL cannot be replayed onto a backup",
                     "set wal_level = replica and restart the server")  # fmt: skip
    if facts.max_wal_senders == 0:
        yield _error("max_wal_senders is 0: the server streams no base backup",
                     "set max_wal_senders = 10 and restart the server")  # fmt: skip
    if not facts.fsync:
        yield _warning("fsync is off: after a power cut the server's own data is lost", "set fsync = on")
    if not facts.full_page_writes:
        yield _warning("full_page_writes is off: pages that a crash tears cannot be repaired from WAL",
                       "set full_page_writes = on")  # fmt: skip


def _role(facts: ServerFacts) -> Iterator[Problem]:
    role = facts.role
    if role.superuser:
        return
    name = '"' + role.name.replace('"', '""') + '"'
    if not role.replication:
        yield _error(f"the role {role.name} has no REPLICATION right, which base backups and the stream need",
                     f"ALTER ROLE {name} REPLICATION;")  # fmt: skip
    if not role.monitor:
        yield _warning(f"the role {role.name} is no member of pg_monitor and sees only a part of the statistics",
                       f"GRANT pg_monitor TO {name};")  # fmt: skip
    for function in role.missing_functions:
        yield _warning(f"the role {role.name} may not execute {function}, for {_RIGHT_OF[function]}",
                       f"GRANT EXECUTE ON FUNCTION {function} TO {name};")  # fmt: skip


def handing_over(facts: ServerFacts, settings: Settings) -> Iterator[Problem]:
    """What in its settings keeps finished segments from the spool, until somebody changes them."""
    if facts.archive_mode == "off":
        yield _error("archive_mode is off: PostgreSQL hands over no WAL",
                     "set archive_mode = on and restart the server")  # fmt: skip
        return  # PostgreSQL shows nothing of the rest while it is off
    if facts.in_recovery and facts.archive_mode != "always":
        yield _error("this server is a standby and does not archive with archive_mode = on",
                     "let walship watch the primary")  # fmt: skip
    if facts.archive_command and facts.archive_library and facts.major >= 16:
        yield _error(f"archive_command and archive_library ({facts.archive_library}) are both set:"
                     " the archiver ends with an error, and nothing is archived",
                     "empty one of them and reload the server")  # fmt: skip
    elif facts.archive_library:
        yield from _library(facts, settings)
    elif facts.archive_command:
        yield from _command(facts, settings)
    else:
        yield _error("neither archive_library nor archive_command is set: WAL gathers on the server and goes nowhere",
                     _wanted(settings))  # fmt: skip


def _archiving(facts: ServerFacts, settings: Settings) -> Iterator[Problem]:
    yield from handing_over(facts, settings)
    if facts.archive_mode == "off":
        return
    if facts.archiver.failing:
        yield _error(f"archiving fails: {facts.archiver.last_failed_wal} could not be archived"
                     f" ({facts.archiver.failed_count} failures so far)",
                     "the server's log has the reason; a truncated file of that name in the spool blocks basic_archive"
                     " for ever")  # fmt: skip
    if facts.archive_timeout == 0 and "stream" not in settings.sources:
        yield _warning("archive_timeout is 0: a quiet server keeps its last changes in an unfinished segment for long",
                       "set archive_timeout = 60, or less")  # fmt: skip


def _unwatched(facts: ServerFacts) -> Iterator[Problem]:
    """Without ``watch``, what is archived into a folder stays there."""
    if facts.archive_mode in ("on", "always") and facts.archive_library == "basic_archive" and facts.archive_directory:
        yield _warning(f"PostgreSQL archives into {facts.archive_directory}, which walship does not empty without watch"
                       " in WALSHIP_SOURCES: it fills the disk",
                       "ALTER SYSTEM SET archive_mode = off; then restart the server and empty that folder (before"
                       " that, do not merely empty archive_library: the server would keep all WAL)")  # fmt: skip


def _library(facts: ServerFacts, settings: Settings) -> Iterator[Problem]:
    if facts.archive_command:
        yield _warning(f"archive_command is ignored because archive_library ({facts.archive_library}) is set;"
                       " from PostgreSQL 16 on both together are an error",
                       "empty one of them and reload the server")  # fmt: skip
    if facts.archive_library != "basic_archive":
        yield _warning(f"archive_library is {facts.archive_library}, which walship does not know",
                       "walship sees only what appears as finished files in WALSHIP_SPOOL_DIR")  # fmt: skip
    elif not facts.archive_directory:
        yield _error("basic_archive.archive_directory is not set: nothing is archived", _wanted(settings))
    elif settings.spool_dir is not None and not _same(facts.archive_directory, str(settings.spool_dir)):
        yield _elsewhere("basic_archive.archive_directory", facts.archive_directory, facts, settings, plain=True)


def _command(facts: ServerFacts, settings: Settings) -> Iterator[Problem]:
    command = facts.archive_command
    if "%f" not in command or "%p" not in command:
        yield _error(f"archive_command is {command!r}: without both %p and %f it cannot hand over a segment",
                     _wanted(settings))  # fmt: skip
        return
    if settings.spool_dir is not None and not _mentions(command, str(settings.spool_dir)):
        yield _elsewhere("archive_command", command, facts, settings, plain=re.search(r"\bcp\s", command) is not None)
    elif re.match(r"\s*(/bin/|/usr/bin/)?cp\s", command):
        yield _warning("archive_command is a plain cp, which does not wait for the disk: after a power cut a segment"
                       " that PostgreSQL has forgotten may be lost from the spool",
                       "prefer " + _wanted(settings).removeprefix("set "))  # fmt: skip


def _elsewhere(setting: str, value: str, facts: ServerFacts, settings: Settings, *, plain: bool) -> Problem:
    """Certain only where the server runs on this machine and what it does is plain: a folder may have another name in
    a container, and a script may copy anywhere.
    """
    fact = f"{setting} is {value!r}, but walship watches {settings.spool_dir}"
    here = settings.postgres_connection_mode == "host" and Path(facts.data_directory or "/nowhere").is_dir()
    if here and plain:
        return _error(fact, f"set WALSHIP_SPOOL_DIR to the same folder, or {_wanted(settings)}")
    return _warning(fact, "make sure that what PostgreSQL archives appears there")


def _wanted(settings: Settings) -> str:
    folder = settings.spool_dir or "(WALSHIP_SPOOL_DIR)"
    return (
        "set archive_library = 'basic_archive', archive_command = '' and"
        f" basic_archive.archive_directory = '{folder}', and reload the server"
    )


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _mentions(command: str, folder: str) -> bool:
    """Whether the folder stands in the command as a whole path, by either of its names."""
    names = {os.path.normpath(folder), os.path.realpath(folder)}
    return any(re.search(rf"(?<![\w./-]){re.escape(name)}(?=[/\s'\"]|$)", command) for name in names)
