"""A copy is as good as what it was copied from: from a folder to S3 and back, killed in between, restored alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.throwaway import free_port, make_folder
from tests.acceptance.conftest import Copy, Shipped

#: The command, which kills itself once it has stored so many objects.
_DYING = """
import os, signal, sys
from infra.cli import main
from infra.storage.local import LocalStore
left, put = int(sys.argv.pop(1)), LocalStore.put
async def dying(self, key, body, **more):
    global left
    await put(self, key, body, **more)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
LocalStore.put = dying
main()
"""


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    folder = make_folder("walship-e-")
    yield folder
    shutil.rmtree(folder)


def stored(root: Path) -> dict[str, bytes]:
    """Without records of what was done to it, and marks of who was killed."""
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".walship-"))  # unfinished
    names = (path.relative_to(root).as_posix() for path in files)
    return {name: (root / name).read_bytes() for name in names if not name.startswith(("log/", "use/"))}


def run(shipped: Shipped, destination: str, *words: str, expect: int = 0, more: Mapping[str, str] | None = None) -> Any:
    environment = shipped.rig.environment(WALSHIP_DESTINATIONS=destination, **(more or {}))
    return json.loads(shipped.rig.run(*words, "--json", expect=expect, environment=environment).stdout)


def rows(shipped: Shipped, destination: str) -> int:
    port, target = free_port(), shipped.rig.target()
    words = ("restore", "--target-dir", str(target), "--latest", "--start", "--port", str(port))
    run(shipped, destination, *words)
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
        found = connection.execute("select count(*) from t where filler = md5(n::text)").fetchone()
    assert found is not None
    return int(found[0])


def test_to_s3_and_back_each_is_whole_by_itself(copy: Copy, elsewhere: Path, seaweed: Seaweed, s3_prefix: str) -> None:
    shipped, bucket, credentials = copy.shipped, seaweed.url(s3_prefix), seaweed.environment
    here, back = f"file://{copy.local}", f"file://{elsewhere}/back"
    planned = run(shipped, "", "copy", "--from", here, "--to", bucket, "--dry-run", more=credentials)
    done = run(shipped, "", "copy", "--from", here, "--to", bucket, more=credentials)
    assert (planned["objects"], planned["made_repository"]) == (done["objects"], True)
    assert (done["troubles"], done["backups"]) == ([], [shipped.backup])
    again = run(shipped, bucket, "copy", "--from", here, "--to", bucket.partition("?")[0], more=credentials)
    assert (again["objects"], again["made_repository"]) == (0, False), "the record is at both ends"
    # The other way round, on a host that has no key at all.
    no_keys = {"BACKUP_ENCRYPTION_ENABLED": "false", "BACKUP_ENCRYPTION_PASSWORD": ""}
    run(shipped, "", "copy", "--from", bucket, "--to", back, more={**credentials, **no_keys})
    assert stored(elsewhere / "back" / shipped.system_id) == stored(copy.root)
    assert run(shipped, bucket, "verify", more=credentials)["ok"]
    assert [backup["name"] for backup in run(shipped, back, "list")["backups"]] == [shipped.backup]
    copies = [each for each in run(shipped, bucket, "history", more=credentials) if each["verb"] == "copy"]
    assert all(each["ok"] for each in copies)
    assert len(copies) == 2
    assert rows(shipped, back) == shipped.rows
    # One bucket by two addresses.
    other = bucket.replace("127.0.0.1", "localhost")
    said = run(shipped, "", "copy", "--from", bucket, "--to", other, expect=2, more=credentials)
    assert "nothing can be copied there" in said["error"]["fact"]


def test_killed_time_and_again_it_ends_whole(copy: Copy, elsewhere: Path) -> None:
    shipped, here, there = copy.shipped, f"file://{copy.local}", f"file://{elsewhere}/there"
    root = elsewhere / "there" / shipped.system_id
    objects = len(stored(copy.root))
    for number in (2, objects // 2, objects // 3):
        words = ("copy", "--from", here, "--to", there)
        command = [sys.executable, "-c", _DYING, str(number), *words]
        environment, folder = shipped.rig.environment(WALSHIP_DESTINATIONS=""), shipped.rig.folder
        killed = subprocess.run(command, env=environment, cwd=folder, capture_output=True, check=False, timeout=120)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert "there is no repository of any cluster" in run(shipped, there, "list", expect=2)["error"]["fact"]
        assert not [*root.glob("base/*/backup_info")] or len([*root.glob("base/*/data/**/0*")]) == len(copy.parts())
    run(shipped, "", "copy", "--from", here, "--to", there)
    assert stored(root) == stored(copy.root)
    assert run(shipped, there, "verify")["ok"]


def test_one_backup_alone_comes_with_what_it_needs(copy: Copy, elsewhere: Path) -> None:
    shipped, there = copy.shipped, f"file://{elsewhere}/there"
    damaged = copy.segments()[-1]
    content = bytearray(damaged.read_bytes())
    content[-50] ^= 1
    damaged.write_bytes(bytes(content))
    words = ("copy", "--from", f"file://{copy.local}", "--to", there, "--backup", shipped.backup)
    assert run(shipped, "", *words)["troubles"] == []
    segments = {path.name for path in (elsewhere / "there").glob("*/wal/*/*")}
    assert 0 < len(segments) < len(copy.segments())
    assert rows(shipped, there) == 2000
    # All since: the damaged segment is told, and exit code 12.
    said = run(shipped, "", *words, "--wal", expect=12)
    assert [(each["name"].rpartition("/")[2], each["kind"]) for each in said["troubles"]] == [(damaged.name, "damaged")]
    refused = run(shipped, "", *words[:-1], "base_20200101_000000", expect=13)
    assert "there is no backup base_20200101_000000" in refused["error"]["fact"]
