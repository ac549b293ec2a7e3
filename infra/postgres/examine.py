"""Looks at a restored server through a private socket: who is superuser, its newest commit, pg_amcheck, and statements.

Nothing here is for a server that anybody needs: an extension is created in each of its databases.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo

from handlers.check_file import Answer
from infra.postgres.processes import RunAs
from infra.postgres.programs import Programs
from pipeline.errors import SourceError

Connection: TypeAlias = AsyncConnection[tuple[Any, ...]]

#: Settings of a role or a database would win over the server's command line; what a client brings wins over both.
_OPTIONS = "-c statement_timeout=0 -c lock_timeout=0 -c idle_session_timeout=0 -c default_transaction_read_only=off"
_PROGRESS = re.compile(r"(\d+)/(\d+) relations \(\s*\d+%\),\s*(\d+)/(\d+) pages")
#: Lines of pg_amcheck that are kept.
_LINES = 20
#: Databases that every cluster has, unless somebody dropped them.
_DATABASES = ("postgres", "template1")
_BOOLEAN = 16


@dataclass(frozen=True, slots=True)
class Door:
    """How to reach the server, which trusts whoever comes by its socket."""

    sockets: Path
    port: int
    user: str = "postgres"

    async def connect(self, database: str) -> Connection:
        """A connection in autocommit; the caller closes it. Raises psycopg.Error."""
        parameters: dict[str, str | int] = {
            "host": str(self.sockets), "port": self.port, "user": self.user, "dbname": database,
            "application_name": "walship_drill", "client_encoding": "UTF8", "options": _OPTIONS,
            "connect_timeout": 60, "sslmode": "disable", "gssencmode": "disable", "target_session_attrs": "any",
        }  # fmt: skip
        return await AsyncConnection.connect(make_conninfo("", **parameters), autocommit=True)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a server says of itself."""

    #: A superuser that may log in.
    superuser: str
    #: ``18.6``
    version: str
    #: When the newest transaction that recovery has replayed ended; None if there was none.
    newest_commit: datetime | None
    #: Whether the extension amcheck can be created.
    amcheck: bool


async def look(sockets: Path, port: int, users: Sequence[str]) -> Seen:
    """The first query: any of the roles will do, for all may read who is superuser. Raises SourceError."""
    refused = ""
    for user in dict.fromkeys(users):
        for database in _DATABASES:
            try:
                connection = await Door(sockets, port, user).connect(database)
            except psycopg.OperationalError as error:
                refused = refused or str(error).strip().splitlines()[-1]
                continue
            async with connection:
                return await _see(connection)
    raise SourceError(
        f"the restored server lets none of the roles {', '.join(dict.fromkeys(users))} in: {refused}",
        hint="set POSTGRES_USERNAME to a role that exists in the cluster and may log in",
    )


async def _see(connection: Connection) -> Seen:
    row = await _one(
        connection,
        "select (select rolname from pg_roles where rolsuper and rolcanlogin order by oid limit 1),"
        " current_setting('server_version'), extract(epoch from pg_last_xact_replay_timestamp())::text,"
        " exists (select from pg_available_extensions where name = 'amcheck')",
    )
    if row[0] is None:
        raise SourceError(
            "the restored server has no superuser that may log in", hint="ALTER ROLE … LOGIN gives it one"
        )
    moment = datetime.fromtimestamp(float(row[2]), UTC) if row[2] is not None else None
    return Seen(row[0], str(row[1]).split()[0], moment, amcheck=row[3])


async def _one(connection: Connection, sql: str) -> tuple[Any, ...]:
    row = await (await connection.execute(sql.encode())).fetchone()
    assert row is not None
    return row


class Statements:
    """Runs statements one after the other; those of one database share a session. An asynchronous context manager."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._database = ""
        self._connection: Connection | None = None

    async def ask(self, database: str, sql: str, timeout: float) -> Answer:
        """What the statement gave. Raises psycopg.Error, and TimeoutError if the server does not even cancel it."""
        connection = await self._session(database)
        async with asyncio.timeout(timeout + 30):
            await connection.execute(f"set statement_timeout = {max(1, round(timeout * 1000))}".encode())
            cursor = await connection.execute(sql.encode())
        result = cursor.pgresult
        assert result is not None
        if not result.nfields:
            return Answer()
        value = result.get_value(0, 0) if result.ntuples else None
        text = value.decode("utf-8", "replace") if value is not None else None
        return Answer(result.ntuples, result.nfields, text, boolean=result.ftype(0) == _BOOLEAN)

    async def _session(self, database: str) -> Connection:
        if self._connection is None or self._connection.closed or database != self._database:
            await self.close()
            self._connection = await self._door.connect(database)
            self._database = database
        return self._connection

    async def close(self) -> None:
        """End the session, if there is one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


@dataclass
class Amcheck:
    """What pg_amcheck did."""

    #: 0: nothing found, 2: corruption, anything else: it could not do its work.
    exit_code: int = 0
    relations: int = 0
    pages: int = 0
    #: The first lines that it printed, errors included, and how many more there were.
    lines: list[str] = field(default_factory=list)
    more: int = 0

    def take(self, line: str) -> None:
        """One line of what it says."""
        if match := _PROGRESS.search(line):
            self.relations, self.pages = int(match[2]), int(match[4])
        elif len(self.lines) < _LINES:
            self.lines.append(line.strip())
        else:
            self.more += 1


async def amcheck(
    programs: Programs, door: Door, *, who: RunAs, jobs: int, progress: Callable[[str], None] = lambda _: None
) -> Amcheck:
    """Check tables and B-tree indexes of all databases, and that every row of a table is found in its indexes.

    ``progress`` is told what pg_amcheck says of it, about once a second. Raises SourceError if the installation lacks
    the program. When it is cancelled it ends the program first.
    """
    command = [
        programs.path("pg_amcheck"), "--all", "--install-missing", "--heapallindexed", "--progress", f"--jobs={jobs}",
        "--no-password", f"--host={door.sockets}", f"--port={door.port}", f"--username={door.user}",
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        *command, env={**programs.environment(), "PGOPTIONS": _OPTIONS}, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd="/", start_new_session=True, **who,
    )  # fmt: skip
    found = Amcheck()

    async def read(stream: asyncio.StreamReader | None) -> None:
        assert stream is not None
        async for line in stream:
            text = line.decode("utf-8", "replace")
            found.take(text)
            if _PROGRESS.search(text):
                progress(text.strip())

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(read(process.stdout))
            group.create_task(read(process.stderr))
        found.exit_code = await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return found
