"""The benchmark of large repositories works on small ones: each operation finds what it has to."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.growing import OPERATIONS, _measured


async def test_every_operation_goes_through(tmp_path: Path) -> None:
    for operation in OPERATIONS:
        seconds, size = await _measured(operation, 600, tmp_path)
        assert seconds >= 0 <= size
