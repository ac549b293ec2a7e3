"""What the server is and what our role may do there; and the few things we ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from infra.postgres.connect import Connection
from pipeline.errors import SourceError
from pipeline.wal import Lsn, WalFile

#: What walship calls, and a person beside it; superusers may, others need EXECUTE.
FUNCTIONS = ("pg_switch_wal()", "pg_create_restore_point(text)")


@dataclass(frozen=True, slots=True)
class Role:
    """The role that walship is connected as."""

    name: str
    superuser: bool
    replication: bool
    #: Member of pg_monitor: may read all statistics and settings.
    monitor: bool
    #: Those of FUNCTIONS that it may not execute.
    missing_functions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Archiver:
    """pg_stat_archiver: what PostgreSQL itself says of its archiving."""

    archived_count: int
    last_archived_wal: str
    last_archived_time: datetime | None
    failed_count: int
    last_failed_wal: str
    last_failed_time: datetime | None

    @property
    def failing(self) -> bool:
        """Whether the latest attempt failed."""
        if self.last_failed_time is None:
            return False
        return self.last_archived_time is None or self.last_failed_time > self.last_archived_time


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """One look at the server. Settings are as PostgreSQL shows them; an empty string is a setting that is not set."""

    #: 170011
    version_num: int
    #: Decimal digits.
    system_identifier: str
    #: Bytes.
    segment_size: int
    #: On a standby the timeline of its last restart point.
    timeline: int
    in_recovery: bool
    #: End of the WAL written so far; on a standby, replayed so far.
    wal_lsn: Lsn
    wal_level: str
    archive_mode: str
    #: ``(disabled)`` while archive_mode is off: PostgreSQL then hides it.
    archive_command: str
    archive_library: str
    #: ``basic_archive.archive_directory``
    archive_directory: str
    #: Seconds, 0 is off.
    archive_timeout: int
    max_wal_senders: int
    #: None if the role may not see it.
    data_directory: str | None
    server_encoding: str
    fsync: bool
    full_page_writes: bool
    synchronous_standby_names: str
    synchronous_commit: str
    #: None before PostgreSQL 17, which has no such setting.
    summarize_wal: bool | None
    role: Role
    archiver: Archiver

    @property
    def major(self) -> int:
        return self.version_num // 10000


_SETTINGS = (
    "wal_segment_size", "wal_level", "archive_mode", "archive_command", "archive_library", "archive_timeout",
    "max_wal_senders", "data_directory", "server_encoding", "fsync", "full_page_writes", "synchronous_standby_names",
    "synchronous_commit", "summarize_wal",
)  # fmt: skip

# pg_settings leaves out what the role may not see, where current_setting would be an error. A module's setting is
# not in it unless the module is loaded, and basic_archive is loaded by the archiver only.
_READ_SETTINGS = """
select name, setting from pg_settings where name = any(%s)
union all select 'archive_directory', coalesce(current_setting('basic_archive.archive_directory', true), '')
"""

_READ_STATE = """
select current_setting('server_version_num')::int, (select system_identifier from pg_control_system())::text,
       pg_is_in_recovery(),
       case when pg_is_in_recovery() then coalesce(pg_last_wal_replay_lsn(), '0/0') else pg_current_wal_lsn() end::text,
       case when pg_is_in_recovery() then (select timeline_id from pg_control_checkpoint())
            else ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int end
"""

_READ_ROLE = """
select rolname, rolsuper, rolreplication, pg_has_role(rolname, 'pg_monitor', 'usage'),
       array(select f from unnest(%s::text[]) f where not has_function_privilege(rolname, f, 'execute'))
from pg_roles where rolname = current_user
"""

_READ_ARCHIVER = """
select archived_count, coalesce(last_archived_wal, ''), last_archived_time,
       failed_count, coalesce(last_failed_wal, ''), last_failed_time from pg_stat_archiver
"""


async def read_facts(conn: Connection) -> ServerFacts:
    """Look at everything walship depends on. Needs no right beyond logging in. Raises SourceError."""
    version = conn.info.server_version
    if version < 150000:
        raise SourceError(
            f"PostgreSQL {version // 10000} is too old: walship works with 15 and later",
            hint="upgrade the server, or use another tool for it until then",
        )
    settings = dict(await rows(conn, _READ_SETTINGS, (list(_SETTINGS),)))
    ((version_num, system_id, in_recovery, lsn, timeline),) = await rows(conn, _READ_STATE)
    ((name, superuser, replication, monitor, missing),) = await rows(conn, _READ_ROLE, (list(FUNCTIONS),))
    (archiver,) = await rows(conn, _READ_ARCHIVER)
    return ServerFacts(
        version_num=version_num,
        system_identifier=system_id,
        segment_size=int(settings["wal_segment_size"]),
        timeline=timeline,
        in_recovery=in_recovery,
        wal_lsn=Lsn.parse(lsn),
        wal_level=settings["wal_level"],
        archive_mode=settings["archive_mode"],
        archive_command=settings["archive_command"],
        archive_library=settings["archive_library"],
        archive_directory=settings["archive_directory"],
        archive_timeout=int(settings["archive_timeout"]),
        max_wal_senders=int(settings["max_wal_senders"]),
        data_directory=settings.get("data_directory"),
        server_encoding=settings["server_encoding"],
        fsync=settings["fsync"] == "on",
        full_page_writes=settings["full_page_writes"] == "on",
        synchronous_standby_names=settings["synchronous_standby_names"],
        synchronous_commit=settings["synchronous_commit"],
        summarize_wal=settings["summarize_wal"] == "on" if "summarize_wal" in settings else None,
        role=Role(name, superuser, replication, monitor, tuple(missing)),
        archiver=Archiver(*archiver),
    )


async def switch_wal(conn: Connection, *, segment_size: int) -> WalFile:
    """End the open segment and return it: all that was committed before lies in it or in earlier ones.

    If nothing was written since the last switch there is nothing to end, and the segment before the open one is
    returned. Raises SourceError on a standby, or without the right.
    """
    # Either the position behind the switch record, or the start of the open segment if nothing was done: in both
    # cases the byte before it lies in the segment that is finished now. (pg_walfile_name means another segment at
    # a boundary before PostgreSQL 17 than since.)
    ((lsn, timeline),) = await rows(
        conn,
        "select pg_switch_wal()::text, ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int",
    )
    return WalFile.segment(timeline, Lsn.parse(lsn) - 1, segment_size)


async def create_restore_point(conn: Connection, name: str) -> Lsn:
    """Write a named point into the WAL, as a target for ``restore --to-name``. Returns its position.

    The name may have up to 63 bytes. Raises SourceError.
    """
    ((lsn,),) = await rows(conn, "select pg_create_restore_point(%s)::text", (name,))
    return Lsn.parse(lsn)


async def rows(conn: Connection, query: str, parameters: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
    try:
        cursor = await conn.execute(query.encode(), parameters)
        return await cursor.fetchall()
    except psycopg.Error as error:
        raise _refused(conn, error) from None


def _refused(conn: Connection, error: psycopg.Error) -> SourceError:
    words = error.diag.message_primary or " ".join(str(error).split())
    hint = error.diag.message_hint or ""
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        hint = f'give the role {conn.info.user} the right; "walship check" lists what it needs'
    elif isinstance(error, psycopg.errors.ObjectNotInPrerequisiteState) and "recovery is in progress" in words:
        hint = "this server is a standby; ask its primary"
    return SourceError(f"PostgreSQL at {conn.info.host}:{conn.info.port} refused: {words}", hint=hint)
