"""``walship check``: try everything that a night shift would otherwise find out, and say what to do about each."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from dotenv import dotenv_values

from handlers.body import joined
from infra.at_hand import look_at_hand, weakness
from infra.backups import refuse_stranger
from infra.clock import SystemClock
from infra.keys import open_keyring, policy_of
from infra.planning import contradictions, doubts, next_runs, summaries_off
from infra.postgres import programs
from infra.postgres.basebackup import INCREMENTAL
from infra.postgres.connect import connect
from infra.postgres.control import ServerFacts, read_facts, rows
from infra.postgres.local_copy import look
from infra.postgres.problems import problems
from infra.postgres.senders import StreamFacts, read_stream_facts
from infra.postgres.stream_problems import stream_problems, stream_words
from infra.repository import Destination, RepositoryFacts, find
from infra.repository import read_facts as read_repository
from infra.settings import SECRETS, Settings
from infra.sources.spool import check_spool
from infra.storage import display_name
from infra.storage.remains import rules
from infra.storage.retry import LOOK
from infra.storage.rooted import Rooted
from infra.whereabouts import exposed, required_elsewhere
from infra.wiring import open_destinations
from pipeline.catalog import REPOSITORY
from pipeline.errors import ConfigError, IntegrityError, ObjectMissing, SourceError, StoreError, WalshipError
from pipeline.objects import MemoryBody

# A role that may not see a setting is not shown it.
_FILES = """
select name, setting from pg_settings
where name in ('data_directory', 'config_file', 'hba_file', 'ident_file') and setting <> ''
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried."""

    #: ``server``, ``backups``, ``spool``, ``settings``, ``schedule``, ``repository``, ``destinations``, or the name of
    #: a destination.
    subject: str
    severity: Literal["ok", "warning", "error"]
    fact: str
    hint: str = ""
    #: What an error is, for the exit code.
    error: WalshipError | None = None


def _wrong(subject: str, error: WalshipError) -> Finding:
    return Finding(subject, "error", error.fact, error.hint, error)


async def examine(settings: Settings, *, waits: Callable[[str], None] = lambda _: None) -> AsyncIterator[Finding]:
    """Try everything, one finding after the other. Writes one small object to each destination and removes it.

    ``waits`` is told, in a sentence, of a destination that is slow to answer.
    """
    server: ServerFacts | None = None
    stream: StreamFacts | None = None
    try:
        async with await connect(settings) as connection:
            server = await read_facts(connection)
            if "stream" in settings.sources:
                stream = await read_stream_facts(connection, settings.slot)
    except SourceError as error:
        yield _wrong("server", error)
    if server is not None:
        async for finding in _server(server, stream, settings):
            yield finding
        async for finding in _backups(server, settings):
            yield finding
    async for finding in _spool(settings):
        yield finding
    for finding in (*_secrets(settings), *_schedule(settings, server)):
        yield finding
    if (lacking := await asyncio.to_thread(_programs, settings, server)) is not None:
        yield lacking
    async with open_destinations(settings, policy=LOOK, waits=waits) as destinations:
        facts: RepositoryFacts | None = None
        try:
            facts = await find(destinations, server.system_identifier if server else "")
        except WalshipError as error:
            yield _wrong("repository", error)
        for destination in destinations:
            async for finding in _destination(destination, facts, server, settings):
                yield finding
        yield await asyncio.to_thread(_off_host, settings)


def _off_host(settings: Settings) -> Finding:
    """Whether what is acknowledged outlives this host, and the database server: a required one must be elsewhere."""
    if (found := exposed(settings)) is not None:
        return Finding("destinations", "warning", f"safe on {found.where} only: {found.fact}", found.hint)
    there = ", ".join(required_elsewhere(settings))
    return Finding("destinations", "ok", f"what is acknowledged is off this host: {there}")


async def _server(server: ServerFacts, stream: StreamFacts | None, settings: Settings) -> AsyncIterator[Finding]:
    found = problems(server, settings) + (stream_problems(server, stream, settings) if stream else [])
    for problem in sorted(found, key=lambda problem: problem.severity):
        error = SourceError(problem.fact, hint=problem.hint) if problem.severity == "error" else None
        yield Finding("server", problem.severity, problem.fact, problem.hint, error)
    if not any(problem.severity == "error" for problem in found):
        ways = {
            "watch": f"archives by {server.archive_library or server.archive_command}",
            "stream": f"streams its WAL through the slot {settings.slot}",
        }
        how = " and ".join(ways[source] for source in ways if source in settings.sources)
        yield Finding("server", "ok", f"PostgreSQL {server.major}, cluster {server.system_identifier}, {how}")
    for words in stream_words(server, stream, settings) if stream else []:
        yield Finding("server", "ok", words)
    try:
        async with await connect(settings, replication=True):
            yield Finding("server", "ok", "accepts replication connections")
    except SourceError as error:
        yield _wrong("server", error)


async def _backups(server: ServerFacts, settings: Settings) -> AsyncIterator[Finding]:
    """Where base backups are taken, and how."""
    source = settings.for_backups()
    try:
        async with await connect(source) as connection:
            if settings.backup_host:
                refuse_stranger(await read_facts(connection), server, settings.backup_host)
                async with await connect(source, replication=True):
                    yield Finding("backups", "ok", f"base backups are taken from the standby {settings.backup_host}")
            if settings.data_dir is not None:
                await look(connection, settings.data_dir)
                yield Finding("backups", "ok", f"{settings.data_dir} is the server's: base backups read it directly")
            if left_out := _outside(dict(await rows(connection, _FILES))):
                yield Finding("backups", "warning", *left_out)
            if server.major >= INCREMENTAL:
                ((summaries,),) = await rows(connection, "show summarize_wal")
                able = "is on: incremental backups are possible"
                unable = "is off: `walship backup --incremental` needs it, full backups do not"
                if summaries != "on" and settings.schedule_incremental and settings.backup_host:
                    raise summaries_off()
                yield Finding("backups", "ok", f"summarize_wal {able if summaries == 'on' else unable}")
    except SourceError as error:
        yield _wrong("backups", error)


def _outside(files: dict[str, str]) -> tuple[str, str] | None:
    """Debian and Ubuntu keep the configuration apart from the data. None where it is backed up, or cannot be told."""
    inside = files.pop("data_directory", "")
    outside = sorted(path for path in files.values() if inside and not Path(path).is_relative_to(inside))
    if not outside:
        return None
    lie, copies = ("lies", "a copy of it") if len(outside) == 1 else ("lie", "copies of them")
    return f"outside the data directory {lie} {', '.join(outside)}: in no backup", f"keep {copies} elsewhere"


def _schedule(settings: Settings, server: ServerFacts | None) -> Iterator[Finding]:
    yield Finding("schedule", "ok", next_runs(settings, SystemClock().now()))
    for error in contradictions(settings, server):
        yield _wrong("schedule", error)
    for fact, hint in doubts(settings):
        yield Finding("schedule", "warning", fact, hint)


def _programs(settings: Settings, server: ServerFacts | None) -> Finding | None:
    """A warning if WALSHIP_PG_BIN_DIR is set and lacks the server's programs: a restore would be the first to say."""
    if settings.pg_bin_dir is None or (settings.schedule_drill and server is not None):
        return None  # or looked for with the schedule, where lacking ones are an error
    try:
        programs.find(server.major if server else None, bin_dir=settings.pg_bin_dir)
    except SourceError as error:
        why = "a restore from here, or a drill, would be refused"
        return Finding("settings", "warning", f"WALSHIP_PG_BIN_DIR: {error.fact}: {why}", error.hint)
    return None


