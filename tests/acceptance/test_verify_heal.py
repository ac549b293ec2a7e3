"""Verify and heal on a real repository: rot at one of two destinations is found, told, mended, and restored from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import psycopg

from infra.postgres.throwaway import free_port
from tests.acceptance.conftest import Copy
from tests.rig import stop_started


def flip(path: Path) -> None:
    """As a disk does it: the file's size and time stay."""
    about, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def test_what_has_rotted_at_one_destination_comes_back_from_the_other(copy: Copy) -> None:
    far = copy.local.parent / "far"
    shutil.copytree(copy.local, far)
    both = f"file://{copy.local},file://{far}"

    def verify(*words: str, expect: int = 0) -> Any:
        return json.loads(copy.run("verify", "--json", *words, expect=expect, WALSHIP_DESTINATIONS=both).stdout)

    first = verify()
    assert (first["ok"], first["trusted"], first["compared_backups"]) == (True, 0, 1)
    again = verify()
    assert again["objects"] + again["trusted"] == first["objects"]
    assert again["objects"] < 20 < again["trusted"]

    broken = [copy.parts()[0], copy.segments()[1]]
    names = sorted(str(path.relative_to(copy.root)) for path in broken)
    good = [path.read_bytes() for path in broken]
    for path in broken:
        flip(path)
    lost = far / copy.root.name / "base" / copy.shipped.backup / "backup_manifest"
    lost.unlink()
    assert [fault["name"] for fault in verify(expect=12)["faults"]] == [str(lost.relative_to(far / copy.root.name))]
    found = verify("--all", "--heal", "--dry-run", expect=12)
    assert found["backups"][0]["usable"], "each object is good somewhere"
    assert [(h["outcome"], h["name"]) for h in found["healings"] if h["kind"] == "damaged"] == [
        ("would", name) for name in sorted(names, key=lambda name: name.startswith("base/"))
    ]
    said = copy.run("verify", "--heal", WALSHIP_DESTINATIONS=both).stdout
    assert said.count("healed: ") == 3, "what was found damaged is not trusted any more"
    assert said.endswith("all that was wrong is healed\n")
    assert [path.read_bytes() for path in broken] == good
    assert lost.is_file()
    assert verify("--all")["ok"]
    records = json.loads(copy.run("history", "--verb", "verify", "--json", WALSHIP_DESTINATIONS=both).stdout)
    assert [record["ok"] for record in records] == [True, True, False, False, True, True]
    assert sorted(record["summary"]["healed"] for record in records) == [0, 0, 0, 0, 0, 3]
    assert {"damaged": 2, "missing": 1} in [record["summary"]["kinds"] for record in records]
    assert "--dry-run is for --heal" in copy.run("verify", "--dry-run", expect=2).stderr

    shutil.rmtree(far)
    target, port = copy.rig.target(), free_port()
    copy.run("restore", "--target-dir", str(target), "--start", "--port", str(port))
    try:
        with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
            assert connection.execute("select count(*) from t").fetchall() == [(copy.shipped.rows,)]
    finally:
        stop_started(target)
