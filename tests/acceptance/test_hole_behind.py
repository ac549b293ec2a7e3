"""A hole in what is stored, with more stored behind it: shipping goes on, and positions count what is really there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from infra.postgres.throwaway import make_folder
from tests.acceptance.test_lagging import segments
from tests.rig import Rig
from tests.servers import NEWEST


@pytest.fixture
def rig() -> Iterator[Rig]:
    folder = make_folder("walship-h-")
    destinations = [f"file://{folder}/a", f"file://{folder}/b"]
    with Rig(folder, NEWEST, destinations, sources="stream") as made:
        yield made
    shutil.rmtree(folder)


def test_a_hole_does_not_hold_the_positions_up_that_lie_behind_it(rig: Rig) -> None:
    rig.server.start()
    rig.run("init")
    service = rig.serve()
    rig.json("backup")
    begun = len(segments(rig.folder / "b"))
    rig.sql("create table t (n int)")
    for number in range(4):
        rig.sql(f"insert into t values ({number})")
        rig.sql("select pg_switch_wal()")
    rig.caught_up()
    rig.wait(lambda: len(segments(rig.folder / "b")) >= begun + 4, "four segments are stored")
    rig.stop(service)
    for store in ("a", "b"):
        segments(rig.folder / store)[begun + 1].unlink()
    lacking = segments(rig.folder / "a")[begun + 2]
    lacking.unlink()  # behind the hole; b has it, and gives it
    rig.sql("checkpoint")
    rig.sql("checkpoint")
    rig.serve()
    rig.wait(lambda: '"event": "gap_opened"' in rig.service_log(), "the hole is told", 30)
    rig.wait(lacking.exists, "copied")
    rig.sql("insert into t values (9)")
    rig.caught_up()
