"""Whose files a restore may overwrite: marks of restores that were killed, tablespaces that may be another's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from handlers.fetch import Fetcher
from handlers.restore import lay_down
from handlers.target_dir import CONTROL, MARKER, look
from pipeline.backup import BackupInfo, Tablespace
from pipeline.errors import IntegrityError, RecoveryError, StoreError
from tests.laying import PART, VERSION, cluster, store
from tests.parts import Shelf
from tests.stores import Faulty
from tests.unit.test_hostile_targets import is_whole, lay, tree

# -- marks


_KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from handlers import lay_seal, restore, target_dir
from handlers.fetch import Fetcher
from infra.storage.local import LocalStore
from pipeline.backup import BackupInfo
from tests.parts import Shelf

folder, owner, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def kill(*_args, **_more):
    os.kill(os.getpid(), signal.SIGKILL)
setattr({"restore": restore, "lay_seal": lay_seal}[owner], name, kill)
info = BackupInfo.decode("b", (folder / "info").read_bytes())
shelf = Shelf()
targets = target_dir.look(info, folder / "data", {}, force=True, wal_margin=0)
fetch = Fetcher([LocalStore(folder / "store")], shelf.chain, "7")
asyncio.run(restore.lay_down(info, targets, fetch=fetch, complete=lambda _: None, part_size=int(sys.argv[4])))
"""


@pytest.mark.parametrize(("owner", "name"), [("restore", "disarm"), ("lay_seal", "finish")])
async def test_a_mark_beside_a_control_file_counts_for_nothing(tmp_path: Path, owner: str, name: str) -> None:
    """Killed where a server can start on the directory: before anything was changed, and when all was done."""
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    await lay(shelf, info, directory)
    (tmp_path / "info").write_bytes(info.encode())
    for key in shelf.names:
        path = tmp_path / "store" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join((await shelf.store.get(key)).chunks()))
    words = [sys.executable, "-c", _KILLED, str(tmp_path), owner, name, str(PART)]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], check=False)  # noqa: ASYNC221 - nothing else goes on
    assert done.returncode == -signal.SIGKILL
    assert (directory / MARKER).exists()
    assert (directory / CONTROL).exists()
    (directory / "base/1/999").write_bytes(b"the server was started again, and somebody works on it")
    before = tree(directory)
    with pytest.raises(RecoveryError, match="is not empty") as caught:
        await lay(shelf, info, directory)
    assert "--force" in caught.value.hint
    assert tree(directory) == before
    _, notices = await lay(shelf, info, directory, force=True)
    assert any(f"{MARKER} is of a restore that" in notice for notice in notices)
    assert is_whole(directory, files)


