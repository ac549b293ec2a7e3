"""A cluster that was restored is backed up again, although PostgreSQL never archived the history of its timeline."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import psycopg
import pytest

from infra.postgres.throwaway import free_port, make_folder
from tests.rig import Rig, stop_started
from tests.servers import NEWEST


@pytest.fixture
def rig() -> Iterator[Rig]:
    folder = make_folder("walship-b-")
    with Rig(folder, NEWEST, [f"file://{folder}/local"]) as made:
        yield made
    shutil.rmtree(folder)


def test_a_restored_cluster_can_be_backed_up_and_restored_again(rig: Rig) -> None:
    rig.server.start()
    rig.run("init")
    rig.sql("create table t as select n from generate_series(1, 1000) n")
    rig.json("backup")
    rig.sql("insert into t select n from generate_series(1001, 2000) n")
    rig.json("switch")
    rig.server.stop()
    rig.run("push")

    target = rig.target()
    done = rig.json("restore", "--target-dir", str(target), "--start", "--port", str(free_port()))
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[0-9:.]+\+00:00", done["last_transaction"]), "also what the log has"
    stop_started(target)
    second = rig.adopt(target)
    second.start()
    # It promoted with archiving off, as every restore of ours does; now it takes the old server's place.
    for name in ("archive_mode", "archive_library", "archive_command"):
        second.query(f"alter system reset {name}")
    second.restart()
    # What served its recovery is gone: a standby that is made of it has other things to follow.
    left = "select name, setting from pg_file_settings where name ~ '^(restore_command|recovery_target)'"
    assert second.query(left) == []
    assert second.query("select timeline_id from pg_control_checkpoint()") == [(2,)]
    second.query("insert into t select n from generate_series(2001, 3000) n")
    environment = rig.environment(**second.environment())
    rig.run("backup", environment=environment)
    ((system_id,),) = second.query("select system_identifier::text from pg_control_system()")
    assert (rig.folder / "local" / system_id / "wal" / "00000002.history").exists()
    second.query("insert into t select n from generate_series(3001, 4000) n")
    rig.run("switch", environment=environment)
    rig.run("backup", environment=environment)  # the history is there already: the same bytes are a success
    second.stop()
    rig.run("push", environment=environment)

    third, port = rig.target(), free_port()
    rig.json("restore", "--target-dir", str(third), "--latest", "--start", "--port", str(port))
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
        assert connection.execute("select count(*), max(n) from t").fetchall() == [(4000, 4000)]
    stop_started(third)
