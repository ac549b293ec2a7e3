"""The promise: losing the host costs one second of commits, or none in synchronous mode. ``make kill-test`` does more.

The rounds here are fixed; ``tests/killtest`` says what happens in one.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

import psycopg
import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.throwaway import free_port, make_folder
from tests.killtest.plan import Pace, Plan, Trouble
from tests.killtest.round import play
from tests.proxy import Mode, Proxy
from tests.rig import Rig, stop_started
from tests.servers import NEWEST

_ROUND = Plan(
    seed=2026, number=1, synchronous=True, major=NEWEST, segment_mb=1, sources="stream", local=False, encrypted=True,
    delay=0.02, clients=4, pace=Pace.BRISK, longest=10_000, switches=0.0, checkpoints=0.0, backup_under_load=False,
    trouble=Trouble.NONE, until_kill=2.0,
)  # fmt: skip


@pytest.mark.parametrize(
    "plan",
    [
        replace(_ROUND, number=1, trouble=Trouble.SERVICE_KILLED),
        replace(_ROUND, number=2, major=15, segment_mb=16, sources="watch,stream", local=True, switches=2.0),
        replace(_ROUND, number=3, synchronous=False, major=16, sources="watch,stream", local=True, clients=8),
        replace(_ROUND, number=4, synchronous=False, major=17, segment_mb=16, pace=Pace.STEADY, until_kill=2.6,
                trouble=Trouble.STORE_CUT),
    ],
    ids=lambda plan: f"{'sync' if plan.synchronous else 'async'}-{plan.number}",
)  # fmt: skip
def test_what_was_acknowledged_outlives_the_host(plan: Plan, seaweed: Seaweed, s3_prefix: str) -> None:
    outcome = play(plan, seaweed, s3_prefix)
    assert not outcome.violations
    assert outcome.acknowledged > 3


def test_what_was_on_its_way_when_the_host_was_lost_is_no_hole(seaweed: Seaweed, s3_prefix: str) -> None:
    """A later segment has arrived and an earlier one has not: all that was acknowledged lies before both."""
    folder = make_folder("walship-q-")
    try:
        with (
            Proxy(int(seaweed.endpoint.rpartition(":")[2]), http=True) as store,
            Rig(
                folder, NEWEST, [seaweed.url(s3_prefix).replace(seaweed.endpoint, f"http://127.0.0.1:{store.port}")],
                settings=seaweed.environment, segment_mb=1, sources="stream",
            ) as rig,
        ):  # fmt: skip
            rig.server.start()
            rig.sql("create table t (n int)")
            rig.run("init")
            service = rig.serve()
            rig.json("backup")
            rig.synchronous()
            rig.sql("insert into t values (1)")
            ((late, later),) = rig.sql(
                "select pg_walfile_name(here + (1 << 20)), pg_walfile_name(here + (2 << 20))"
                " from pg_current_wal_lsn() here"
            )
            since = time.monotonic() + 1  # what is reported is told once a second
            rig.wait(lambda: store.renewed_since(since), "the lease says what is safe")
            store.held = f"/{late}"
            for n in (2, 3, 4):  # each one transaction, whose commit lies behind the switch
                rig.sql(f"set synchronous_commit = local; insert into t values ({n}); select pg_switch_wal()")
            rig.wait(
                lambda: any(put.path.endswith(f"/{later}") and put.seconds is not None for put in store.requests),
                "the segment behind the one that hangs is stored",
            )
            rig.destroy(service, first=lambda: store.turn(Mode.DOWN))
            store.held = ""
            store.turn(Mode.PASS)
            target, port = rig.target(), free_port()
            done = rig.run("restore", "--latest", "--target-dir", str(target), "--start", "--port", str(port))
            assert f"segment {late} is not stored whole, and WAL behind it is" in done.stdout + done.stderr
            with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
                assert connection.execute("select n from t order by n").fetchall() == [(1,)]
            stop_started(target)
    finally:
        shutil.rmtree(folder)


def test_one_commit_on_a_quiet_database_is_safe_within_its_second(seaweed: Seaweed, s3_prefix: str) -> None:
    """Nothing finishes the segment, and the service is killed in between: the second commit needs both tails."""
    folder = make_folder("walship-q-")
    try:
        with (
            Proxy(int(seaweed.endpoint.rpartition(":")[2]), http=True) as store,
            Rig(
                folder, NEWEST, [seaweed.url(s3_prefix).replace(seaweed.endpoint, f"http://127.0.0.1:{store.port}")],
                settings=seaweed.environment, segment_mb=16, sources="stream",
            ) as rig,
        ):  # fmt: skip
            rig.server.start()
            rig.sql("create table t (n int)")
            rig.run("init")
            service = rig.serve()
            rig.json("backup")
            rig.caught_up()
            rig.sql("insert into t values (1)")
            ((segment,),) = rig.sql("select pg_walfile_name(pg_current_wal_lsn())")
            rig.wait(lambda: any(f"/tail/{segment}/" in put.path for put in store.requests), "a tail is stored")
            service.kill()
            service.wait()
            service = rig.serve()
            rig.wait(rig.streams, "the service streams again")
            rig.sql("insert into t values (2)")
            time.sleep(2.5)  # the promise: one second, and one PUT
            assert rig.sql("select pg_walfile_name(pg_current_wal_lsn())") == [(segment,)]
            rig.destroy(service, first=lambda: store.turn(Mode.DOWN))
            assert not any(put.path.endswith(f"/{segment}") for put in store.requests), "the segment was never finished"
            store.turn(Mode.PASS)
            target, port = rig.target(), free_port()
            rig.json("restore", "--latest", "--target-dir", str(target), "--start", "--port", str(port))
            with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
                assert connection.execute("select n from t order by n").fetchall() == [(1,), (2,)]
            stop_started(target)
    finally:
        shutil.rmtree(folder)
