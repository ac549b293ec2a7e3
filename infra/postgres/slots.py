"""The physical replication slot: what makes the server keep WAL until it is durable offsite."""

from __future__ import annotations

from dataclasses import dataclass

import psycopg

from infra.postgres.connect import Connection, RefusedError
from infra.postgres.replication import ReplicationConnection
from pipeline.errors import SourceError
from pipeline.wal import Lsn


@dataclass(frozen=True, slots=True)
class Slot:
    """One look at a slot."""

    name: str
    physical: bool
    temporary: bool
    #: The oldest WAL it keeps; None if it keeps none (created without RESERVE_WAL and never used, or lost).
    restart_lsn: Lsn | None
    active: bool
    #: Process of the WAL sender that uses it.
    active_pid: int | None
    #: Application name of that WAL sender; empty if nobody uses it, or if we may not see it.
    application_name: str
    #: Who uses it, for people: ``walship, process 123, from 10.0.0.7``; empty if nobody.
    holder: str
    #: As PostgreSQL says it: reserved, extended, unreserved, lost; empty if it keeps nothing yet.
    wal_status: str
    #: Bytes that may be written before it is in danger of being lost; None: no limit, or it is lost.
    safe_wal_size: int | None
    #: Bytes of WAL from ``restart_lsn`` to the end; 0 if it keeps none.
    retained: int
    #: The server says, or its files show, that WAL this slot was to keep is gone.
    lost: bool


async def look(control: Connection, name: str) -> Slot | None:
    """The slot of that name as it is now, or None. Raises SourceError.

    Look *before* streaming from it: while somebody streams, 15 to 17 show a lost slot as ``unreserved`` or ``reserved``.
    """
    raise NotImplementedError


def refuse_foreign(slot: Slot) -> None:
    """Raise SourceError (lasting) if the slot cannot be ours: logical, or temporary; or if another program uses it."""
    raise NotImplementedError


async def create(replication: ReplicationConnection, name: str) -> None:
    """Make the slot; it keeps WAL from the last checkpoint's start on, at once.

    Raises RefusedError: 42710 there is one of that name, 53400 max_replication_slots, 55000 wal_level is minimal.
    """
    raise NotImplementedError


async def drop(replication: ReplicationConnection, name: str) -> None:
    """Remove the slot; RefusedError with 55006 if somebody uses it. One that is not there is a success."""
    raise NotImplementedError
