"""Base backups under way, for tests of what happens to them: begun, waited for, stopped; and what they leave behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from infra.postgres.throwaway import ThrowawayServer, make_folder
from tests import commands
from tests.rig import Rig
from tests.servers import NEWEST

_SLOTS = "pg_replication_slots"
_OURS = "select count(*) from pg_stat_activity where application_name = 'walship_backup'"


class Running:
    """A command under way."""

    def __init__(self, rig: Rig, *words: str, **changed: str) -> None:
        self._rig = rig
        self._environment = rig.environment(**changed)
        self._words = words
        self._pid = 0
        self._begun = threading.Event()
        self.done: subprocess.CompletedProcess[str] | None = None
        rig.next_second()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._begun.wait(30)

    def _run(self) -> None:
        def started(pid: int) -> None:
            self._pid = pid
            self._begun.set()

        self.done = commands.run(self._words, self._environment, self._rig.folder, timeout=60, started=started)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it, as long as the command runs."""
        while not condition():
            if not self._thread.is_alive():
                raise AssertionError(f"it ended before: {self.done}")
            time.sleep(0.001)

    def signal(self, number: int) -> None:
        os.kill(self._pid, number)

    def end(self, expect: int) -> subprocess.CompletedProcess[str]:
        self._thread.join(60)
        assert self.done is not None, "it hangs"
        assert self.done.returncode == expect, self.done
        return self.done


def nothing_left(server: ThrowawayServer) -> None:
    """No session of ours, no backup in progress, and no slot."""
    deadline = time.monotonic() + 30
    queries = (_OURS, *(f"select count(*) from {name}" for name in ("pg_stat_progress_basebackup", _SLOTS)))
    while any(server.query(query) != [(0,)] for query in queries):
        assert time.monotonic() < deadline, server.query("select pid, state, query from pg_stat_activity")
        time.sleep(0.02)


def names(rig: Rig) -> list[str]:
    return [backup["name"] for backup in rig.json("list")["backups"]]


def said(rig: Rig, *words: str, expect: int = 10, **changed: str) -> str:
    """Everything that a backup that fails prints."""
    done = rig.run("backup", *words, expect=expect, environment=rig.environment(**changed))
    nothing_left(rig.server)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One server with a backup; what a test does to it, it undoes."""
    folder = make_folder("walship-b-")
    settings = {"summarize_wal": "on", "autovacuum": "off", "max_wal_senders": "8"}
    try:
        with Rig(folder, NEWEST, [f"file://{folder}/store"], server_settings=settings) as made:
            made.server.start()
            made.run("init")
            made.sql("create table t as select n, md5(n::text) filler from generate_series(1, 60000) n")
            made.run("backup")
            yield made
    finally:
        shutil.rmtree(folder)


def local(server: ThrowawayServer) -> dict[str, str]:
    return {"WALSHIP_DATA_DIR": str(server.data_dir)}
