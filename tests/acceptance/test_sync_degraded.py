"""Synchronous mode when a required destination dies: commits wait, or after WALSHIP_SYNC_TIMEOUT go on, loudly."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.throwaway import free_port, make_folder
from tests.proxy import Mode, Proxy
from tests.rig import Rig, stop_started
from tests.servers import NEWEST


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[Proxy]:
    with Proxy(int(seaweed.endpoint.rpartition(":")[2])) as made:
        yield made


@pytest.fixture
def rig(seaweed: Seaweed, s3_prefix: str, proxy: Proxy) -> Iterator[Rig]:
    folder = make_folder("walship-y-")
    remote = f"s3://{seaweed.bucket}/{s3_prefix}?endpoint=http://127.0.0.1:{proxy.port}&region=us-east-1"
    with Rig(
        folder, NEWEST, [f"file://{folder}/local", remote], settings=seaweed.environment, sources="stream"
    ) as made:
        yield made
    shutil.rmtree(folder)


class Commit:
    """One row, committed in a thread."""

    def __init__(self, rig: Rig, n: int) -> None:
        self._dsn = rig.server.dsn()
        self._n = n
        self.returned = threading.Event()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute("insert into t values (%s)", (self._n,))
            self.returned.set()


def rows(rig: Rig, source: str, target: Path) -> list[tuple[int]]:
    port = free_port()
    rig.json("restore", "--target-dir", str(target), "--latest", "--from", source, "--start", "--port", str(port))
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
        found = connection.execute("select n from t order by n").fetchall()
    stop_started(target)
    return found


def begin(rig: Rig, **settings: str) -> None:
    rig.server.start()
    rig.run("init")
    rig.sql("create table t (n int primary key)")
    rig.serve(**settings)
    rig.json("backup")
    rig.synchronous()
    assert Commit(rig, 1).returned.wait(20)


def test_commits_wait_for_a_required_destination_for_as_long_as_it_takes(rig: Rig, proxy: Proxy) -> None:
    begin(rig)
    proxy.turn(Mode.DOWN)
    waiting = Commit(rig, 2)
    assert not waiting.returned.wait(4), "it is durable in one of two required places"
    proxy.turn(Mode.PASS)
    assert waiting.returned.wait(60)
    assert "sync_degraded" not in rig.service_log()


def test_after_the_timeout_commits_go_on_with_one_durable_copy_and_it_is_told(rig: Rig, proxy: Proxy) -> None:
    begin(rig, WALSHIP_SYNC_TIMEOUT="2")
    proxy.turn(Mode.DOWN)
    assert Commit(rig, 2).returned.wait(30), "two seconds, and one destination is left"
    rig.wait(lambda: '"event": "sync_degraded"' in rig.service_log(), "it is told")
    assert Commit(rig, 3).returned.wait(10)
    proxy.turn(Mode.PASS)
    rig.wait(lambda: '"event": "sync_restored"' in rig.service_log(), "it has caught up, and that is told")
    assert Commit(rig, 4).returned.wait(20)
    expected = [(1,), (2,), (3,), (4,)]
    assert rows(rig, rig.destinations[1], rig.target()) == expected, "from S3 alone"
    # With none left, commits wait, whatever the timeout says: a local folder that is gone, and the store away.
    proxy.turn(Mode.DOWN)
    (rig.folder / "local").rename(rig.folder / "away")
    waiting = Commit(rig, 5)
    assert not waiting.returned.wait(5)
    (rig.folder / "away").rename(rig.folder / "local")
    assert waiting.returned.wait(60)


def test_an_optional_destination_that_accepts_and_never_answers_holds_up_nothing(rig: Rig, proxy: Proxy) -> None:
    """The commits of the other one go on, and so do finished segments, many more than fit into memory."""
    begin(rig, WALSHIP_REQUIRED=rig.destinations[0])
    proxy.turn(Mode.STALL)
    local = rig.folder / "local"
    before = len(list(local.glob("*/wal/*/*")))
    for number in range(8):
        assert Commit(rig, 10 + number).returned.wait(30)
        rig.sql("select pg_switch_wal()")
    rig.wait(lambda: len(list(local.glob("*/wal/*/*"))) >= before + 8, "the local folder goes on", 40)
    rig.wait(lambda: "has not answered for 10 seconds" in rig.service_log(), "it is told", 40)
    proxy.turn(Mode.PASS)
    rig.wait(lambda: '"event": "destination_caught_up"' in rig.service_log(), "it gets what it missed", 90)
    assert rig.json("verify")["ok"]
