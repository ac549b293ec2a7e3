"""What is said while a restore goes on, where there is no terminal."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from infra.cli import progress
from infra.cli.progress import Bytes
from infra.cli.restore import _replayed
from infra.postgres.restored import Replay
from pipeline.backup import BackupInfo
from pipeline.catalog import Catalog
from pipeline.recovery import RestorePlan
from pipeline.runs import Runs
from pipeline.targets import Target
from pipeline.wal import Lsn

SIZE = 1 << 20
NOON = datetime(2026, 1, 14, 12, tzinfo=UTC)


def plan() -> RestorePlan:
    """From the start of segment 2 to the end of segment 9."""
    backup = BackupInfo(
        "base", "b" * 32, "full", "7", 170000, SIZE, 1, Lsn(2 * SIZE), Lsn(2 * SIZE + 80), NOON, NOON, (), (), (), "", 0
    )
    catalog = Catalog("7", SIZE, (backup,), {1: Runs(((2, 10),))})
    lineage = catalog.lineage(1)
    path = catalog.wal_path(lineage, backup.start_lsn)
    return RestorePlan(backup, Target(), Target(timeline=1), lineage, "1", path, None, end=path.end)


def test_the_replay_is_counted_to_where_the_plan_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    made = plan()
    with Bytes("base backup") as bar:
        bar(SIZE, 2 * SIZE)
        told = _replayed(made, bar)
        told(Replay(None, ""))  # nothing is known yet
        told(Replay(None, "000000010000000000000004"))
        told(Replay(Lsn(6 * SIZE), "000000010000000000000007"))
        told(Replay(Lsn(12 * SIZE), ""))  # more came than was planned
    base, restored, half, more = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"base backup: 1\.0 MB of 2\.0 MB, .*/s, \d+ s left", base)
    assert re.match(r"replay: LSN 0/400000 of 0/A00000, 25 %: 2\.0 MB of 8\.0 MB, .*/s, \d+ s left$", restored)
    assert re.match(r"replay: LSN 0/600000 of 0/A00000, 50 %: 4\.0 MB of 8\.0 MB, ", half)
    assert "100 %: 8.0 MB of 8.0 MB" in more


def test_a_plan_without_any_wal_divides_by_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    made = plan()
    with Bytes("base backup") as bar:
        _replayed(replace(made, end=made.path.start), bar)(Replay(Lsn(2 * SIZE), ""))
    assert "replay: LSN 0/200000 of 0/200000" in capsys.readouterr().err