async def _spool(settings: Settings) -> AsyncIterator[Finding]:
    if not settings.sources:
        hint = "set WALSHIP_SOURCES=stream, or watch,stream, or watch: without a source no WAL is shipped"
        yield _wrong("settings", ConfigError("WALSHIP_SOURCES names no source", hint=hint))
        return
    if "watch" not in settings.sources:
        if settings.spool_dir is not None:
            fact = f"WALSHIP_SPOOL_DIR is {settings.spool_dir}, and nobody empties it: WALSHIP_SOURCES is without watch"
            yield Finding("spool", "warning", fact, "set WALSHIP_SOURCES=watch,stream, or let PostgreSQL not archive")
        return
    if settings.spool_dir is None:
        hint = "it is the folder PostgreSQL archives into; for the stream alone, set WALSHIP_SOURCES=stream"
        yield _wrong("spool", ConfigError("WALSHIP_SPOOL_DIR is not set", hint=hint))
        return
    try:
        check_spool(settings.spool_dir)
    except SourceError as error:
        yield _wrong("spool", error)
        return
    room = os.statvfs(settings.spool_dir)
    free = room.f_bavail * room.f_frsize
    yield Finding("spool", "ok", f"{settings.spool_dir} can be read and emptied; {free >> 20} MB are free")


def _secrets(settings: Settings) -> list[Finding]:
    """What is to be said of .env, the passphrase, and the files that are to open the key ring."""
    found = [open_to_all] if (open_to_all := env_file(Path(".env"))) else []
    if weak := weakness(settings.passphrase):
        found.append(Finding("settings", "warning", *weak))
    try:
        look_at_hand(settings, lambda fact, hint: found.append(Finding("settings", "warning", fact, hint)))
    except ConfigError as error:
        found.append(_wrong("settings", error))
    return found


