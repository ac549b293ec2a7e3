"""``walship demo``, as ``make demo`` runs it: a small bank, the whole story, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

_DEMO = [sys.executable, "-m", "infra.cli", "demo"]

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


@pytest.fixture
def mark() -> str:
    """Stands in the environment of everything that one demo starts."""
    return uuid.uuid4().hex


def _left(mark: str) -> list[str]:
    """Command lines of the processes that still run with the mark."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            if mark.encode() in Path(entry.path, "environ").read_bytes():
                found.append(Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
    return found


def _wait_until_none_is_left(mark: str) -> None:
    """Guards and grandchildren end a moment later."""
    deadline = time.monotonic() + 60
    while _left(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _left(mark)


def _environment(mark: str) -> dict[str, str]:
    return {**os.environ, "DEMO_MARK": mark}


def _folders() -> Iterator[Path]:
    return Path("/tmp").glob("walship-demo-*")


def test_it_tells_the_whole_story_and_every_claim_holds(mark: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [*_DEMO, "--seconds", "0.5", "--payments", "5000", "--json"],
        env=_environment(mark), cwd=tmp_path, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ok"]
    texts = [claim["text"] for claim in result["claims"]]
    assert len(texts) == 18
    for when in ("the moment before", "the live server again"):
        assert sum(text.startswith(when) for text in texts) == 3
    for when in ("after losing everything:", "after losing everything again:"):
        assert sum(text.startswith(when) for text in texts) == 5
    facts = {"base backup", "written", "archive lag", "tail lag", "restore to the moment", "restored", "restored again"}
    assert facts <= result["facts"].keys()
    assert "measured RPO" in result["facts"]["first loss"]
    assert "none of them lost" in result["facts"]["second loss"]
    _wait_until_none_is_left(mark)
    assert not list(tmp_path.iterdir())


def test_stopped_in_the_middle_it_leaves_nothing(mark: str, tmp_path: Path) -> None:
    before = set(_folders())
    with subprocess.Popen(
        [*_DEMO, "--payments", "1000"], env=_environment(mark), cwd=tmp_path, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as demo:  # fmt: skip
        assert demo.stderr is not None
        lines = []
        for line in demo.stderr:
            lines.append(line)
            if "walship backup" in line:
                break
        ours = {folder for folder in set(_folders()) - before if any(str(folder) in text for text in _left(mark))}
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(60) == 130, "".join(lines)
    assert ours
    _wait_until_none_is_left(mark)
    assert not [folder for folder in ours if folder.exists()]
