"""A tablespace that was created behind the backup: replay would make it at its old place, where the server runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import make_folder
from tests.rig import Rig
from tests.servers import NEWEST


@pytest.fixture
def rig() -> Iterator[Rig]:
    folder = make_folder("walship-n-")
    try:
        with Rig(folder, NEWEST, [f"file://{folder}/store"], server_settings={"autovacuum": "off"}) as made:
            made.server.start()
            made.run("init")
            yield made
    finally:
        shutil.rmtree(folder)


def content(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_no_restore_writes_into_the_tablespaces_of_the_server_beside_it(rig: Rig) -> None:
    rig.sql("create table t as select n from generate_series(1, 100) n")
    rig.run("backup")
    rig.sql("select pg_create_restore_point('before')")
    place = rig.folder / "space"
    place.mkdir()
    give(place, run_as())
    rig.sql(f"create tablespace space location '{place}'")
    rig.sql("create table a tablespace space as select n, 'first' v from generate_series(1, 1000) n")
    rig.sql("select pg_create_restore_point('behind')")
    rig.sql("update a set v = 'second'")
    rig.sql("checkpoint")
    rig.run("switch")
    before = content(place)
    fact = f"creates the tablespace at {place}, which a server uses that runs here"
    target = rig.target()
    for words in (("drill",), ("restore", "--target-dir", str(target), "--to-name", "behind", "--start")):
        refused = rig.run(*words, expect=13)
        assert fact in refused.stdout + refused.stderr
        assert "walship backup" in refused.stdout + refused.stderr
    assert list(target.iterdir()) == []
    # Where replay ends before it, nothing is in the way; and a backup that has it puts it elsewhere.
    rig.run("restore", "--target-dir", str(target), "--to-name", "before")
    rig.run("backup")
    rig.run("drill")
    assert content(place) == before
    rig.server.stop()
    rig.server.start()
    assert rig.sql("select v, count(*) from a group by v") == [("second", 1000)]
