"""A standby is promoted: the service follows without a hand, and both timelines can be restored."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import psycopg
import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.throwaway import free_port, make_folder
from pipeline.wal import Lsn, parse_history
from tests.acceptance.test_two_writers import events
from tests.proxy import Mode, Proxy
from tests.rig import Load, Rig, stop_started
from tests.servers import NEWEST

_OLD = "and another server has gone over to timeline 2 already: it was primary before, and is not followed"
_OLD_STORED = "has gone over to timeline 2 in this repository: it was primary before, and is not followed"
#: All of a table of rows (n, filler) in three values.
CONTENT = "select count(*), max(n), md5(string_agg(n || filler, ',' order by n)) from"


@dataclass(frozen=True)
class Moment:
    """What a table held at a time of the server's clock."""

    time: str
    content: tuple[object, ...]


class Pair:
    """A primary that is shipped, and its standby; ``rig.server`` is the one that is primary."""

    def __init__(self, rig: Rig) -> None:
        """The primary has to run."""
        self.rig = rig
        self.primary = rig.server
        copy = rig.folder / "standby"
        self.primary.run("pg_basebackup", "-D", str(copy), "-R", "-c", "fast", "-d", self.primary.dsn())
        self.standby = rig.adopt(copy)
        self.standby.start()
        rig._restored.append(self.primary)  # to be ended with the rig, whoever is primary then
        both = (self.primary, self.standby)
        rig.extra["POSTGRES_HOST"] = ",".join(server.host for server in both)
        rig.extra["POSTGRES_PORT"] = ",".join(str(server.port) for server in both)

    def insert(self, count: int) -> Moment:
        """More rows on the primary; returns the moment after them."""
        self.rig.sql(
            "insert into t select coalesce(max, 0) + n, repeat(md5(n::text), 20)"
            f" from (select max(n) from t), generate_series(1, {count}) n"
        )
        (content,) = self.rig.sql(f"{CONTENT} t")
        ((time,),) = self.rig.sql("select clock_timestamp()::text")
        return Moment(time, content)

    def replayed(self) -> None:
        ((end,),) = self.rig.sql("select pg_current_wal_lsn()::text")
        caught_up = f"select pg_last_wal_replay_lsn() >= '{end}'"
        self.rig.wait(lambda: self.standby.query(caught_up) == [(True,)], "the standby has caught up")

    def promote(self) -> Lsn:
        """The standby is the primary from now on; returns the fork."""
        self.rig.server = self.standby
        assert self.standby.query("select pg_promote()") == [(True,)]
        (fork,) = parse_history("2", (self.standby.data_dir / "pg_wal" / "00000002.history").read_bytes())
        return fork.lsn

    def restored(self, *words: str, query: str = f"{CONTENT} t") -> list[tuple[object, ...]]:
        """What the query says on a cluster that was restored so."""
        target, port = self.rig.target(), free_port()
        self.rig.json("restore", *words, "--target-dir", str(target), "--start", "--port", str(port))
        with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
            rows = connection.execute(query.encode()).fetchall()
        stop_started(target)
        return rows


class House:
    """A folder, and a store behind a proxy."""

    def __init__(self, stack: ExitStack, seaweed: Seaweed, prefix: str, sources: str, major: int = NEWEST) -> None:
        folder = make_folder("walship-f-")
        stack.callback(shutil.rmtree, folder)
        self.store = stack.enter_context(Proxy(int(seaweed.endpoint.rpartition(":")[2]), http=True))
        self.rig = stack.enter_context(
            Rig(
                folder, major, [seaweed.url(prefix).replace(seaweed.endpoint, f"http://127.0.0.1:{self.store.port}")],
                settings=seaweed.environment, sources=sources,
                server_settings={"wal_keep_size": "64MB", "max_wal_senders": "8"},
            )
        )  # fmt: skip
        self.rig.server.start()
        self.rig.sql("create table t (n int primary key, filler text)")
        self.rig.run("init")
        self.pair = Pair(self.rig)

    def stored(self) -> list[str]:
        """Names of objects in the order in which they were asked to be stored; the prefix is left out."""
        puts = [each for each in self.store.requests if each.method == "PUT" and not each.failed]
        return ["/".join(each.path.split("/")[4:]) for each in puts]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.mark.parametrize(("sources", "major"), [("stream", NEWEST), ("watch,stream", 16)])
