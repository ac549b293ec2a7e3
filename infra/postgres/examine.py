"""Looks at a restored server through a private socket: who is superuser, its newest commit, pg_amcheck, and statements.

Nothing here is for a server that anybody needs: an extension is created in each of its databases.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import psycopg
from psycopg import AsyncConnection, AsyncCursor
from psycopg.conninfo import make_conninfo

from handlers.check_file import Answer
from infra.postgres.processes import RunAs
from infra.postgres.programs import Programs
from pipeline.errors import SourceError

Connection: TypeAlias = AsyncConnection[tuple[Any, ...]]
Cursor: TypeAlias = AsyncCursor[tuple[Any, ...]]

#: Settings of a role or a database would win over the server's command line; what a client brings wins over both.
_OPTIONS = "-c statement_timeout=0 -c lock_timeout=0 -c idle_session_timeout=0 -c default_transaction_read_only=off"
_PROGRESS = re.compile(r"(\d+)/(\d+) relations \(\s*\d+%\),\s*(\d+)/(\d+) pages")
#: Lines of pg_amcheck that are kept.
_LINES = 20
#: Databases that every cluster has, unless somebody dropped them.
_DATABASES = ("postgres", "template1")
_BOOLEAN = 16
#: Seconds beside a statement's own for the server to end it.
_GRACE = 2.0
#: Seconds in which a server is back after a crash of its own.
_BACK = 30.0
#: What it says until then: refused, or let in by a server that was ending already.
_RESTARTING = ("the database system is", "terminating connection", "closed the connection", "the connection is")
#: Bytes of a value that is not even looked at.
_LONG = 1 << 20


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
        #: Of the server's process that it talks to.
        self._pid = 0

    async def ask(self, database: str, sql: str, timeout: float) -> Answer:
        """What the statement gave. Raises psycopg.Error, and TimeoutError if it does not end when it is cancelled."""
        limit = f"set statement_timeout = {max(1, round(timeout * 1000))}".encode()
        connection = await self._ready(database, limit)
        cursor = await self._bounded(connection.execute(sql.encode()), timeout)
        result = cursor.pgresult
        assert result is not None
        if not result.nfields:
            return Answer()
        value = result.get_value(0, 0) if result.ntuples else None
        if value is not None and len(value) > _LONG:
            return Answer(result.ntuples, result.nfields, long=len(value))
        text = value.decode("utf-8", "replace") if value is not None else None
        return Answer(result.ntuples, result.nfields, text, boolean=result.ftype(0) == _BOOLEAN)

    async def _bounded(self, answer: Awaitable[Cursor], timeout: float) -> Cursor:
        """PostgreSQL ends a statement after ``timeout`` seconds. One that catches that is ended with its session."""
        ended = False

        def end() -> None:
            nonlocal ended
            ended = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)

        loop = asyncio.get_running_loop()
        last = loop.call_later(timeout + _GRACE, end)
        try:
            # And what does not even hear a signal, a program that it waits for, is waited for no more.
            async with asyncio.timeout(timeout + 2 * _GRACE):
                return await answer
        except psycopg.Error:
            if ended:
                raise TimeoutError from None
            raise
        finally:
            last.cancel()

    async def _ready(self, database: str, limit: bytes) -> Connection:
        """What was asked before may have ended this session, or all of them: the server is back in a moment."""
        deadline = time.monotonic() + _BACK
        while True:
            try:
                connection = await self._session(database)
                await connection.execute(limit)
            except psycopg.OperationalError as error:
                await self.close()
                if time.monotonic() > deadline or not any(words in str(error) for words in _RESTARTING):
                    raise
            else:
                return connection
            await asyncio.sleep(0.1)

    async def _session(self, database: str) -> Connection:
        if self._connection is None or self._connection.closed or database != self._database:
            await self.close()
            self._connection = await self._door.connect(database)
            self._pid = self._connection.info.backend_pid
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