def env_file(path: Path) -> Finding | None:
    """A warning if the file holds a secret and others may read it; None if all is well, or there is no such file.

    The rule is PostgreSQL's for its server key (ssl_key_file): 0600, or 0640 if root owns it.
    """
    try:
        state = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(state.st_mode):
        return None  # a pipe can be read once
    too_much = stat.S_IMODE(state.st_mode) & (0o037 if state.st_uid == 0 else 0o077)
    held = [name for name, value in dotenv_values(path, interpolate=False).items() if value and name in SECRETS]
    if not (too_much and held):
        return None
    fact = f"{path.absolute()} holds {', '.join(held)} and has mode {stat.S_IMODE(state.st_mode):04o}"
    hint = f"chmod 600 {shlex.quote(str(path.absolute()))}"
    return Finding("settings", "warning", f"{fact}: others on this host may read it", hint)


async def _destination(
    destination: Destination, facts: RepositoryFacts | None, server: ServerFacts | None, settings: Settings
) -> AsyncIterator[Finding]:
    name = destination.name
    if facts is None:
        return
    store = Rooted(destination.root, facts.system_id)
    try:
        here = await read_repository(destination.root, facts.system_id)
        if server is not None and here.segment_size != server.segment_size:
            raise ConfigError(
                f"the repository has segments of {here.segment_size} bytes, the server {server.segment_size}",
                hint="begin a new repository at another destination",
            )
        body = MemoryBody([joined(await store.get(REPOSITORY))])
        abilities = await store.probe(REPOSITORY, body)
        severity: Literal["ok", "warning"] = "ok" if abilities.conditional_put else "warning"
        yield Finding(name, severity, f"conditional put: {abilities.remark}")
        yield await _round_trip(store, name)
        if (finding := await _versions(destination, settings)) is not None:
            yield finding
        at_hand = look_at_hand(settings, lambda *_: None)  # what is wrong with it was said
        keys = await open_keyring(
            store, facts.system_id, at_hand, writer=True, wanted=policy_of(settings), clock=SystemClock()
        )
        opens = "the key ring opens" if keys.reads else "the writer file fits the key ring: this host writes, reads not"
        yield Finding(name, "ok", opens if keys.encrypted else "nothing is encrypted (no key ring)")
    except ObjectMissing as error:
        hint = "`walship init` makes or joins the repository there"
        yield _wrong(name, ConfigError(f"there is no repository of cluster {facts.system_id}: {error.fact}", hint=hint))
    except (ConfigError, StoreError, IntegrityError) as error:
        yield _wrong(name, error)


async def _versions(destination: Destination, settings: Settings) -> Finding | None:
    """Whether a bucket keeps what is deleted, and for how long. None for a folder."""
    name = destination.name
    url = next((url for url in settings.destinations if display_name(url) == name), "")
    if not url.startswith("s3:"):
        return None
    try:
        status, found = await rules(url, settings)
    except StoreError as error:
        return Finding(name, "ok", f"whether the bucket keeps versions is not known: {error.fact}")
    if status != "Enabled":
        words = "no versions any more (they are suspended)" if status else "no versions"
        return Finding(name, "ok", f"the bucket keeps {words}: what is deleted or replaced there is gone")
    lock = f", each locked for {_days(found.locked_for)} ({found.lock})" if found.lock else ""
    fact = f"the bucket keeps versions{lock}"
    if found.rule is False:
        hint = "what is deleted or replaced stays there, and costs, until a rule removes it: docs/ransomware.md has one"
        return Finding(name, "warning", f"{fact}, and no lifecycle rule ever removes old ones", hint)
    return Finding(name, "ok", fact + ("; a lifecycle rule removes old ones" if found.rule else ""))


async def _round_trip(store: Rooted, name: str) -> Finding:
    """Write, read back, compare, remove: a store that breaks bytes or lacks a right is found out here."""
    key = f"log/check-{secrets.token_hex(8)}"
    content = secrets.token_bytes(4096)
    await store.put(key, MemoryBody([content]))
    if joined(await store.get(key)) != content:
        error = IntegrityError(f"{key} was read back with other bytes than were written", hint="the store breaks data")
        return _wrong(name, error)
    try:
        await store.delete([key])
    except StoreError as error:
        return Finding(
            name, "warning", f"an object could be written and read back, not deleted: {error.fact}", error.hint
        )
    return Finding(name, "ok", "an object was written, read back, compared and deleted")


def _days(span: timedelta) -> str:
    return "1 day" if span.days == 1 else f"{span.days} days"
