"""SIGKILL of the service at every boundary between stages: it goes on where it was and loses nothing acknowledged."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
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


def test_a_store_that_is_killed_and_comes_back_gets_all_that_it_missed(tmp_path: Path, s3_prefix: str) -> None:
    """The local store goes on meanwhile, nothing leaves the spool, and nobody has to lend a hand."""
    folder = make_folder("walship-o-")
    try:
        with Seaweed(tmp_path) as s3:
            destinations = [f"file://{folder}/local", s3.url(s3_prefix)]
            with Rig(folder, NEWEST, destinations, settings=s3.environment) as rig:
                rig.server.start()
                rig.run("init")
                service = rig.serve()
                rig.sql("create table t as select generate_series(1, 1000) n")
                rig.json("switch")
                s3.kill()
                local = folder / "local"
                before = len(list(local.glob("*/wal/*/*")))
                for _ in range(3):
                    rig.sql("insert into t select generate_series(1, 1000) n")
                    rig.sql("select pg_switch_wal()")
                rig.wait(lambda: len(list(local.glob("*/wal/*/*"))) >= before + 3, "the local store goes on", 120)
                assert len(rig.spooled()) >= 3, "what one required store lacks is not acknowledged"
                rig.wait(lambda: '"event": "destination_failed"' in rig.service_log(), "the outage is told", 120)
                s3.start()
                rig.wait(lambda: not rig.spooled(), "all is acknowledged again", 120)
                rig.wait(lambda: '"event": "destination_caught_up"' in rig.service_log(), "its return is told", 120)
                assert rig.stop(service) == 0
                assert rig.json("verify")["ok"]
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_a_backup_that_is_killed_is_none_and_the_next_one_is_whole(rig: Rig, number: int, code: int) -> None:
    rig.server.start()
    rig.run("init")
    rig.sql("create table t as select n, md5(n::text) from generate_series(1, 300000) n")
    command = [sys.executable, "-m", "infra.cli", "backup"]
    with (rig.folder / "service.log").open("ab") as log:
        killed = subprocess.Popen(command, env=rig.environment(), cwd=rig.folder, stdout=log, stderr=log)
    rig.wait(lambda: any((rig.folder / "local").glob("*/base/*/data/*/*")), "the backup has begun")
    killed.send_signal(number)
    assert killed.wait(60) == code, "what was stopped is not done"
    assert rig.json("list")["backups"] == []
    taken = rig.json("backup")
    (backup,) = rig.json("list")["backups"]
    assert backup["name"] == taken["name"]
    assert rig.json("verify")["ok"]


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
