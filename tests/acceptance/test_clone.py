"""A clone: the same cluster and timeline once more, on another port, with a service of its own on the same repository.

What cannot be prevented: a clone that begins exactly where the stored WAL ends, while the service of the original is
dead, goes on with it like the original would, and nothing in what is stored tells them apart. From then on the original
is the one that is refused; its commits wait (synchronous), or stay on its own disk.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import psycopg
import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.throwaway import ThrowawayServer, free_port, make_folder
from tests.acceptance.test_two_writers import events
from tests.commands import Process
from tests.rig import Load, Rig, stop_started
from tests.servers import NEWEST


class Clones:
    """An original in synchronous mode, and its clone, as they were at one moment; both run."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        rig.server.start()
        rig.sql("create table load (n bigint primary key, filler text)")
        rig.run("init")
        self.service = rig.serve()
        rig.synchronous()
        rig.json("backup")
        self.acknowledged: list[int] = []
        self.commit(50)

    def commit(self, count: int) -> None:
        """Commits on the original that are acknowledged."""
        with Load(self.rig.server) as load:
            self.rig.wait(lambda: len(load.acknowledged) >= count, "the original commits")
        self.acknowledged += load.acknowledged

    def clone(self) -> ThrowawayServer:
        """From a snapshot of the disk; commits do not wait on it."""
        rig = self.rig
        rig.server.stop()
        copy = rig.folder / "clone"
        subprocess.run(["cp", "-a", rig.server.data_dir, copy], check=True)
        clone = rig.adopt(copy)
        clone.configure({"port": str(clone.port)})
        with (copy / "postgresql.auto.conf").open("a") as conf:
            conf.write("synchronous_standby_names = ''\n")
        return clone

    def serve(self, server: ThrowawayServer) -> Process:
        """Its service, which may be refused."""
        return self.rig.serve("-m", "infra.cli", **server.environment())

    def refused(self, event: str, *texts: str) -> None:
        """Wait until a service has said that."""
        self.rig.wait(
            lambda: any(all(text in line["error"] for text in texts) for line in events(self.rig, event)),
            f"refused: {texts}",
            120,
        )

    def restored(self) -> set[int]:
        """What comes back from the bucket alone; negative numbers are of the clone."""
        rig = self.rig
        target, port = rig.target(), free_port()
        rig.json("restore", "--latest", "--target-dir", str(target), "--start", "--port", str(port))
        with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
            rows = connection.execute("select n from load").fetchall()
        stop_started(target)
        return {n for (n,) in rows}


@pytest.fixture
def clones(seaweed: Seaweed, s3_prefix: str) -> Iterator[Clones]:
    folder = make_folder("walship-l-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        rig = stack.enter_context(
            Rig(folder, NEWEST, [seaweed.url(s3_prefix)], settings=seaweed.environment, sources="stream")
        )
        yield Clones(rig)


def test_a_clone_that_is_behind_what_is_stored_is_refused(clones: Clones) -> None:
    """By the lease while the original's service runs, and by its bytes afterwards."""
    rig, first = clones.rig, clones.service
    clone = clones.clone()
    rig.server.start()
    clone.start()
    clones.commit(50)
    second = clones.serve(clone)
    clones.refused("waiting", f"is written already by process {first.pid} on ")
    assert "a clone of the server needs a repository of its own" in events(rig, "waiting")[-1]["hint"]
    rig.stop(second, signal.SIGKILL)

    # The original's service dies, and that of the clone starts: the clone has not written as much as is stored.
    rig.stop(first, signal.SIGKILL)
    second = clones.serve(clone)
    clones.refused("stream_lost", f"the WAL of PostgreSQL at 127.0.0.1:{clone.port} ends at ")
    assert "an old clone?" in events(rig, "stream_lost")[-1]["hint"]
    # Now it has, and they are other bytes.
    clone.query("insert into load select -n, repeat(md5(n::text), 20) from generate_series(1, 5000) n")
    rig.stop(second, signal.SIGKILL)
    second = clones.serve(clone)
    clones.refused("stream_lost", "the server's WAL is not the one that is stored")

    # The original comes back. As long as that of the clone holds the lease, it is told of it by name, and waits.
    first = clones.serve(rig.server)
    clones.refused("waiting", f"is written already by process {second.pid} on ")
    rig.stop(second, signal.SIGKILL)
    clones.commit(50)
    rig.destroy(first)
    clone.kill9()
    found = clones.restored()
    assert set(clones.acknowledged) <= found
    assert min(found) > 0, "nothing of the clone is stored"
    assert rig.json("verify")["ok"]


def test_a_clone_that_took_over_where_the_original_ended_is_told_apart_from_then_on(clones: Clones) -> None:
    """Nothing that was acknowledged to the original is lost or overwritten."""
    rig = clones.rig
    clone = clones.clone()
    rig.stop(clones.service, signal.SIGKILL)
    clone.start()
    second = clones.serve(clone)
    rig.wait(
        lambda: clone.query("select 1 from pg_stat_replication where state = 'streaming'") != [], "it streams", 120
    )
    clone.query("insert into load values (-1, 'of the clone')")
    ((end,),) = clone.query("select pg_current_wal_lsn()::text")
    durable = f"select 1 from pg_stat_replication where flush_lsn >= '{end}'"
    rig.wait(lambda: clone.query(durable) != [], "it is stored")

    rig.server.start()
    first = clones.serve(rig.server)
    clones.refused("waiting", f"is written already by process {second.pid} on ")
    with Load(rig.server) as load:
        rig.stop(second, signal.SIGKILL)
        clones.refused("stream_lost", "the server's WAL is not the one that is stored")
        assert load.acknowledged == [], "what is stored nowhere is not acknowledged"
        rig.destroy(first)
    clone.kill9()
    found = clones.restored()
    assert set(clones.acknowledged) <= found
    assert {n for n in found if n < 0} == {-1}
