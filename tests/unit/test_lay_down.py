"""A base backup on its way to disk: hostile archives, folders in use, interruptions, tablespaces."""

from __future__ import annotations

import asyncio
import io
import os
import pwd
import stat
import subprocess
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from handlers.fetch import Fetcher
from handlers.restore import Laid, lay_down
from handlers.target_dir import MARKER, Targets, look
from pipeline.backup import ArchiveInfo, BackupInfo, Tablespace
from pipeline.catalog import manifest_key, part_key
from pipeline.errors import ConfigError, IntegrityError, RecoveryError
from pipeline.wal import Lsn
from tests.parts import Shelf

MOMENT = datetime(2026, 1, 14, 12, tzinfo=UTC)
CONTROL = b"control" * 100


def member(
    name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    info.mode = 0o700 if kind == tarfile.DIRTYPE else 0o600
    return info, content


#: A small data directory.
CLUSTER = (
    member("PG_VERSION", b"17\n"),
    member("global", kind=tarfile.DIRTYPE),
    member("base", kind=tarfile.DIRTYPE),
    member("base/1", kind=tarfile.DIRTYPE),
    member("base/1/1259", os.urandom(300_000)),
    member("base/1/empty"),
    member("pg_tblspc", kind=tarfile.DIRTYPE),
    member("pg_wal", kind=tarfile.DIRTYPE),
    member("standby.signal"),
    member("postmaster.pid", b"1\n"),
    member("global/pg_control", CONTROL),
)


def tar(members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


async def store(
    shelf: Shelf, archives: dict[str, bytes], *, spaces: tuple[Tablespace, ...] = (), part: int = 50_000
) -> BackupInfo:
    infos = []
    for name, data in archives.items():
        digests = []
        for number, start in enumerate(range(0, len(data), part), 1):
            shipped = await shelf(part_key("b", name, number), data[start : start + part], backup="b" * 32)
            digests.append(shipped.digest)
        infos.append(ArchiveInfo(name, len(data), tuple(digests)))
    return BackupInfo(
        "b", "b" * 32, "full", "7", 170000, 1 << 20, 1, Lsn(40), Lsn(80), MOMENT, MOMENT, spaces, tuple(infos), (), "",
        0,
    )  # fmt: skip


def fetcher(shelf: Shelf) -> Fetcher:
    return Fetcher([shelf.store], shelf.chain, "7")


def see(info: BackupInfo, directory: Path, *, force: bool = False, moves: dict[str, str] | None = None) -> Targets:
    return look(info, directory, moves or {}, force=force, wal_margin=0)


async def lay(shelf: Shelf, info: BackupInfo, targets: Targets) -> Laid:
    return await lay_down(
        info, targets, fetch=fetcher(shelf), complete=lambda folder: (folder / "recovery.signal").touch()
    )


def is_postgres(pid: int) -> bool:
    return "postgres" in Path(f"/proc/{pid}/comm").read_text()


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def test_the_cluster_comes_back(tmp_path: Path) -> None:
    shelf = Shelf()
    info = await store(shelf, {"base": tar(CLUSTER)})
    directory = tmp_path / "new"
    seen: list[tuple[int, int]] = []
    targets = see(info, directory)
    assert not directory.exists(), "looking changes nothing"
    laid = await lay_down(
        info,
        targets,
        fetch=fetcher(shelf),
        complete=lambda folder: (folder / "recovery.signal").touch(),
        progress=lambda done, size: seen.append((done, size)),
    )
    assert laid == Laid(4, info.size, info.size, kept=0, removed=0)
    assert seen[-1] == (info.size, info.size)
    for entry, content in CLUSTER:
        path = directory / entry.name
        if entry.name in {"standby.signal", "postmaster.pid"}:
            assert not path.exists()
        elif entry.isdir():
            assert path.is_dir()
        else:
            assert path.read_bytes() == content
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert (directory / "recovery.signal").exists()
    assert not (directory / MARKER).exists()


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (member("../evil", b"x"), "leads out of its folder"),
        (member("/etc/evil", b"x"), "leads out of its folder"),
        (member("base/../../evil", b"x"), "leads out of its folder"),
        (member("base/1/link", kind=tarfile.SYMTYPE, link="/etc"), "holds a link"),
        (member("pg_tblspc/17", kind=tarfile.SYMTYPE, link="/etc"), "holds a link"),
        (member("base/1/hard", kind=tarfile.LNKTYPE, link="PG_VERSION"), "does not write"),
        (member("base/1/fifo", kind=tarfile.FIFOTYPE), "does not write"),
        (member("base/1/disk", kind=tarfile.BLKTYPE), "does not write"),
        (member("PG_VERSION", b"18\n"), "twice"),
        (member("PG_VERSION/x", b"18\n"), "twice"),
        (member("PG_VERSION", kind=tarfile.DIRTYPE), "where a file is"),
        (member("global/pg_control", CONTROL), "that is none"),
        (member("global/pg_control", b"x" * 100_000), "that is none"),
    ],
)
async def test_a_hostile_archive_writes_nothing_outside_and_cannot_be_started(
    tmp_path: Path, hostile: tuple[tarfile.TarInfo, bytes], message: str
) -> None:
    shelf = Shelf()
    info = await store(shelf, {"base": tar((*CLUSTER, hostile))})
    directory = tmp_path / "inner" / "new"
    with pytest.raises(IntegrityError, match=message):
        await lay(shelf, info, see(info, directory))
    assert names(tmp_path / "inner") == ["new"]
    assert names(tmp_path) == ["inner"]
    assert not (directory / "global/pg_control").exists()
    assert (directory / MARKER).exists()


