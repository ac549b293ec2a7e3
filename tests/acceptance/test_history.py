"""What was done to a repository is remembered there, and shown."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.acceptance.conftest import Copy


def test_what_was_done_is_shown_also_where_records_are_damaged_or_a_destination_is_missing(copy: Copy) -> None:
    time.sleep(1.01)  # the name of a record tells whole seconds: one that cannot be read is sorted by them
    copy.run("verify", "--stored-only")
    copy.object(copy.parts()[0].relative_to(copy.root).as_posix()).write_bytes(b"damage")
    copy.run("verify", copy.shipped.backup, expect=12)
    shown = json.loads(copy.run("history", "--json").stdout)
    assert [(each["verb"], each["ok"]) for each in shown] == [("backup", True), ("verify", True), ("verify", False)]
    taken, good, bad = shown
    assert taken["summary"]["name"] == copy.shipped.backup
    assert (good["arguments"], good["summary"]["faults"]) == (["--stored-only"], 0)
    assert bad["arguments"] == [copy.shipped.backup]
    assert "damaged or missing" in bad["error"]
    assert not {str(copy.local), "PASSWORD"} & set(json.dumps(shown).split('"'))

    copy.object(good["record"]).write_bytes(b"WALSHIP")
    gone = f"file://{copy.local},file://{copy.local}-gone"
    told = copy.rig.run("history", environment=copy.rig.environment(WALSHIP_DESTINATIONS=gone))
    lines = told.stdout.splitlines()
    assert [line.split()[3:5] for line in lines] == [["backup", "ok"], ["verify", "ok"], ["verify", "FAILED"]]
    assert "its record cannot be read" in lines[1]
    assert f"file://{copy.local}-gone is left out" in told.stderr
    assert copy.run("history", "--verb", "drill").stdout == "no drill was recorded yet\n"
    assert len(copy.run("history", "--last", "1").stdout.splitlines()) == 1
    told = copy.run("history", "--verb", "dril", expect=2)
    assert "'dril' is not one of" in told.stderr


def test_a_change_of_the_keys_says_which_one_it_was(copy: Copy, tmp_path: Path) -> None:
    copy.run("key", "export-writer", str(tmp_path / "writer.json"))
    (line,) = copy.run("history", "--verb", "key").stdout.splitlines()
    assert line.endswith("  export-writer")
