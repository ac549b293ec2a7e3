"""What may lie where a restore goes: links, pipes, other file systems.

Nothing outside the folders is read, written, given away or removed, and nothing hangs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlers.fetch import Fetcher
from handlers.occupant import occupant
from handlers.restore import Laid, lay_down
from handlers.target_dir import MARKER, look
from pipeline.backup import BackupInfo, Tablespace
from pipeline.errors import ConfigError, RecoveryError
from tests.laying import PART, VERSION, cluster, store
from tests.parts import Shelf
from tests.unit.test_full_disk import small_disk


async def lay(
    shelf: Shelf, info: BackupInfo, directory: Path, moves: dict[str, str] | None = None, *, force: bool = False,
    delta: bool = False,
) -> tuple[Laid, tuple[str, ...]]:  # fmt: skip
    """Look and lay down; what there was to say."""
    targets = look(info, directory, moves or {}, force=force, delta=delta, wal_margin=0)
    fetch = Fetcher([shelf.store], shelf.chain, shelf.system_id)
    return await lay_down(info, targets, fetch=fetch, complete=lambda _: None, part_size=PART), targets.notices


def tree(folder: Path) -> dict[str, str]:
    """All below, as it is; nothing is opened but regular files."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        about = path.lstat()
        what = str(path.readlink()) if path.is_symlink() else path.read_bytes().hex() if path.is_file() else ""
        found[str(path.relative_to(folder))] = f"{about.st_mode:o} {about.st_uid} {what}"
    return found


def is_whole(directory: Path, files: dict[str, bytes]) -> bool:
    """Every file is there, and nothing beside but our empty folder."""
    found = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    return found == {name.rstrip("/") for name in files} | {"backup_manifest", "pgsql_tmp.walship"} and all(
        (directory / name).read_bytes() == content for name, content in files.items() if name[-1] != "/"
    )


# -- names


async def test_folders_may_be_links(tmp_path: Path) -> None:
    shelf, files = Shelf(), cluster()
    for name in ("disk1", "disk2"):
        (tmp_path / name).mkdir()
    directory, space = tmp_path / "data", tmp_path / "space"
    directory.symlink_to(tmp_path / "disk1")
    space.symlink_to(tmp_path / "disk2")
    inner = {f"{VERSION}/": b"", f"{VERSION}/1": os.urandom(100)}
    info = await store(shelf, {"17": inner, "base": files}, spaces=(Tablespace(17, str(space)),))
    for force, delta in ((False, False), (True, False), (False, True)):
        await lay(shelf, info, directory, force=force, delta=delta)
        assert (tmp_path / "disk1/pg_tblspc/17").readlink() == space, "by the name that people gave it"
        assert (tmp_path / "disk1/tablespace_map").read_text() == f"17 {space}\n"
        assert (tmp_path / "disk2" / VERSION / "1").read_bytes() == inner[f"{VERSION}/1"]
    assert directory.is_symlink()
    assert space.is_symlink()
    # Two names of one folder.
    for place in (f"{tmp_path}/disk1", f"{tmp_path}/disk2/../data/inside"):
        with pytest.raises(ConfigError, match="tablespace 17 and the data directory cannot share"):
            await lay(shelf, info, directory, {str(space): place}, force=True)
    await lay(shelf, info, directory, {str(space): f"{tmp_path}/disk2/../disk3"}, force=True)
    assert (directory / "pg_tblspc/17").readlink() == tmp_path / "disk3"


async def test_a_target_inside_a_data_directory_is_refused(tmp_path: Path) -> None:
    info = await store(shelf := Shelf(), {"base": cluster()})
    (tmp_path / "pg/global").mkdir(parents=True)
    (tmp_path / "pg/PG_VERSION").write_text("17")
    (tmp_path / "link").symlink_to(tmp_path / "pg")
    for place in ("pg/base/new", "link/new"):
        with pytest.raises(RecoveryError, match="lies inside the data directory"):
            await lay(shelf, info, tmp_path / place)
    (tmp_path / "space/PG_17_202406281/5").mkdir(parents=True)
    with pytest.raises(RecoveryError, match=f"lies inside the tablespace at {tmp_path}/space"):
        await lay(shelf, info, tmp_path / "space/PG_17_202406281/5/new")
    await lay(shelf, info, tmp_path / "space/beside")


async def test_a_target_that_cannot_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = await store(shelf := Shelf(), {"base": cluster()})
    with pytest.raises(RecoveryError, match="File name too long"):
        await lay(shelf, info, tmp_path / ("x" * 300))
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(RecoveryError, match="Too many levels of symbolic links"):
        await lay(shelf, info, tmp_path / "round")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="relative to a folder that is gone"):
        await lay(shelf, info, Path("new"))


async def test_a_folder_that_cannot_be_made_is_refused_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the kernel's answer to another user is put in its place."""
    info = await store(Shelf(), {"base": cluster()})
    (tmp_path / "closed/data").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, _mode: path not in (tmp_path / "closed", tmp_path / "closed/data"))
    with pytest.raises(RecoveryError, match=f"new/data cannot be made: {tmp_path}/closed is closed") as caught:
        look(info, tmp_path / "closed/new/data", {}, force=False, wal_margin=0)
    assert "install -d -o USER" in caught.value.hint
    with pytest.raises(RecoveryError, match="closed/data cannot be written to"):
        look(info, tmp_path / "closed/data", {}, force=False, wal_margin=0)
    look(info, tmp_path / "open/data", {}, force=False, wal_margin=0)


# -- what is no file


