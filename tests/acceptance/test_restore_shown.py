"""What a person sees of a restore: the plan, the question, and what it came to."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from itertools import takewhile
from pathlib import Path

from tests.acceptance.conftest import Copy
from tests.servers import NEWEST

#: Columns of the terminal.
_WIDTH = 70


def at_terminal(copy: Copy, keys: bytes, *words: str) -> tuple[int, str]:
    """The command's exit code and what it said, with somebody at its terminal who types that once it asks."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, _WIDTH, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "infra.cli", "restore", *words],
        env=copy.rig.environment(WALSHIP_DESTINATIONS=f"file://{copy.local}"),
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  Ctrl-C goes to who has the terminal
    )  # fmt: skip
    os.close(follower)
    said, asked = b"", False
    try:
        while process.poll() is None:
            if select.select([leader], [], [], 60)[0] == []:
                raise TimeoutError(said)
            try:
                said += os.read(leader, 65536)
            except OSError:  # the other side is closed
                break
            if not asked and b"[y/N]: " in said:
                asked = bool(os.write(leader, keys))
        return process.wait(60), said.decode()
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def note_in(said: str, words: str) -> list[str]:
    """The lines of the note that begins with these words."""
    lines = said.splitlines()
    (first,) = [n for n, line in enumerate(lines) if line.startswith(f"  note: {words}")]
    rest = takewhile(lambda line: line.startswith(" " * 8), lines[first + 1 :])
    return [lines[first], *rest]


def test_the_plan_names_what_comes_from_where_and_what_is_overwritten(copy: Copy, tmp_path: Path) -> None:
    target = tmp_path / "target"
    dry = ("restore", "--target-dir", str(target), "--dry-run")
    said = copy.run(*dry).stdout.splitlines()
    assert said[0] == f"restore latest into {target}"
    assert said[1].startswith(f"  backup    {copy.shipped.backup} (full, PostgreSQL {NEWEST}), finished 20")
    assert any(line.startswith("  WAL       timeline 1: ") for line in said)
    assert any(line.endswith(f" from file://{copy.local}") and "backup: " in line for line in said)
    assert any(line.startswith("  time      perhaps ") for line in said)
    assert not target.exists()
    facts = json.loads(copy.run(*dry, "--json").stdout)
    parts = sum(path.stat().st_size for path in (copy.root / "base" / copy.shipped.backup).rglob("*") if path.is_file())
    info = copy.object(f"base/{copy.shipped.backup}/backup_info").stat().st_size
    segments = sum(path.stat().st_size for path in copy.segments())
    assert parts - info < facts["stored_bytes"] <= parts - info + segments
    assert facts["overwrites"] == []
    assert facts["expected_seconds"]["base"] > 0


def test_a_restore_over_a_restore_asks_and_tells_what_it_kept(copy: Copy, tmp_path: Path) -> None:
    target = tmp_path / "target"
    first = json.loads(copy.run("restore", "--target-dir", str(target), "--json").stdout)
    assert first["bytes_fetched"] >= first["base_bytes"]
    assert first["bytes_kept"] == 0
    assert first["took"].keys() == {"planning", "base", "replay"}
    (target / "base/1/999999").write_bytes(b"the backup does not have this")
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}

    # Somebody at a terminal is asked, and says no; or presses Ctrl-C.
    for keys in (b"n\n", b"\x03"):
        code, shown = at_terminal(copy, keys, "--target-dir", str(target), "--force", "--to-time", "now")
        assert code == 130
        note = note_in(shown, "the last transaction that is stored ended at")
        assert len(note) > 1, "it is wrapped"
        assert max(map(len, note)) <= _WIDTH
        said = " ".join(shown.split())
        assert f"replaces {target}: a cluster of PostgreSQL {NEWEST}, system identifier" in said
        assert f"Go on, and lose what is in {target}?" in said
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before

    again = copy.run("restore", "--target-dir", str(target), "--delta")
    assert f"  compares  {target}: a cluster of PostgreSQL {NEWEST}" in again.stderr
    assert "were there already" in again.stdout
    # All of its two parts are fetched, for the few small files that a restore changes are in both.
    assert "were fetched, in whole parts that hold many files each: saved 0 %" in again.stdout
    assert "1 file was removed" in again.stdout
    assert not (target / "base/1/999999").exists()


def test_a_part_that_is_missing_everywhere_is_found_before_anything_is_touched(copy: Copy, tmp_path: Path) -> None:
    target = tmp_path / "target"
    copy.parts()[1].unlink()
    done = copy.run("restore", "--target-dir", str(target), expect=12)
    assert "is missing from every destination: backup" in done.stderr
    assert not target.exists()
