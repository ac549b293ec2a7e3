"""What the service says in its log as it starts, of settings that cannot work."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from infra import service
from infra.clock import SystemClock
from infra.founding import found
from infra.planning import contradictions
from infra.repository import RepositoryFacts
from infra.settings import load
from infra.wiring import open_destinations
from tests.keys import NOW, SYSTEM_ID


async def test_what_is_scheduled_and_can_only_fail_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spool").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "DESTINATIONS": f"file://{tmp_path}/near",
        "SPOOL_DIR": str(tmp_path / "spool"),
        "LISTEN": "off",
        "SCHEDULE_EXPIRE": "0 5 * * *",
    }.items():
        monkeypatch.setenv(f"WALSHIP_{name}", value)
    monkeypatch.setenv("POSTGRES_HOST", str(tmp_path))  # no server there
    settings = load()
    (wrong,) = contradictions(settings, None)
    async with open_destinations(settings) as destinations:
        await found(destinations, RepositoryFacts(SYSTEM_ID, 18, 1 << 20, NOW.isoformat()), settings, SystemClock())
    with capture_logs() as said:
        task = asyncio.create_task(service.serve(settings))
        async with asyncio.timeout(60):
            while not any(line.get("error") == wrong.fact for line in said) and not task.done():
                await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    (line,) = [line for line in said if line["event"] == "schedule" and line["log_level"] == "warning"]
    assert (line["error"], line["hint"]) == (wrong.fact, wrong.hint)
