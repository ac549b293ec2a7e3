"""What check says of a schedule."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import pytest

from infra.planning import contradictions, doubts, next_runs
from infra.settings import load
from tests.docs_blocks import blocks_of
from tests.unit.test_status import SERVER

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


@pytest.mark.parametrize(
    ("job", "major", "summaries", "standby", "said"),
    [
        ("INCREMENTAL", 18, False, "", "summarize_wal is off"),
        ("INCREMENTAL", 18, True, "", ""),
        ("INCREMENTAL", 16, None, "", "PostgreSQL 16 has no incremental backups"),
        ("INCREMENTAL", 18, False, "standby.example", ""),  # its setting counts, and only check asks it
        ("FULL", 18, False, "", ""),
    ],
)
def test_an_incremental_backup_needs_summaries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, job: str, major: int, summaries: bool | None, standby: str,
    said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(f"WALSHIP_SCHEDULE_{job}", "0 3 * * *")
    monkeypatch.setenv("WALSHIP_BACKUP_HOST", standby)
    found = [*contradictions(load(), replace(SERVER, version_num=major * 10000, summarize_wal=summaries))]
    assert [said in error.fact for error in found] == [True] * bool(said)


@pytest.mark.parametrize("document", ["README.md", "docs/schedule.md"])
def test_what_the_documents_schedule_works_as_it_is_pasted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, document: str
) -> None:
    """Whatever the server; what needs PostgreSQL 17 is a block of its own, whose text says so."""
    monkeypatch.chdir(tmp_path)
    blocks = [block.text for block in blocks_of(document) if block.text.startswith("WALSHIP_SCHEDULE")]
    assert len(blocks) == 2
    for number, major in product((0, 1), (15, 16, 17, 18)):
        Path(".env").write_text("WALSHIP_KEEP_WINDOW=14d\n" + "".join(blocks[: number + 1]), "utf-8")
        settings, server = load(), replace(SERVER, version_num=major * 10000)
        settings.schedule_drill = ""  # programs of that version need not be on this machine
        errors = [*contradictions(settings, server)]
        assert bool(errors) is (number == 1 and major < 17)
        assert [*doubts(settings)] == []
        assert all("WalshipBackupTooOld" in error.hint for error in errors)


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
