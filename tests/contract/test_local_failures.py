"""What a local disk does at times: full, read-only, forbidden, not mounted; and a process that dies while it writes.

Where a fault is one of the whole process, it is tried in a process of its own.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from handlers.body import joined
from infra.clock import SystemClock
from infra.sources.spool import LOCK, locked
from infra.storage.local import LocalStore
from pipeline.errors import ObjectConflict, ObjectMissing, StoreError
from pipeline.objects import MemoryBody

ROOT = Path(__file__).parents[2]
BODY = MemoryBody((b"x" * 1000,))

seen_in_proc = pytest.mark.skipif(sys.platform != "linux", reason="what is fsynced is seen in /proc")

#: Fills the store in argv[1] with objects of 64 KiB until that fails, makes room and goes on. Prints what happened.
FILL = """
import asyncio, json, os, sys
from pathlib import Path
from handlers.body import joined
from infra.storage.local import LocalStore
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody

async def main():
    store, body, stored = LocalStore(Path(sys.argv[1])), MemoryBody((b"x" * 65536,)), []
    report = {}
    try:
        for number in range(1000):
            await store.put(f"wal/{number:04d}", body)
            stored.append(f"wal/{number:04d}")
    except StoreError as error:
        report = {"fact": error.fact, "hint": error.hint, "passing": error.passing}
    report["stored"] = len(stored)
    report["listed"] = [info.key async for info in store.list("")] == stored
    report["whole"] = all([len(joined(await store.get(key))) == 65536 for key in stored])
    report["left"] = [name for _, _, names in os.walk(sys.argv[1]) for name in names if name.startswith(".")]
    if stored:
        await store.delete(stored[:2])
        await store.put("wal/again", body)
    print(json.dumps(report))

asyncio.run(main())
"""

#: The same as one who has no rights there, where we are root.
FORBIDDEN = """
import asyncio, json, os, sys
from pathlib import Path
from infra.storage.local import LocalStore
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody

async def main():
    store, body = LocalStore(Path(sys.argv[1])), MemoryBody((b"x",))
    await asyncio.to_thread(int)  # the thread and its libraries are there before the rights go
    if os.geteuid() == 0:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    report = []
    for call in (store.put("a", body), store.put("new/a", body), store.delete(["there"])):
        try:
            await call
        except StoreError as error:
            report.append({"fact": error.fact, "hint": error.hint, "passing": error.passing})
    print(json.dumps(report))

asyncio.run(main())
"""

#: Begins to put an object and never ends.
STUCK = """
import asyncio, sys, time
from pathlib import Path
from infra.storage.local import LocalStore

class Endless:
    size = 1 << 20
    def chunks(self):
        yield b"x" * 65536
        print("writing", flush=True)
        time.sleep(600)
    def close(self): pass

asyncio.run(LocalStore(Path(sys.argv[1])).put("wal/0001", Endless()))
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_while_writing(folder: Path) -> Path:
    """What a process leaves that was killed in the middle of a put."""
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    (left,) = (folder / "wal").iterdir()
    return left


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_a_mount(options: str, folder: Path, code: str) -> str:
    """Run the code on a tmpfs of its own, in a mount namespace that goes with the process."""
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    unshare = ["unshare", "--mount", *as_root, "sh", "-c"]
    mount = f'mount -t tmpfs -o {options} tmpfs "$1"'
    try:
        allowed = subprocess.run([*unshare, mount, "sh", str(folder)], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this machine lets us mount nothing, also not in a namespace of our own")
    return run(*unshare, f'{mount} && exec "$2" -c "$3" "$1"', "sh", str(folder), sys.executable, code)


def test_a_full_disk_is_said_and_what_was_stored_stays(tmp_path: Path) -> None:
    report = json.loads(in_a_mount("size=1m", tmp_path, FILL))
    assert "No space left on device" in report["fact"]
    assert f"file://{tmp_path}" in report["fact"]
    assert "65536 bytes" in report["fact"]
    assert "bytes are free" in report["fact"]
    assert "the disk is full" in report["hint"]
    assert report["passing"]
    assert 0 < report["stored"] < 17
    assert report["listed"]
    assert report["whole"]
    assert report["left"] == []


def test_a_limit_of_file_size_is_said(tmp_path: Path) -> None:
    limited = 'ulimit -f 100; exec "$1" -c "$2" "$3"'  # in blocks of 512 bytes: less than an object
    report = json.loads(run("sh", "-c", limited, "sh", sys.executable, FILL, str(tmp_path)))
    assert "File too large" in report["fact"]
    assert not report["passing"]
    assert report["stored"] == 0
    assert report["listed"]
    assert report["left"] == []


def test_a_folder_without_the_right_to_write_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "there").write_bytes(b"x")
    # Above pytest's own folders nobody else may pass; below they may, to fail where we want it.
    opened = [path for path in folder.parents if path.stat().st_uid == os.geteuid() and not path.stat().st_mode & 0o001]
    modes = {path: path.stat().st_mode for path in opened}
    for path in opened:
        path.chmod(modes[path] | 0o001)
    folder.chmod(0o555)
    try:
        reports = json.loads(run(sys.executable, "-c", FORBIDDEN, str(folder)))
    finally:
        folder.chmod(0o755)
        for path, mode in modes.items():
            path.chmod(mode)
    assert len(reports) == 3
    for report in reports:
        assert "Permission denied" in report["fact"]
        assert "the right to read and write" in report["hint"]
        assert not report["passing"]
    assert (folder / "there").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="nobody else can give files away")
