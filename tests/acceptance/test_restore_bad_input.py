"""What people ask of a restore that cannot be, and what breaks under one: message, exit code, and nothing is changed.

Beside ``test_bad_input`` and ``test_bad_repository``, which look at folders in use and at damaged repositories.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from handlers.fetch import Fetcher
from infra.postgres.throwaway import make_folder
from infra.restore import Place, Watch, check_place, make_plan, restore
from pipeline.contracts import Buffer
from pipeline.errors import RecoveryError
from pipeline.targets import Target
from tests.acceptance.conftest import Copy
from tests.acceptance.made_repository import NO_FETCH, build


def fingerprint(*folders: Path) -> dict[str, str]:
    """Every file, folder and link below: its mode, and its content's hash or where it leads."""
    found = {}
    for folder in folders:
        for path in (folder, *sorted(folder.rglob("*"))):
            if path.is_symlink():
                what = str(path.readlink())
            else:
                what = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            found[str(path)] = f"{path.lstat().st_mode:o} {path.lstat().st_uid} {what}"
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    made = make_folder("walship-i-")
    yield made
    shutil.rmtree(made)


@pytest.fixture
def occupied(folder: Path) -> Path:
    """A data directory in whose place the restore shall go, with a tablespace of its own; no server runs on it."""
    directory, place = folder / "target", folder / "place"
    for path in (directory / "global", directory / "pg_tblspc", place / "PG_18_202506291"):
        path.mkdir(parents=True)
    (directory / "PG_VERSION").write_text("18\n")
    (directory / "global/pg_control").write_bytes(b"c" * 8192)
    (directory / "pg_tblspc/16384").symlink_to(place)
    (place / "PG_18_202506291/1").write_text("precious")
    return directory