async def test_killed_while_its_mark_is_written(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    (directory / MARKER).parent.mkdir(parents=True)
    (directory / f"{MARKER}.walship").write_text("{")
    await lay(shelf, info, directory)
    assert is_whole(directory, files)


async def stopped(shelf: Shelf, info: BackupInfo, directory: Path, *, at: int, force: bool = False) -> None:
    """A restore that ends at its so-maniest fetch."""
    store = Faulty(shelf.store, fail={("get", at): StoreError("the line is cut")})
    targets = look(info, directory, {}, force=force, wal_margin=0)
    fetch = Fetcher([store], shelf.chain, shelf.system_id)
    with pytest.raises(StoreError, match="the line is cut"):
        await lay_down(info, targets, fetch=fetch, complete=lambda _: None, part_size=PART)


@pytest.mark.parametrize("force", [False, True])
async def test_a_mark_gives_no_leave_to_remove_what_came_later(tmp_path: Path, *, force: bool) -> None:
    """Stopped at once, and forgotten; then somebody puts other things there, another cluster for one."""
    shelf, files, directory = Shelf(), {**cluster(), "site.conf": b"mine", "empty/": b""}, tmp_path / "data"
    info = await store(shelf, {"base": files})
    await stopped(shelf, info, directory, at=2)  # the manifest is read, and the mark is set
    assert [path.name for path in directory.iterdir()] == [Path(MARKER).parts[0]]
    (directory / "main/global").mkdir(parents=True)
    for name in ("main/PG_VERSION", "main/global/pg_control", "thesis"):
        (directory / name).write_text("years of work")
    before = tree(directory)
    with pytest.raises(RecoveryError, match="data holds main, thesis, which the restore") as caught:
        await lay(shelf, info, directory, force=force)
    assert "move that elsewhere" in caught.value.hint
    assert tree(directory) == before


@pytest.mark.parametrize("ends_at", range(2, 11, 2))
async def test_what_the_backup_or_force_put_there_is_no_obstacle(tmp_path: Path, ends_at: int) -> None:
    """Wherever it ended, it goes on without being told again: with people's own files, and what was to be removed."""
    shelf, directory = Shelf(), tmp_path / "data"
    files = {**cluster(), "server.key": b"mine", "conf.d/": b"", "conf.d/a": b"1", "empty/": b"", '\u00fc "x\\': b"2"}
    info = await store(shelf, {"base": files})
    await lay(shelf, info, directory)
    (directory / "old").mkdir()
    (directory / "old/one").write_text("to be removed")
    await stopped(shelf, info, directory, at=ends_at, force=True)
    assert not (directory / CONTROL).exists()
    await lay(shelf, info, directory)
    assert is_whole(directory, files)


# -- tablespaces of others


async def tablespace(tmp_path: Path) -> tuple[Shelf, BackupInfo, Path, dict[str, bytes]]:
    """A backup, laid down once, with a tablespace in ``space``."""
    shelf, space = Shelf(), tmp_path / "space"
    inner = {f"{VERSION}/": b"", f"{VERSION}/1": os.urandom(PART)}
    info = await store(shelf, {"17": inner, "base": cluster()}, spaces=(Tablespace(17, str(space)),))
    await lay(shelf, info, tmp_path / "data")
    assert [path.name for path in space.iterdir()] == [VERSION], "no mark is left in it"
    return shelf, info, space, inner


@pytest.mark.parametrize("more", ["PG_16_202307071", "PG_17_202405161"])
async def test_the_folder_of_another_version_is_never_touched(tmp_path: Path, more: str) -> None:
    """pg_upgrade leaves the old cluster's beside the new one's, and the old cluster may run."""
    shelf, info, space, _ = await tablespace(tmp_path)
    (space / more).mkdir()
    (space / more / "precious").touch()
    before = tree(tmp_path)
    for force, delta in ((True, False), (False, True), (True, True)):
        with pytest.raises(RecoveryError, match=f"location of tablespace 17, {space}, holds .*{more}") as caught:
            await lay(shelf, info, tmp_path / "data", force=force, delta=delta)
        assert f"--tablespace-map {space}=/another/folder" in caught.value.hint
    assert tree(tmp_path) == before
    await lay(shelf, info, tmp_path / "data", {str(space): str(tmp_path / "elsewhere")}, force=True)
    assert (space / more / "precious").exists()


async def test_a_link_in_the_place_of_a_version_folder_is_refused(tmp_path: Path) -> None:
    shelf, info, space, _ = await tablespace(tmp_path)
    (space / VERSION).rename(tmp_path / "outside")
    (space / VERSION).symlink_to(tmp_path / "outside")
    with pytest.raises(RecoveryError, match="is not empty"):
        await lay(shelf, info, tmp_path / "data", force=True)


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="what a process does is told by /proc")
async def test_a_tablespace_that_a_running_server_uses_is_refused(tmp_path: Path) -> None:
    """The data directory was copied, and the links of the copy lead to the original's."""
    shelf, info, space, inner = await tablespace(tmp_path)
    directory, copy = tmp_path / "data", tmp_path / "copy"
    shutil.copytree(directory, copy, symlinks=True)
    program = tmp_path / "postgres"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"], cwd=directory) as server:  # noqa: ASYNC220 - ended here
        try:
            before = tree(tmp_path)
            for moves in ({}, {str(space): str(space)}):
                with pytest.raises(
                    RecoveryError, match=f"in use by a running server, process {server.pid} in"
                ) as caught:
                    await lay(shelf, info, copy, moves, delta=True)
                assert f"--tablespace-map {space}=/another/folder" in caught.value.hint
            # Without a postmaster.pid, too.
            with pytest.raises(RecoveryError, match=f"{directory} belongs to a running server, process {server.pid}"):
                await lay(shelf, info, directory, force=True)
            assert tree(tmp_path) == before
        finally:
            server.kill()
    await lay(shelf, info, copy, {str(space): str(tmp_path / "new")}, delta=True)
    assert (space / VERSION / "1").read_bytes() == inner[f"{VERSION}/1"]


