"""Every way to take a base backup, under load, of a cluster with a bit of everything: restored, it is the cluster.

Each restore replays the WAL up to the same end, and is compared with what the server said at that end: by content, per
table of every database, and by what its indexes find.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import psycopg
import pytest

from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import ThrowawayServer, make_folder
from tests.rig import Load, Rig
from tests.servers import SERVER_VERSIONS

_WIDE = """
create table plain (n int primary key, kind text, filler text);
insert into plain select n, 'kind ' || n % 7, md5(n::text) from generate_series(1, 4000) n;
create table ranged (day date, n int, note text, primary key (day, n)) partition by range (day);
create table ranged_25 partition of ranged for values from ('2025-01-01') to ('2026-01-01');
create table ranged_26 partition of ranged for values from ('2026-01-01') to ('2027-01-01') tablespace stays;
insert into ranged select date '2025-06-01' + n, n, repeat('note ', n % 9) from generate_series(1, 500) n;
create table listed (place text, n int) partition by list (place);
create table listed_a partition of listed for values in ('a', 'b') partition by range (n);
create table listed_a1 partition of listed_a default;
create table listed_rest partition of listed default;
insert into listed select chr(97 + n % 5), n from generate_series(1, 1000) n;
create table wide (n int primary key, outside text, doc jsonb, words tsvector, box box, span int4range);
alter table wide alter outside set storage external;
insert into wide select n, repeat(md5(n::text), 150), jsonb_build_object('n', n, 'half', n / 2),
  to_tsvector('simple', 'word' || n || ' all'), box(point(n, n), point(n + 1, n + 1)), int4range(n, n + 3)
  from generate_series(1, 300) n;
