"""Expire on a real repository: killed at any point it lists nothing that cannot be restored.

And at the edges of what is kept, the content is that of the moment.
"""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg

from infra.postgres.throwaway import free_port, make_folder
from tests.rig import Rig
from tests.servers import NEWEST

#: The command, which kills itself once it has deleted so many times, marks aside.
_DYING = """
import os, signal, sys
from infra.cli import main
from infra.storage.local import LocalStore
left, delete = int(sys.argv.pop(1)), LocalStore.delete
async def dying(self, keys):
    global left
    await delete(self, keys)
    left -= not any("/use/" in key for key in keys)
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
LocalStore.delete = dying
main()
"""


def insert(rig: Rig, row: int) -> str:
    """Commit the row; a time just after it."""
    rig.sql(f"insert into t values ({row}, md5('{row}'))")
    ((moment,),) = rig.sql("select clock_timestamp()::text")
    return str(moment)


def restored(rig: Rig, *words: str) -> list[tuple[Any, ...]]:
    port = free_port()
    rig.json("restore", "--target-dir", str(rig.target()), "--start", "--port", str(port), *words)
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
        return connection.execute("select n, filler = md5(n::text) from t order by n").fetchall()


def kill(rig: Rig, deletions: int) -> None:
    command = [sys.executable, "-c", _DYING, str(deletions), "expire", "--yes"]
    done = subprocess.run(command, env=rig.environment(), cwd=rig.folder, capture_output=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_what_the_window_promises_is_there_whatever_happens_to_expire() -> None:
    folder = make_folder("walship-x-")
    try:
        with Rig(folder, NEWEST, [f"file://{folder}/a", f"file://{folder}/b"]) as rig:
            rig.server.start()
            rig.run("init")
            rig.sql("create table t (n int primary key, filler text)")
            moments, names = [], []
            for row in range(1, 4):
                insert(rig, 10 * row)
                names.append(rig.json("backup")["name"])
                moments.append(insert(rig, 10 * row + 1))
                insert(rig, 10 * row + 2)
                rig.sql("select pg_sleep(1.1)")  # a window is in whole seconds
            rig.json("switch")
            ends = [datetime.fromisoformat(backup["stopped"]) for backup in rig.json("list")["backups"]]
            # No policy, no deletion; and a policy that keeps the second backup as the one before the window.
            assert "no retention is set" in rig.json("expire", "--yes", expect=2)["error"]["fact"]
            rig.extra["WALSHIP_KEEP_WINDOW"] = f"{math.floor((ends[2] - ends[1]).total_seconds())}s"
            before = rig.json("list")
            looked = rig.json("expire", "--dry-run")
            assert [backup["name"] for backup in looked["going"]] == names[:1]
            assert "ended before the window" in " ".join(looked["kept"][0]["reasons"])
            assert all(place["wal"] for place in looked["destinations"])
            assert "nobody can be asked" in rig.json("expire", expect=2)["error"]["fact"]
            rig.run("pin", names[0], "--reason", "audit")
            assert rig.json("expire", "--dry-run")["kept"][0] == {"name": names[0], "reasons": ["pinned: audit"]}
            rig.run("unpin", names[0])
            # Killed between the two backup_info: one is missing, and all that is listed is whole. Then among the parts.
            for deletions, code in ((1, 12), (2, 0)):
                kill(rig, deletions)
                verified = rig.json("verify", expect=code)
                assert all(backup["usable"] for backup in verified["backups"])
                assert [fault["name"] for fault in verified["faults"]] == (
                    [f"base/{names[0]}/backup_info"] if code else []
                )
                assert rig.json("list")["backups"][-2:] == before["backups"][-2:]
            done = rig.json("expire", "--yes")
            assert done["refused"] == []
            assert rig.json("verify")["ok"]
            after = rig.json("list")
            assert [backup["name"] for backup in after["backups"]] == names[1:]
            assert after["windows"] == before["windows"][1:]
            for place in ("a", "b"):
                (root,) = Path(folder, place).glob("7*")
                assert [*(root / "use").rglob("*/*")] == []
                assert not (root / "base" / names[0] / "data").exists()
            assert rig.json("expire", "--yes")["deleted"] == []
            assert [record["verb"] for record in rig.json("history")][-1:] == ["expire"]
            rig.server.stop()
            # The oldest moment that is promised, the newest, and one that is not any more.
            assert restored(rig, "--to-time", moments[1]) == [(n, True) for n in (10, 11, 12, 20, 21)]
            everything = [(10 * row + n, True) for row in range(1, 4) for n in range(3)]
            assert restored(rig, "--latest") == everything
            refused = rig.json(
                "restore", "--target-dir", str(rig.target()), "--to-time", moments[0], "--dry-run", expect=13
            )
            assert names[1] in refused["error"]["fact"]
    finally:
        shutil.rmtree(folder)