async def test_a_copy_of_a_data_directory_does_not_own_what_its_links_lead_to(tmp_path: Path) -> None:
    shelf, info, space, _ = await tablespace(tmp_path)
    directory, copy = tmp_path / "data", tmp_path / "copy"
    (directory / "postmaster.opts").write_text(f'/usr/lib/postgresql/17/bin/postgres "-D" "{directory}" "-p" "1"\n')
    shutil.copytree(directory, copy, symlinks=True)
    await lay(shelf, info, directory, delta=True)
    before = tree(tmp_path)
    for force in (False, True):
        with pytest.raises(
            RecoveryError, match=f"{copy} was last started as {directory}, so it may be a copy"
        ) as caught:
            await lay(shelf, info, copy, force=force, delta=True)
        assert f"--tablespace-map {space}={space} says" in caught.value.hint
    assert tree(tmp_path) == before
    await lay(shelf, info, copy, {str(space): str(space)}, delta=True)
    assert (copy / "pg_tblspc/17").readlink() == space


async def test_a_mark_does_not_speak_for_a_folder_that_was_filled_since(tmp_path: Path) -> None:
    """The restore was given up, and a new cluster uses the folder that its mark names."""
    shelf, info, space, _ = await tablespace(tmp_path)
    directory = tmp_path / "data"
    shutil.rmtree(directory)
    shutil.rmtree(space)
    lost = "base/b/data/base/00000003"
    body = await shelf.store.get(lost)
    await shelf.store.delete([lost])
    with pytest.raises(IntegrityError, match="not complete"):
        await lay(shelf, info, directory)
    assert (space / VERSION / "1").exists()
    await shelf.store.put(lost, body)
    await lay_interrupted_again(shelf, info, tmp_path)
    shutil.rmtree(space)
    (space / VERSION).mkdir(parents=True)
    (space / VERSION / "precious").touch()
    (directory / CONTROL).unlink()
    with pytest.raises(RecoveryError, match=f"location of tablespace 17, {space}, is not empty"):
        await lay(shelf, info, directory)
    assert (space / VERSION / "precious").exists()


async def lay_interrupted_again(shelf: Shelf, info: BackupInfo, tmp_path: Path) -> None:
    """What was begun goes on without being told to; then its mark is put back, as if it had been killed once more."""
    mark = (tmp_path / "data" / MARKER).read_bytes()
    laid, _ = await lay(shelf, info, tmp_path / "data")
    assert laid.kept > PART
    (tmp_path / "data" / MARKER).write_bytes(mark)


async def test_a_chain_goes_on_and_leaves_no_mark_in_a_tablespace(tmp_path: Path) -> None:
    shelf, directory, space = Shelf(), tmp_path / "data", tmp_path / "space"
    spaces = (Tablespace(17, str(space)),)
    files = {"backup_label": b"", **cluster()}
    one = await store(shelf, {"17": {f"{VERSION}/1": b"old", f"{VERSION}/2": b""}, "base": files}, spaces=spaces)
    two = await store(shelf, {"17": {f"{VERSION}/1": b"new"}, "base": files}, name="c", spaces=spaces)
    fetch = Fetcher([shelf.store], shelf.chain, shelf.system_id)
    lost = "base/c/data/17/00000001"
    body = await shelf.store.get(lost)
    await shelf.store.delete([lost])
    for broken in (True, False):
        targets = look(two, directory, {}, force=False, wal_margin=0, before=[one])
        work = lay_down(two, targets, fetch=fetch, complete=lambda _: None, part_size=PART, before=[one])
        if broken:
            with pytest.raises(IntegrityError, match="not complete"):
                await work
            await shelf.store.put(lost, body)
        else:
            await work
    assert [path.name for path in space.rglob("*")] == [VERSION, "1"]
    assert (space / VERSION / "1").read_bytes() == b"new"
