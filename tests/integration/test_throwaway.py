"""The servers that everything else is tested with: they start, they end, and nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.postgres.processes import _alive, _descendants
from infra.postgres.throwaway import ThrowawayServer, make_folder
from pipeline.errors import SourceError
from tests.servers import NEWEST, StartServer, new_server, programs, server_folder, start_server

__all__ = ["server_folder", "start_server"]


def test_a_server_starts_answers_and_stops(start_server: StartServer) -> None:
    server = start_server(segment_mb=1)
    assert server.query("show server_version_num")[0][0].startswith(str(NEWEST))
    assert server.query("select count(*) from pg_ls_dir('.')")[0][0] > 10
    server.stop()
    assert not server.running
    server.start()
    assert server.query("select 1") == [(1,)]


def test_killing_leaves_no_process_and_the_data_comes_back(start_server: StartServer) -> None:
    server = start_server()
    server.query("create table t as select 1 as x")
    assert server.pid is not None
    family = [server.pid, *_descendants(server.pid)]
    assert len(family) > 3
    server.kill9()
    assert not [pid for pid in family if _alive(pid)]
    server.start()
    assert server.query("select x from t") == [(1,)]


@pytest.mark.parametrize("segment_mb", [1, 64])
def test_the_segment_size_is_as_asked(segment_mb: int, start_server: StartServer) -> None:
    server = start_server(segment_mb=segment_mb, tcp=False)
    assert server.query("show wal_segment_size") == [(f"{segment_mb}MB",)]
    assert "127.0.0.1" not in server.dsn()


def test_a_server_that_cannot_start_says_why_in_its_own_words(server_folder: Path) -> None:
    with new_server(NEWEST, server_folder, settings={"wal_level": "nonsense"}) as server:
        with pytest.raises(SourceError, match='invalid value for parameter "wal_level"'):
            server.start()
        assert not server.running


def test_it_does_not_outlive_the_process_that_started_it(server_folder: Path) -> None:
    """Even when that process is killed and can clean up nothing."""
    new_server(NEWEST, server_folder).close()
    script = (
        "import sys, time; from pathlib import Path; from infra.postgres.throwaway import ThrowawayServer\n"
        f"s = ThrowawayServer(Path({str(programs(NEWEST))!r}), Path({str(server_folder / 'data')!r}))\n"
        "s.start(); print(s.pid, s.socket_dir, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    ) as owner:
        assert owner.stdout is not None
        pid, socket_dir = owner.stdout.readline().split()
        assert _alive(int(pid))
        owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while _alive(int(pid)):
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.02)
    Path(socket_dir).rmdir()


def test_a_data_directory_without_initdb_is_started_as_it_is(start_server: StartServer) -> None:
    """What restore does: the directory is there already."""
    first = start_server()
    first.query("create table t as select 7 as x")
    first.stop()
    with ThrowawayServer(programs(NEWEST), first.data_dir, tcp=False) as second:
        second.start({"max_connections": "25"})
        assert second.query("select x from t") == [(7,)]
        assert second.query("show max_connections") == [("25",)]


def test_the_folder_is_short_and_open_to_the_server() -> None:
    folder = make_folder()
    try:
        assert len(str(folder)) < 60
        if os.geteuid() == 0:
            assert folder.stat().st_mode & 0o755 == 0o755
            assert folder.stat().st_uid != 0
    finally:
        folder.rmdir()
