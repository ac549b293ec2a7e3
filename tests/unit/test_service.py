"""The service: what it says as it starts, and beside others what it waits for, and goes on after."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from infra import service
from infra.clock import SystemClock
from infra.founding import found
from infra.planning import contradictions
from infra.repository import RepositoryFacts
from infra.settings import Settings, load
from infra.sources.spool import LOCK, holder
from infra.wiring import open_destinations
from pipeline.errors import ConfigError
from tests.keys import NOW, SYSTEM_ID

#: Ships the spool of its first argument, as far as anybody can see.
_OTHER = """
import fcntl, os, sys
handle = open(sys.argv[1], "w")
fcntl.flock(handle, fcntl.LOCK_EX)
handle.write(str(os.getpid()))
handle.flush()
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
async def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    structlog.reset_defaults()  # where a command was called before, in this process, its stream is gone
    (tmp_path / "spool").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WALSHIP_DESTINATIONS", f"file://{tmp_path}/near")
    monkeypatch.setenv("WALSHIP_SOURCES", "watch")
    monkeypatch.setenv("WALSHIP_SPOOL_DIR", str(tmp_path / "spool"))
    monkeypatch.setenv("WALSHIP_LISTEN", "off")
    monkeypatch.setenv("POSTGRES_HOST", str(tmp_path))  # no server there
    made = load()
    async with open_destinations(made) as destinations:
        await found(destinations, RepositoryFacts(SYSTEM_ID, 18, 1 << 20, NOW.isoformat()), made, SystemClock())
    return made


@pytest.fixture
def other(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ships the spool until its standard input is closed."""
    assert settings.spool_dir is not None
    command = [sys.executable, "-c", _OTHER, str(settings.spool_dir / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as made:
        assert made.stdout is not None
        assert made.stdout.readline() == b"taken\n"
        yield made


async def test_what_is_scheduled_and_can_only_fail_is_warned_of(settings: Settings) -> None:
    settings.schedule_expire = "0 5 * * *"
    (wrong,) = contradictions(settings, None)
    with capture_logs() as said:
        task = asyncio.create_task(service.serve(settings))
        async with asyncio.timeout(60):
            while not any(line.get("error") == wrong.fact for line in said) and not task.done():
                await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    (line,) = [line for line in said if line["event"] == "schedule" and line["log_level"] == "warning"]
    assert (line["error"], line["hint"]) == (wrong.fact, wrong.hint)


async def test_a_spool_that_is_given_back_while_the_service_still_unwinds_is_waited_for_all_the_same(
    settings: Settings,
    other: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A switch that found no service had it; the lease takes seconds to give back where a store is dead."""

    def seen(folder: Path) -> int | None:
        there = holder(folder)
        other.communicate()  # and just behind that look it ends
        return there

    monkeypatch.setattr(service, "holder", seen)
    task = asyncio.create_task(service.serve(settings))
    said = ""
    async with asyncio.timeout(60):
        while "started" not in said and not task.done():
            await asyncio.sleep(0.02)
            said += "".join(capfd.readouterr())
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert f"the spool {settings.spool_dir} is shipped by process {other.pid} already" in said
    assert "it goes on once that one has given it back" in said
    assert "started" in said


async def test_with_the_stream_alone_there_is_nothing_to_push_and_what_to_do_is_said() -> None:
    """A spool is no setting that is missing there."""
    with pytest.raises(ConfigError, match="WALSHIP_SOURCES is stream: there is no spool") as raised:
        await service.push(Settings(_env_file=None, WALSHIP_SOURCES="stream"), lambda _: None)
    assert "`walship switch`" in raised.value.hint
    with pytest.raises(ConfigError, match="WALSHIP_SPOOL_DIR is not set"):
        await service.push(Settings(_env_file=None, WALSHIP_SOURCES="watch,stream"), lambda _: None)
