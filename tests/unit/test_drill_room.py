"""The folder of a drill: what is refused, and that only what a dead drill has left is ever removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.drill_room import Room, sweep
from infra.postgres.processes import run_as, started_at
from infra.postgres.throwaway import make_folder
from pipeline.errors import ConfigError

NAME = "walship-drill-abcd1234"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path


def left_behind(work: Path, name: str = NAME, **changed: object) -> Path:
    """As a drill leaves it whose process has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    folder = work / name
    (folder / "data").mkdir(parents=True)
    marker = {"walship_drill": 1, "pid": ended.pid, "started": "1", **changed}
    (folder / "drill.json").write_text(json.dumps(marker), "utf-8")
    return folder


def test_what_a_dead_drill_has_left_is_removed(work: Path) -> None:
    folder = left_behind(work)
    assert sweep(work) == [folder]
    assert list(work.iterdir()) == []


def test_a_number_that_another_process_has_by_now_is_dead_too(work: Path) -> None:
    folder = left_behind(work, pid=os.getpid(), started="another time")
    assert sweep(work) == [folder]


def test_a_living_process_keeps_its_folder_even_without_its_lock(work: Path) -> None:
    left_behind(work, pid=os.getpid(), started=started_at(os.getpid()))
    assert sweep(work) == []


@pytest.mark.parametrize(
    "name", ["walship-drill-abcd12345", "walship-drill-ABCD1234", "walship-drill-", "drill-abcd1234"]
)
def test_another_name_is_left_alone(work: Path, name: str) -> None:
    folder = left_behind(work, name)
    assert sweep(work) == []
    assert folder.exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"walship_drill": 1}', '{"walship_drill": 1, "pid": "x", "started": ""}']
)
def test_another_marker_is_left_alone(work: Path, content: str) -> None:
    folder = left_behind(work)
    (folder / "drill.json").write_text(content, "utf-8")
    assert sweep(work) == []


def test_links_are_not_followed(work: Path) -> None:
    elsewhere = left_behind(work, "precious")
    (work / NAME).symlink_to(elsewhere)
    assert sweep(work) == []
    (work / NAME).unlink()
    real = work / NAME
    real.mkdir()
    (real / "drill.json").symlink_to(elsewhere / "drill.json")
    assert sweep(work) == []
    assert elsewhere.exists()


def test_a_folder_that_is_not_there_holds_nothing(work: Path) -> None:
    assert sweep(work / "missing") == []


def test_a_room_is_locked_while_it_is_used_and_gone_afterwards() -> None:
    work = make_folder("walship-d-")
    try:
        with Room(work) as room:
            marker = json.loads((room.folder / "drill.json").read_text("utf-8"))
            assert marker["pid"] == os.getpid()
            (room.folder / "drill.json").write_text(json.dumps({**marker, "started": "never"}), "utf-8")
            assert sweep(work) == [], "the lock alone is enough"
            assert room.sockets.stat().st_mode & 0o777 == 0o700
        assert list(work.iterdir()) == []
    finally:
        work.rmdir()


def test_a_path_that_is_too_long_for_a_socket(work: Path) -> None:
    deep = work / ("d" * 100)
    deep.mkdir()
    with pytest.raises(ConfigError, match="too long for a server's socket"), Room(deep):
        pass
    assert list(deep.iterdir()) == []


@pytest.mark.skipif(not run_as(), reason="only root runs servers as somebody else")
def test_a_folder_that_the_servers_user_cannot_reach() -> None:
    work = make_folder("walship-d-")
    closed = work / "closed"
    closed.mkdir(mode=0o700)
    try:
        with pytest.raises(ConfigError, match="cannot reach"), Room(closed):
            pass
        assert list(closed.iterdir()) == []
    finally:
        closed.rmdir()
        work.rmdir()
