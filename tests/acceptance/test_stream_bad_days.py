"""Bad days of the stream, through the real command: restarts, cuts, a store that is away, slots in other hands."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.processes import give, run_as
from infra.postgres.programs import environment_for
from infra.postgres.throwaway import free_port, make_folder
from tests.acceptance.test_two_writers import events
from tests.killtest import soak
from tests.proxy import Mode, Proxy
from tests.rig import Load, Rig, stop_started
from tests.servers import NEWEST

_SENDER = "select pid from pg_stat_replication where application_name = 'walship'"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def folder(stack: ExitStack) -> Path:
    made = make_folder("walship-d-")
    stack.callback(shutil.rmtree, made)
    return made


@pytest.fixture
def local(stack: ExitStack, folder: Path) -> Rig:
    """A server that streams, and a local store; nothing runs yet."""
    return stack.enter_context(Rig(folder, NEWEST, [f"file://{folder}/store"], sources="stream"))


def restored(rig: Rig, query: str, *words: str) -> tuple[list[tuple[object, ...]], str]:
    """What the query says on a cluster that was restored so (to latest), and what restore has said."""
    target, port = rig.target(), free_port()
    done = rig.run("restore", *words, "--target-dir", str(target), "--start", "--port", str(port))
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
        rows = connection.execute(query.encode()).fetchall()
    stop_started(target)
    return rows, done.stderr


def checked(rig: Rig, expect: int = 10) -> str:
    """What ``walship check`` prints."""
    return rig.run("check", expect=expect).stdout


def said(rig: Rig, event: str, text: str) -> Callable[[], bool]:
    """Whether the service has logged an error like that."""
    return lambda: any(text in line["error"] for line in events(rig, event))


# -- the server and the way to it


def test_a_server_that_is_restarted_five_times(seaweed: Seaweed, s3_prefix: str) -> None:
    soak.restarts(seaweed, s3_prefix, count=5)


def test_a_connection_that_is_cut_every_second(seaweed: Seaweed, s3_prefix: str) -> None:
    soak.cuts(seaweed, s3_prefix, seconds=6)


def test_a_server_that_is_not_made_for_it_is_told_what_it_lacks(local: Rig) -> None:
    """The service waits, and goes on by itself once it is right."""
    rig = local
    rig.server.start({"wal_level": "minimal", "max_wal_senders": "0"})
    rig.sql("create role plain login")
    rig.run("init")
    assert "wal_level is minimal" in checked(rig)
    service = rig.serve(POSTGRES_USERNAME="plain")
    rig.wait(said(rig, "stream_lost", "no free WAL sender"), "it is told")
    rig.server.stop()
    rig.server.start()
    rig.wait(said(rig, "stream_lost", "the role plain"), "the missing right is told")
    assert 'ALTER ROLE "plain" REPLICATION' in events(rig, "stream_lost")[-1]["hint"]
    rig.sql("alter role plain replication")
    rig.sql("grant pg_monitor to plain")
    rig.wait(rig.streams, "it streams")
    assert rig.stop(service) == 0


def test_a_slot_in_other_hands_is_left_there_by_name(local: Rig, folder: Path, stack: ExitStack) -> None:
    """And a second connection of our name would release commits in our place."""
    rig = local
    rig.server.start()
    rig.run("init")
    rig.sql("select pg_create_physical_replication_slot('walship', true)")
    holder = receivewal(rig, folder, stack, "--slot", "walship")
    rig.wait(lambda: rig.sql("select active from pg_replication_slots") == [(True,)], "the slot is in use")
    service = rig.serve()
    rig.wait(said(rig, "stream_lost", "the replication slot walship belongs to pg_receivewal (process "), "told")
    assert "the slot walship is in use by another program: pg_receivewal (process " in checked(rig)
    assert "set WALSHIP_SLOT" in events(rig, "stream_lost")[-1]["hint"]
    holder.kill()
    holder.wait()
    rig.synchronous()
    rig.sql("create table t (n int)")
    checked(rig, expect=0)

    # One that calls itself as we do, on no slot of ours, and confirms what is stored nowhere.
    impostor = receivewal(rig, folder, stack, "--synchronous", name="WALSHIP")
    rig.wait(lambda: len(rig.sql("select 1 from pg_stat_replication where state = 'streaming'")) == 2, "it streams")
    assert "commits need not wait for walship: other connections release them in its place (WALSHIP" in checked(rig)
    rig.sql("alter system set synchronous_standby_names = '*'")
    rig.server.reload()
    rig.wait(lambda: rig.sql("show synchronous_standby_names") == [("*",)], "the setting is there")
    assert "* matches every connection" in checked(rig)
    impostor.kill()
    impostor.wait()
    rig.sql("alter system set synchronous_standby_names = 'walship'")
    rig.sql("alter system set synchronous_commit = 'remote_apply'")
    rig.server.reload()
    rig.wait(lambda: rig.sql("show synchronous_commit") == [("remote_apply",)], "the setting is there")
    assert "synchronous_commit is remote_apply: commits wait until walship has replayed them" in checked(rig)
    assert rig.stop(service) == 0


def receivewal(
    rig: Rig, folder: Path, stack: ExitStack, *words: str, name: str = "pg_receivewal"
) -> subprocess.Popen[bytes]:
    """Another receiver, ended with the test."""
    into = folder / f"received-{name}"
    into.mkdir()
    give(into, run_as())
    receiver = stack.enter_context(
        subprocess.Popen(
            [rig.bin_dir / "pg_receivewal", "--directory", str(into), "--no-loop",
             "--dbname", f"{rig.server.dsn()} application_name={name}", *words],
            env=environment_for(rig.bin_dir), stderr=subprocess.DEVNULL, cwd="/", **run_as(),
        )
    )  # fmt: skip
    stack.callback(receiver.kill)
    return receiver


# -- the store


def test_more_wal_than_the_server_keeps_while_the_store_is_away(
    stack: ExitStack, folder: Path, seaweed: Seaweed, s3_prefix: str
) -> None:
    """The hole is told, the service goes on, and a new base backup makes the repository whole."""
    store = stack.enter_context(Proxy(int(seaweed.endpoint.rpartition(":")[2]), http=True))
    url = seaweed.url(s3_prefix).replace(seaweed.endpoint, f"http://127.0.0.1:{store.port}")
    rig = stack.enter_context(
        Rig(folder, NEWEST, [url], settings=seaweed.environment, sources="stream",
            server_settings={"max_slot_wal_keep_size": "3MB", "min_wal_size": "2MB", "max_wal_size": "4MB"})
    )  # fmt: skip
    rig.server.start()
    rig.sql("create table t (n int, filler text)")
    rig.run("init")
    service = rig.serve()
    rig.json("backup")
    rig.sql("insert into t values (0, 'before')")
    rig.caught_up()
    store.turn(Mode.DOWN)
    for n in range(1, 4):
        rig.sql(f"insert into t select {n}, md5(random()::text) from generate_series(1, 50000)")
        rig.sql("checkpoint")
    store.turn(Mode.PASS)
    rig.wait(lambda: events(rig, "gap_opened") != [], "the hole is told", 60)
    (gap,) = events(rig, "gap_opened")
    assert gap["level"] == "error"
    assert "take a new base backup now" in gap["hint"]
    rig.caught_up()
    status = rig.json("status")
    assert not status["healthy"]
    assert any(f"{gap['first']} is missing" in reason for reason in status["reasons"]), status["reasons"]
    since = time.monotonic() + 1  # what is reported is told once a second
    rig.wait(lambda: store.renewed_since(since), "the lease says that what lies behind the hole is safe")
    # Until then: no word of latest, but where the WAL ends, and how to get there.
    refused = rig.run("restore", "--latest", "--target-dir", str(rig.target()), expect=13).stderr
    assert f"segment {gap['first']} is missing: the latest state cannot be reached" in refused
    position = re.search(r"--to-lsn ([0-9A-F]+/[0-9A-F]+)", refused)
    assert position is not None, refused
    (newest,) = restored(rig, "select max(n) from t", "--to-lsn", position[1])[0][0]
    assert newest in (0, 1), "what was in memory when the store went away may have come through"
    rig.json("backup")
    rig.sql("insert into t values (9, 'after')")
    rig.caught_up()
    reasons = rig.json("status")["reasons"]
    assert not any("what lies behind it cannot be reached" in reason for reason in reasons), reasons
    assert restored(rig, "select count(*), max(n) from t")[0] == [(150002, 9)]
    assert rig.stop(service) == 0


def test_a_store_that_is_stuck_and_then_answers_503_for_long(
    stack: ExitStack, folder: Path, seaweed: Seaweed, s3_prefix: str
) -> None:
    """Four seconds each, for the minutes that it takes on a real day; the rest is as long as it is."""
    store = stack.enter_context(Proxy(int(seaweed.endpoint.rpartition(":")[2]), http=True))
    url = seaweed.url(s3_prefix).replace(seaweed.endpoint, f"http://127.0.0.1:{store.port}")
    rig = stack.enter_context(
        Rig(folder, NEWEST, [url], settings=seaweed.environment, sources="stream",
            server_settings={"wal_sender_timeout": "3s"})
    )  # fmt: skip
    rig.server.start()
    rig.run("init")
    service = rig.serve()
    rig.json("backup")
    rig.wait(rig.streams, "it streams")
    sender = rig.sql(_SENDER)
    with Load(rig.server, pause=0.001) as load:
        store.turn(Mode.STALL)
        time.sleep(4)  # more than the server waits for a sign of life
        assert rig.sql(_SENDER) == sender, "the connection lives on"
        store.turn(Mode.BUSY)
        store.cut()
        time.sleep(4)
        assert rig.sql(_SENDER) == sender, "still"
        # Far more than what is held in memory, and nobody waits for the store.
        assert len(load.acknowledged) > 300
        rig.sql("insert into load select -n, repeat(md5(random()::text), 20) from generate_series(1, 10000) n")
        began = time.monotonic()
        rig.server.stop("fast", timeout=30)
        assert time.monotonic() - began < 25
    rig.wait(said(rig, "stream_lost", "is shutting down and has waited 10 seconds"), "why is told")
    assert events(rig, "destination_failed") != []
    rig.server.start()
    store.turn(Mode.PASS)
    rig.caught_up()
    assert not events(rig, "gap_opened")
    rig.destroy(service)
    rows, _ = restored(rig, "select n from load where n > 0")
    assert {n for (n,) in rows} >= set(load.acknowledged)
    assert rig.json("verify")["ok"]


def test_a_bucket_that_refuses_deletes_is_told_once_and_shipping_goes_on(
    stack: ExitStack, folder: Path, seaweed: Seaweed, s3_prefix: str
) -> None:
    deny(seaweed, s3_prefix)
    stack.callback(deny, seaweed, "")
    rig = stack.enter_context(
        Rig(folder, NEWEST, [seaweed.url(s3_prefix)], settings={**seaweed.environment, "WALSHIP_TAIL_INTERVAL": "0.1"},
            sources="stream")
    )  # fmt: skip
    rig.server.start()
    rig.sql("create table t (n int)")
    rig.run("init")
    service = rig.serve()
    rig.json("backup")
    for n in range(3):
        rig.sql(f"insert into t values ({n})")
        rig.caught_up()
        rig.sql("select pg_switch_wal()")
        rig.caught_up()
    rig.wait(lambda: events(rig, "delete_refused") != [], "it is told")
    rig.sql("insert into t values (3)")
    rig.sql("select pg_switch_wal()")
    rig.caught_up()
    (told,) = events(rig, "delete_refused")
    assert "tails that are no longer needed cannot be deleted" in told["error"]
    assert "s3:DeleteObject" in told["hint"]
    rig.destroy(service)
    assert restored(rig, "select n from t order by n")[0] == [(0,), (1,), (2,), (3,)]
    assert rig.json("verify")["ok"]


def deny(seaweed: Seaweed, prefix: str) -> None:
    """Let nobody delete below the prefix; with none, let everybody again."""
    import botocore.session

    client: Any = botocore.session.get_session().create_client(
        "s3", region_name="us-east-1", endpoint_url=seaweed.endpoint, aws_access_key_id=seaweed.access_key,
        aws_secret_access_key=seaweed.secret_key,
    )  # fmt: skip
    if not prefix:
        client.delete_bucket_policy(Bucket=seaweed.bucket)
        return
    statement = {
        "Effect": "Deny", "Principal": "*", "Action": ["s3:DeleteObject"],
        "Resource": [f"arn:aws:s3:::{seaweed.bucket}/{prefix}/*"],
    }  # fmt: skip
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    client.put_bucket_policy(Bucket=seaweed.bucket, Policy=policy)


def test_a_damaged_tail_at_the_end_of_life_ends_the_restore_before_it_and_says_so(local: Rig, folder: Path) -> None:
    rig = local
    rig.server.start()
    rig.sql("create table t (n int)")
    rig.run("init")
    service = rig.serve()
    rig.json("backup")
    rig.caught_up()
    tails: list[Path] = []
    for n in (1, 2):
        rig.sql(f"insert into t values ({n})")
        rig.caught_up()
        tails = sorted((folder / "store").glob("*/tail/*/*"), key=lambda path: path.name[9:])
        last, content = tails[-1], tails[-1].read_bytes()
    ((segment,),) = rig.sql("select pg_walfile_name(pg_current_wal_lsn())")
    assert last.parent.name == segment
    # The host goes on for a while in a copy of the store, for the end of this test.
    rig.stop(service, signal.SIGKILL)
    position = len(content) // 2
    flipped = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    for damaged in (flipped, content[:position]):
        last.write_bytes(damaged)
        rows, words = restored(rig, "select n from t order by n")
        assert rows == [(1,)]
        assert last.name in words, words
        assert last.name in rig.run("verify", expect=12).stdout
    # Once the finished segment covers it, it is of no interest, damaged as it is.
    again = rig.serve()
    rig.sql("insert into t values (3)")
    rig.sql("select pg_switch_wal()")
    rig.caught_up()
    rig.stop(again, signal.SIGKILL)
    last.parent.mkdir(exist_ok=True)
    last.write_bytes(content[:position])
    assert restored(rig, "select n from t order by n")[0] == [(1,), (2,), (3,)]


# -- clocks
