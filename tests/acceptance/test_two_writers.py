"""Two services for one repository: the second is refused by name, and one that wakes after its lease does no harm."""

from __future__ import annotations

import json
import shutil
import signal
from typing import Any

import psycopg

from infra.demo.seaweed import Seaweed
from infra.postgres.throwaway import free_port, make_folder
from tests.rig import Rig
from tests.servers import NEWEST


def events(rig: Rig, name: str) -> list[dict[str, Any]]:
    """What the services have logged under that name; all of them write to one file, line by line."""
    lines = (json.loads(line) for line in rig.service_log().splitlines() if line.startswith("{") and line.endswith("}"))
    return [line for line in lines if line["event"] == name]


def test_a_second_service_is_refused_until_the_first_one_sleeps_and_then_the_first_one(
    seaweed: Seaweed, s3_prefix: str
) -> None:
    """The second one has a slot of its own; it need not know of the first, as a forgotten clone would not."""
    folder = make_folder("walship-w-")
    try:
        with Rig(folder, NEWEST, [seaweed.url(s3_prefix)], settings=seaweed.environment, sources="stream") as rig:
            rig.server.start()
            rig.sql("create table t (n int, filler text)")
            rig.run("init")
            first = rig.serve()
            rig.json("backup")

            second = rig.serve("-m", "infra.cli", WALSHIP_SLOT="second")

            def refused(text: str) -> bool:
                return any(text in line["error"] for line in events(rig, "waiting"))

            rig.wait(lambda: refused(f"is written already by process {first.pid} on "), "the second is refused")
            (line,) = events(rig, "waiting")
            assert "(slot walship)" in line["error"]
            assert "lease/00000001" in line["error"]
            assert "a clone of the server needs a repository of its own" in line["hint"]
            assert len(events(rig, "started")) == 1, "the second has shipped nothing"
            rig.sql("insert into t select n, md5(n::text) from generate_series(1, 20000) n")

            first.send_signal(signal.SIGSTOP)  # in the midst of its work
            rig.wait(lambda: len(events(rig, "started")) == 2, "the second takes over")
            assert [line["epoch"] for line in events(rig, "started")] == [1, 2]
            rig.sql("insert into t select n, md5(n::text) from generate_series(20001, 40000) n")

            first.send_signal(signal.SIGCONT)
            rig.wait(lambda: refused(f"writes to this repository: process {second.pid} on "), "the first notices")
            assert first.poll() is None, "it waits for its turn"
            rig.sql("insert into t select n, md5(n::text) from generate_series(40001, 60000) n")
            ((end,),) = rig.sql("select pg_current_wal_insert_lsn()::text")
            durable = f"select 1 from pg_stat_replication where application_name = 'second' and flush_lsn >= '{end}'"
            rig.wait(lambda: rig.sql(durable) != [], "the second has all")
            rig.destroy(second)
            rig.stop(first, signal.SIGKILL)

            target, port = rig.target(), free_port()
            rig.json("restore", "--latest", "--target-dir", str(target), "--start", "--port", str(port))
            with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
                whole = "select count(*), count(distinct n), bool_and(filler = md5(n::text)) from t"
                assert connection.execute(whole).fetchone() == (60000, 60000, True)
            assert rig.json("verify")["ok"]
    finally:
        shutil.rmtree(folder)