async def test_a_file_in_the_place_of_a_tablespace_is_refused(tmp_path: Path) -> None:
    shelf = Shelf()
    space = Tablespace(17, str(tmp_path / "space"))
    info = await store(shelf, {"base": tar((*CLUSTER, member("pg_tblspc/17/x", b"x")))}, spaces=(space,))
    with pytest.raises(IntegrityError, match="in the place of a tablespace"):
        await lay(shelf, info, see(info, tmp_path / "new"))


async def test_parts_that_were_exchanged_lost_or_cut(tmp_path: Path) -> None:
    shelf = Shelf()
    info = await store(shelf, {"base": tar(CLUSTER)})
    first = await shelf.store.get(part_key("b", "base", 1))
    second = await shelf.store.get(part_key("b", "base", 2))
    # The same name and the same backup, but not the part that was listed.
    await shelf.store.delete([part_key("b", "base", 2)])
    await shelf(part_key("b", "base", 2), bytes(50_000), backup="b" * 32)
    with pytest.raises(IntegrityError, match="is not the one that is listed"):
        await lay(shelf, info, see(info, tmp_path / "exchanged"))
    await shelf.store.delete([part_key("b", "base", 2)])
    with pytest.raises(IntegrityError, match="backup b is not complete"):
        await lay(shelf, info, see(info, tmp_path / "lost"))
    await shelf.store.put(part_key("b", "base", 2), first)
    with pytest.raises(IntegrityError, match="holds an object named"):
        await lay(shelf, info, see(info, tmp_path / "renamed"))
    await shelf.store.put(part_key("b", "base", 2), second, replace=True)
    short = info.archives[0]
    cut = BackupInfo.decode("b", info.encode().replace(str(short.size).encode(), str(short.size - 512).encode()))
    with pytest.raises(IntegrityError, match="not the"):
        await lay(shelf, cut, see(cut, tmp_path / "cut"))


async def test_without_a_control_file_it_is_no_cluster(tmp_path: Path) -> None:
    shelf = Shelf()
    info = await store(shelf, {"base": tar(CLUSTER[:-1])})
    with pytest.raises(IntegrityError, match="has no global/pg_control"):
        await lay(shelf, info, see(info, tmp_path / "new"))


async def test_what_an_interrupted_restore_left_is_replaced_without_force(tmp_path: Path) -> None:
    shelf = Shelf()
    space = Tablespace(17, str(tmp_path / "space"))
    inner = tar((member("PG_17_202406281", kind=tarfile.DIRTYPE), member("PG_17_202406281/1", b"data")))
    info = await store(shelf, {"17": inner, "base": tar(CLUSTER)}, spaces=(space,))
    body = await shelf.store.get(part_key("b", "base", 3))
    await shelf.store.delete([part_key("b", "base", 3)])
    directory = tmp_path / "new"
    with pytest.raises(IntegrityError, match="not complete"):
        await lay(shelf, info, see(info, directory))
    assert (directory / "PG_VERSION").exists()
    assert (tmp_path / "space/PG_17_202406281/1").exists()
    await shelf.store.put(part_key("b", "base", 3), body)
    await lay(shelf, info, see(info, directory))
    assert (directory / "global/pg_control").read_bytes() == CONTROL
    assert (directory / "pg_tblspc/17").readlink() == tmp_path / "space"
    assert (directory / "tablespace_map").read_text() == f"17 {tmp_path}/space\n"