#: What a restore looks at before it removes anything, or comes upon.
PLACES = ("global/pg_control", "PG_VERSION", "postmaster.pid", "base/1/101", "extra", MARKER, "postgresql.auto.conf",
          "postmaster.opts", "pgsql_tmp.walship", "pg_tblspc", "pg_wal")  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "delta"), [("link", True), ("link to a folder", True), ("pipe", True), ("pipe", False)]
)
@pytest.mark.parametrize("name", PLACES)
async def test_nothing_outside_is_touched_and_nothing_hangs(
    tmp_path: Path, name: str, kind: str, *, delta: bool
) -> None:
    """It is refused, or restored; what lies outside is as it was."""
    shelf, files, directory, outside = Shelf(), cluster(), tmp_path / "data", tmp_path / "outside"
    for big in ("base/1/100", "base/1/101", "base/1/103", "base/5/100"):
        files[big] = b"small"
    info = await store(shelf, {"base": files})
    await lay(shelf, info, directory)
    if os.geteuid() == 0:
        os.chown(directory, 65534, 65534)
    path = directory / name
    outside.mkdir(mode=0o755)
    (outside / "incomplete.json").write_text('{"id": "1"}')
    (outside / "17").symlink_to(outside)
    (outside / "victim").write_bytes(path.read_bytes() if path.is_file() else b"99999999\n")
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside / "victim" if kind == "link" else outside)
    before = tree(outside)
    assert occupant(directory).files
    refused = False
    try:
        await lay(shelf, info, directory, force=True, delta=delta)
    except RecoveryError as error:
        refused = True
        assert error.hint  # noqa: PT017 - either is right
    assert refused == (name == "postmaster.pid" or (name == "PG_VERSION" and kind != "link"))
    assert refused or is_whole(directory, files)
    assert tree(outside) == before


async def test_a_link_to_where_wal_lies_is_told(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    await lay(shelf, info, directory)
    shutil.move(directory / "pg_wal", tmp_path / "disk")
    (directory / "pg_wal").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/old").touch()
    _, notices = await lay(shelf, info, directory, delta=True)
    assert any(notice.startswith(f"{directory}/pg_wal is a link to {tmp_path}/disk: ") for notice in notices)
    assert is_whole(directory, files)
    assert (tmp_path / "disk/old").exists()


# -- file systems


@contextlib.contextmanager
def mounted(place: Path) -> Iterator[None]:
    with small_disk(place, 1 << 20):
        (place / "lost+found").mkdir(mode=0o700)
        yield


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
@pytest.mark.parametrize("delta", [False, True])
async def test_a_mount_point_inside_stays_and_is_emptied(tmp_path: Path, *, delta: bool) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    await lay(shelf, info, directory)
    shutil.rmtree(directory / "pg_wal")
    with mounted(directory / "pg_wal"):
        (directory / "pg_wal/000000010000000000000009").write_bytes(b"old WAL")
        await lay(shelf, info, directory, force=True, delta=delta)
        assert (directory / "pg_wal").is_mount()
        assert sorted(path.name for path in (directory / "pg_wal").iterdir()) == ["archive_status", "lost+found"]
    (directory / "extra").write_bytes(b"")
    subprocess.run(["mount", "--bind", "/dev/null", directory / "extra"], check=True)  # noqa: ASYNC221 - quick
    try:
        with pytest.raises(
            RecoveryError, match=f"{directory}/extra cannot be written: Device or resource busy"
        ) as caught:
            await lay(shelf, info, directory, force=True, delta=delta)
        assert "unmount it" in caught.value.hint
    finally:
        subprocess.run(["umount", directory / "extra"], check=True)  # noqa: ASYNC221 - quick
    await lay(shelf, info, directory)
    assert is_whole(directory, files)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
async def test_what_only_root_may_look_at_is_left_alone(tmp_path: Path) -> None:
    """The top of a file system, restored to by the server's user."""
    shelf, files = Shelf(), cluster()
    top = tmp_path / "top"
    info = await store(shelf, {"base": files})
    await lay(shelf, info, top)
    for path in (top, *top.rglob("*")):
        os.chown(path, 65534, 65534)
    (top / "lost+found").mkdir(mode=0o700)
    opened = [path for path in top.parents if path.stat().st_uid == 0 and not path.stat().st_mode & 0o005]
    for path in opened:
        path.chmod(0o755)
    os.setegid(65534)
    os.seteuid(65534)
    try:
        for delta in (False, True):
            laid, _ = await lay(shelf, info, top, force=True, delta=delta)
            assert bool(laid.kept) == delta
    finally:
        os.seteuid(0)
        os.setegid(0)
        for path in opened:
            path.chmod(0o700)
    assert (top / "lost+found").stat().st_uid == 0
    shutil.rmtree(top / "lost+found")
    assert is_whole(top, files)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file immutable")
async def test_a_file_that_nobody_may_remove_is_named(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    await lay(shelf, info, directory)
    stuck = directory / "base/1/stuck"
    stuck.touch()
    done = subprocess.run(["chattr", "+i", stuck], capture_output=True, check=False)  # noqa: ASYNC221 - quick
    if done.returncode:
        pytest.skip("this file system knows no immutable files")
    try:
        with pytest.raises(RecoveryError, match=f"{stuck} cannot be written: Operation not permitted") as caught:
            await lay(shelf, info, directory, delta=True)
        assert "chattr -i" in caught.value.hint
    finally:
        subprocess.run(["chattr", "-i", stuck], check=True)  # noqa: ASYNC221 - quick
    await lay(shelf, info, directory)
    assert is_whole(directory, files)
