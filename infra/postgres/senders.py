"""What the server says of its slots and WAL senders: who streams, who could stand in for us, and how long WAL is kept.

Read over a normal connection, because replication connections cannot query views. pg_monitor is enough; without it
the names of other roles' connections stay hidden, and ``problems`` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from infra.postgres.connect import Connection
from infra.postgres.control import rows
from infra.postgres.slots import Slot, look


@dataclass(frozen=True, slots=True)
class Sender:
    """A line of pg_stat_replication: a connection that speaks the replication protocol."""

    pid: int
    #: Empty if it has none, or if our role may not see it.
    application_name: str
    user: str
    #: Address, or ``a local socket``.
    client: str
    #: startup, catchup, streaming, backup, stopping.
    state: str
    #: async, potential, sync, quorum.
    sync_state: str

    def __str__(self) -> str:
        return f"{self.application_name or 'unnamed'} of the role {self.user}, process {self.pid}, from {self.client}"


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """One look at all that the stream depends on."""

    #: The one that WALSHIP_SLOT names; None if it is not there.
    slot: Slot | None
    senders: tuple[Sender, ...]
    #: Of all kinds.
    slots: int
    max_slots: int
    #: ``max_slot_wal_keep_size`` in bytes; None: no limit.
    keep_size: int | None
    #: ``wal_sender_timeout`` in seconds; 0 is off.
    sender_timeout: float
    #: ``idle_replication_slot_timeout`` in seconds, from PostgreSQL 18 on; 0 is off.
    idle_timeout: int
    #: Where synchronous_commit is something else than for us: ``role app: off``.
    other_commits: tuple[str, ...]

    @property
    def user(self) -> Sender | None:
        """The connection that uses the slot."""
        pid = self.slot.active_pid if self.slot else None
        return next((sender for sender in self.senders if sender.pid == pid), None)

    @property
    def ours(self) -> Sender | None:
        """The same, if it goes by the slot's name, as walship does."""
        user, slot = self.user, self.slot
        return user if user and slot and user.application_name.lower() == slot.name else None


_READ_SENDERS = """
select pid, coalesce(application_name, ''), coalesce(usename, ''), coalesce(host(client_addr), 'a local socket'),
       coalesce(state, ''), coalesce(sync_state, '') from pg_stat_replication order by pid
"""

_READ_LIMITS = """
select (select count(*) from pg_replication_slots), current_setting('max_replication_slots')::int,
       (select setting::bigint from pg_settings where name = 'max_slot_wal_keep_size'),
       (select setting::bigint from pg_settings where name = 'wal_sender_timeout'),
       coalesce((select setting::int from pg_settings where name = 'idle_replication_slot_timeout'), 0)
"""

_READ_OTHER_COMMITS = """
select concat_ws(' in ', 'role ' || rolname, 'database ' || datname) || ': ' || split_part(config, '=', 2)
from pg_db_role_setting cross join unnest(setconfig) config
     left join pg_roles on pg_roles.oid = setrole left join pg_database on pg_database.oid = setdatabase
where config like 'synchronous_commit=%%' and split_part(config, '=', 2) <> current_setting('synchronous_commit')
order by 1
"""


async def read_stream_facts(conn: Connection, slot: str) -> StreamFacts:
    """Look at the slot of that name and at everything around it. Raises SourceError."""
    senders = await rows(conn, _READ_SENDERS)
    ((slots, max_slots, keep_mb, timeout_ms, idle),) = await rows(conn, _READ_LIMITS)
    others = await rows(conn, _READ_OTHER_COMMITS)
    return StreamFacts(
        slot=await look(conn, slot),
        senders=tuple(Sender(*row) for row in senders),
        slots=slots,
        max_slots=max_slots,
        keep_size=None if keep_mb < 0 else keep_mb << 20,
        sender_timeout=timeout_ms / 1000,
        idle_timeout=idle,
        other_commits=tuple(other for (other,) in others),
    )
