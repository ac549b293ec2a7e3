"""A TCP proxy on 127.0.0.1 between the service and a server: adds latency, cuts connections, plays dead or overloaded.

It passes bytes as they are, so a store sees the Host header that the client has signed, and the signature holds. It
runs in a thread of its own; everything here may be called from any thread.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Self, TypeVar
from urllib.parse import urlsplit

_T = TypeVar("_T")

_PIECE = 256 << 10
_BUSY = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>'
)
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)


class Mode(Enum):
    """What becomes of connections. A change cuts those that are open, but for one from or to ``STALL``."""

    PASS = "pass"
    #: A connection is reset as soon as it is made.
    DOWN = "down"
    #: Every HTTP request is answered ``503 SlowDown``.
    BUSY = "busy"
    #: Connections stay open, and nothing comes through; it does once they pass again.
    STALL = "stall"


@dataclass(slots=True)
class Request:
    """One HTTP request that was seen; times in monotonic seconds, at the client's side of the proxy."""

    method: str
    path: str
    #: Its first byte came from the client.
    began: float
    #: The last byte of its answer went to the client, or it was cut; None while it is under way.
    ended: float | None = None
    #: Cut, or refused by us.
    failed: bool = False

    @property
    def seconds(self) -> float | None:
        """What an answered request took."""
        return None if self.ended is None or self.failed else self.ended - self.began


@dataclass(slots=True, eq=False)
class _Connection:
    """Both ends, and the request that is under way on it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    request: Request | None = None

    def reset(self) -> None:
        _reset(self.client)
        _reset(self.server)


class Proxy:
    """Listens from ``__enter__`` or ``start`` on; ``close`` ends the thread. ``port`` is where.

    ``to_client`` and ``to_server``: seconds by which every byte of that direction is delayed, without making the way
    any narrower. For HTTP, ``to_client`` is what each request takes longer.
    ``http``: note the requests that pass, one after the other on each connection, in ``requests``; and those whose path
    holds ``held`` are not passed on: their connections hang.
    """

    def __init__(self, port: int, *, to_client: float = 0.0, to_server: float = 0.0, http: bool = False) -> None:
        """``port``: of the server, on 127.0.0.1."""
        self.target = port
        self.to_client = to_client
        self.to_server = to_server
        self.requests: list[Request] = []
        self.held = ""
        self._http = http
        self._mode = Mode.PASS
        self._open = asyncio.Event()
        self._connections: set[_Connection] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self.port = 0

    # -- what tests say

    def start(self) -> None:
        self._thread.start()
        if not self._ready.wait(30):
            raise RuntimeError("the proxy did not start")

    def close(self) -> None:
        """Cut everything and end; idempotent."""
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(30)

    @property
    def mode(self) -> Mode:
        return self._mode

    def turn(self, mode: Mode) -> None:
        """Change the mode; on return it holds, and the open connections are cut if the change wants that."""
        self._do(lambda: self._turn(mode))

    def renewed_since(self, moment: float) -> bool:
        """Whether a lease was written whose PUT began later than that, in monotonic seconds."""
        return any(
            put.method == "PUT" and "/lease/" in put.path and put.began > moment and put.seconds is not None
            for put in self.requests
        )

    def cut(self) -> int:
        """Reset all connections; how many there were."""
        return self._do(self._cut)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- in the thread

    def _do(self, action: Callable[[], _T]) -> _T:
        async def act() -> _T:
            return action()

        assert self._loop is not None, "the proxy has not been started"
        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(30)

    def _turn(self, mode: Mode) -> None:
        if Mode.STALL not in (mode, self._mode):
            self._cut()
        self._mode = mode
        if mode is Mode.STALL:
            self._open.clear()
        else:
            self._open.set()

    def _cut(self) -> int:
        count = len(self._connections)
        for connection in self._connections:
            connection.reset()
        return count

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._open.set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_PIECE)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        self._cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._open.wait()
            if self._mode is Mode.DOWN:
                _reset(writer)
            elif self._mode is Mode.BUSY:
                await self._refuse(reader, writer)
            else:
                await self._pass(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            _reset(writer)  # cancelled: the loop ends

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read a request whole, or the answer would be lost with the reset, and have the client connect anew."""
        head = await reader.readuntil(b"\r\n\r\n")
        if length := _LENGTH.search(head):
            await reader.readexactly(int(length[1]))
        elif b"chunked" in head.lower():
            await reader.readuntil(b"0\r\n\r\n")
        now = time.monotonic()
        self.requests.append(Request(*_line(head), began=now, ended=now, failed=True))
        body = b"" if head.startswith(b"HEAD ") else _BUSY
        writer.write(
            b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(_BUSY), body)
        )
        await writer.drain()
        writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self.target, limit=_PIECE)
        connection = _Connection(writer, to_server)
        if self._mode not in (Mode.PASS, Mode.STALL):  # turned while we connected
            connection.reset()
            return
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._way(reader, to_server, lambda: self.to_server, connection))
                group.create_task(self._way(from_server, writer, lambda: self.to_client, connection))
            to_server.close()
            writer.close()
        except* OSError:
            connection.reset()
        finally:
            self._connections.discard(connection)
            if (request := connection.request) is not None and request.ended is None:
                request.ended, request.failed = time.monotonic(), True

    async def _way(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: Callable[[], float],
        connection: _Connection,
    ) -> None:  # fmt: skip
        """One direction: what was read at t is written at t + delay, and the end likewise."""
        # Bounded: a reader that is slow slows down its writer, as it would without us.
        waiting = asyncio.Queue[tuple[float, bytes]](64)

        async def take() -> None:
            data = b"-"
            while data:
                data = await reader.read(_PIECE)
                if writer is connection.server:
                    self._asked(connection, data)
                    if self.held and connection.request and self.held in connection.request.path:
                        await self._stop.wait()
                await waiting.put((time.monotonic() + delay(), data))

        async def deliver() -> None:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(due - time.monotonic())
                await self._open.wait()
                if not data:
                    writer.write_eof()
                    return
                if writer is connection.client:
                    self._told(connection)
                writer.write(data)
                await writer.drain()

        await asyncio.gather(take(), deliver())

    def _asked(self, connection: _Connection, data: bytes) -> None:
        if self._http and data and (connection.request is None or connection.request.ended is not None):
            connection.request = Request(*_line(data), began=time.monotonic())
            self.requests.append(connection.request)

    def _told(self, connection: _Connection) -> None:
        if connection.request is not None:
            connection.request.ended = time.monotonic()


def _line(head: bytes) -> tuple[str, str]:
    """Method and path of a request."""
    method, _, rest = head.partition(b" ")
    return method.decode("latin-1"), urlsplit(rest.partition(b" ")[0].decode("latin-1")).path


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection so that the other side notices at once, and nothing more arrives there."""
    connected: socket.socket | None = writer.get_extra_info("socket")
    if connected is not None and not writer.is_closing():
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
