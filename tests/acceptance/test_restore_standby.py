"""A standby that is made from the repository alone goes on following it, through every new run of the service."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from infra.postgres.throwaway import free_port, make_folder
from tests.rig import Rig, stop_started
from tests.servers import NEWEST


@pytest.fixture
def rig() -> Iterator[Rig]:
    folder = make_folder("walship-f-")
    try:
        with Rig(folder, NEWEST, [f"file://{folder}/one"]) as made:
            made.server.start()
            made.run("init")
            made.sql("create table t (n int)")
            yield made
    finally:
        shutil.rmtree(folder)


def test_a_standby_reads_what_is_encrypted_under_later_keys(rig: Rig) -> None:
    rig.json("backup")
    rig.sql("insert into t values (1)")
    rig.json("switch")
    target, port, out = rig.target(), free_port(), rig.folder / "restored.json"
    words = ("restore", "--standby", "--start", "--port", str(port), "--target-dir", str(target), "--json")
    with out.open("wb") as stdout, (rig.folder / "restored.log").open("wb") as stderr:
        command = subprocess.Popen(
            [sys.executable, "-m", "infra.cli", *words], env=rig.environment(), cwd=rig.folder, stdout=stdout,
            stderr=stderr, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    said = rig.folder / "restored.log"
    try:
        rig.wait(lambda: said.read_text().count("follows timeline 1") > 0 or command.poll() is not None, "it follows")
        assert command.poll() is None, said.read_text()
        result = json.loads(out.read_text())
        assert (result["state"], result["port"]) == ("standby", port)
        assert "that file holds the opened key ring" in said.read_text()

        def rows() -> list[tuple[int]]:
            with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
                return connection.execute("select n from t order by n").fetchall()

        assert rows() == [(1,)]
        before = {path.name for path in Path(rig.folder, "one").rglob("data-*")}
        rig.sql("insert into t values (2)")
        rig.json("switch")
        assert {path.name for path in Path(rig.folder, "one").rglob("data-*")} > before, "each run has a key of its own"
        rig.wait(lambda: rows() == [(1,), (2,)], "the standby has what was shipped under another key")
        refused = rig.run("restore", "--target-dir", str(target), "--force", expect=13)
        assert f"process {command.pid} restores into {target}" in refused.stderr, "for as long as it feeds the server"
        os.kill(command.pid, signal.SIGINT)
        assert command.wait(30) == 0, said.read_text()
        assert rows() == [(1,), (2,)], "the server goes on"
        refused = rig.run("restore", "--target-dir", str(target), "--force", expect=13)
        assert f"{target} belongs to a running server, process {result['pid']}" in refused.stderr
    finally:
        command.kill()
        command.wait()
        stop_started(target)
