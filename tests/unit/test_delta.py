"""``--delta``, and a restore that goes on after an interruption: what stays, what is fetched, what is never done."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from handlers.fetch import Fetcher
from handlers.restore import Laid, lay_down
from handlers.target_dir import MARKER, Targets, look
from pipeline.backup import BackupInfo, Tablespace
from pipeline.catalog import index_key, part_key
from pipeline.errors import IntegrityError, RecoveryError
from tests.laying import CONTROL, PART, VERSION, cluster, store, without_index
from tests.parts import Shelf


def see(info: BackupInfo, directory: Path, *, moves: dict[str, str] | None = None, force: bool = False) -> Targets:
    return look(info, directory, moves or {}, force=force, delta=True, wal_margin=0)


async def lay(shelf: Shelf, info: BackupInfo, targets: Targets, seen: list[tuple[int, int]] | None = None) -> Laid:
    return await lay_down(
        info,
        targets,
        fetch=Fetcher([shelf.store], shelf.chain, shelf.system_id),
        complete=lambda folder: (folder / "recovery.signal").touch(),
        progress=lambda done, size: None if seen is None else seen.append((done, size)),
        part_size=PART,
    )


def check(directory: Path, files: Mapping[str, bytes], *, manifest: bool = True) -> None:
    """The directory holds these files and nothing else."""
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*")}
    wanted = {name.rstrip("/") for name in files} | {"pgsql_tmp.walship", "recovery.signal"}
    assert found.keys() == wanted | ({"backup_manifest"} if manifest else set())
    for name, content in files.items():
        path = directory / name
        if name.endswith("/"):
            assert path.is_dir()
            assert not path.is_symlink()
        else:
            assert path.read_bytes() == content, name
            assert stat.S_ISREG(path.lstat().st_mode)


def size(files: Mapping[str, bytes]) -> int:
    """Of what a restore can keep."""
    return sum(map(len, files.values())) - len(CONTROL)


@pytest.mark.parametrize("algorithm", ["CRC32C", "SHA224", "SHA256", "SHA384", "SHA512"])
async def test_what_is_as_in_the_backup_stays(tmp_path: Path, algorithm: str) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files}, algorithm=algorithm)
    first = await lay(shelf, info, see(info, directory))
    assert first == Laid(11, info.size, info.size, kept=0, removed=0)
    check(directory, files)
    inodes = {name: (directory / name).stat().st_ino for name in files}
    seen: list[tuple[int, int]] = []
    again = await lay(shelf, info, see(info, directory), seen)
    check(directory, files)
    assert (again.files, again.size, again.kept) == (11, info.size, size(files))
    # The parts with folders, and the one with pg_control.
    assert again.fetched <= 5 * PART < info.size
    assert seen[-1] == (info.size, info.size)
    assert seen == sorted(seen)
    for name in files:
        if not name.endswith("/") and name != "global/pg_control":
            assert (directory / name).stat().st_ino == inodes[name]


async def test_what_differs_is_made_anew(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    await lay(shelf, info, see(info, directory))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_bytes(files["base/1/100"])
    one = directory / "base/1/101"
    one.write_bytes(bytes(len(files["base/1/101"])))  # the same size, other bytes
    os.link(directory / "base/1/103", outside / "copy")  # somebody's copy: the server would write into it
    (directory / "base/1/100").unlink()
    (directory / "base/1/100").symlink_to(outside / "victim")
    (directory / "base/1/104").unlink()
    (directory / "base/1/104").mkdir()  # a folder where a file was
    (directory / "base/1/104/deep").touch()
    (directory / "base/1/999").write_bytes(b"a table of later")
    (directory / "base/7/empty").mkdir(parents=True)
    (directory / "pg_wal/000000010000000000000009").write_bytes(b"old WAL")
    (directory / "pg_wal/archive_status").rmdir()
    (directory / "pg_wal/archive_status").symlink_to(outside)
    os.mkfifo(directory / "base/5/fifo")
    (directory / "base/5/100").chmod(0o666)
    (directory / "standby.signal").touch()
    laid = await lay(shelf, info, see(info, directory))
    check(directory, files)
    assert laid.kept == size(files) - sum(len(files[f"base/1/{n}"]) for n in (100, 101, 103, 104))
    # deep, 999, WAL, the link, the fifo; signal files are a restore's own
    assert laid.removed == 5
    assert (outside / "victim").read_bytes() == files["base/1/100"]
    assert (outside / "copy").read_bytes() == files["base/1/103"]
    assert (outside / "copy").stat().st_nlink == 1
    assert stat.S_IMODE((directory / "base/5/100").stat().st_mode) == 0o600
    assert sorted(p.name for p in outside.iterdir()) == ["copy", "victim"]


async def test_permissions_are_those_of_the_cluster(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files}, mode=0o640)
    await lay(shelf, info, see(info, directory))
    (directory / "base/1/100").chmod(0o400)
    (directory / "base/1/103").chmod(0o777)
    await lay(shelf, info, see(info, directory))
    assert stat.S_IMODE((directory / "base/1/100").stat().st_mode) == 0o600
    assert stat.S_IMODE((directory / "base/1/103").stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
async def test_kept_files_belong_to_the_owner(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    await lay(shelf, info, see(info, directory))
    os.chown(directory / "base/1/100", 0, 0)
    assert (await lay(shelf, info, see(info, directory))).kept == size(files)
    assert {path.stat().st_uid for name in files for path in [directory / name]} == {65534}


@pytest.mark.parametrize("algorithm", [None, "NONE"])
async def test_without_checksums_everything_is_fetched(tmp_path: Path, algorithm: str | None) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files}, algorithm=algorithm)
    await lay(shelf, info, see(info, directory))
    (directory / "base/1/100").write_bytes(b"changed")
    laid = await lay(shelf, info, see(info, directory))
    assert (laid.fetched, laid.kept) == (info.size, 0)
    check(directory, files, manifest=algorithm is not None)


async def test_without_an_index_kept_files_are_kept_too(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = without_index(await store(shelf, {"base": files}))
    await lay(shelf, info, see(info, directory))
    seen: list[tuple[int, int]] = []
    laid = await lay(shelf, info, see(info, directory), seen)
    assert (laid.fetched, laid.kept) == (info.size, size(files))
    assert seen[-1] == (info.size, info.size)
    check(directory, files)


async def test_an_archive_that_several_workers_made(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    halves: dict[str, dict[str, bytes]] = {"base.1": {}, "base.2": {}}
    for number, (name, content) in enumerate(files.items()):
        halves[f"base.{number % 2 + 1}"][name] = content
    info = await store(shelf, halves)
    await lay(shelf, info, see(info, directory))
    check(directory, files)
    (directory / "base/1/103").write_bytes(b"changed")
    laid = await lay(shelf, info, see(info, directory))
    assert laid.kept == size(files) - len(files["base/1/103"])
    check(directory, files)
    for more, fact in (({"base/1/100": b"x"}, "twice"), ({"global/pg_control": CONTROL}, "more than one")):
        shelf = Shelf()
        info = await store(shelf, {"base.1": files, "base.2": more})
        with pytest.raises(IntegrityError, match=fact):
            await lay(shelf, info, see(info, tmp_path / fact))


async def test_a_link_in_the_place_of_global_is_not_followed(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    await lay(shelf, info, see(info, directory))
    (directory / "global").rename(tmp_path / "global")
    (directory / "global").symlink_to(tmp_path / "global")
    with pytest.raises(RecoveryError, match="cannot be told which cluster"):
        see(info, directory)
    await lay(shelf, info, see(info, directory, force=True))
    check(directory, files)
    assert (tmp_path / "global/pg_control").read_bytes() == CONTROL


async def test_tablespaces_are_compared_where_they_lie(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    old, new = tmp_path / "old", tmp_path / "new"
    spaces = (Tablespace(17, str(old)), Tablespace(18, "pg_tblspc/18"))
    outer = {f"{VERSION}/": b"", f"{VERSION}/1": os.urandom(3 * PART), f"{VERSION}/2": os.urandom(PART)}
    inner = {f"{VERSION}/": b"", f"{VERSION}/1": os.urandom(2 * PART)}
    info = await store(shelf, {"17": outer, "18": inner, "base": files}, spaces=spaces)
    await lay(shelf, info, see(info, directory))
    (old / VERSION / "2").write_bytes(b"changed")
    (old / VERSION / "3").write_bytes(b"of later")
    everything = size(files) + size(outer) + size(inner) + 2 * len(CONTROL)
    laid = await lay(shelf, info, see(info, directory))
    assert (laid.kept, laid.removed) == (everything - PART, 1)
    assert (old / VERSION / "2").read_bytes() == outer[f"{VERSION}/2"]
    assert not (old / VERSION / "3").exists()
    assert (directory / "pg_tblspc/17").readlink() == old
    assert (directory / "pg_tblspc/18" / VERSION / "1").read_bytes() == inner[f"{VERSION}/1"]
    # Moved: the new place has nothing yet, and what lies at the old one is not touched.
    laid = await lay(shelf, info, see(info, directory, moves={str(old): str(new)}))
    assert laid.kept == everything - size(outer) - len(CONTROL)
    assert (new / VERSION / "1").read_bytes() == outer[f"{VERSION}/1"]
    assert (old / VERSION / "1").exists()
    assert (directory / "pg_tblspc/17").readlink() == new
    laid = await lay(shelf, info, see(info, directory, moves={str(old): str(new)}))
    assert laid.kept == everything


async def test_a_tablespace_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    shelf, directory, space = Shelf(), tmp_path / "data", tmp_path / "space"
    plain = await store(shelf, {"base": cluster()})
    await lay(shelf, plain, see(plain, directory))
    (space / VERSION).mkdir(parents=True)
    info = await store(Shelf(), {"base": cluster()}, spaces=(Tablespace(17, str(space)),))
    with pytest.raises(RecoveryError, match="location of tablespace 17"):
        see(info, directory)


async def test_another_cluster_is_refused(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    await lay(shelf, info, see(info, directory))
    (directory / "global/pg_control").write_bytes((7702).to_bytes(8, sys.byteorder) + b"x" * 100)
    with pytest.raises(RecoveryError, match="of the cluster 7702, and backup b is of the cluster 7") as caught:
        see(info, directory)
    assert "--force" in caught.value.hint
    assert (await lay(shelf, info, see(info, directory, force=True))).kept == size(files)
    (directory / "global/pg_control").unlink()
    with pytest.raises(RecoveryError, match="cannot be told which cluster"):
        see(info, directory)


async def test_what_is_no_data_directory_is_refused_and_what_is_empty_is_not(tmp_path: Path) -> None:
    info = await store(Shelf(), {"base": cluster()})
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/letter").write_text("dear")
    with pytest.raises(RecoveryError, match="is not empty"):
        see(info, tmp_path / "letters")
    (tmp_path / "empty").mkdir()
    assert not see(info, tmp_path / "empty").delta
    assert not see(info, tmp_path / "missing").delta


async def test_a_store_that_does_not_answer_leaves_the_old_directory_as_it_was(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    await lay(shelf, info, see(info, directory))
    (directory / "global/later").touch()
    await shelf.store.delete(["base/b/backup_manifest"])
    with pytest.raises(IntegrityError, match="not complete"):
        await lay(shelf, info, see(info, directory))
    assert (directory / "global/pg_control").exists()
    assert (directory / "global/later").exists()
    assert not (directory / MARKER).exists()


async def test_an_interrupted_restore_goes_on(tmp_path: Path) -> None:
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    lost = part_key("b", "base", len(info.archives[0].parts) - 1)
    body = await shelf.store.get(lost)
    await shelf.store.delete([lost])
    with pytest.raises(IntegrityError, match="not complete"):
        await lay(shelf, info, look(info, directory, {}, force=False, wal_margin=0))
    assert (directory / MARKER).exists()
    assert not (directory / "global/pg_control").exists()
    await shelf.store.put(lost, body)
    targets = look(info, directory, {}, force=False, wal_margin=0)
    assert targets.delta
    assert any("interrupted restore" in notice for notice in targets.notices)
    laid = await lay(shelf, info, targets)
    assert laid.kept > 5 * PART
    assert laid.fetched < info.size
    check(directory, files)


async def test_an_index_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    """What it says of where a part begins is compared with what is there."""
    shelf, files = Shelf(), cluster()
    info = await store(shelf, {"base": files})
    honest = await shelf.read(index_key("b", 1), info.id)
    for number, (old, new) in enumerate(
        [
            (b'"path":"base/1/101"', b'"path":"base/1/1O1"'),
            (b'"size":%d' % len(files["base/1/101"]), b'"size":%d' % (len(files["base/1/101"]) + 512)),
            (b'"archive":"base"', b'"archive":"17"'),
        ]
    ):
        lines = honest.splitlines(keepends=True)
        at = next(i for i, line in enumerate(lines) if old in line and b'"offset":0' not in line)
        lines[at] = lines[at].replace(old, new)
        await shelf.store.delete([index_key("b", 1)])
        digest = (await shelf(index_key("b", 1), b"".join(lines), backup=info.id)).digest
        changed = BackupInfo.decode("b", info.encode().replace(info.index[0].encode(), digest.encode()))
        with pytest.raises(IntegrityError):
            await lay(shelf, changed, see(changed, tmp_path / str(number)))
        assert not (tmp_path / str(number) / "global/pg_control").exists()


_KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from handlers import delta, lay_parts, lay_seal, restore, unpack
from handlers.fetch import Fetcher
from infra.storage.local import LocalStore
from pipeline.backup import BackupInfo
from tests.parts import Shelf
from handlers.target_dir import look

folder, moment = Path(sys.argv[1]), int(sys.argv[2])
calls = 0

def counted(owner, name):
    whole = getattr(owner, name)
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)
    setattr(owner, name, call)

for name in ("pwrite", "open", "unlink", "rmdir", "mkdir", "fsync", "chmod", "fchmod"):
    counted(os, name)
info = BackupInfo.decode("b", (folder / "info").read_bytes())
shelf = Shelf()
targets = look(info, folder / "data", {}, force=False, delta=True, wal_margin=0)
fetch = Fetcher([LocalStore(folder / "store")], shelf.chain, "7")
asyncio.run(restore.lay_down(info, targets, fetch=fetch, complete=lambda d: (d / "recovery.signal").touch(),
                             part_size=int(sys.argv[3])))
print(calls)
"""


def _killed(folder: Path, moment: int) -> int:
    words = [sys.executable, "-c", _KILLED, str(folder), str(moment), str(PART)]
    return subprocess.run(words, cwd=Path(__file__).parents[2], timeout=60, check=False).returncode


async def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    """SIGKILL at the n-th call that changes something, each run going on where the one before was killed."""
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    await lay(shelf, info, see(info, directory))
    for name in ("base/1/101", "base/5/100"):
        (directory / name).write_bytes(bytes(len(files[name])))
    (directory / "base/1/later").touch()
    (tmp_path / "info").write_bytes(info.encode())
    for name in shelf.names:
        path = tmp_path / "store" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join((await shelf.store.get(name)).chunks()))
    killed, moments = 0, [3, 9, 12, 20, 30, 45, 70]
    for moment in moments:
        status = await asyncio.to_thread(_killed, tmp_path, moment)
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        if (directory / "global/pg_control").exists() and not (directory / "base/1/later").exists():
            (directory / MARKER).unlink(missing_ok=True)  # whole, and killed just before that
            check(directory, files)
    assert killed > len(moments) // 2
    laid = await lay(shelf, info, see(info, directory))
    assert laid.kept > 0
    check(directory, files)
