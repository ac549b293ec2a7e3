"""The status page and what it shows: ``/``, ``/api/status``, ``/readyz``. Read-only; it fetches nothing from elsewhere.

The page is one answer: its style and its script stand in it, and the policy that comes with it names them by their
hashes. So even a name in the repository that looks like markup could run nothing.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # only the service pays for loading it
    from aiohttp import web
    from aiohttp.typedefs import Middleware

#: Sent with everything that is answered.
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Shown(Protocol):
    """Who knows how things stand. Both answer at once, from what is known."""

    def api(self) -> bytes:
        """JSON."""
        ...

    def not_ready(self) -> str:
        """Why nothing is shipped; empty if it is."""
        ...


def routes(shown: Shown) -> list[web.RouteDef]:
    """What people and health checks ask for."""
    from aiohttp import hdrs, web

    html, policy = compose()

    async def page(_request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": policy, "X-Frame-Options": "DENY"}
        return web.Response(text=html, content_type="text/html", headers=headers)

    async def status(_request: web.Request) -> web.Response:
        return web.Response(body=shown.api(), headers={hdrs.CONTENT_TYPE: "application/json"})

    async def ready(_request: web.Request) -> web.Response:
        """Whether it ships. What only a person can mend (a hole, no backup) does not count: see ``/api/status``."""
        why = shown.not_ready()
        return web.Response(text=f"{why or 'ok'}\n", status=503 if why else 200)

    return [web.get("/", page), web.get("/api/status", status), web.get("/readyz", ready)]


def compose() -> tuple[str, str]:
    """The page, and the Content-Security-Policy that lets it do what it does and nothing else."""
    folder = files("infra.monitoring")
    names = ("page.html", "page.css", "moments.js", "page.js")
    html, style, moments, script = (folder.joinpath(name).read_text("utf-8") for name in names)
    script = moments + script
    page = html.replace("/*style*/", style).replace("/*script*/", script)
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; connect-src 'self'; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def only_local_names(host: str) -> Middleware:
    """Where only this machine is listened to, answer no one who came by a name of the outside.

    A page of anywhere may give its own name the address 127.0.0.1, and would then read ours as its own (DNS
    rebinding). On other addresses whoever reaches the port may read, by whatever name.
    """
    from aiohttp import web

    local = host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)

    @web.middleware
    async def check(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        name = _bare(request.headers.get("Host", ""))
        if local and name not in ("", "localhost") and not _is_address(name):
            raise web.HTTPMisdirectedRequest(text=f"this is not {name}: ask for localhost\n")
        return await handler(request)

    return check


def _bare(host: str) -> str:
    """``[::1]:9432`` → ``::1``; ``localhost:9432`` → ``localhost``."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
