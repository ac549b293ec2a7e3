"""What may outlive a throw-away server: programs that its users started, backends that nobody told, shared memory.

``COPY … TO PROGRAM 'setsid … &'`` makes a process that is nobody's child any more, and a postmaster that was killed
leaves backends that do not notice, and its System V memory, which the kernel keeps until somebody removes it. Linux
only: elsewhere nobody tells which folder a process works in.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

#: In the environment of a throw-away server, and so of every program that is started in it.
MARK = "OF_WALSHIP_DRILL"
_IPC_RMID = 0


def end_family(folder: Path, data: Path, *, patience: float = 10.0) -> None:
    """SIGKILL what was started with ``MARK`` set to ``folder``, and servers that work in ``data``, until none is left.

    Blocking, for ``patience`` seconds at most.
    """
    mark = os.fsencode(f"{MARK}={folder}")
    works = {os.path.realpath(data), str(data)}
    deadline = time.monotonic() + patience
    while (found := [pid for pid in _processes() if _belongs(pid, mark, works)]) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def _processes() -> list[int]:
    with contextlib.suppress(OSError):
        return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit() and int(entry.name) > 1]
    return []


def _belongs(pid: int, mark: bytes, works: set[str]) -> bool:
    """By what it inherited; servers write their title over that, but work in their data directory."""
    home = Path(f"/proc/{pid}")
    try:
        if pid == os.getpid() or (home / "stat").read_text("latin-1").rpartition(") ")[2][:1] in "ZX":
            return False
        if mark in (home / "environ").read_bytes().split(b"\0"):
            return True
        works_in = str((home / "cwd").readlink()).removesuffix(" (deleted)")
        return works_in in works and (home / "comm").read_text("latin-1").startswith("postgres")
    except OSError:  # it has ended, or is another user's
        return False


def forget_memory(pid: int, since: float) -> None:
    """Remove the System V memory that a server has left: made by that process, not before ``since``, used by nobody."""
    try:
        lines = Path("/proc/sysvipc/shm").read_text("ascii").splitlines()[1:]
    except OSError:
        return
    for line in lines:
        # key shmid perms size cpid lpid nattch uid gid cuid cgid atime dtime ctime …
        fields = [int(word) for word in line.split()]
        if fields[4] == pid and fields[6] == 0 and fields[13] >= int(since):
            ctypes.CDLL(None).shmctl(fields[1], _IPC_RMID, None)
