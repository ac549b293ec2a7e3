"""Tails that a lifecycle rule or a person removes while they are needed are noticed, and stored once more."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from infra.postgres.throwaway import free_port, make_folder
from tests.rig import Rig, stop_started
from tests.servers import NEWEST


@pytest.fixture
def rig() -> Iterator[Rig]:
    folder = make_folder("walship-r-")
    with Rig(folder, NEWEST, [f"file://{folder}/store"], sources="stream", segment_mb=16) as made:
        yield made
    shutil.rmtree(folder)


def tails(rig: Rig) -> list[Path]:
    return sorted((rig.folder / "store").glob("*/tail/*/*"))


def test_tails_that_were_removed_are_stored_once_more(rig: Rig) -> None:
    rig.server.start()
    rig.run("init")
    service = rig.serve()
    rig.json("backup")
    rig.sql("create table t as select 1 n")
    rig.caught_up()
    rig.wait(lambda: tails(rig) != [], "the open segment has a tail")
    for tail in tails(rig):
        tail.unlink()
    rig.wait(lambda: "are gone; they are stored once more" in rig.service_log(), "it is told", 30)
    rig.wait(lambda: any("-00000000-" in tail.name for tail in tails(rig)), "from its first byte on", 30)
    rig.sql("insert into t values (2)")
    rig.caught_up()
    assert rig.stop(service) == 0
    target, port = rig.target(), free_port()
    rig.json("restore", "--latest", "--target-dir", str(target), "--start", "--port", str(port))
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
        assert connection.execute("select n from t order by n").fetchall() == [(1,), (2,)]
    stop_started(target)
