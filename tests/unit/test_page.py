"""The page as it is served: what it is made of, what it may do, and who is answered."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import aiohttp
import pytest

from infra.monitoring.http import serving
from infra.monitoring.metrics import Metrics
from infra.monitoring.page import compose
from infra.postgres.throwaway import free_port
from tests.clock import FastClock


@dataclass
class Known:
    """What is shown: a ``infra.monitoring.page.Shown``."""

    why: str = ""

    def api(self) -> bytes:
        return b'{"state":"safe"}'

    def not_ready(self) -> str:
        return self.why


@pytest.fixture
def metrics() -> Metrics:
    return Metrics({"s3://bucket": True}, put_price=0.005, clock=FastClock())


def _hashes(page: str, tag: str) -> Iterator[str]:
    for content in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL):
        yield f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def test_the_policy_lets_run_what_stands_in_the_page_and_nothing_else() -> None:
    page, policy = compose()
    (style,), (script,) = _hashes(page, "style"), _hashes(page, "script")
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'", "style-src": style, "script-src": script, "connect-src": "'self'",
        "img-src": "data:", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip


def test_the_page_is_small_and_asks_nobody_else() -> None:
    page, _ = compose()
    assert len(page.encode()) < 100_000
    assert set(re.findall(r"[a-z]+://[^\"'` ]+", page)) == {"http://www.w3.org/2000/svg"}, "the name of SVG"
    assert not re.search(r"""\s(on\w+|style)=["']""", page), "the policy would not run them"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)
    assert re.findall(r"fetch\(([^,)]*)", page) == ['"/api/status"']


def test_whoever_reads_it_aloud_or_has_no_mouse_finds_everything() -> None:
    page, _ = compose()
    html = page.partition("<script>")[0]
    assert '<html lang="en">' in html
    ids = set(re.findall(r' id="([^"]+)"', html))
    named = re.findall(r'(?:aria-labelledby|aria-describedby|for)="([^"]+)"', html)
    assert named
    assert set(named) <= ids
    assert re.search(r'role="slider" tabindex="0" aria-label=', html)
    assert "prefers-color-scheme: dark" in html
    assert ":focus-visible" in html


async def test_what_is_served(metrics: Metrics) -> None:
    listen, known = f"127.0.0.1:{free_port()}", Known()
    async with serving(listen, metrics, shown=known), aiohttp.ClientSession(f"http://{listen}") as session:
        async with session.get("/") as answer:
            assert (answer.status, answer.content_type) == (200, "text/html")
            assert answer.headers["Content-Security-Policy"] == compose()[1]
            assert answer.headers["Cache-Control"] == "no-store"
            assert await answer.text() == compose()[0]
        async with session.get("/api/status") as answer:
            assert (answer.content_type, await answer.json()) == ("application/json", {"state": "safe"})
            assert "Access-Control-Allow-Origin" not in answer.headers
        async with session.get("/readyz") as answer:
            assert (answer.status, await answer.text()) == (200, "ok\n")
        known.why = "the stream is lost"
        async with session.get("/readyz") as answer:
            assert (answer.status, await answer.text()) == (503, "the stream is lost\n")
        async with session.get("/healthz") as answer:
            assert answer.status == 200
        for path in ("/metrics", "/nowhere", "/../pyproject.toml", "/%2e%2e/pyproject.toml"):
            async with session.get(path) as answer:
                assert answer.status == (200 if path == "/metrics" else 404)
                assert answer.headers["Server"] == "walship"
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        for path in ("/", "/api/status", "/readyz", "/healthz", "/metrics"):
            async with session.head(path) as answer:
                assert answer.status == (503 if path == "/readyz" else 200)
            for method in ("POST", "PUT", "DELETE", "PATCH"):
                async with session.request(method, path) as answer:
                    assert answer.status == 405


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200), ("localhost:{port}", 200), ("LOCALHOST", 200), ("[::1]:{port}", 200),
        ("attacker.example:{port}", 421), ("localhost.attacker.example", 421), ("walship:{port}", 421),
    ],
)  # fmt: skip
async def test_a_name_of_the_outside_is_not_answered_on_loopback(metrics: Metrics, host: str, status: int) -> None:
    port = free_port()
    async with serving(f"127.0.0.1:{port}", metrics, shown=Known()), aiohttp.ClientSession() as session:
        headers = {"Host": host.format(port=port)}
        for path in ("/api/status", "/metrics"):
            async with session.get(f"http://127.0.0.1:{port}{path}", headers=headers) as answer:
                assert answer.status == status


async def test_elsewhere_it_has_whatever_name_it_was_given(metrics: Metrics) -> None:
    port = free_port()
    async with (
        serving(f"0.0.0.0:{port}", metrics, shown=Known()),
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/metrics", headers={"Host": "walship:9432"}) as answer,
    ):
        assert answer.status == 200
