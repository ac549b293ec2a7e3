"""Where Prometheus and health checks ask, ``/metrics`` and ``/healthz``; and people, see ``page``."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import structlog

from infra.monitoring.metrics import Metrics
from infra.monitoring.page import HEADERS, Shown, only_local_names, routes
from infra.settings import listen_address
from pipeline.errors import ConfigError

if TYPE_CHECKING:  # only the service pays for loading it
    from aiohttp import web


#: Connections at a time: what clients leave open is never taken from what stores and server need.
MOST = 100
#: Seconds that one may stay open between two requests. Prometheus comes back after 15 or 60.
_IDLE = 75.0
_TAKEN = "nobody can see this service's metrics: give it a port of its own with WALSHIP_LISTEN"


@asynccontextmanager
async def serving(
    listen: str, metrics: Metrics, *, shown: Shown | None = None, chosen: bool = True
) -> AsyncIterator[None]:
    """Answer on ``listen`` (``host:port``; empty: nowhere) during the ``async with`` block.

    ``shown``: what the status page and ``/readyz`` tell; without it they are not there.

    Unless the address was ``chosen`` by somebody, one that is taken is no error: of several services on one machine the
    first has the default port, and the others say in the log that they serve nothing.

    Without a password: on another address than 127.0.0.1, whoever reaches the port reads the names of the destinations.
    Raises ConfigError if that address cannot be had.
    """
    if not listen:
        yield
        return
    from aiohttp import web

    host, port = listen_address(listen)
    app = web.Application(middlewares=[only_local_names(host)])
    app.add_routes([*_handlers(metrics), *(routes(shown) if shown is not None else ())])
    app.on_response_prepare.append(_sign)
    # A scrape takes milliseconds: who still reads after a second does not hold up the end of the service.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=_IDLE)
    await runner.setup()
    assert runner.server is not None, "it is set up"
    listening: asyncio.Server | None = None
    try:
        try:
            listening = await asyncio.get_running_loop().create_server(_admit(runner.server), host, port, backlog=32)
        except OSError as error:
            if chosen or error.errno != errno.EADDRINUSE:
                raise _refused(listen, error) from None
            log = structlog.get_logger()
            log.warning("not_listening", address=listen, error="another process listens there", hint=_TAKEN)
        else:
            structlog.get_logger().info("listening", address=listen)
        yield
    finally:
        if listening is not None:
            listening.close()
        await runner.cleanup()


def _admit(server: web.Server) -> Callable[[], asyncio.Protocol]:
    """Connections as the server makes them. For one more than ``MOST``, the one that was there first has to go."""

    def connection() -> asyncio.Protocol:
        open_ones = [
            each.transport for each in server.connections if each.transport and not each.transport.is_closing()
        ]
        if len(open_ones) >= MOST:
            open_ones[0].abort()
        return server()

    return connection


async def _sign(_request: web.Request, answer: web.StreamResponse) -> None:
    """What goes with every answer, errors too; and nobody needs to know what it is made with."""
    from aiohttp import hdrs

    answer.headers.update({**HEADERS, hdrs.SERVER: "walship"})


def _handlers(metrics: Metrics) -> list[web.RouteDef]:
    from aiohttp import hdrs, web

    async def page(request: web.Request) -> web.Response:
        body, content_type = metrics.page(request.headers.get(hdrs.ACCEPT, ""))
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})

    async def health(_request: web.Request) -> web.Response:
        """That the service's loop turns. A store or a server that is away is no reason to kill it."""
        return web.Response(text="ok\n")

    return [web.get("/metrics", page), web.get("/healthz", health)]


def _refused(listen: str, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"WALSHIP_LISTEN is {listen}, and another process listens there",
            hint="choose another port, or find the other one with: ss -ltnp",
        )
    if error.errno == errno.EACCES:
        return ConfigError(f"WALSHIP_LISTEN is {listen}: no right to listen there", hint="choose a port above 1023")
    return ConfigError(
        f"WALSHIP_LISTEN is {listen}: {error.strerror}", hint="it is an address of this machine, most often 127.0.0.1"
    )
