"""Two restores into one folder: the second one is refused, and says whose it is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from handlers.target_lock import Hold
from pipeline.errors import RecoveryError

_HOLDER = """
import subprocess, sys, time
from pathlib import Path
from handlers.target_lock import Hold
with Hold([Path(word) for word in sys.argv[1:]]):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, flush=True)
    time.sleep(60)
"""


@contextmanager
def other(*folders: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds them, and one that it has started."""
    words = [sys.executable, "-c", _HOLDER, *map(str, folders)]
    with subprocess.Popen(words, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


def test_a_second_one_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    data, space = tmp_path / "data", tmp_path / "space"
    with other(data, space) as (process, child):
        for folders in ([data], [tmp_path / "new", space]):
            for make in (False, True):
                with pytest.raises(RecoveryError, match=f"process {process.pid} restores into {folders[-1]}") as caught:
                    Hold(folders, make=make).__enter__()
                assert "nothing was touched" in caught.value.hint
        assert not (tmp_path / "new").exists()
        process.kill()
        process.wait()
        os.kill(child, 0)  # what it has started lives on, and does not hold them
        with Hold([data, space]):
            pass


def test_folders_that_stay_empty_go_again_with_an_error_only(tmp_path: Path) -> None:
    deep = tmp_path / "a/b/c"
    with pytest.raises(KeyError), Hold([deep]):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), Hold([deep]):
        raise KeyError((deep / "file").write_text("kept"))
    assert (deep / "file").exists()
    mask = os.umask(0)
    os.umask(mask)
    assert [path.stat().st_mode & 0o777 for path in (deep, deep.parent)] == [0o700, 0o777 & ~mask]
    with Hold([tmp_path / "x"], make=False):
        assert not (tmp_path / "x").exists()
    with Hold([tmp_path / "x"]):
        pass
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_was_replaced_before_it_was_locked_is_taken_anew(tmp_path: Path) -> None:
    """Another restore that is refused removes the folder that it has made, between our opening it and our lock."""
    folder, handles = tmp_path / "data", []

    def lock(handle: int, _how: int) -> None:
        handles.append(handle)
        if len(handles) == 1:
            folder.rmdir()

    with Hold([folder], lock=lock):
        assert os.path.samestat(folder.stat(), os.fstat(handles[1]))


def test_a_file_system_without_locks_is_told(tmp_path: Path) -> None:
    def lock(_handle: int, _how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    with Hold([tmp_path], lock=lock) as held:
        assert [remark.partition(":")[0] for remark in held.remarks] == [
            f"{tmp_path} cannot be locked (Operation not supported)"
        ]


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("file", "file/x"):
        with pytest.raises(RecoveryError, match="is not a folder"):
            Hold([tmp_path / path]).__enter__()
