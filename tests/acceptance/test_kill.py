"""SIGKILL of the service at every boundary between stages: it goes on where it was and loses nothing acknowledged."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.throwaway import free_port, make_folder
from tests.acceptance.dying_service import POINTS
from tests.rig import Rig, stop_started
from tests.servers import NEWEST

_PROGRAM = str(Path(__file__).with_name("dying_service.py"))


@pytest.fixture
def rig(seaweed: Seaweed, s3_prefix: str) -> Iterator[Rig]:
    folder = make_folder("walship-k-")
    destinations = [f"file://{folder}/local", seaweed.url(s3_prefix)]
    with Rig(folder, NEWEST, destinations, settings=seaweed.environment) as made:
        yield made
    shutil.rmtree(folder)


def test_killed_at_every_boundary_it_goes_on_and_loses_nothing(rig: Rig, seaweed: Seaweed, s3_prefix: str) -> None:
    rig.server.start()
    rig.run("init")
    rig.sql("create table t (n serial primary key, filler text)")
    rig.json("backup")
    for point in POINTS:
        # The first destination gets the data key before the first segment, so that a put is counted twice there.
        service = rig.serve(_PROGRAM, DIE_AT=f"{point}:2")
        for _ in range(3):
            rig.sql("insert into t (filler) select md5(n::text) from generate_series(1, 500) n")
            rig.sql("select pg_switch_wal()")
        assert service.wait(60) == -signal.SIGKILL, f"{point} was never reached: {rig.service_log()[-2000:]}"
    ((rows,),) = rig.sql("select count(*) from t")
    assert rows == len(POINTS) * 1500
    service = rig.serve()
    rig.json("switch")
    rig.drained()
    assert rig.stop(service) == 0
    assert rig.json("verify")["ok"]
    for source in (f"file://{rig.folder}/local", seaweed.url(s3_prefix)):
        target, port = rig.target(), free_port()
        rig.json("restore", "--target-dir", str(target), "--from", source, "--start", "--port", str(port))
        import psycopg

        with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
            assert connection.execute("select count(*) from t").fetchall() == [(rows,)], f"from {source}"
        stop_started(target)


def test_a_service_that_is_told_to_stop_finishes_and_leaves_nothing_half(rig: Rig) -> None:
    rig.server.start()
    rig.run("init")
    service = rig.serve()
    rig.sql("create table t (n serial primary key, filler text)")
    rig.wait(lambda: '"event": "started"' in rig.service_log(), "the service has started")
    for _ in range(5):
        rig.sql("insert into t (filler) select md5(n::text) from generate_series(1, 500) n")
        rig.sql("select pg_switch_wal()")
    assert rig.stop(service, signal.SIGTERM) == 0
    assert '"event": "stopped"' in rig.service_log()
    shipped = rig.json("push")["shipped"]
    assert shipped + rig.service_log().count('"event": "shipped"') >= 5
    assert rig.spooled() == []