@pytest.mark.parametrize(
    ("target", "fact", "hint"),
    [
        (("--timeline", "7"), "nothing of timeline 7 is stored", "timelines in the repository: 1"),
        (("--to-lsn", "0/100"), "LSN 0/100, lies before the end of the first backup (base_", "the earliest that can"),
        (("--to-time", "BEFORE"), "lies before the end of the first backup (base_", "the earliest that can be reached"),
        (("--to-name", "nobody made it"), "restore point 'nobody made it' is not in the stored WAL from LSN ",
         "timeline 1 can be restored from "),
        (("--to-xid", "4000000000"), "transaction 4000000000 is not in the stored WAL", "timeline 1 can be restored"),
        (("--to-lsn", "9/100"), "LSN 9/100, lies behind the stored WAL of timeline 1", "timeline 1 can be restored"),
        (("--backup", "base_19990101_000000"), "there is no backup base_19990101_000000", "base_"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_a_target_that_cannot_be_reached(
    copy: Copy, occupied: Path, target: tuple[str, ...], fact: str, hint: str
) -> None:
    """Refused before anything is touched, although ``--force`` says that it may be."""
    before = fingerprint(occupied.parent, copy.local)
    early = str(copy.shipped.end - timedelta(days=1))
    asked = [early if word == "BEFORE" else word for word in target]
    done = copy.run("restore", "--target-dir", str(occupied), *asked, "--force", expect=13)
    assert fact in done.stderr
    assert hint in done.stderr.partition("hint:")[2]
    assert fingerprint(occupied.parent, copy.local) == before


def test_another_clusters_directory_is_not_brought_forward(copy: Copy, occupied: Path) -> None:
    before = fingerprint(occupied.parent)
    foreign = int.from_bytes(b"c" * 8, "little")
    done = copy.run("restore", "--target-dir", str(occupied), "--delta", expect=13)
    assert f"{occupied} is the data directory of the cluster {foreign}, and backup base_" in done.stderr
    assert "hint: choose another folder, or --force" in done.stderr
    (occupied / "PG_VERSION").unlink()
    assert f"{occupied} is not empty" in copy.run("restore", "--target-dir", str(occupied), "--delta", expect=13).stderr
    before.pop(str(occupied / "PG_VERSION"))
    assert fingerprint(occupied.parent) == before


# -- two at once


class Waiting(Fetcher):
    """Fetches parts once it may."""

    begun, go_on = asyncio.Event(), asyncio.Event()

    async def into(self, name: str, use: Callable[[Iterator[Buffer]], None], **more: Any) -> None:
        if "/data/" in name:
            self.begun.set()
            await self.go_on.wait()
        await super().into(name, use, **more)


async def test_two_restores_at_once(folder: Path) -> None:
    """Both would be told that all is well, and one would have removed what the other had written."""
    made = await build(os.urandom(1 << 20))
    repository = made.repository(made.shelf.store)
    plan = await make_plan(repository, Target())
    target = folder / "target"
    waiting = Waiting(repository.stores, made.shelf.chain, made.shelf.system_id)
    first = asyncio.create_task(
        restore(replace(repository, fetch=waiting), plan, Place(target), fetch_wal=NO_FETCH)
    )  # fmt: skip
    await waiting.begun.wait()
    before = fingerprint(folder)
    (folder / "link").symlink_to(target)
    for place in (Place(target), Place(target, force=True), Place(target, delta=True), Place(folder / "link")):
        for work in (check_place(plan, place), restore(repository, plan, place, fetch_wal=NO_FETCH)):
            with pytest.raises(RecoveryError, match=f"process {os.getpid()} restores into {target}"):
                await work
    (folder / "link").unlink()
    assert fingerprint(folder) == before
    waiting.go_on.set()
    await first
    assert all((target / path).read_bytes() == content for path, content in made.files.items())
    await restore(repository, plan, Place(target, force=True), fetch_wal=NO_FETCH)


# -- what is missing everywhere


def test_what_no_destination_has_whole_is_named_with_what_can_still_be_reached(copy: Copy, folder: Path) -> None:
    """One destination lacks it, and in the other it is damaged."""
    other = folder / "other"
    shutil.copytree(copy.local, other)
    segment = copy.segments()[-2]
    path = other / segment.relative_to(copy.local)
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    segment.unlink()
    target = folder / "target"
    environment = copy.rig.environment(WALSHIP_DESTINATIONS=f"file://{copy.local},file://{other}")
    before = fingerprint(copy.local, other)
    done = copy.rig.run("restore", "--target-dir", str(target), environment=environment, expect=12)
    assert f"{segment.name} is damaged" in done.stderr
    assert f"file://{other}" in done.stderr
    # Once the damaged one is gone as well it is a hole, and it is known what comes before that.
    path.unlink()
    done = copy.rig.run("restore", "--target-dir", str(target), environment=environment, expect=13)
    assert f"segment {segment.name} is missing: the latest state cannot be reached" in done.stderr
    reachable = done.stderr.partition("(--to-lsn ")[2].partition(")")[0]
    assert not target.exists()
    copy.rig.run("restore", "--target-dir", str(target), "--to-lsn", reachable, environment=environment)
    before.pop(str(path))
    restored = {name for name in {**before, **fingerprint(copy.local, other)} if "-restore-ok-" in name}
    after = {name: what for name, what in fingerprint(copy.local, other).items() if name not in restored}
    assert after == {name: what for name, what in before.items() if name not in restored}, (
        "but for the record of the restore that went well"
    )


def test_a_part_that_no_destination_has_names_the_backup_that_is_lost(copy: Copy, folder: Path) -> None:
    other = folder / "other"
    shutil.copytree(copy.local, other)
    gone = copy.parts()[-1]
    for path in (gone, other / gone.relative_to(copy.local)):
        path.unlink()
    environment = copy.rig.environment(WALSHIP_DESTINATIONS=f"file://{copy.local},file://{other}")
    before = fingerprint(copy.local, other)
    target = folder / "target"
    done = copy.rig.run("restore", "--target-dir", str(target), environment=environment, expect=12)
    assert f"data/base/{gone.name} is missing from " in done.stderr
    assert f"backup {copy.shipped.backup} is not complete" in done.stderr
    assert "hint: choose another one with --backup" in done.stderr
    assert not (target / "global/pg_control").exists(), "PostgreSQL refuses to start without it"
    assert fingerprint(copy.local, other) == before


# -- a disk that fills


@pytest.fixture
def disk(folder: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = folder / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "walship-test", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


async def test_a_disk_that_fills_half_way(disk: Path) -> None:
    """There was room when the restore began, and then somebody else took it."""
    made = await build(os.urandom(3 << 20))
    repository = made.repository(made.shelf.store)
    beside = disk / "precious"
    beside.mkdir()
    (beside / "kept").write_bytes(b"precious" * 1000)
    before = fingerprint(beside)
    plan = await make_plan(repository, Target())
    place = Place(disk / "target")
    ballast = disk / "ballast"

    def fill(done: int, size: int) -> None:
        if done < size and not ballast.exists():
            subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=64k"], capture_output=True, check=False)

    wanted = rf"No space left on device; the file system at {disk} has \d+ bytes free, and \d+ bytes are still"
    with pytest.raises(RecoveryError, match=wanted) as caught:
        await restore(repository, plan, place, watch=Watch(files=fill), fetch_wal=NO_FETCH)
    assert ballast.exists()
    assert re.search(r"make room for at least \d{4,} bytes more there, then run the same restore", caught.value.hint)
    assert not (disk / "target/global/pg_control").exists(), "PostgreSQL refuses to start without it"
    # Not enough room: told before anything is touched, and how much it is.
    left = fingerprint(disk / "target")
    with pytest.raises(RecoveryError, match=r"has \d+ MB of room, and the restore needs about \d+ MB"):
        await restore(repository, plan, place, fetch_wal=NO_FETCH)
    assert fingerprint(disk / "target") == left
    assert fingerprint(beside) == before
    ballast.unlink()
    await restore(repository, plan, place, fetch_wal=NO_FETCH)
    assert all((disk / "target" / path).read_bytes() == content for path, content in made.files.items())
    assert fingerprint(beside) == before