async def test_what_root_puts_belongs_to_the_owner_of_the_store(tmp_path: Path) -> None:
    """Else a `walship backup` that root has typed is one that the service cannot read, nor remove."""
    folder = tmp_path / "store"
    folder.mkdir()
    os.chown(folder, 65534, 65533)
    await LocalStore(folder).put("base/b/data/1", BODY)
    made = list(folder.rglob("*"))
    assert len(made) == 4
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(65534, 65533)}
    async with locked(folder, SystemClock()):
        assert (folder / LOCK).stat().st_uid == 65534


def test_a_read_only_file_system_is_said(tmp_path: Path) -> None:
    report = json.loads(in_a_mount("ro", tmp_path, FILL))
    assert "Read-only file system" in report["fact"]
    assert "mounted read-only" in report["hint"]
    assert not report["passing"]


async def test_an_absent_folder_is_not_an_empty_store(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "not-mounted")

    async def listing() -> None:
        async for _ in store.list(""):
            pass

    calls = (
        lambda: store.put("a/b", BODY),
        lambda: store.get("a"),
        lambda: store.head("a"),
        lambda: store.delete(["a"]),
        listing,
    )
    for call in calls:
        with pytest.raises(StoreError, match=r"the folder .*/not-mounted of .* is not there") as raised:
            await call()
        assert not isinstance(raised.value, ObjectMissing)
        assert "mount" in raised.value.hint
    assert not (tmp_path / "not-mounted").exists()


async def test_kill_9_in_the_middle_of_a_put_leaves_no_object(tmp_path: Path) -> None:
    left = killed_while_writing(tmp_path)
    assert left.name.startswith(".walship-")

    store = LocalStore(tmp_path)
    assert [info.key async for info in store.list("")] == []
    assert [info.key async for info in store.list("wal/.")] == []
    with pytest.raises(ObjectMissing):
        await store.get("wal/0001")
    await store.put("wal/0001", BODY)
    assert left.exists(), "a fresh one may belong to a process that lives"

    yesterday = time.time() - 25 * 3600
    os.utime(left, (yesterday, yesterday))
    like_it = tmp_path / "wal" / ".walship-mine.tmp"
    like_it.write_bytes(b"x")
    os.utime(like_it, (yesterday, yesterday))
    await LocalStore(tmp_path).put("wal/0002", BODY)
    assert not left.exists()
    assert like_it.exists(), "only the exact pattern is ours to remove"


