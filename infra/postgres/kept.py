"""One connection for all who look at the server again and again: each of theirs would be a new process there.

It is given up after a minute, and made anew when it is wanted next: a smart shutdown waits for every client, and a
password, a right or a name that has changed is noticed by new connections only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from infra.postgres.connect import Connection, connect
from infra.postgres.control import rows
from infra.settings import Settings
from pipeline.contracts import Clock
from pipeline.errors import SourceError

#: Seconds that one is kept.
LIFE = 60.0
#: Seconds that a look may take, the wait for others included.
PATIENCE = 15.0


class Kept:
    """``async with Kept(...)``; nothing is connected before somebody looks."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._turn = asyncio.Lock()
        self._connection: Connection | None = None
        self._since = 0.0

    @asynccontextmanager
    async def lent(self) -> AsyncIterator[Connection]:
        """A connection that works, for one look; one borrower at a time.

        Raises SourceError if there is none, or the look with it takes longer than ``PATIENCE``.
        """
        try:
            async with asyncio.timeout(PATIENCE), self._turn:
                connection = await self._working()
                try:
                    yield connection
                except BaseException:
                    await self._leave()  # in the midst of an answer, perhaps: nobody else would understand the rest
                    raise
                if self._clock.monotonic() - self._since > LIFE:
                    await self._leave()
        except TimeoutError:
            host, port = self._settings.servers[0]
            raise SourceError(
                f"PostgreSQL at {host}:{port} did not answer within {PATIENCE:.0f} s",
                hint="is it overloaded, or stopped in the midst of its work?",
            ) from None

    async def _working(self) -> Connection:
        if self._connection is not None:
            try:
                await rows(self._connection, "select 1")  # a restart, or somebody who ended it, is no failed look
            except SourceError:
                await self._leave()
        if self._connection is None:
            self._connection, self._since = await connect(self._settings), self._clock.monotonic()
        return self._connection

    async def _leave(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave()
