"""Checks of a drill that do harm to its server: each gets its own result, and nothing is left of any of them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.postgres.leftovers import MARK
from infra.postgres.throwaway import make_folder
from tests.acceptance.conftest import Shipped

ATTACKS = r"""
-- name: its own session
select pg_terminate_backend(pg_backend_pid());
-- name: after that
-- expect: 1
select 1;
-- name: a program in the background
copy (select 1) to program 'cat >/dev/null; setsid sleep 555 >/dev/null 2>&1 &';
-- name: it will not be cancelled
-- timeout: 0.2
do $$ begin loop begin perform pg_sleep(1); exception when query_canceled then null; end; end loop; end $$;
-- name: after that as well
-- expect: 1
select 1;
-- name: long
select repeat('x', 100000000);
-- name: long, and wrong
-- expect: 7
select repeat('7', 2000000);
-- name: many
select generate_series(1, 300000);
-- name: its database
drop database postgres;
-- name: a crash
copy (select 1) to program 'kill -9 $PPID';
-- name: after the crash
-- expect: 1
select 1;
-- name: its memory
select trim(split_part(pg_read_file('postmaster.pid'), E'\n', 7));
-- name: its other memory
-- expect: mmap
select current_setting('dynamic_shared_memory_type');
-- name: its files
copy (select 1) to program 'rm -rf base global/[2-9]*';
-- name: the server
copy (select 1) to program 'kill -9 $(head -n 1 postmaster.pid); rm postmaster.pid';
-- name: after all
-- database: template1
select 1;
"""


@pytest.fixture
def work() -> Iterator[Path]:
    folder = make_folder("walship-d-")
    yield folder
    shutil.rmtree(folder)


def memory() -> set[str]:
    """Ids of all System V memory."""
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text("ascii").splitlines()[1:]}


def processes(folder: Path) -> list[str]:
    """Command lines of what was started in a drill below the folder, or works there."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or (entry / "stat").read_text("latin-1").rpartition(") ")[2][0] in "ZX":
                continue
            works_in, environment = str((entry / "cwd").readlink()), (entry / "environ").read_bytes()
            if works_in.startswith(str(folder)) or f"{MARK}={folder}".encode() in environment:
                found.append((entry / "cmdline").read_bytes().decode())
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/sysvipc/shm").exists(), reason="elsewhere what is left cannot be seen")
def test_checks_that_attack_the_server(shipped: Shipped, work: Path) -> None:
    (work / "attacks.sql").write_text(ATTACKS, "utf-8")
    began = time.monotonic()
    shipped.rig.run(
        "drill", "--skip-amcheck", "--work-dir", str(work), "--report", str(work), "--check", str(work / "attacks.sql"),
        expect=12,
    )  # fmt: skip
    assert time.monotonic() - began < 100
    (path,) = work.glob("drill_*.json")
    checks = json.loads(path.read_text("utf-8"))["checks"]
    said = {check["name"]: (check["state"], check["found"]) for check in checks}
    states = {name: state for name, (state, _) in said.items()}
    del states["the server"]  # its session may or may not notice before it has answered
    failed = {"its own session", "it will not be cancelled", "long, and wrong", "its database", "a crash", "after all"}
    assert {name for name, state in states.items() if state == "failed"} == failed, said
    assert {name for name, state in states.items() if state == "not run"} == {"pg_amcheck"}
    assert said["its own session"][1] == "terminating connection due to administrator command"
    assert said["it will not be cancelled"][1] == "no answer within 0.2 s"
    assert said["long"][1] == "it ran: a value of 100000000 bytes"
    assert said["its database"][1] == "cannot drop the currently open database"
    assert not list(work.glob("walship-drill-*"))
    assert not processes(work)
    assert said["its memory"][1].split()[-1] not in memory()
