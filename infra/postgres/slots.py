"""The physical replication slot: what makes the server keep WAL until it is durable offsite."""

from __future__ import annotations

from dataclasses import dataclass

from infra.postgres.connect import Connection, RefusedError
from infra.postgres.control import rows
from infra.postgres.replication import ReplicationConnection
from pipeline.errors import SourceError
from pipeline.wal import Lsn, WalFile


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
    #: Application name of that WAL sender; empty if nobody uses it.
    application_name: str
    #: Who uses it, for people: ``walship (process 123 of the server, from 10.0.0.7)``; empty if nobody. The address
    #: only if the role is a member of pg_monitor.
    holder: str
    #: As PostgreSQL says it: reserved, extended, unreserved, lost; empty if it keeps nothing yet.
    wal_status: str
    #: Bytes that may be written before it is in danger of being lost; None: no limit, or it is lost.
    safe_wal_size: int | None
    #: Bytes of WAL from ``restart_lsn`` to the end; 0 if it keeps none.
    retained: int
    #: The server says, or its files show, that WAL this slot was to keep is gone.
    lost: bool

    @property
    def in_use(self) -> SourceError:
        """What to say when the server refuses the slot because it is in use (55006)."""
        who = self.holder or "somebody who has left meanwhile"
        return SourceError(
            f"the replication slot {self.name} is in use by {who}",
            hint="one service streams from a slot: end the other one, or give this one its own (WALSHIP_SLOT)."
            " A connection of ours that broke is given up by the server within wal_sender_timeout",
        )


# ``to_jsonb`` because invalidation_reason exists from 17 on. Files are listed only where the role may: what lies below
# the oldest segment is gone whatever wal_status says. Recycled segments wait under names of the future, and names sort
# as positions do once the timeline is cut off.
_LOOK = """
with s as (select * from pg_replication_slots where slot_name = %s),
     w as (select case when pg_is_in_recovery()
                       then greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn(), '0/0')
                       else pg_current_wal_lsn() end as lsn)
select slot_type = 'physical', temporary, restart_lsn::text, active, active_pid, wal_status, safe_wal_size,
       greatest(coalesce(w.lsn - restart_lsn, 0), 0)::bigint, to_jsonb(s) ->> 'invalidation_reason',
       coalesce(a.application_name, ''), host(a.client_addr), has_function_privilege('pg_ls_waldir()', 'execute'),
       (select setting::bigint from pg_settings where name = 'wal_segment_size')
from w, s left join pg_stat_activity a on a.pid = s.active_pid
"""
_OLDEST = "select min(right(name, 16)) from pg_ls_waldir() where name ~ '^[0-9A-F]{24}$'"


async def look(control: Connection, name: str) -> Slot | None:
    """The slot of that name as it is now, or None. Raises SourceError.

    Look *before* streaming from it. 15 to 17 let a lost slot stream: from the first report on, 15 keeps WAL again and
    rightly shows ``reserved``, 16 and 17 keep none and still show ``unreserved`` for as long as it is in use.
    """
    found = await rows(control, _LOOK, (name,))
    if not found:
        return None
    (physical, temporary, restart, active, pid, status, safe, retained, reason, program, address, may_list,
     segment_size) = found[0]  # fmt: skip
    restart_lsn = None if restart is None else Lsn.parse(restart)
    lost = status == "lost" or reason is not None
    if not lost and restart_lsn is not None and may_list:
        ((oldest,),) = await rows(control, _OLDEST)
        first = WalFile.parse(f"00000001{oldest}") if oldest else None
        lost = first is not None and restart_lsn < first.start(segment_size)
    holder = ""
    if pid is not None:
        where = f", from {address}" if address else ""
        holder = f"{program or 'a program without a name'} (process {pid} of the server{where})"
    return Slot(
        name=name, physical=physical, temporary=temporary, restart_lsn=restart_lsn, active=active, active_pid=pid,
        application_name=program, holder=holder, wal_status=status or "", safe_wal_size=safe, retained=retained,
        lost=lost,
    )  # fmt: skip


def refuse_foreign(slot: Slot) -> None:
    """Raise SourceError (lasting) if the slot cannot be ours: logical, temporary, or in use under another name.

    In use under our own name may be ourselves, a moment ago: that is no reason to refuse, see ``Slot.in_use``.
    """
    elsewhere = "set WALSHIP_SLOT to a name that is free: walship makes the slot itself"
    if not slot.physical:
        raise SourceError(
            f"the replication slot {slot.name} is a logical one, of some other program", hint=elsewhere, lasting=True
        )
    if slot.temporary:
        raise SourceError(
            f"the replication slot {slot.name} is a temporary one, of {slot.holder or 'some other program'}",
            hint=elsewhere, lasting=True,
        )  # fmt: skip
    if slot.application_name and slot.application_name.lower() != slot.name:
        raise SourceError(f"the replication slot {slot.name} belongs to {slot.holder}", hint=elsewhere, lasting=True)


async def create(replication: ReplicationConnection, name: str) -> None:
    """Make the slot; it keeps WAL at once, from the start of the last checkpoint (on a standby: restart point) on.

    Raises RefusedError: 42710 there is one of that name, 53400 there is no room for one. (wal_level minimal shows
    itself before: with it a server has no WAL senders to connect to.)
    """
    try:
        await replication.rows(f'CREATE_REPLICATION_SLOT "{name}" PHYSICAL RESERVE_WAL')
    except RefusedError as error:
        fact = f"the replication slot {name} cannot be made: {error.fact.removeprefix('PostgreSQL refused: ')}"
        hint = _CREATE_HINTS.get(error.state, error.hint)
        raise RefusedError(fact, state=error.state, hint=hint, lasting=error.state in _CREATE_HINTS) from None


_CREATE_HINTS = {
    "42501": "give the role the REPLICATION right: ALTER ROLE … REPLICATION;",
    "42710": "set WALSHIP_SLOT to a name that is free",
    "53400": "raise max_replication_slots and restart the server, or drop a slot that nobody needs",
}


async def drop(replication: ReplicationConnection, name: str) -> None:
    """Remove the slot; one that is not there is a success. RefusedError with 55006 if somebody uses it."""
    try:
        await replication.rows(f'DROP_REPLICATION_SLOT "{name}"')
    except RefusedError as error:
        if error.state != "42704":
            raise
