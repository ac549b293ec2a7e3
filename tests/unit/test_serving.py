"""``/metrics`` and ``/healthz`` over real HTTP."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterable

import aiohttp
import pytest
import structlog
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from infra.monitoring.http import MOST, serving
from infra.monitoring.log import configure
from infra.monitoring.metrics import Metrics
from infra.postgres.throwaway import free_port
from infra.settings import listen_address, load
from pipeline.errors import ConfigError
from pipeline.events import SyncDegraded
from tests.clock import FastClock


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics({"s3://bucket": True}, put_price=0.005, clock=FastClock())
    made.notify(SyncDegraded("s3://bucket", "it is silent"))
    return made


async def test_prometheus_reads_both_formats(metrics: Metrics) -> None:
    listen = f"127.0.0.1:{free_port()}"
    wanted = ("walship_sync_degraded", {"destination": "s3://bucket"}, 1.0)

    def samples(families: Iterable[Metric]) -> list[tuple[str, dict[str, str], float]]:
        return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]

    async with serving(listen, metrics), aiohttp.ClientSession(f"http://{listen}") as session:
        async with session.get("/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert wanted in samples(read_text(await answer.text()))
        accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
        async with session.get("/metrics", headers=accept) as answer:
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
            text = await answer.text()
            assert wanted in samples(read_openmetrics(text))  # type: ignore[no-untyped-call]  # the library's own
        async with session.get("/healthz") as answer:
            assert (answer.status, await answer.text()) == (200, "ok\n")
        async with session.post("/metrics") as answer:
            assert answer.status == 405
        async with session.get("/") as answer:
            assert answer.status == 404
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(listen.rpartition(":")[2]))) != 0


async def test_only_the_address_that_was_named_is_listened_on(metrics: Metrics) -> None:
    port = free_port()
    async with serving(f"127.0.0.1:{port}", metrics):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.2", port)) != 0


async def test_clients_that_stay_take_no_more_than_their_share(metrics: Metrics) -> None:
    """Some read nothing, some ask for nothing: whoever comes next is answered all the same."""
    port = free_port()
    async with serving(f"127.0.0.1:{port}", metrics), aiohttp.ClientSession() as session:
        waiting = []
        for number in range(2 * MOST):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" if number % 2 else b"GET /metr")
            waiting.append((reader, writer))
        async with session.get(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.status == 200
        async with asyncio.timeout(20):
            for reader, _ in waiting[:MOST]:
                while await _read(reader):
                    pass
        for _, writer in waiting:
            writer.close()


async def _read(reader: asyncio.StreamReader) -> bytes:
    """Some of what came; nothing once the connection has ended, in whatever way."""
    try:
        return await reader.read(1 << 16)
    except ConnectionResetError:
        return b""


async def test_an_address_may_be_one_of_ipv6(metrics: Metrics) -> None:
    listen = f"[::1]:{free_port()}"
    try:
        async with (
            serving(listen, metrics),
            aiohttp.ClientSession() as session,
            session.get(f"http://{listen}/healthz") as answer,
        ):
            assert answer.status == 200
    except ConfigError as error:
        if "Cannot assign requested address" not in error.fact and "not supported" not in error.fact:
            raise
        pytest.skip("this machine has no IPv6")


async def test_nothing_is_served_unless_asked_for(metrics: Metrics, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving("", metrics):
        pass
    assert "listening" not in "".join(capsys.readouterr())


async def test_a_port_in_use_is_told(metrics: Metrics) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"WALSHIP_LISTEN is {listen}, and another process") as raised:
            async with serving(listen, metrics):
                pytest.fail("two listen on one port")
    assert "choose another port" in raised.value.hint


async def test_an_address_of_another_machine_is_told(metrics: Metrics) -> None:
    with pytest.raises(ConfigError, match=r"WALSHIP_LISTEN is 192\.0\.2\.1:9100: ") as raised:
        async with serving("192.0.2.1:9100", metrics):
            pytest.fail("that address is nobody's")
    assert "address of this machine" in raised.value.hint


@pytest.mark.parametrize(
    ("listen", "meant"),
    [
        ("127.0.0.1:9100", ("127.0.0.1", 9100)),
        ("localhost:1", ("localhost", 1)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_an_address_is_host_and_port(listen: str, meant: tuple[str, int]) -> None:
    assert listen_address(listen) == meant


@pytest.mark.parametrize("listen", ["9100", ":9100", "localhost", "localhost:", "h:0", "h:65536", "h:+1", "::1:9100"])
def test_what_is_none_is_refused_as_a_setting(listen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WALSHIP_LISTEN", listen)
    with pytest.raises(ConfigError, match="WALSHIP_LISTEN: it must be host:port"):
        load()


def test_a_command_that_measures_nothing_loads_no_server() -> None:
    """They cost a tenth of a second, and every verb of the command would pay it."""
    program = (
        "import sys, infra.monitoring.http, infra.monitoring.log;"
        "print(sorted({'aiohttp', 'prometheus_client'} & sys.modules.keys()))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


async def test_a_default_port_that_is_taken_is_told_and_no_error(
    metrics: Metrics, capsys: pytest.CaptureFixture[str]
) -> None:
    listen = f"127.0.0.1:{free_port()}"
    configure()
    try:
        async with serving(listen, metrics), serving(listen, metrics, chosen=False):
            pass
    finally:
        structlog.reset_defaults()
    assert '"not_listening"' in capsys.readouterr().err


@pytest.mark.parametrize(("given", "listens"), [(None, "127.0.0.1:9432"), ("off", ""), ("[::1]:80", "[::1]:80")])
def test_it_listens_on_this_machine_unless_told_otherwise(
    given: str | None, listens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is not None:
        monkeypatch.setenv("WALSHIP_LISTEN", given)
    settings = load()
    assert settings.listens == listens
    assert ("listen" in settings.model_fields_set) == (given is not None)
