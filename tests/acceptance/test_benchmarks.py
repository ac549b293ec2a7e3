"""The benchmark runs. What it measures is nobody's test: machines differ, and this one is busy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import backups
from tests.benchmarks.bench import Row
from tests.benchmarks.measured import Cost

ROOT = Path(__file__).parents[2]


def test_benchmark_of_a_tiny_backlog_leaves_figures_and_nothing_else() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--alone", "--json", "--segments=4", "--segment-mb=1", "--scale=1",
         "--rounds=1", "--levels=3", "--tasks=drain,service"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["task"], row["tool"], row["size"]) for row in rows] == [
        ("drain, zstd 3", "walship", 4 << 20),
        ("walship run", "walship", 4 << 20),
    ]
    assert rows[0]["stored"] > 0
    for row in rows:
        assert 0 < row["mb_per_second"] < 10_000
        assert 20e6 < row["peak"] < 200e6
    assert "walship runs alone" in done.stderr


def test_goals_of_base_backups_are_judged_by_the_pairs() -> None:
    def row(task: str, tool: str, seconds: list[float], *, stored: int = 0, memory: int = 10) -> Row:
        return Row(task, tool, 10**9, [Cost(s, s, 1.0, 10, memory * 10**6) for s in seconds], stored)

    rows = [
        row(backups.FILES, "walship", [1, 2, 3], memory=240),
        row(backups.FILES, "pgBackRest", [1.5, 2.2, 3.9]),
        row(backups.SERVER, "walship", [2, 2, 2], memory=251),
        row(backups.SERVER, "pg_basebackup", [1, 1.8, 3]),
        row(backups.INCREMENT, "walship", [1, 1, 1], stored=30),
        row(backups.INCREMENT, "pgBackRest", [2, 2, 0.5], stored=20),
    ]
    assert [(round(goal.value, 2), goal.reached) for goal in backups.goals(rows)] == [
        (1.3, True), (240, True), (0.9, False), (251, False), (0.5, True), (1.5, False), (10, True),
    ]  # fmt: skip
