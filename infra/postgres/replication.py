"""The replication protocol, as far as it is not about WAL: commands, their rows, and a COPY that comes from the server.

Source: PostgreSQL documentation, "Streaming Replication Protocol". Nothing here blocks: libpq's blocking calls hold the
GIL for as long as they wait, in whichever thread, so every wait is the event loop's, on the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

import psycopg
from psycopg.pq import DiagnosticField, ExecStatus
from psycopg.pq.abc import PGconn, PGresult

from infra.postgres.connect import BACKUP_NAME, Connection, RefusedError, connect, place
from infra.settings import Settings
from pipeline.contracts import Buffer
from pipeline.errors import SourceError
from pipeline.wal import Lsn

#: One row of a simple query: text as the server writes it.
Row: TypeAlias = tuple[str | None, ...]

#: Reads of a COPY between which nobody else has a turn: about a millisecond's work.
_TURN = 16
_OF_COPY = (ExecStatus.COPY_OUT, ExecStatus.COPY_IN, ExecStatus.COPY_BOTH)


@dataclass(frozen=True, slots=True)
class SystemIdentity:
    """The answer to IDENTIFY_SYSTEM."""

    #: Decimal digits.
    system_id: str
    timeline: int
    #: End of what is flushed, on a standby end of what is replayed or received.
    lsn: Lsn


class ReplicationConnection:
    """One command at a time. After any error but RefusedError it is of no use: close it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._conn: PGconn = connection.pgconn

    @classmethod
    async def open(cls, settings: Settings, *, application_name: str = BACKUP_NAME) -> Self:
        """Connect. Raises SourceError with what to do: see ``connect``."""
        return cls(await connect(settings, replication=True, application_name=application_name))

    async def close(self) -> None:
        """Leave at once; a command under way ends on the server as soon as it tries to send. Idempotent."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def place(self) -> str:
        """Which of the servers it is: ``host:port``."""
        return place(self._connection)

    @property
    def pgconn(self) -> PGconn:
        """For whoever goes on by himself after a COPY BOTH has begun: see ``walstream``."""
        return self._conn

    @property
    def server_version(self) -> int:
        """As ``server_version_num`` says it: 170011."""
        return self._conn.server_version

    def warned(self, hear: Callable[[str], None]) -> None:
        """``hear`` is told of what the server warns of, in its words."""
        self._connection.add_notice_handler(
            lambda said: hear(said.message_primary or "") if said.severity_nonlocalized == "WARNING" else None
        )

    async def identify_system(self) -> SystemIdentity:
        """Ask who the server is."""
        row = (await self.rows("IDENTIFY_SYSTEM"))[0]
        system_id, timeline, lsn = row[0], row[1], row[2]
        assert system_id is not None
        assert timeline is not None
        assert lsn is not None
        return SystemIdentity(system_id, int(timeline), Lsn.parse(lsn))

    async def show(self, setting: str) -> str:
        """The value of a setting: ``16MB``."""
        return (await self.rows(f"SHOW {setting}"))[0][0] or ""

    async def timeline_history(self, timeline: int) -> bytes:
        """The history file of a timeline that the server is on or came from, as the bytes that it would archive.

        SourceError if it has none (58P01), as timeline 1 never has.
        """
        await self.send(f"TIMELINE_HISTORY {timeline:d}")
        content: bytes | None = None
        while (result := await self.result()) is not None:
            if result.ntuples:
                content = result.get_value(0, 1)  # raw: the reason in it may be of any encoding
        if content is None:
            raise SourceError(
                f"PostgreSQL did not send the history of timeline {timeline}", hint="see the server's log"
            )
        return content

    async def rows(self, command: str) -> list[Row]:
        """Run a command that answers with rows, or with none. All of its result sets, joined."""
        await self.send(command)
        found: list[Row] = []
        while (result := await self.result()) is not None:
            found += rows_of(result)
        return found

    async def send(self, command: str) -> None:
        """Send a command; its results are then taken one by one with ``result``."""
        try:
            self._conn.send_query(command.encode())
            while self._conn.flush():
                await self._writable()
        except psycopg.Error as error:
            raise lost(error) from None

    async def result(self) -> PGresult | None:
        """The next result of the command; None when it is complete. SourceError if it failed."""
        result = await self._next()
        if result is None or result.status not in (ExecStatus.FATAL_ERROR, ExecStatus.BAD_RESPONSE):
            return result
        error = _refused(result)
        # Take what is left of the command, so that the connection is good for another; if it breaks, this error counts.
        with contextlib.suppress(SourceError):
            while await self._next() is not None:
                pass
        raise error

    async def copy_out(self) -> AsyncIterator[memoryview]:
        """The messages of a COPY that ``result`` has announced; then go on with ``result``, which tells how it ended.

        Reads from the socket only when asked for more: a slow consumer slows the server down, and nothing piles up.
        """
        taken = 0
        while True:
            try:
                size, message = self._conn.get_copy_data(1)
                if size == 0:
                    # First what is there already: to watch the socket for each message costs more than to read it.
                    self._conn.consume_input()
                    size, message = self._conn.get_copy_data(1)
                    if size == 0:
                        await self._readable()
                        continue
                    taken += 1
                    if taken % _TURN == 0:
                        await asyncio.sleep(0)
            except psycopg.Error as error:
                raise lost(error) from None
            if size < 0:
                return
            yield message

    async def copy_in(self, data: Buffer, piece: int = 1 << 20) -> None:
        """Send the data of a COPY that ``result`` has announced; then go on with ``result``."""
        view = memoryview(data)
        try:
            for at in range(0, len(view), piece):
                while not self._conn.put_copy_data(bytes(view[at : at + piece])):
                    await self._writable()
                while self._conn.flush():
                    await self._writable()
            while not self._conn.put_copy_end():
                await self._writable()
            while self._conn.flush():
                await self._writable()
        except psycopg.Error as error:
            raise lost(error) from None

    async def _next(self) -> PGresult | None:
        try:
            while self._conn.is_busy():
                # Before the wait, too: with TLS, libpq may hold back bytes that the socket no longer tells of.
                self._conn.consume_input()
                if self._conn.is_busy():
                    await self._readable()
            return self._conn.get_result()
        except psycopg.Error as error:
            raise lost(error) from None

    async def _readable(self) -> None:
        """Wait until the server has sent something, or is gone. Registered only while waiting: see ``copy_out``."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        descriptor = self._conn.socket
        loop.add_reader(descriptor, _set, ready)
        try:
            await ready
        finally:
            loop.remove_reader(descriptor)

    async def _writable(self) -> None:
        """Wait until the server takes more. It may have to be read from first, or both sides wait for each other."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        descriptor = self._conn.socket
        loop.add_reader(descriptor, _set, ready)
        loop.add_writer(descriptor, _set, ready)
        try:
            await ready
        finally:
            loop.remove_writer(descriptor)
            loop.remove_reader(descriptor)
        self._conn.consume_input()


def lost(error: psycopg.Error | str) -> SourceError:
    """The connection is gone, with libpq's words for it."""
    words = " ".join(str(error).split())
    return SourceError(
        f"the replication connection to PostgreSQL broke: {words}",
        hint="the server's log tells whether it was stopped, crashed or closed the connection",
    )


def rows_of(result: PGresult) -> list[Row]:
    """All rows of a result; none if it is no result set."""
    if result.status in _OF_COPY:
        raise SourceError("PostgreSQL began a COPY where rows were expected", hint="this is a defect of walship")
    return [
        tuple(
            None if (value := result.get_value(row, column)) is None else value.decode("utf-8", "replace")
            for column in range(result.nfields)
        )
        for row in range(result.ntuples)
    ]


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _refused(result: PGresult) -> RefusedError:
    """The server's own words and SQLSTATE."""

    def said(field: DiagnosticField) -> str:
        return (result.error_field(field) or b"").decode("utf-8", "replace")

    primary = said(DiagnosticField.MESSAGE_PRIMARY) or result.get_error_message()
    detail, hint = said(DiagnosticField.MESSAGE_DETAIL), said(DiagnosticField.MESSAGE_HINT)
    state = said(DiagnosticField.SQLSTATE)
    words = f"{primary.strip()} ({state})" if state else primary.strip()
    return RefusedError(f"PostgreSQL refused: {words}" + (f": {detail}" if detail else ""), state=state, hint=hint)
