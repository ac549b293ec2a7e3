"""``--delta``: an old data directory is brought forward, and most of it is not fetched again.

Nothing in it is believed but what has the backup's checksum: what was changed behind PostgreSQL's back, with its size
and time as before, is found as well. ``pg_verifybackup`` says whether all is as it has to be before any server starts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import free_port, make_folder
from tests.acceptance.test_restore_interrupted import killed_at
from tests.rig import Rig, stop_started
from tests.servers import NEWEST

CONTENT = """
select count(*), md5(string_agg(n || filler, ',' order by n)), (select count(*) from added),
       (select sum(n) from in_tablespace) from t
"""


@dataclass
class Past:
    """A server that runs, its repository, and the data directory as it was some commits ago."""

    rig: Rig
    #: Where the server's tablespace lies.
    place: Path
    old: Path
    #: A file of table t, below a data directory.
    relation: str
    content: tuple[object, ...]

    def copy(self) -> Path:
        """The old directory once more, with a tablespace of its own."""
        target = self.rig.target("old")
        target.rmdir()
        place = tablespace_of(target)
        subprocess.run(["cp", "-a", "--reflink=auto", self.old, target], check=True)
        subprocess.run(["cp", "-a", "--reflink=auto", tablespace_of(self.old), place], check=True)
        (link,) = (target / "pg_tblspc").iterdir()
        link.unlink()
        link.symlink_to(place)
        return target

    def words(self, target: Path, *more: str) -> tuple[str, ...]:
        map_to = f"{self.place}={tablespace_of(target)}"
        return ("restore", "--target-dir", str(target), "--tablespace-map", map_to, "--delta", *more)

    def verified(self, target: Path) -> None:
        """Fails if a file is missing, is one too many, or is not as the backup has it. No server has run on it."""
        ours = ("--ignore=pgsql_tmp.walship", "--ignore=tablespace_map")
        self.rig.server.run("pg_verifybackup", "--no-parse-wal", "--quiet", *ours, str(target))

    def started(self, target: Path, *more: str) -> tuple[dict[str, Any], tuple[object, ...]]:
        """The result of a restore whose server is started, and what it holds."""
        port = free_port()
        result = self.rig.json(*self.words(target, "--start", "--port", str(port), *more))
        with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
            row = connection.execute(CONTENT).fetchone()
        stop_started(target)
        assert row is not None
        return result, row


def tablespace_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}-tablespace")


@pytest.fixture(scope="module")
def past() -> Iterator[Past]:
    with ExitStack() as stack:
        folder = make_folder("walship-d-")
        stack.callback(shutil.rmtree, folder)
        place = folder / "place"
        place.mkdir()
        give(place, run_as())
        with Rig(folder, NEWEST, [f"file://{folder}/local"], server_settings={"autovacuum": "off"}) as rig:
            # A part is 16 MiB and is fetched whole: only a cluster of many parts shows what is saved. It writes no WAL.
            rig.server.start({"wal_level": "minimal", "archive_mode": "off", "max_wal_senders": "0"})
            rig.sql("create database quiet")
            rig.sql("create table u as select n, repeat('x', 900) from generate_series(1, 100000) n", dbname="quiet")
            rig.server.stop()
            rig.server.start()
            rig.run("init")
            rig.sql(f"create tablespace outside location '{place}'")
            rig.sql("create table t as select n, md5(n::text) filler from generate_series(1, 60000) n")
            rig.sql("create table in_tablespace tablespace outside as select n from generate_series(1, 20000) n")
            rig.sql("create table dropped as select n from generate_series(1, 1000) n")
            ((relation,),) = rig.sql("select pg_relation_filepath('t')")
            rig.server.stop()
            old = folder / "as_it_was"
            subprocess.run(["cp", "-a", "--reflink=auto", rig.server.data_dir, old], check=True)
            subprocess.run(["cp", "-a", "--reflink=auto", place, tablespace_of(old)], check=True)
            rig.server.start()
            rig.sql("create table added as select n from generate_series(1, 500) n")
            rig.sql("drop table dropped")
            rig.sql("insert into in_tablespace values (-1)")
            rig.json("backup")
            rig.sql("insert into t values (0, 'behind the backup')")
            (content,) = rig.sql(CONTENT)
            rig.json("switch")
            yield Past(rig, place, old, str(relation), content)


def test_an_old_data_directory_is_brought_forward(past: Past) -> None:
    target = past.copy()
    # What a comparison of sizes and times would not notice, and what no backup has.
    relation = target / past.relation
    stat = relation.stat()
    with relation.open("r+b") as file:
        file.seek(4000)
        file.write(b"\xff" * 8)
    os.utime(relation, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (target / "base/stray").write_text("of nobody")
    result = past.rig.json(*past.words(target))
    assert result["bytes_kept"] > result["base_bytes"] / 2
    assert result["bytes_fetched"] < result["base_bytes"] / 2
    assert not (target / "base/stray").exists()
    past.verified(target)
    # And once more as it is: nothing but what was made for the recovery differs.
    again, found = past.started(target)
    assert found == past.content
    assert again["bytes_kept"] > 0.9 * again["base_bytes"]


def test_killed_half_way_it_goes_on(past: Past) -> None:
    target = killed_at(
        past.rig, past.copy, past.words, lambda folder: not (folder / "global/pg_control").exists()
    )  # fmt: skip
    result = past.rig.json(*past.words(target))
    assert result["bytes_kept"] > result["base_bytes"] / 2, "what was there before the first run is still of use"
    past.verified(target)


def test_a_running_server_is_refused(past: Past) -> None:
    data = past.rig.server.data_dir
    done = past.rig.run("restore", "--target-dir", str(data), "--delta", expect=13)
    assert f"{data} belongs to a running server, process {past.rig.server.pid}" in done.stderr
    assert past.rig.sql(CONTENT) == [past.content]