async def test_tablespaces_move(tmp_path: Path) -> None:
    shelf = Shelf()
    old, new = tmp_path / "old", tmp_path / "new\nspace"
    old.mkdir()
    (old / "somebody").touch()
    spaces = (Tablespace(17, str(old)), Tablespace(18, "pg_tblspc/18"))
    inner = tar((member("PG_17_202406281", kind=tarfile.DIRTYPE), member("PG_17_202406281/1", b"data")))
    mapped = (*CLUSTER, member("tablespace_map", f"17 {old}\n".encode()))
    linked = (*mapped, member("pg_tblspc/17", kind=tarfile.SYMTYPE, link=str(old)))
    info = await store(shelf, {"17": inner, "18": inner, "base": tar(linked)}, spaces=spaces)
    with pytest.raises(RecoveryError, match="location of tablespace 17") as caught:
        see(info, tmp_path / "data")
    assert f"--tablespace-map {old}=" in caught.value.hint
    await lay(shelf, info, see(info, tmp_path / "data", moves={str(old): str(new)}))
    assert (new / "PG_17_202406281/1").read_bytes() == b"data"
    assert (tmp_path / "data/pg_tblspc/17").readlink() == new
    assert (tmp_path / "data/pg_tblspc/18/PG_17_202406281/1").read_bytes() == b"data"
    escaped = str(new).replace("\n", "\\\n")
    assert (tmp_path / "data/tablespace_map").read_text() == f"17 {escaped}\n"


async def test_the_map_of_an_archive_is_never_laid_down(tmp_path: Path) -> None:
    """A server makes links of it at its start: to a folder that may be a running server's."""
    shelf = Shelf()
    mapped = (*CLUSTER, member("tablespace_map", b"99 /var/lib/postgresql/live\n"))
    info = await store(shelf, {"base": tar(mapped)})
    await lay(shelf, info, see(info, tmp_path / "none"))
    assert not (tmp_path / "none/tablespace_map").exists()
    listed = Shelf()
    info = replace(
        info, manifest=(await listed(manifest_key("b"), b'{ "Path": "tablespace_map" }', backup=info.id)).digest
    )
    for number, _ in enumerate(info.archives[0].parts, 1):
        await listed.store.put(part_key("b", "base", number), await shelf.store.get(part_key("b", "base", number)))
    await lay(listed, info, see(info, tmp_path / "empty"))
    assert (tmp_path / "empty/tablespace_map").read_text() == "", "pg_verifybackup wants the file"
    inner = tar((member("PG_17_202406281", kind=tarfile.DIRTYPE),))
    spaces = (Tablespace(17, str(tmp_path / "space")),)
    other = Shelf()
    info = await store(other, {"17": inner, "base": tar(mapped)}, spaces=spaces)
    await lay(other, info, see(info, tmp_path / "one"))
    assert (tmp_path / "one/tablespace_map").read_text() == f"17 {tmp_path}/space\n"


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ({"/nowhere": "/x"}, "has no tablespace at /nowhere"),
        ({"/space/a": "relative"}, "not an absolute path"),
        ({"/space/a": "/space/b"}, "two tablespaces cannot share"),
        ({"/space/a": "DATA/inside"}, "cannot share"),
    ],
)
async def test_maps_that_make_no_sense(tmp_path: Path, moves: dict[str, str], message: str) -> None:
    spaces = (Tablespace(17, "/space/a"), Tablespace(18, "/space/b"))
    info = await store(Shelf(), {"base": tar(CLUSTER)}, spaces=spaces)
    moves = {old: new.replace("DATA", str(tmp_path / "data")) for old, new in moves.items()}
    with pytest.raises(ConfigError, match=message):
        see(info, tmp_path / "data", moves=moves)