def test_a_promoted_standby_is_followed_and_every_moment_comes_back(
    stack: ExitStack, seaweed: Seaweed, s3_prefix: str, sources: str, major: int
) -> None:
    house = House(stack, seaweed, s3_prefix, sources, major)
    rig, pair = house.rig, house.pair
    service = rig.serve()
    rig.json("backup")
    before = pair.insert(3000)
    rig.caught_up()
    pair.insert(100)
    pair.replayed()
    pair.primary.kill9()
    pair.promote()
    across = pair.insert(10)
    rig.caught_up()
    after = pair.insert(3000)
    pair.insert(7)
    rig.caught_up()
    last = rig.sql(f"{CONTENT} t")
    assert events(rig, "stream_started")[-1]["timeline"] == 2
    assert not [line for line in events(rig, "timeline_left") if "error" in line], "nothing was left behind"
    assert not events(rig, "gap_opened")
    if sources == "stream":
        names = house.stored()
        first = next(at for at, name in enumerate(names) if name.startswith("tail/00000002"))
        assert first < names.index("wal/00000002.history"), "the first bytes of a timeline come before its history"

    for moment in (before, across, after) if sources == "stream" else (across,):
        assert pair.restored("--to-time", moment.time) == [moment.content]
    assert pair.restored("--latest") == last
    assert rig.stop(service) == 0
    assert rig.json("verify")["ok"]


def test_the_old_primary_is_not_followed_when_it_runs_again(stack: ExitStack, seaweed: Seaweed, s3_prefix: str) -> None:
    """It is the first that is asked, as a host that has booted again may be; the other one is followed all the same."""
    house = House(stack, seaweed, s3_prefix, "stream")
    rig, pair = house.rig, house.pair
    service = rig.serve()
    rig.json("backup")
    pair.insert(100)
    rig.caught_up()
    pair.replayed()
    pair.primary.kill9()
    pair.promote()
    pair.insert(10)
    rig.caught_up()
    pair.primary.start()
    pair.primary.query("insert into t values (-1, 'only on the old primary')")
    rig.sql("select pg_terminate_backend(pid) from pg_stat_replication where application_name = 'walship'")

    def refused() -> bool:
        return any(_OLD in line["error"] and "pg_rewind" in line["hint"] for line in events(rig, "stream_lost"))

    rig.wait(refused, "the old primary is refused")
    pair.insert(5)
    rig.caught_up()
    # And by a service that remembers nothing of it.
    service.kill()
    service.wait()
    (rig.folder / "service.log").unlink()
    service = rig.serve()
    rig.wait(
        lambda: any(_OLD_STORED in line["error"] for line in events(rig, "stream_lost")), "it is refused again", 10
    )
    pair.insert(5)
    rig.caught_up()
    assert pair.primary.query("select 1 from pg_replication_slots where active") == []
    last = rig.sql(f"{CONTENT} t")
    assert pair.restored("--latest") == last
    assert rig.stop(service) == 0


