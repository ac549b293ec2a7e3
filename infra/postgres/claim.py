"""One base backup of a server at a time: an advisory lock that the session of the backup holds, and who holds it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from infra.postgres.connect import BACKUP_NAME, connect, place
from infra.postgres.control import rows
from infra.settings import Settings
from pipeline.errors import SourceError

#: Key of the lock: the bytes of "walship\0". It goes with the session, however that ends.
_KEY = int.from_bytes(b"walship\0", "big", signed=True)

#: Ends a backup from afar: all its sessions, for it goes on without the one that holds the lock. For people to type.
_END = f"select pg_terminate_backend(pid) from pg_stat_activity where application_name = '{BACKUP_NAME}'"  # noqa: S608

#: What is said to whoever comes second.
TAKEN = "is being taken already"

_HOLDER = """
select coalesce(host(a.client_addr), 'the server itself'), to_char(a.backend_start, 'HH24:MI:SS TZ')
from pg_locks l join pg_stat_activity a using (pid)
where l.locktype = 'advisory' and l.granted and ((l.classid::bigint << 32) | l.objid::bigint) = %s
"""


@asynccontextmanager
async def claimed(settings: Settings) -> AsyncIterator[None]:
    """Nobody else backs this server up with walship meanwhile. Raises SourceError that says who does."""
    async with await connect(settings, application_name=BACKUP_NAME) as connection:
        ((mine,),) = await rows(connection, "select pg_try_advisory_lock(%s)", (_KEY,))
        if not mine:
            found = await rows(connection, _HOLDER, (_KEY,))
            address, since = found[0] if found else ("a session that has just ended", "now")
            raise SourceError(
                f"a base backup of {place(connection)} {TAKEN}: from {address}, since {since}",
                hint=f"wait for it; if nobody wants it, end it there, or with {_END}",
            )
        yield