async def test_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    info = await store(Shelf(), {"base": tar(CLUSTER)})
    (tmp_path / "letter").write_text("dear")
    for force in (False, True):
        with pytest.raises(RecoveryError, match="is not empty") as caught:
            see(info, tmp_path, force=force)
    assert "--force empties only" in caught.value.hint
    with pytest.raises(RecoveryError, match="is not a folder"):
        see(info, tmp_path / "letter")
    assert (tmp_path / "letter").read_text() == "dear"


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="a process is told by its name in /proc")
async def test_force_replaces_a_data_directory_but_never_a_running_server(tmp_path: Path) -> None:
    shelf = Shelf()
    info = await store(shelf, {"base": tar(CLUSTER)})
    directory = tmp_path / "data"
    await lay(shelf, info, see(info, directory))
    (directory / "later").touch()
    with pytest.raises(RecoveryError, match="is not empty") as caught:
        see(info, directory)
    assert "--force to replace" in caught.value.hint

    shell = tmp_path / "postgres"
    shell.symlink_to("/bin/sleep")
    server = subprocess.Popen([shell, "60"])  # noqa: ASYNC220 - started and ended here
    try:
        async with asyncio.timeout(20):
            while not is_postgres(server.pid):
                await asyncio.sleep(0.01)
        (directory / "postmaster.pid").write_text(f"{server.pid}\n{directory}\n")
        for force in (False, True):
            with pytest.raises(RecoveryError, match=f"running server, process {server.pid}"):
                see(info, directory, force=force)
    finally:
        server.kill()
        server.wait()
    # A number that is nobody here, or ourselves, may be a server's in another container or on another machine.
    for pid in (server.pid, os.getpid(), os.getppid()):
        (directory / "postmaster.pid").write_text(f"{pid}\n{directory}\n1\n5432\n\n\n  1234  99999999\nready\n")
        with pytest.raises(RecoveryError, match=f"process {pid}\\) may be running elsewhere") as caught:
            see(info, directory, force=True)
        assert f"remove {directory}/postmaster.pid" in caught.value.hint
    assert (directory / "later").exists()
    # Where our own interrupted restore left its marker, and no pg_control, no server was ever started.
    (directory / MARKER).write_text('{"id": "1", "names": ["later", "postmaster.pid"]}')
    with pytest.raises(RecoveryError, match="may be running elsewhere"):
        see(info, directory)
    (directory / "global/pg_control").rename(tmp_path / "control")
    see(info, directory)
    (tmp_path / "control").rename(directory / "global/pg_control")
    (directory / MARKER).unlink()
    (directory / "postmaster.pid").unlink()
    await lay(shelf, info, see(info, directory, force=True))
    assert not (directory / "later").exists()


async def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    info = await store(Shelf(), {"base": tar(CLUSTER)})
    with pytest.raises(RecoveryError, match=r"MB of room, and the restore needs about \d+ MB"):
        look(info, tmp_path / "data", {}, force=False, wal_margin=1 << 60)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
async def test_as_root_the_owner_of_the_folder_gets_the_files(tmp_path: Path) -> None:
    shelf = Shelf()
    info = await store(shelf, {"base": tar(CLUSTER)})
    directory = tmp_path / "data"
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    await lay(shelf, info, see(info, directory))
    for path in (directory / "PG_VERSION", directory / "base/1", directory / "global/pg_control"):
        assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
async def test_as_root_without_an_owner_it_is_the_user_postgres(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = await store(Shelf(), {"base": tar(CLUSTER)})

    def nobody(name: str) -> None:
        raise KeyError(name)

    monkeypatch.setattr(pwd, "getpwnam", nobody)
    targets = see(info, tmp_path / "data")
    assert targets.owner is None
    assert "there is no user postgres" in targets.notices[0]


async def test_a_cancelled_restore_has_stopped_writing_when_it_returns(tmp_path: Path) -> None:
    shelf = Shelf()
    info = await store(shelf, {"base": tar((*CLUSTER[:-1], member("base/1/large", bytes(20_000_000)), CLUSTER[-1]))})
    directory = tmp_path / "data"
    begun = asyncio.Event()
    work = lay_down(
        info,
        see(info, directory),
        fetch=fetcher(shelf),
        complete=lambda folder: (folder / "recovery.signal").touch(),
        progress=lambda _done, _all: begun.set(),
    )
    task = asyncio.create_task(work)
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    written = {path: path.stat().st_size for path in directory.rglob("*")}
    await asyncio.to_thread(time.sleep, 0.1)
    assert {path: path.stat().st_size for path in directory.rglob("*")} == written
    assert not (directory / "global/pg_control").exists()
    assert (directory / MARKER).exists()
    await lay(shelf, info, see(info, directory))
    assert (directory / "base/1/large").stat().st_size == 20_000_000
