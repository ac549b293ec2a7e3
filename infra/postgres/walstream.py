"""The WAL as it is written: COPY BOTH of the streaming replication protocol, without ever blocking.

Source: PostgreSQL documentation, "Streaming Replication Protocol", START_REPLICATION.

    while True:
        while (message := stream.take()) is not None: …      what has arrived; WalData, Keepalive, TimelineEnded
        await stream.wait(wake, reading=…, seconds=…)        until more has arrived, or something else is to be done
        await stream.report(durable, now=…)                  often enough that the server does not give up on us

The socket is watched by one reader that stays registered as long as the caller keeps up; it takes nothing unless the
caller is in ``wait(reading=True)``, so at most one buffer of libpq (some 256 KB) is held here at any time.
"""

from __future__ import annotations

import asyncio
import select
import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self, TypeAlias

import psycopg
from psycopg.pq import ConnStatus, ExecStatus

from infra.postgres.connect import FETCH_NAME
from infra.postgres.replication import ReplicationConnection, lost, rows_of
from infra.settings import Settings
from pipeline.errors import SourceError
from pipeline.wal import Lsn, WalFile

#: XLogData behind its letter: start, end of the server's WAL, its clock.
_DATA = struct.Struct(">QQq")
_DATA_HEADER = 1 + _DATA.size
#: Keepalive behind its letter: end of the server's WAL, its clock, whether it wants an answer at once.
_KEEPALIVE = struct.Struct(">QqB")
#: Standby status update: written, flushed, applied, our clock, whether we want an answer.
_STATUS = struct.Struct(">cQQQqB")

#: PostgreSQL counts microseconds from here.
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class WalData:
    """A piece of WAL, up to 128 KB; pieces follow one another without a gap."""

    #: Position of its first byte.
    start: Lsn
    #: End of the WAL on the server when it sent this.
    server_end: Lsn
    #: Valid until the next ``take``.
    data: memoryview


@dataclass(frozen=True, slots=True)
class Keepalive:
    """The server lives. ``server_end`` is how far it has *sent*, which is all of its WAL once we have caught up."""

    server_end: Lsn
    #: It closes the connection unless it gets a report soon.
    reply_requested: bool


@dataclass(frozen=True, slots=True)
class TimelineEnded:
    """All of this timeline has been sent; the stream is over, and its connection is good for another command."""

    next_timeline: int
    #: First byte of the next timeline: the old one ends here.
    fork: Lsn


Message: TypeAlias = WalData | Keepalive | TimelineEnded


