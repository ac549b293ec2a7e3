"""Chains of incremental backups: restored, interrupted, broken, and read without walship."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from infra.postgres.processes import give, run_as
from tests.backups import Running, local, names, rig
from tests.rig import Rig

__all__ = ["rig"]  # a fixture


def chain(rig: Rig) -> list[str]:
    """A full backup and two incremental ones, with something to lay over."""
    taken: list[str] = [rig.json("backup")["name"]]
    for number in (1, 2):
        rig.sql(f"update t set filler = md5(filler) where n % 3 = {number}")
        result: dict[str, Any] = rig.json("backup", "--incremental")
        assert result["parent"] == taken[-1]
        taken.append(result["name"])
    return taken


def test_a_restore_of_a_chain_is_killed_and_run_again(rig: Rig) -> None:
    signal_file = rig.server.data_dir / "standby.signal"  # in a backup of a standby: listed, and not laid down
    signal_file.touch()
    give(signal_file, run_as())
    last = chain(rig)[-1]
    signal_file.unlink()
    target = rig.target()
    words = ("restore", "--backup", last, "--target-dir", str(target))
    for stage in ("pgsql_tmp.walship/increment/base", "pgsql_tmp.walship/increment/global"):
        running = Running(rig, *words)
        running.until((target / stage).exists)
        running.signal(signal.SIGKILL)
        running.end(-9)
        assert not (target / "global/pg_control").exists(), "no server can start on it"
    rig.run(*words)
    assert (target / "global/pg_control").exists()
    rig.server.run("pg_verifybackup", "-n", "-i", "pgsql_tmp.walship", str(target))
    assert not list(target.rglob("INCREMENTAL.*"))


def test_a_backup_of_the_chain_is_deleted(rig: Rig) -> None:
    older = names(rig)[-1]
    full, middle, last = chain(rig)
    (folder,) = (rig.folder / "store").glob(f"*/base/{full}")
    aside = folder.with_name("aside")
    folder.rename(aside)
    try:
        report = rig.run("verify", expect=12)
        assert (
            f"backup {middle} cannot be used: it builds on {full}, and base/{full}/backup_info is not" in report.stdout
        )
        assert names(rig)[-1] == older
        refused = rig.run("restore", "--backup", last, "--target-dir", str(rig.target()), expect=13)
        assert (
            f"backup {last} cannot be used: it builds on {full} by way of {middle}, and base/{full}/" in refused.stderr
        )
        assert older in refused.stderr
        target = rig.target()
        assert rig.json("restore", "--target-dir", str(target))["backup"] == older
        rig.server.run("pg_verifybackup", "-n", "-i", "pgsql_tmp.walship", str(target))
        # The next one builds on what there is.
        assert rig.json("backup", "--incremental")["parent"] == older
    finally:
        aside.rename(folder)


def test_a_damaged_backup_of_the_chain_spoils_those_behind_it(rig: Rig) -> None:
    full, middle, last = chain(rig)
    (part,) = (rig.folder / "store").glob(f"*/base/{middle}/data/base/00000001")
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        done = rig.run("verify", last, "--json", expect=12)
        verdicts = {backup["name"]: backup for backup in json.loads(done.stdout)["backups"]}
        assert [verdicts[name]["usable"] for name in (full, middle, last)] == [True, False, False]
        assert verdicts[last]["broken_parent"] == middle
    finally:
        part.write_bytes(content)
    # Gone at all: what is missing is named, of whichever backup it is.
    aside = part.with_name("aside")
    part.rename(aside)
    try:
        refused = rig.run("restore", "--backup", last, "--target-dir", str(rig.target()), expect=12)
        assert f"base/{middle}/data/base/00000001" in refused.stderr
        assert f"backup {middle} is not complete, and {last} builds on it" in refused.stderr
    finally:
        aside.rename(part)
    (manifest,) = (rig.folder / "store").glob(f"*/base/{last}/backup_manifest")
    aside = manifest.rename(manifest.with_name("aside"))
    try:
        refused = rig.run("backup", "--incremental", expect=12)
        assert f"base/{last}/backup_manifest" in refused.stderr
        assert f"{last} is not complete" in refused.stderr
        assert "take a full one: walship backup" in refused.stderr
    finally:
        aside.rename(manifest)


def test_a_chain_is_rescued_without_walship(rig: Rig) -> None:
    """What docs/format.md says of it, with docs/rescue.py, tar and PostgreSQL's own program."""
    environment = rig.environment(**local(rig.server))
    taken = [json.loads(rig.run("backup", "--json", environment=environment).stdout)["name"]]
    rig.sql("update t set filler = 'rescued' where n % 700 = 0")
    taken.append(rig.json("backup", "--incremental")["name"])
    listed = {backup["name"]: backup for backup in rig.json("list")["backups"]}
    (root,) = (path.parent for path in (rig.folder / "store").glob("*/repository.json"))
    result = rig.folder / "rescued"
    folders = []
    for name in taken:
        folder = rig.target("unpacked")
        folders.append(str(folder))
        archives = sorted(path.name for path in (root / "base" / name / "data").iterdir())
        assert archives == (["base.1", "base.2"] if listed[name]["kind"] == "full" else ["base"])
        for archive in archives:
            tar = f"{folder}.{archive}.tar"
            rescue(rig, root, "archive", name, archive, tar)
            subprocess.run(["tar", "-xf", tar, "-C", folder, "--same-owner"], check=True)
        rescue(rig, root, "get", f"base/{name}/backup_manifest", str(folder / "backup_manifest"))
        give(folder, run_as())
    rig.server.run("pg_combinebackup", *folders, "-o", str(result), "--no-sync")
    rig.server.run("pg_verifybackup", "-n", str(result))


def rescue(rig: Rig, root: Path, *words: str) -> None:
    script = Path(__file__).resolve().parents[2] / "docs/rescue.py"
    subprocess.run([sys.executable, script, root, *words], env=rig.environment(), check=True, stdin=subprocess.DEVNULL)
