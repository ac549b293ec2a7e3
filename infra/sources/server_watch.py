"""What a WAL sender does not tell: whether commits wait for us, and whether its server wants to shut down.

A server that shuts down waits until all it sent is durable, and says so only by keepalives that ask for an answer.
New connections are told, so a new one is made when something looks like it: keepalives in a burst, or the end of the
connection that looks. That one is also made anew every so often, as a *smart* shutdown waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Protocol

from infra.postgres.connect import Connection, RefusedError, connect
from infra.postgres.control import rows
from infra.settings import Settings
from pipeline.contracts import Clock
from pipeline.errors import SourceError
from pipeline.wal import Lsn

#: Seconds between looks; the first ones follow faster, as commits wait for us only after our first reports.
_PERIOD = 2.0
_FIRST_PERIOD = 0.1
#: Seconds after which the connection is replaced.
_RENEW = 10.0
#: So many keepalives that ask for an answer, at an unchanged end, within so many seconds, are a burst.
_BURST = 5
_BURST_SECONDS = 2.0

_STATE = "select sync_state from pg_stat_replication where pid = %s"


class Told(Protocol):
    """Whoever wants to know whether commits wait for us."""

    def __call__(self, *, synchronous: bool) -> None: ...


class ServerWatch:
    """Beside one stream; ``run`` until cancelled."""

    def __init__(self, settings: Settings, pid: int, *, clock: Clock, synchronous: Told) -> None:
        """``pid`` is that of our WAL sender; ``synchronous`` is told at each look whether commits wait for it."""
        self._settings = settings
        self._pid = pid
        self._clock = clock
        self._tell = synchronous
        self._suspected = asyncio.Event()
        self._asked: deque[float] = deque(maxlen=_BURST)
        self._end = Lsn(0)
        #: When we last looked because of a burst.
        self._probed = -_PERIOD
        #: The server lets nobody in: it shuts down.
        self._closed = False
        #: Since when it waits for us and nobody else, in monotonic seconds; None: it does not.
        self._since: float | None = None

    def asked(self, end: Lsn) -> None:
        """A keepalive that asks for an answer has come; ``end`` as it says."""
        now = self._clock.monotonic()
        if end != self._end:
            self._asked.clear()
        self._end = end
        self._asked.append(now)
        if self._bursting(now) and now - self._probed >= _PERIOD:
            self._probed = now
            self._suspected.set()

    def held_up(self, *, reading: bool) -> float:
        """Seconds for which the server has waited for us alone to shut down; 0 if it does not.

        A *smart* shutdown lets clients work on, for hours: only keepalives in a burst tell that they are gone. Where
        nothing is read no keepalive arrives, but then nothing is lost by leaving either.
        """
        now = self._clock.monotonic()
        if not self._closed or (reading and not self._bursting(now)):
            self._since = None
            return 0.0
        if self._since is None:
            self._since = now
        return now - self._since

    def _bursting(self, now: float) -> bool:
        return len(self._asked) == _BURST and now - self._asked[0] < _BURST_SECONDS

    async def run(self) -> None:
        """Look every two seconds or so, and at once when the server is suspected to shut down."""
        connection: Connection | None = None
        made, pause = 0.0, _FIRST_PERIOD
        try:
            while True:
                now = self._clock.monotonic()
                suspected = self._suspected.is_set()
                self._suspected.clear()
                if connection is not None and (suspected or now - made > _RENEW):
                    await connection.close()
                    connection = None
                if connection is None:
                    connection, made = await self._connect(suspected=suspected), now
                if connection is not None and not await self._look(connection):
                    await connection.close()
                    connection = None
                    self._suspected.set()
                # Not wait_for: before Python 3.12 it swallows a cancel that comes together with the event, as both do
                # when the server dies, and the stream would wait for us for ever.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._suspected.wait()
                pause = min(_PERIOD, pause * 2)
        finally:
            if connection is not None:
                await connection.close()

    async def _connect(self, *, suspected: bool) -> Connection | None:
        try:
            connection = await connect(self._settings)
        except SourceError as error:
            # In whichever language: who asks for answers in a burst and lets nobody in is shutting down.
            down = isinstance(error, RefusedError) and error.state == "57P03"
            self._closed = self._closed or suspected or down
            return None
        self._closed = False
        return connection

    async def _look(self, connection: Connection) -> bool:
        """Ask; False if the connection is gone."""
        try:
            found = await rows(connection, _STATE, (self._pid,))
        except SourceError:
            return False
        if found:
            self._tell(synchronous=found[0][0] in ("sync", "quorum", "potential"))
        return True