class WalStream:
    """One START_REPLICATION. Owns the use of the connection, not the connection: close both.

    ``take`` and ``wait`` raise SourceError when the connection is lost, RefusedError (``state``: SQLSTATE) when the
    server ended the stream with an error: 58P01 the WAL is removed, XX000 it was asked for what it does not have. What
    arrived before is handed out first. After an error only ``close`` is allowed.
    """

    def __init__(self, connection: ReplicationConnection) -> None:
        self._connection = connection
        self._conn = connection.pgconn
        self._descriptor = self._conn.socket
        self._loop = asyncio.get_running_loop()
        #: Set while ``wait`` waits; None: nobody would take what is read.
        self._waiter: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._watched: asyncio.Event | None = None
        self._reader = self._writer = False
        #: Looked at already by ``wait``, handed out by the next ``take``.
        self._held: Message | None = None
        self._copy_ended = False
        self._over = False
        self._failure: SourceError | None = None
        #: The newest report that libpq has not been given yet.
        self._report: bytes | None = None

    @classmethod
    async def start(
        cls, connection: ReplicationConnection, *, slot: str | None, timeline: int, lsn: Lsn
    ) -> Self | TimelineEnded:
        """Ask for the WAL of ``timeline`` from ``lsn`` on; TimelineEnded at once if that is exactly where it ended.

        Raises RefusedError: 55006 the slot is in use, 42704 there is none, 55000 it is lost (18), XX000 ``lsn`` is not
        in this server's history of that timeline. That the WAL is removed (58P01), or not written yet (XX000), is said
        only *after* the start, by ``take`` and ``wait``.
        """
        by = f'SLOT "{slot}" ' if slot is not None else ""
        await connection.send(f"START_REPLICATION {by}PHYSICAL {lsn} TIMELINE {timeline:d}")
        result = await connection.result()
        if result is None or result.status != ExecStatus.COPY_BOTH:
            ended = _next_timeline(rows_of(result)) if result is not None else None
            while await connection.result() is not None:
                pass
            if ended is None:
                raise SourceError(f"PostgreSQL did not start to send WAL from {lsn}", hint="see the server's log")
            return ended
        return cls(connection)

    def take(self) -> Message | None:
        """What has arrived, without waiting; None if there is nothing right now: then ``wait``.

        TimelineEnded is the last there is. It comes after a ``wait``, which has completed the end with the server.
        """
        message, self._held = self._held, None
        if message is None:
            message = self._next()
        if message is None and self._failure is not None and not self._copy_ended:
            raise self._failure
        return message

    async def wait(self, wake: asyncio.Event, *, reading: bool, seconds: float) -> None:
        """Until there may be something to ``take`` (only if ``reading``), ``wake`` is set, or ``seconds`` have passed.

        May return early. With ``reading=False`` nothing is taken from the socket: the server stops sending when its and
        our kernel's buffers are full, and nothing piles up here. A connection that is closed is noticed all the same,
        as SourceError (where the buffers are full: once a ``report`` was sent that nobody took); what was not read by
        then is given up.
        """
        self._listen(reading)
        if reading:
            self._fill()
        elif self._failure is None and not self._copy_ended and _hung_up(self._descriptor):
            raise lost("the server closed it")
        if self._copy_ended and not self._over:
            self._held = await self._finish()
        if self._held is None and self._failure is not None:
            raise self._failure
        self._waiter = self._loop.create_future()
        try:
            if wake.is_set() or (self._held is not None and (reading or self._over)):
                await asyncio.sleep(0)  # whoever calls us in a loop must not keep the others out
                return
            self._watch(wake)
            timer = self._loop.call_later(seconds, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
        finally:
            self._waiter = None

    async def report(self, flush: Lsn, *, now: datetime, ask: bool = False) -> None:
        """Tell the server that everything before ``flush`` is durable: it may release commits, and forget that WAL.

        Written and flushed are one to us; applied is never reported. ``flush`` 0: we live, and say nothing of
        positions. ``ask``: the server shall answer with a Keepalive at once. Never waits, and never raises for the
        connection's sake: while the socket takes nothing, only the newest report is kept, and goes out when it can.
        """
        stamp = int((now - _EPOCH).total_seconds() * 1_000_000)
        self._report = _STATUS.pack(b"r", flush, flush, 0, stamp, ask)
        self._push()

    async def close(self) -> None:
        """Stop watching the socket. Idempotent; the connection is the caller's to close."""
        self._deafen()
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = self._watched = None

    # -- in

    def _next(self) -> Message | None:
        """The next message of the copy that libpq holds whole."""
        if self._copy_ended:
            return None
        try:
            size, message = self._conn.get_copy_data(1)
        except psycopg.Error as error:
            self._fail(error)
            return None
        if size < 0:
            self._copy_ended = True
            return None
        if size == 0:
            return None
        kind = message[0]
        if kind == 0x77:  # w
            start, end, _ = _DATA.unpack_from(message, 1)
            return WalData(Lsn(start), Lsn(end), message[_DATA_HEADER:])
        if kind == 0x6B:  # k
            end, _, asked = _KEEPALIVE.unpack_from(message, 1)
            return Keepalive(Lsn(end), bool(asked))
        raise SourceError(f"PostgreSQL sent a replication message of an unknown kind: {kind:#04x}")

    def _fill(self) -> None:
        """Read what the socket holds, and look at the first message of it.

        Never left to the reader alone: with TLS, libpq may have read more from the socket than fitted into its buffer,
        and the event loop would not be told of the rest. Nothing is left there once a read has not completed a message.
        """
        if self._held is None:
            self._held = self._next()
        if self._held is None and not self._copy_ended and self._failure is None:
            self._consume()
            self._held = self._next()

    def _consume(self) -> None:
        try:
            self._conn.consume_input()
        except psycopg.Error as error:
            self._fail(error)

    def _readable(self) -> None:
        if self._waiter is None:
            self._loop.remove_reader(self._descriptor)  # nobody takes anything: until the next wait
            self._reader = False
            return
        self._consume()
        self._wake()

    def _listen(self, reading: bool) -> None:  # noqa: FBT001 - it is the parameter of ``wait``
        if reading == self._reader or self._failure is not None or self._over:
            return
        if reading:
            self._loop.add_reader(self._descriptor, self._readable)
        else:
            self._loop.remove_reader(self._descriptor)
        self._reader = reading

    async def _finish(self) -> TimelineEnded:
        """The server has ended the copy: find out why. What it said before it left counts, not that it left."""
        self._deafen()  # the connection itself waits from here on
        self._over = True
        result = await self._connection.result()
        if result is not None and result.status == ExecStatus.COPY_IN:
            try:
                self._conn.put_copy_end()
            except psycopg.Error as error:
                raise lost(error) from None
            ended: TimelineEnded | None = None
            while (result := await self._connection.result()) is not None:
                ended = ended or _next_timeline(rows_of(result))
            if ended is not None:
                return ended
        raise SourceError(
            "PostgreSQL ended the stream of WAL: it is shutting down", hint="the stream goes on when it is up again"
        )

    # -- out

    def _push(self) -> None:
        """Send what is unsent, as far as the socket takes it."""
        try:
            unsent = self._conn.flush()
            if not unsent and self._report is not None:
                report, self._report = self._report, None
                self._conn.put_copy_data(report)
                unsent = self._conn.flush()
        except psycopg.Error as error:
            self._fail(error)
            return
        if self._conn.status != ConnStatus.OK:
            # libpq has closed the socket; why, it tells when it is read from next.
            self._deafen()
            self._consume()
            self._wake()
        elif bool(unsent) != self._writer:
            self._writer = bool(unsent)
            if unsent:
                self._loop.add_writer(self._descriptor, self._push)
            else:
                self._loop.remove_writer(self._descriptor)

    # -- the event loop

    def _watch(self, wake: asyncio.Event) -> None:
        """One task for as long as the event stays unset, not one for each wait."""
        if self._watcher is not None:
            if self._watcher.done():
                self._watcher.result()
            elif self._watched is wake:
                return
            else:
                self._watcher.cancel()

        async def watch() -> None:
            await wake.wait()
            self._wake()

        self._watched, self._watcher = wake, self._loop.create_task(watch())

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: psycopg.Error) -> None:
        if self._failure is None:
            self._failure = lost(error)
        # libpq has closed the socket: its number may soon be another's.
        self._deafen()
        self._wake()

    def _deafen(self) -> None:
        if self._reader:
            self._loop.remove_reader(self._descriptor)
        if self._writer:
            self._loop.remove_writer(self._descriptor)
        self._reader = self._writer = False


