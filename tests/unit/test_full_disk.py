"""A disk that fills half way: what was there stays, the message says what is missing and where, and it goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlers.fetch import Fetcher
from handlers.full_disk import cannot_write
from handlers.restore import Laid, lay_down
from handlers.target_dir import MARKER, Targets, look
from pipeline.backup import BackupInfo
from pipeline.errors import RecoveryError
from tests.laying import PART, cluster, store
from tests.parts import Shelf


async def lay(shelf: Shelf, info: BackupInfo, targets: Targets) -> Laid:
    fetch = Fetcher([shelf.store], shelf.chain, shelf.system_id)
    return await lay_down(info, targets, fetch=fetch, complete=lambda _: None, part_size=PART)


def see(info: BackupInfo, directory: Path) -> Targets:
    return look(info, directory, {}, force=False, wal_margin=0)


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A file system of that many bytes; skips where none can be mounted."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
async def test_a_disk_that_fills_half_way(tmp_path: Path) -> None:
    shelf, files, disk = Shelf(), cluster(), tmp_path / "disk"
    info = await store(shelf, {"base": files})
    with small_disk(disk, info.size + (128 << 10)):
        directory = disk / "data"
        targets = see(info, directory)
        other = disk / "somebody's"
        other.write_bytes(bytes(info.size // 2))  # after the look: somebody else needs the room
        with pytest.raises(RecoveryError, match="No space left on device") as caught:
            await lay(shelf, info, targets)
        told = re.search(rf"the file system at {disk} has (\d+) bytes free, and (\d+) bytes", caught.value.fact)
        assert told is not None
        free, left = map(int, told.groups())
        assert free < left <= info.size
        assert f"at least {left - free} bytes more" in caught.value.hint
        assert "run the same restore again" in caught.value.hint
        assert other.read_bytes() == bytes(info.size // 2)
        assert (directory / MARKER).exists()
        assert not (directory / "global/pg_control").exists()
        other.unlink()
        laid = await lay(shelf, info, see(info, directory))
        assert laid.kept > 0
        assert all((directory / name).read_bytes() == content for name, content in files.items() if name[-1] != "/")


async def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The way that needs no root: a limit on the size of files."""
    shelf, files, directory = Shelf(), cluster(), tmp_path / "data"
    info = await store(shelf, {"base": files})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * PART, before[1]))
    try:
        with pytest.raises(RecoveryError, match="base/1/101 cannot be written: File too large") as caught:
            await lay(shelf, info, see(info, directory))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "ulimit -f" in caught.value.hint
    assert not (directory / "global/pg_control").exists()
    laid = await lay(shelf, info, see(info, directory))
    assert laid.files == 11


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_what_is_missing_is_counted_on_the_file_system_that_is_full(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OSError, match="No space left") as caught, Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"x")
    error = OSError(caught.value.errno, os.strerror(errno.ENOSPC), str(tmp_path / "data/base/1"))
    told = cannot_write(error, tmp_path / "data", [(tmp_path / "data", free + (1 << 40)), (Path("/proc"), 1 << 50)])
    missing = re.search(r"at least (\d+) bytes more there", told.hint)
    assert missing is not None
    assert (1 << 39) < int(missing[1]) < (1 << 41), "of the other file system nothing is missing"
    told = cannot_write(error, tmp_path / "data", [(tmp_path / "data", 10)])
    assert "a quota may be used up" in told.hint
    told = cannot_write(OSError(errno.EROFS, "Read-only file system"), tmp_path, [])
    assert told.fact == f"{tmp_path} cannot be written: Read-only file system"