class Syncs:
    """What is fsynced below a folder, in order; ``failing`` is what the disk refuses to write."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.failing = ""
        self._folder = folder
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._noted)

    def _noted(self, file: int) -> None:
        path = Path(f"/proc/self/fd/{file}").readlink()
        name = str(path.relative_to(self._folder))
        if name == self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unnamed = path.name.startswith(".walship-")
        assert not unnamed or os.fstat(file).st_nlink == 1, "the name came before the bytes"
        self.seen.append("file" if unnamed else name)
        self._fsync(file)


@seen_in_proc
async def test_each_put_syncs_file_and_folder_and_new_parents_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, syncs = LocalStore(tmp_path), Syncs(tmp_path, monkeypatch)
    await store.put("wal/01/a", BODY)
    assert syncs.seen == [".", "wal", "file", "wal/01"]
    syncs.seen.clear()
    await store.put("wal/01/b", BODY)
    assert syncs.seen == ["file", "wal/01"]


@seen_in_proc
async def test_a_name_that_could_not_be_made_durable_is_not_taken_for_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conflict means "it is stored": whoever is told so compares, and lets the original go."""
    store, syncs = LocalStore(tmp_path), Syncs(tmp_path, monkeypatch)
    syncs.failing = "wal/01"
    for _ in range(2):
        with pytest.raises(StoreError, match="Input/output error") as raised:
            await store.put("wal/01/a", BODY)
        assert not isinstance(raised.value, ObjectConflict)
        assert raised.value.passing
        assert (tmp_path / "wal/01/a").exists()
    syncs.failing = ""
    syncs.seen.clear()
    with pytest.raises(ObjectConflict):
        await store.put("wal/01/a", BODY)
    assert syncs.seen == [".", "wal", "wal/01/a", "wal/01"], "the folders above are not trusted either"


@seen_in_proc
async def test_an_object_of_a_writer_that_died_is_made_durable_before_the_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the link and the fsync of the folder, or of a folder above it."""
    await LocalStore(tmp_path).put("wal/01/a", BODY)
    store, syncs = LocalStore(tmp_path), Syncs(tmp_path, monkeypatch)
    with pytest.raises(ObjectConflict):
        await store.put("wal/01/a", BODY)
    assert syncs.seen == [".", "wal", "wal/01/a", "wal/01"]


@seen_in_proc
async def test_who_loses_the_race_for_a_name_makes_it_durable_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look before the writing has found nothing, the link finds the name taken; its writer may be dead by now."""
    link, syncs = os.link, Syncs(tmp_path, monkeypatch)

    def too_late(source: Path, target: Path, **more: bool) -> None:
        Path(target).write_bytes(b"x" * 1000)
        link(source, target, **more)

    monkeypatch.setattr(os, "link", too_late)
    with pytest.raises(ObjectConflict):
        await LocalStore(tmp_path).put("wal/01/a", BODY)
    assert syncs.seen == [".", "wal", "file", "wal/01/a", "wal/01"]


async def test_without_hard_links_creating_still_does_not_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", refuse)
    store = LocalStore(tmp_path)
    await store.put("a", BODY)
    with pytest.raises(StoreError, match="has an object a already"):
        await store.put("a", MemoryBody((b"other",)))
    assert joined(await store.get("a")) == b"x" * 1000
    found = await store.probe("a", BODY)
    assert not found.conditional_put
    assert "no hard links" in found.remark
    assert names(tmp_path) == ["a"]


async def test_an_object_stays_readable_while_it_is_replaced_and_deleted(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first = b"1" * (17 << 20)
    await store.put("a", MemoryBody((first,)))
    body = await store.get("a")
    await store.put("a", BODY, replace=True)
    await store.delete(["a"])
    assert joined(body) == first
    assert joined(body) == first
    body.close()


async def test_a_file_where_a_folder_is_needed_is_said(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    await store.put("a", BODY)
    with pytest.raises(StoreError, match=r"Not a directory|File exists"):
        await store.put("a/b", BODY)
    await store.put("d/e", BODY)
    with pytest.raises(StoreError, match=r"File exists|Is a directory"):
        await store.put("d", BODY)
    with pytest.raises(StoreError, match=r"Is a directory|File exists"):
        await store.put("d", BODY, replace=True)
    assert [info.key async for info in store.list("")] == ["a", "d/e"]


async def test_folders_go_with_their_last_object_and_come_back(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    await store.put("base/b1/data/1", BODY)
    await store.delete(["base/b1/data/1"])
    assert names(tmp_path) == []
    await store.put("base/b1/data/1", BODY)
    assert joined(await store.get("base/b1/data/1")) == b"x" * 1000
