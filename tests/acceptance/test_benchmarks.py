"""The benchmark runs. What it measures is nobody's test: machines differ, and this one is busy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
