"""A destination that lacks what was stored before the service began: it gets it, from wherever it can still come."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.postgres.throwaway import make_folder
from tests.rig import Rig
from tests.servers import NEWEST


@pytest.fixture
def rig() -> Iterator[Rig]:
    folder = make_folder("walship-l-")
    destinations = [f"file://{folder}/a", f"file://{folder}/b"]
    with Rig(folder, NEWEST, destinations, sources="stream") as made:
        yield made
    shutil.rmtree(folder)


def segments(store: Path) -> list[Path]:
    return sorted(path for path in store.glob("*/wal/*/*") if len(path.name) == 24)


def test_what_is_lost_where_it_was_to_be_copied_from_comes_from_the_server_again(rig: Rig) -> None:
    """One destination lacks a segment, and the other one's copy is damaged: nothing of that is acknowledged."""
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
    lacking, damaged = segments(rig.folder / "a")[begun + 1], segments(rig.folder / "b")[begun + 1]
    assert lacking.name == damaged.name
    lacking.unlink()
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    service = rig.serve()
    rig.wait(lambda: '"event": "fetched_again"' in rig.service_log(), "it is fetched from the server", 60)
    rig.caught_up()
    assert lacking.exists()
    assert lacking.name in rig.service_log(), "the damaged copy is told"
    said = rig.run("verify", expect=12)
    assert damaged.name in said.stdout + said.stderr
    damaged.unlink()
    rig.stop(service)
    rig.serve()
    rig.wait(damaged.exists, "moved away, it is copied from the destination that has it")
    assert rig.json("verify")["ok"]
