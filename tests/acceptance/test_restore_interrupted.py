"""A restore that dies in the middle, or beside whose repository the service dies; and one in the way of the old server.

Killed with SIGKILL, so that nothing can be tidied up: what is left must not be taken for a cluster, and the next run
has to get through.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import free_port, make_folder
from tests.acceptance.test_restore_bad_input import fingerprint
from tests.rig import Load, Rig, stop_started
from tests.servers import NEWEST

CONTENT = "select count(*), max(n), md5(string_agg(n || filler, ',' order by n)) from t"


@dataclass
class House:
    """A server with a tablespace that runs and archives, and its repository with a backup and WAL behind it."""

    rig: Rig
    #: Of the tablespace.
    place: Path
    #: Of table t: all of it is shipped.
    content: tuple[object, ...]

    def mapped(self, target: Path) -> str:
        return f"{self.place}={target.with_name(f'{target.name}-tablespace')}"

    def words(self, target: Path, *more: str) -> tuple[str, ...]:
        return ("restore", "--target-dir", str(target), "--tablespace-map", self.mapped(target), *more)

    def restored(self, target: Path, *more: str) -> list[str]:
        """Restore to the end and compare table t; what it has noted."""
        port = free_port()
        result = self.rig.json(*self.words(target, "--start", "--port", str(port), *more))
        found = content(port)
        stop_started(target)
        assert found == self.content
        return [str(note) for note in result["notes"]]


def content(port: int) -> tuple[object, ...]:
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
        row = connection.execute(CONTENT).fetchone()
    assert row is not None
    return row


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with ExitStack() as stack:
        folder = make_folder("walship-k-")
        stack.callback(shutil.rmtree, folder)
        place = folder / "place"
        place.mkdir()
        give(place, run_as())
        with Rig(folder, NEWEST, [f"file://{folder}/local"]) as rig:
            rig.server.start()
            rig.run("init")
            rig.sql(f"create tablespace outside location '{place}'")
            rig.sql("create table t (n int primary key, filler text) tablespace outside")
            rig.json("backup")
            for first in range(0, 40000, 5000):
                rig.sql(f"insert into t select n, md5(n::text) from generate_series({first}, {first + 4999}) n")
            (row,) = rig.sql(CONTENT)
            rig.json("switch")
            yield House(rig, place, row)


def begun(rig: Rig, *words: str) -> subprocess.Popen[str]:
    """The command, still at work; what it says goes to ``begun.log``."""
    with (rig.folder / "begun.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "infra.cli", *words], env=rig.environment(), cwd=rig.folder,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True,
        )  # fmt: skip


def killed_at(
    rig: Rig, prepare: Callable[[], Path], words: Callable[[Path], tuple[str, ...]], condition: Callable[[Path], bool]
) -> Path:
    """Begin a restore, and SIGKILL it at once when the condition holds of its target; where that lies.

    Where it was through before we had looked, that is done again, with a target as ``prepare`` makes it.
    """
    for _ in range(5):
        target = prepare()
        process = begun(rig, *words(target))
        deadline = time.monotonic() + 60
        while process.poll() is None and not condition(target):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        if process.poll() is None:
            process.kill()
            process.wait()
            return target
        stop_started(target)
    raise AssertionError("it was always through before we had looked")


def test_a_tablespace_that_is_not_mapped_while_the_old_server_runs(house: House) -> None:
    """On the same machine its old location is taken, by the very server that shall be restored beside."""
    target = house.rig.target()
    before = fingerprint(house.place)
    for force in ((), ("--force",)):
        done = house.rig.run("restore", "--target-dir", str(target), *force, expect=13)
        assert f"{house.place}, is not empty" in done.stderr
        assert f"hint: --tablespace-map {house.place}=/another/folder puts it elsewhere" in done.stderr
    assert fingerprint(house.place) == before
    assert list(target.iterdir()) == []
    assert house.rig.sql(CONTENT) == [house.content]


def test_killed_while_the_base_is_laid_down_and_run_again(house: House) -> None:
    target = killed_at(house.rig, house.rig.target, house.words, lambda folder: (folder / "PG_VERSION").exists())
    assert not (target / "global/pg_control").exists(), "PostgreSQL refuses to start without it"
    server = house.rig.adopt(target)
    server.begin()
    house.rig.wait(lambda: server.exit_code not in (None, 0), "no server starts on it")
    # The same words once more, and it needs no --force: what lies there is known to be no cluster.
    notes = house.restored(target)
    assert any("holds what an interrupted restore has left: what of it is as in the backup is kept" in n for n in notes)


def replaying(target: Path) -> bool:
    log = target.with_name(f"{target.name}.log")
    return log.exists() and "redo starts" in log.read_text("utf-8", "replace")


def test_killed_while_the_server_replays_and_run_again(house: House) -> None:
    port = free_port()
    target = killed_at(
        house.rig, house.rig.target, lambda folder: house.words(folder, "--start", "--port", str(port)), replaying
    )

    # The server has lost its feed. It gets the WAL by itself, or stops; it is never promoted with less.
    def settled() -> bool:
        return not (target / "postmaster.pid").exists() or not (target / "recovery.signal").exists()

    house.rig.wait(settled, "the server has stopped, or is promoted")
    if (target / "postmaster.pid").exists():
        assert content(port) == house.content
        done = house.rig.run(*house.words(target, "--force"), expect=13)
        assert f"{target} belongs to a running server, process " in done.stderr
        stop_started(target)
    # What was replayed is of no use to the next run; that it may be replaced has to be said.
    before = fingerprint(target)
    assert "is not empty" in house.rig.run(*house.words(target), expect=13).stderr
    assert fingerprint(target) == before
    house.restored(target, "--force")


def test_the_service_is_killed_while_its_repository_is_restored(house: House) -> None:
    rig = house.rig
    service = rig.serve()
    target, port = rig.target(), free_port()
    with Load(rig.server) as load:
        rig.wait(lambda: len(load.acknowledged) > 20, "clients commit")
        before = len(load.acknowledged)
        rig.run("switch")
        process = begun(rig, *house.words(target, "--start", "--port", str(port)))
        rig.wait((target / "PG_VERSION").exists, "the restore is under way")
        rig.stop(service, signal.SIGKILL)
        rig.sql("select pg_switch_wal()")
        assert process.wait(60) == 0, (rig.folder / "begun.log").read_text()
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
        found = {n for (n,) in connection.execute("select n from load").fetchall()}
    stop_started(target)
    assert set(load.acknowledged[:before]) <= found, "all that was stored when the restore was planned"
    assert found == set(range(1, len(found) + 1)), "and no hole in it"
