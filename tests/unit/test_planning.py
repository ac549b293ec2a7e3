"""What check says of a schedule."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from infra.planning import contradictions, doubts, next_runs
from infra.settings import load

NOON = datetime(2026, 1, 14, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"FULL": "0 3 * * 0", "EXPIRE": "0 4 * * *"}, "no retention"),
        ({"DRILL": "0 3 * * 0"}, "DRILL_CHECKS: /nowhere/checks.sql cannot be read"),
    ],
)
def test_what_can_only_fail_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: dict[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WALSHIP_DRILL_CHECKS", "/nowhere/checks.sql")
    for job, expression in changed.items():
        monkeypatch.setenv(f"WALSHIP_SCHEDULE_{job}", expression)
    found = [*contradictions(load(), None)]
    assert [said in error.fact for error in found] == [True] * bool(said)
    assert all(error.hint for error in found)


def test_chains_that_only_grow_are_doubted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WALSHIP_SCHEDULE_INCREMENTAL", "0 3 * * *")
    ((fact, _),) = doubts(load())
    assert "long chains" in fact
    monkeypatch.setenv("WALSHIP_SCHEDULE_FULL", "0 3 * * 0")
    assert not [*doubts(load())]


def test_the_next_runs_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert next_runs(load(), NOON).startswith("nothing is scheduled")
    monkeypatch.setenv("WALSHIP_SCHEDULE_FULL", "0 3 * * *")
    monkeypatch.setenv("WALSHIP_TIME_ZONE", "Europe/Berlin")
    told = next_runs(load(), NOON)
    assert told == "scheduled by the clock of Europe/Berlin, next: full 2026-01-15 02:00:00 UTC"