async def fetch_segment(settings: Settings, file: WalFile, segment_size: int, *, timeout: float = 60.0) -> bytearray:
    """The bytes of one finished segment. See ``fetch_part``."""
    return await fetch_part(settings, file, segment_size, segment_size, timeout=timeout)


async def fetch_part(
    settings: Settings, file: WalFile, segment_size: int, length: int, *, timeout: float = 60.0
) -> bytearray:
    """The first ``length`` bytes of a segment, by a connection of its own and without a slot.

    Raises RefusedError (58P01: the server has removed it), SourceError if the server's WAL or the timeline ends inside
    them, if it takes longer than ``timeout`` seconds, or if the connection breaks.
    """
    part = bytearray()
    start = file.start(segment_size)
    try:
        async with (
            asyncio.timeout(timeout),
            await ReplicationConnection.open(settings, application_name=FETCH_NAME) as connection,
        ):
            server = await connection.identify_system()
            if server.lsn < start + length:
                raise SourceError(
                    f"the WAL of PostgreSQL at {connection.place} ends at {server.lsn}, and segment {file.name} is"
                    f" asked for up to {start + length}",
                    hint="was it rolled back to an older state than the stored one, or is it an old clone?",
                    lasting=True,
                )
            stream = await WalStream.start(connection, slot=None, timeline=file.timeline, lsn=start)
            if isinstance(stream, TimelineEnded):
                raise _ends_in(file, stream)
            never = asyncio.Event()
            try:
                while len(part) < length:
                    message = stream.take()
                    if message is None:
                        await stream.wait(never, reading=True, seconds=timeout)
                    elif isinstance(message, TimelineEnded):
                        raise _ends_in(file, message)
                    elif isinstance(message, WalData):
                        part += message.data[: length - len(part)]
            finally:
                await stream.close()
    except TimeoutError:
        raise SourceError(
            f"PostgreSQL sent {len(part)} of {length} bytes of segment {file.name} in {timeout:g} seconds",
            hint="if its WAL ends there, it was rolled back to an older state than the stored one",
        ) from None
    return part


def _ends_in(file: WalFile, ended: TimelineEnded) -> SourceError:
    return SourceError(f"timeline {file.timeline} ended at {ended.fork}, inside or before segment {file.name}")


def _next_timeline(rows: list[tuple[str | None, ...]]) -> TimelineEnded | None:
    """The row that ends a timeline: the next one, and where it begins."""
    for row in rows:
        if len(row) >= 2 and row[0] and row[1]:
            return TimelineEnded(int(row[0]), Lsn.parse(row[1]))
    return None


def _hung_up(descriptor: int) -> bool:
    """Whether the other side has closed the connection, without reading what it sent before."""
    poll = select.poll()
    poll.register(descriptor, getattr(select, "POLLRDHUP", 0))  # only Linux can tell; others notice when they report
    return bool(poll.poll(0))
