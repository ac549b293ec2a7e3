"""A server that speaks a little S3, as badly as it is told to: what stores and proxies really do at times."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from infra.storage.s3 import S3Store
from infra.storage.s3_client import S3Options

#: Answers one request instead of the server; None lets the server go on.
Fault = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


@dataclass
class LookAlike:
    """Keeps what is PUT, and ignores ``If-None-Match``. Each fault answers one request, in turn."""

    endpoint: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    #: Method and headers of each request.
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def store(self, checksums: str = "when_required") -> S3Store:
        return S3Store(
            S3Options(
                bucket="bucket",
                endpoint=self.endpoint,
                checksums="when_supported" if checksums == "when_supported" else "when_required",
                access_key="me",
                secret_key="very-secret",
            )
        )

    def count(self, method: str) -> int:
        return sum(1 for called, _ in self.requests if called == method)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, dict(request.headers)))
        if self.faults and (response := await self.faults.pop(0)(request)) is not None:
            return response
        key = request.match_info.get("key", "")
        if request.method == "PUT":
            self.objects[key] = await request.read()
            return web.Response(headers={"ETag": '"e"'})
        if not key:
            return web.Response()
        if key not in self.objects:
            return error(404, "NoSuchKey")
        return web.Response(body=self.objects[key], headers={"ETag": '"e"'})


@asynccontextmanager
async def look_alike() -> AsyncIterator[LookAlike]:
    server = LookAlike()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/bucket", server.answer)
    app.router.add_route("*", "/bucket/{key:.*}", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


def error(status: int, code: str, message: str = "so it is") -> web.Response:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")


def answers(status: int, code: str) -> Fault:
    """A fault that reads the request and answers with an error document."""

    async def fault(request: web.Request) -> web.StreamResponse:
        await request.read()
        return error(status, code)

    return fault


async def cuts_the_body(request: web.Request) -> web.StreamResponse:
    """Announces 1000 bytes, sends 500, and hangs up."""
    response = web.StreamResponse(headers={"Content-Length": "1000", "ETag": '"e"'})
    await response.prepare(request)
    await response.write(b"x" * 500)
    assert request.transport is not None
    request.transport.close()
    return response


async def hangs_up(request: web.Request) -> web.StreamResponse | None:
    """Takes the request in, and closes the connection instead of answering."""
    await request.read()
    assert request.transport is not None
    request.transport.close()
    return None


async def without_etag(request: web.Request) -> web.StreamResponse:
    """As a proxy does that says yes to everything."""
    await request.read()
    return web.Response()
