"""Two promotions have used one timeline number: what comes second is kept, told, and holds up nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from infra.postgres.processes import give, run_as
from pipeline.objects import read_header
from tests.acceptance.conftest import Copy
from tests.rig import PASSPHRASE

RESCUE = Path(__file__).parents[2] / "docs" / "rescue.py"
HISTORY = "00000002.history"
FIRST, SECOND = b"1\t0/2000000\tthe first\n", b"1\t0/2000100\tthe second\n"


def rescued(copy: Copy, name: str) -> bytes:
    """What the reader without walship makes of an object."""
    out = copy.local.parent / f"plain.{name.replace('/', '.')}"
    subprocess.run(
        [sys.executable, str(RESCUE), str(copy.root), "get", name, str(out)],
        check=True, capture_output=True, env={"BACKUP_ENCRYPTION_PASSWORD": PASSPHRASE},
    )  # fmt: skip
    return out.read_bytes()


def push(copy: Copy, files: Mapping[str, bytes], *, expect: int = 0) -> tuple[str, list[str]]:
    """Ship files that PostgreSQL could have archived; what was said, and what is left of them."""
    spool = copy.local.parent / "spool"
    spool.mkdir(exist_ok=True)
    give(spool, run_as())
    for name, content in files.items():
        (spool / name).write_bytes(content)
    done = copy.run("push", expect=expect, WALSHIP_SPOOL_DIR=str(spool))
    return done.stderr, sorted(path.name for path in spool.iterdir() if not path.name.startswith("."))


def test_a_history_and_a_partial_whose_names_are_taken_are_kept_beside_and_block_nothing(copy: Copy) -> None:
    segment = copy.segments()[-1]
    content = rescued(copy, f"wal/{segment.parent.name}/{segment.name}")
    other = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    partial = f"{segment.name}.partial"

    assert push(copy, {HISTORY: FIRST, partial: content})[1] == []
    assert not (copy.root / "conflict").exists()
    assert push(copy, {HISTORY: FIRST})[1] == [], "the same again is no conflict"
    assert not (copy.root / "conflict").exists()

    before = copy.run("list", "--json").stdout

    # A segment stays in the spool and keeps its command from success, and holds up none of the others.
    said, left = push(copy, {HISTORY: SECOND, partial: other, segment.name: other}, expect=11)
    assert left == [segment.name]
    kept = sorted(copy.root.glob("conflict/*"))
    assert [path.name[:-17] for path in kept] == [partial, HISTORY]
    assert rescued(copy, f"conflict/{kept[0].name}") == other
    assert rescued(copy, f"conflict/{kept[1].name}") == SECOND
    assert rescued(copy, f"wal/{HISTORY}") == FIRST
    header, _ = read_header(HISTORY, (copy.root / "wal" / HISTORY).read_bytes())
    (told,) = [line for line in said.splitlines() if "set aside" in line and HISTORY in line]
    assert told.startswith("error: ")
    assert header.fingerprint[:16] in told
    assert kept[1].name[-16:] in told
    assert "Find out which server is right" in told
    (copy.local.parent / "spool" / segment.name).unlink()

    # It comes once more: a service that was killed before its spool file went. It is the same object.
    made = kept[1].stat()
    assert push(copy, {HISTORY: SECOND})[1] == []
    assert sorted(copy.root.glob("conflict/*")) == kept
    assert kept[1].stat().st_mtime_ns == made.st_mtime_ns

    # Whoever reads goes by what is stored under the name, and is not confused by the rest.
    assert copy.run("list", "--json").stdout == before
    verified = json.loads(copy.run("verify", "--json").stdout)
    assert verified["ok"]
    assert [kept[n].name in verified["warnings"][n] for n in (0, 1)] == [True, True]
    restore = ("restore", "--target-dir", str(copy.local.parent / "r"), "--dry-run", "--json")
    assert json.loads(copy.run(*restore).stdout)["timeline"] == 1


def test_what_was_set_aside_is_verified_like_all_else_and_the_report_is_there_also_when_it_is_bad(copy: Copy) -> None:
    push(copy, {HISTORY: FIRST})
    push(copy, {HISTORY: SECOND})
    (kept,) = copy.root.glob("conflict/*")
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    done = copy.run("verify", "--json", expect=12)
    report = json.loads(done.stdout)
    assert not report["ok"]
    assert [fault["name"] for fault in report["faults"]] == [f"conflict/{kept.name}"]
    assert report["backups"][0]["usable"]
    assert "1 objects are damaged or missing" in done.stderr