create unlogged table unlogged (n int primary key, b bigserial);
insert into unlogged select n from generate_series(1, 500) n;
create table placed (n int primary key using index tablespace goes, filler text) tablespace goes;
create table in_place (n int) tablespace in_place;
insert into in_place select n from generate_series(1, 2000) n;
insert into placed select n, md5(n::text) from generate_series(1, 3000) n;
create sequence numbers increment 3;
create index by_hash on plain using hash (filler);
create index by_expression on plain (upper(kind)) where n % 2 = 0;
create index by_brin on plain using brin (n) with (pages_per_range = 1);
create index by_gin on wide using gin (doc);
create index by_words on wide using gin (words);
create index by_gist on wide using gist (span);
create index by_spgist on wide using spgist (box);
create materialized view summary as select kind, count(*) from plain group by kind;
create unique index on summary (kind);
create view seen as select * from plain where n < 10;
create extension bloom;
create index by_bloom on plain using bloom (n, kind);
select lo_from_bytea(0, decode(repeat(md5(n::text), 300), 'hex')) from generate_series(1, 20) n
"""
#: What an index finds, asked with the table closed to sequential scans.
_PROBES = (
    "select count(*) from plain where filler = md5('77')",
    "select count(*) from plain where upper(kind) = 'KIND 3' and n % 2 = 0",
    "select sum(n) from plain where n between 500 and 900",
    "select sum(n) from plain where n = 123 and kind = 'kind 4'",
    "select sum(n) from wide where doc @> '{\"half\": 20}'",
    "select sum(n) from wide where words @@ 'word17'",
    "select sum(n) from wide where span @> 50",
    "select sum(n) from wide where box <@ box(point(0, 0), point(90, 90))",
    "select sum(n), min(filler) from placed where n > 2500",
    "select sum(n) from ranged where day > '2026-01-15'",
)
_TABLES = """
select c.oid::regclass::text from pg_class c join pg_namespace s on s.oid = relnamespace
where relkind in ('r', 'm') and relpersistence = 'p' and nspname not like 'pg_%' and nspname <> 'information_schema'
order by 1
"""
_LARGE = "select oid, md5(lo_get(oid)) from pg_largeobject_metadata order by oid"
#: The WAL is up to 32 values of a sequence ahead.
_SEQUENCE = "select (last_value - 1) / 3 from numbers"
#: The oldest and the newest. What a standby sends and holds changed with 16 in nothing but tablespaces in place, which
#: the primary of 16 sends as well, and with 17 in nothing.
_OF_STANDBYS = (SERVER_VERSIONS[0], SERVER_VERSIONS[-1])
#: What goes on in these tables while backups are taken.
_CHURN = (
    "update plain set filler = md5(filler), kind = 'kind ' || (n + 1) % 7 where n % 97 = {n} % 97",
    "insert into wide (n, outside) values (1000 + {n}, repeat(md5('{n}'), 200))",
    "delete from wide where n = 990 + {n}",
    "update placed set filler = 'new {n}' where n % 50 = {n} % 50",
    "insert into listed values ('a', {n}), ('z', {n})",
    "create table passing_{n} as select n from generate_series(1, 100) n",
    "select nextval('numbers'), lo_from_bytea(0, 'large {n}')",
    "update in_place set n = n + 1 where n % 90 = {n} % 90",
    "drop table passing_{n}",
    "truncate listed_rest",
    "vacuum plain",
    "refresh materialized view concurrently summary",
    "checkpoint",
)


class Churn:
    """Statements of every kind, one after the other, until it is stopped."""

    def __init__(self, server: ThrowawayServer) -> None:
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self.rounds = 0
        self.error: Exception | None = None

    def _work(self) -> None:
        try:
            with psycopg.connect(self._server.dsn("wide"), autocommit=True) as connection:
                while not self._stop.is_set():
                    for statement in _CHURN:
                        connection.execute(statement.format(n=self.rounds).encode())
                        time.sleep(0.04)
                    self.rounds += 1
        except Exception as error:  # noqa: BLE001 - raised by the test's own thread
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        if self.error is not None:
            raise self.error


class Cluster:
    """The cluster, its backups, and what it held at the end."""

    def __init__(self, folder: Path, major: int) -> None:
        settings = {"wal_keep_size": "1GB", "autovacuum": "off", "allow_in_place_tablespaces": "on"}
        if major >= 17:
            settings["summarize_wal"] = "on"
        self.rig = Rig(folder, major, [f"file://{folder}/store"], server_settings=settings)
        self.folder = folder
        self.major = major

    def tablespace(self, name: str) -> None:
        place = self.folder / f"space_{name}"
        place.mkdir()
        give(place, run_as())
        self.rig.sql(f"create tablespace {name} location '{place}'")

    def script(self, statements: str, dbname: str = "wide") -> None:
        with psycopg.connect(self.rig.server.dsn(dbname), autocommit=True) as connection:
            for statement in statements.split(";\n"):
                connection.execute(statement.encode())

    def fill(self) -> None:
        for name in ("stays", "goes"):
            self.tablespace(name)
        if self.major >= 16:
            self.rig.sql("create tablespace in_place location ''")
        else:  # whose BASE_BACKUP knows nothing of tablespaces in place
            self.tablespace("in_place")
        for name in ("wide", "other", "dropped"):
            self.rig.sql(f"create database {name} template template0")
        self.script(_WIDE)
        self.script("create table other as select n, 'x' || n from generate_series(1, 2000) n", "other")

    def back_up(self, *words: str, **changed: str) -> str:
        done = self.rig.run("backup", *words, environment=self.rig.environment(**changed))
        assert "DAMAGED" not in done.stdout
        assert "warns" not in done.stderr, done.stderr
        return done.stdout.partition(":")[0]

    def standby(self) -> ThrowawayServer:
        """One that follows by streaming; its tablespaces are its own."""
        standby = ThrowawayServer(self.rig.bin_dir, self.folder / "standby")
        places = []
        for (place,) in self.rig.sql("select pg_tablespace_location(oid) from pg_tablespace where oid > 16000"):
            if place.startswith("/"):
                places += ["--tablespace-mapping", f"{place}={place}_standby"]
        self.rig.server.run(
            "pg_basebackup", "-D", str(standby.data_dir), "-d", self.rig.server.dsn(), "-R", "-c", "fast", *places
        )
        standby.start()
        self.rig.wait(
            lambda: self.rig.sql("select 1 from pg_stat_replication where state = 'streaming'") != [], "it follows"
        )
        return standby

    def restore(self, backup: str, spaces: Sequence[str], before_start: Path) -> ThrowawayServer:
        """Lay it down, have pg_verifybackup look at it, and start it on the WAL in the folder ``before_start``."""
        target = self.rig.target()
        words = ["restore", "--backup", backup, "--target-dir", str(target), "--json"]
        assert spaces, "there is something to be moved"
        for number, place in enumerate(spaces):
            if place.startswith("/"):  # not in place
                words += ["--tablespace-map", f"{place}={target}_{number}"]
        self.rig.run(*words)
        server = self.rig.adopt(target)
        # The map says now where tablespaces are.
        server.run("pg_verifybackup", "-n", "-i", "pgsql_tmp.walship", "-i", "tablespace_map", str(target))
        # What fetch-wal would hand out, without a Python for each segment; and without what may lie in pg_wal.
        with (target / "postgresql.auto.conf").open("a") as conf:
            conf.write(f"restore_command = 'cp {before_start}/%f %p'\n")
        server.start()
        self.rig.wait(lambda: server.query("select pg_is_in_recovery()") == [(False,)], "it is promoted")
        return server


def contents(server: ThrowawayServer) -> dict[str, Any]:
    """Everything that people would miss, as digests."""
    found: dict[str, Any] = {}
    names = server.query("select datname from pg_database where datallowconn order by 1")
    for (name,) in names:
        with psycopg.connect(server.dsn(name), autocommit=True) as connection:
            for (table,) in connection.execute(_TABLES.encode()).fetchall():
                query = f"select count(*), md5(string_agg(t::text, '|' order by t::text collate \"C\")) from {table} t"
                found[f"{name}.{table}"] = connection.execute(query.encode()).fetchone()
            found[f"{name}: large objects"] = connection.execute(_LARGE.encode()).fetchall()
            if name == "wide":
                connection.execute("set enable_seqscan = off")
                for probe in _PROBES:
                    found[probe] = connection.execute(probe.encode()).fetchall()
    return found


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path)


@pytest.fixture
def folder() -> Iterator[Path]:
    made = make_folder("walship-m-")
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("major", SERVER_VERSIONS)
def test_every_mode_brings_the_cluster_back(folder: Path, major: int) -> None:
    cluster = Cluster(folder, major)
    with cluster.rig as rig:
        rig.server.start()
        rig.run("init")
        cluster.fill()
        local = {"WALSHIP_DATA_DIR": str(rig.server.data_dir)}
        taken: dict[str, str] = {}
        with Load(rig.server, pause=0.02) as load, Churn(rig.server) as churn:
            # A chain builds on either, and on the newest.
            modes = [("through the server", {}), ("local", local)]
            for mode, changed in modes if major % 2 else reversed(modes):
                taken[mode] = cluster.back_up(**changed)
            cluster.tablespace("comes")
            cluster.script("create table arrives tablespace comes as select n from generate_series(1, 5000) n")
            if major >= 17:
                cluster.back_up("--incremental")
            cluster.script("create database made", "postgres")
            cluster.script("create table made (n) as values (1), (2)", "made")
            cluster.script("drop database dropped", "postgres")
            cluster.script("alter table placed set tablespace stays;\nalter index placed_pkey set tablespace comes")
            cluster.script("drop tablespace goes", "postgres")
            if major >= 17:
                taken["incremental"] = cluster.back_up("--incremental", **local)
            if major in _OF_STANDBYS:
                with cluster.standby() as standby:
                    host = {"WALSHIP_BACKUP_HOST": f"127.0.0.1:{standby.port}"}
                    taken["standby"] = cluster.back_up(**host)
                    taken["standby, local"] = cluster.back_up(WALSHIP_DATA_DIR=str(standby.data_dir), **host)
        assert len(load.acknowledged) > 50
        assert churn.rounds > 1
        wanted = contents(rig.server)
        ((drawn,),) = rig.sql(_SEQUENCE, dbname="wide")
        assert wanted["wide.plain"][0] == 4000
        assert wanted["postgres.load"][0] == len(load.acknowledged)
        rig.run("switch")
        rig.run("verify")
        listed = {backup["name"]: backup for backup in rig.json("list")["backups"]}
        assert len(listed) == len(taken) + (major >= 17)
        rig.server.stop()
        for mode, backup in taken.items():
            empty(folder / "space_comes")  # older backups replay its creation at this very place
            with cluster.restore(backup, listed[backup]["tablespaces"], rig.server.data_dir / "pg_wal") as server:
                assert contents(server) == wanted, mode
                ((number,),) = server.query(_SEQUENCE, dbname="wide")
                assert drawn <= number <= drawn + 32, mode
                assert server.query("select count(*) from unlogged", dbname="wide") == [(0,)]
                server.run("pg_amcheck", "--all", "--install-missing", "-h", server.host,
                           "-p", str(server.port), "-U", "postgres")  # fmt: skip