def test_commits_that_the_new_primary_never_had_are_told_and_come_back(
    stack: ExitStack, seaweed: Seaweed, s3_prefix: str
) -> None:
    """The standby hears nothing for a while; then the host of the primary is gone."""
    house = House(stack, seaweed, s3_prefix, "stream")
    rig, pair = house.rig, house.pair
    service = rig.serve()
    rig.json("backup")
    pair.insert(100)
    pair.replayed()
    pair.standby.kill9()
    left = pair.insert(2000)
    rig.caught_up()
    pair.primary.kill9()
    pair.standby.start()
    fork = pair.promote()
    pair.insert(10)
    rig.caught_up()
    last = rig.sql(f"{CONTENT} t")
    (told,) = events(rig, "timeline_left")
    assert (told["level"], told["timeline"], told["fork"]) == ("warning", 1, str(fork))
    assert "commits in them are not on the new timeline" in told["error"]
    assert "restore --timeline 1 brings them back" in told["hint"]
    assert rig.stop(service) == 0
    assert pair.restored("--latest") == last
    assert pair.restored("--timeline", "1") == [left.content]


def test_no_acknowledged_commit_is_lost_when_a_failover_and_the_end_of_all_hosts_come_together(
    stack: ExitStack, seaweed: Seaweed, s3_prefix: str
) -> None:
    """Synchronous all along; the service is killed in the midst of the switch, and then the new primary as well."""
    house = House(stack, seaweed, s3_prefix, "watch,stream")
    rig, pair = house.rig, house.pair
    service = rig.serve()
    rig.synchronous()
    rig.json("backup")
    with Load(pair.primary) as first:
        rig.wait(lambda: len(first.acknowledged) > 200, "clients commit")
        pair.primary.kill9()
    house.store.turn(Mode.STALL)  # the switch begins, and comes to no end
    pair.standby.query("alter system set synchronous_standby_names = 'walship'")  # as on the primary, by then
    pair.standby.reload()
    rig.wait(lambda: pair.standby.query("show synchronous_standby_names") == [("walship",)], "the standby knows")
    pair.promote()
    with Load(pair.standby) as second:
        rig.wait(lambda: events(rig, "stream_lost") != [], "the service has noticed")
        rig.stop(service, signal.SIGKILL)
        assert second.acknowledged == [], "nothing of the new timeline is stored"
        house.store.turn(Mode.PASS)
        service = rig.serve()
        rig.wait(lambda: len(second.acknowledged) > 200, "clients commit again")
        rig.destroy(service, first=lambda: house.store.turn(Mode.DOWN))
    shutil.rmtree(pair.primary.data_dir)
    house.store.turn(Mode.PASS)
    numbers = "select n from load"
    old = {n for (n,) in pair.restored("--timeline", "1", query=numbers)}
    assert set(first.acknowledged) <= old
    new = {n for (n,) in pair.restored("--latest", query=numbers)}
    assert set(second.acknowledged) <= new
    assert not events(rig, "gap_opened")


@pytest.mark.parametrize("stage", ["tail", "history"])
def test_killed_in_the_midst_of_the_switch_it_goes_on(
    stack: ExitStack, seaweed: Seaweed, s3_prefix: str, stage: str
) -> None:
    """After the first bytes of the new timeline, and before its history; and right after that."""
    house = House(stack, seaweed, s3_prefix, "stream")
    rig, pair = house.rig, house.pair
    service = rig.serve()
    rig.json("backup")
    pair.insert(500)
    rig.caught_up()
    pair.insert(500)
    pair.replayed()
    pair.primary.kill9()
    pair.promote()
    pair.insert(500)
    wanted = {"tail": "tail/00000002", "history": "wal/00000002.history"}[stage]
    rig.wait(lambda: any(name.startswith(wanted) for name in house.stored()), "the switch is under way")
    rig.stop(service, signal.SIGKILL)
    service = rig.serve()
    pair.insert(500)
    rig.caught_up()
    last = rig.sql(f"{CONTENT} t")
    names = house.stored()
    first = next(at for at, name in enumerate(names) if name.startswith(("tail/00000002", "wal/0000000200000000")))
    assert first < names.index("wal/00000002.history")
    assert not events(rig, "gap_opened")
    assert pair.restored("--latest") == last
    assert rig.stop(service) == 0
    assert rig.json("verify")["ok"]
