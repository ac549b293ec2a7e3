"""What a backup tells programs: a line at regular intervals, whatever it waits for, and every line of it JSON."""

from __future__ import annotations

import io
import json
import sys
import time
from typing import Any

import pytest

from infra.cli.json_lines import JsonLines, note


def lines(stderr: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stderr.getvalue().splitlines()]


def until(stderr: io.StringIO, phase: str, count: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 30
    while len(found := [line for line in lines(stderr) if line.get("phase") == phase]) < count:
        assert time.monotonic() < deadline, stderr.getvalue()
        time.sleep(0.005)
    return found


def test_each_phase_has_its_lines_and_notes_are_json_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with JsonLines("base backup", every=0.01) as told:
        (first, *_) = until(stderr, "start", 2)
        assert first == {
            "progress": "base backup", "phase": "start", "tablespace": None, "bytes": 0, "of_bytes": None,
            "bytes_per_second": 0, "seconds_left": None,
        }  # fmt: skip
        told(1 << 20, 4 << 20, "16384.2")
        (line, *_) = until(stderr, "files", 1)
        assert (line["tablespace"], line["bytes"], line["of_bytes"]) == ("16384", 1 << 20, 4 << 20)
        assert line["bytes_per_second"] > 0
        assert line["seconds_left"] is not None
        told(4 << 20, 4 << 20, "manifest")
        until(stderr, "manifest", 1)
        told(4 << 20, 4 << 20, "wal")
        note("waiting for WAL: 3 of 4")
        waiting = until(stderr, "wal", 12)  # it goes on, and says that nothing moves
        assert waiting[-1]["bytes_per_second"] == 0
        assert (waiting[-1]["tablespace"], waiting[-1]["seconds_left"]) == (None, None)
    assert {"note": "waiting for WAL: 3 of 4"} in lines(stderr)
    count = len(lines(stderr))
    time.sleep(0.03)
    assert len(lines(stderr)) == count, "it has ended"
