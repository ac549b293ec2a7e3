"""Days on which several things go wrong at once: an accident that is still on its way, a disk that is not mounted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from infra.postgres.recovery_files import parse_conf
from infra.postgres.throwaway import free_port, make_folder
from tests.rig import Rig, stop_started
from tests.servers import NEWEST


@pytest.fixture
def folder() -> Iterator[Path]:
    made = make_folder("walship-y-")
    yield made
    shutil.rmtree(made)


@pytest.fixture
def rig(folder: Path) -> Iterator[Rig]:
    with Rig(folder, NEWEST, [f"file://{folder}/one", f"file://{folder}/two"]) as made:
        made.server.start()
        made.run("init")
        made.sql("create table precious as select generate_series(1, 1000) n")
        yield made


def rows(port: int, query: str = "select count(*) from precious") -> list[tuple[object, ...]]:
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
        return connection.execute(query.encode()).fetchall()


def test_an_accident_that_is_shipped_while_the_restore_runs_is_not_replayed(rig: Rig) -> None:
    """The plan ends at the last record that is stored; what comes later is behind the target, whoever ships it."""
    rig.json("backup")
    rig.sql("insert into precious values (1001)")
    rig.json("switch")
    ((before,),) = rig.sql("select clock_timestamp()::text")
    rig.sql("drop table precious")
    target, port = rig.target(), free_port()
    done = rig.run("restore", "--target-dir", str(target), "--to-time", before)
    assert "restoring to that, and no further" in done.stderr
    assert "`walship switch`, then restore again" in done.stderr
    settings = parse_conf((target / "postgresql.auto.conf").read_text("utf-8"))
    assert settings["recovery_target_lsn"], "without a target recovery goes on into whatever is shipped meanwhile"
    rig.json("switch")
    # And as the message says: everything up to the moment is stored now.
    again = rig.target()
    rig.json("restore", "--target-dir", str(again), "--to-time", before, "--start", "--port", str(port))
    assert rows(port) == [(1001,)]
    stop_started(again)


def test_the_host_is_lost_with_one_destination_and_the_other_serves(rig: Rig) -> None:
    rig.json("backup")
    rig.json("switch")
    rig.server.stop()
    shutil.rmtree(rig.folder / "one")
    away = f"the folder {rig.folder}/one of file://{rig.folder}/one is not there"
    listed = rig.run("list", "--json")
    assert listed.stderr.count(away) == 1, "whoever notices it, it is said once"
    assert away in json.loads(listed.stdout)["problems"][0]
    target, port = rig.target(), free_port()
    done = rig.run("restore", "--target-dir", str(target), "--start", "--port", str(port))
    assert f"file://{rig.folder}/one is left out: as said above. What only it has cannot be restored" in done.stderr
    assert done.stderr.count(away) == 1
    assert rows(port) == [(1000,)]
    stop_started(target)


def test_nothing_is_acknowledged_into_an_empty_mount_point(rig: Rig) -> None:
    service = rig.serve()
    rig.json("switch")
    rig.wait(lambda: '"event": "shipped"' in rig.service_log(), "the service has used the folder")
    one, away = rig.folder / "one", rig.folder / "unmounted"
    one.rename(away)
    one.mkdir()
    for _ in range(3):
        rig.sql("insert into precious values (2)")
        rig.sql("select pg_switch_wal()")
    rig.wait(lambda: "is not the one that it was" in rig.service_log(), "the exchange is noticed")
    rig.wait(lambda: len(rig.spooled()) >= 3, "what one required destination lacks stays in the spool")
    assert [path for path in one.rglob("*") if path.is_file()] == []
    one.rmdir()
    away.rename(one)
    rig.drained()
    assert rig.stop(service) == 0
    rig.json("backup")
    assert rig.json("verify")["ok"]


def test_what_a_restored_server_writes_can_be_restored_before_its_first_backup(rig: Rig) -> None:
    """It was promoted while its archiving was off, so PostgreSQL never archives the history of its timeline."""
    rig.json("backup")
    rig.json("switch")
    rig.server.stop()
    target = rig.target()
    rig.json("restore", "--target-dir", str(target), "--start", "--port", str(free_port()))
    stop_started(target)
    heir = rig.adopt(target)
    with (target / "postgresql.auto.conf").open("a") as conf:
        conf.write(
            f"archive_mode = on\narchive_library = basic_archive\nbasic_archive.archive_directory = '{rig.spool}'\n"
        )
    heir.start()
    heir.query("insert into precious values (2000)")
    rig.run("switch", environment={**rig.environment(), **heir.environment()})
    heir.stop()
    again, port = rig.target(), free_port()
    rig.json("restore", "--target-dir", str(again), "--start", "--port", str(port))
    assert rows(port, "select max(n) from precious") == [(2000,)]
    stop_started(again)


def test_two_clusters_share_a_destination_and_both_go_on(rig: Rig) -> None:
    ((mine,),) = rig.sql("select system_identifier::text from pg_control_system()")
    stranger = "7000000000000000001"
    for place in ("one", "two"):
        folder = rig.folder / place / stranger
        shutil.copytree(rig.folder / place / mine, folder)
        facts = folder / "repository.json"
        facts.write_text(facts.read_text("utf-8").replace(mine, stranger), "utf-8")
    service = rig.serve()
    rig.sql("select pg_switch_wal()")
    rig.wait(lambda: '"event": "shipped"' in rig.service_log(), "the service knows whose WAL it is")
    assert rig.stop(service) == 0
    rig.json("push")
    rig.json("backup")
    assert rig.json("list", "--cluster", mine)["backups"]
    rig.server.stop()
    done = rig.run("push", expect=2)
    assert "the destinations hold 2 clusters" in done.stderr
    rig.run("push", "--cluster", mine)
