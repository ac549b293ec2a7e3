"""Rows → a table for people, or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from tests.benchmarks.backups import Goal
from tests.benchmarks.bench import Row

_HEAD = (
    "task",
    "tool",
    "MB/s",
    "seconds",
    "CPU s",
    "server CPU s",
    "peak MB",
    "of all",
    "stored MB",
    "ratio, median (each)",
)


def table(rows: Sequence[Row]) -> list[str]:
    """Medians of each task and tool; the peaks are of any run, MB are millions of bytes."""
    lines = [_HEAD, *(_line(row, _peer(row, rows)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def result(rows: Sequence[Row], goals: Sequence[Goal], about: dict[str, Any]) -> dict[str, Any]:
    """Every run, for machines. Seconds, bytes, and MB of a million bytes per second."""
    return {
        **about,
        "rows": [
            {
                "task": row.task, "tool": row.tool, "size": row.size, "stored": row.stored,
                "runs": [asdict(cost) for cost in row.costs], "server_cpu": row.server_cpu,
                "mb_per_second": median(row.speeds), "cpu": row.cpu, "peak": row.peak, "together": row.together,
                "ratios": row.ratios(peer) if (peer := _peer(row, rows)) else [],
            }
            for row in rows
        ],
        "goals": [{**asdict(goal), "reached": goal.reached} for goal in goals],
    }  # fmt: skip


def _line(row: Row, peer: Row | None) -> tuple[str, ...]:
    ratios = row.ratios(peer) if peer else []
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return (
        row.task,
        row.tool,
        f"{median(row.speeds):.0f}",
        f"{row.seconds:.2f}",
        f"{row.cpu:.2f}",
        f"{median(row.server_cpu):.2f}" if row.server_cpu else "",
        f"{row.peak / 1e6:.0f}",
        f"{row.together / 1e6:.0f}" if row.together else "",
        f"{row.stored / 1e6:.0f}" if row.stored else "",
        f"{median(ratios):.2f} ({each})" if ratios else "",
    )


def _peer(row: Row, rows: Sequence[Row]) -> Row | None:
    """The other tool's row of the same task; only walship is compared."""
    if row.tool != "walship":
        return None
    return next((other for other in rows if other.task == row.task and other.tool != row.tool), None)
