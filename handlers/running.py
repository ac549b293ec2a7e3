"""Whether a server may be running on a data directory. Blocking; changes nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from pipeline.errors import RecoveryError


class _Owner(Enum):
    """What is known of the server that a postmaster.pid speaks of."""

    RUNS = "runs"
    DEAD = "dead"
    UNKNOWN = "unknown"


def check_not_running(directory: Path, *, ours: bool) -> None:
    """Refuse a directory whose server runs, or whose server is not proven dead.

    A process number proves no death: the server may run in another container, or on another machine that shares the
    mount, and then its number is nobody here, or somebody else, or (1, in a container) ourselves. What proves it is
    what PostgreSQL itself goes by: the small System V shared memory segment that every server keeps attached, and that
    outlives a killed one. If the very segment that postmaster.pid names is here, made by the process it names, and
    nobody is attached to it, the server ran here and is dead. After a reboot the segment is gone: a person has to say
    so then. Only where an interrupted restore of ours left its marker no server can have been started.
    """
    try:
        lines = (directory / "postmaster.pid").read_text("latin-1").split("\n")
    except FileNotFoundError:
        return
    pid = abs(int(lines[0])) if lines[0].strip().lstrip("-").isdecimal() else 0
    owner = _attached(pid, lines)
    if owner is _Owner.UNKNOWN and pid and _is_server(pid):
        owner = _Owner.RUNS
    if owner is _Owner.RUNS:
        raise RecoveryError(
            f"{directory} belongs to a running server, process {pid}",
            hint="stop it first, or restore into another folder",
        )
    if owner is _Owner.UNKNOWN and not ours:
        raise RecoveryError(
            f"{directory} has a postmaster.pid, and the server that it names (process {pid}) may be running elsewhere",
            hint="in another container, or on another machine that shares the folder; if it is certain that no server"
            f" runs on it, remove {directory}/postmaster.pid",
        )


def _attached(pid: int, lines: Sequence[str]) -> _Owner:
    """Whether anyone holds the shared memory segment that line 7 of postmaster.pid names by key and id."""
    try:
        key, number = (int(word) & 0xFFFFFFFF for word in lines[6].split())
        table = Path("/proc/sysvipc/shm").read_text("ascii").splitlines()[1:]
    except (OSError, ValueError, IndexError):
        return _Owner.UNKNOWN
    for line in table:
        # key shmid perms size cpid lpid nattch …
        fields = [int(word) for word in line.split()]
        if (fields[0] & 0xFFFFFFFF, fields[1]) == (key, number):
            if fields[6]:
                return _Owner.RUNS
            return _Owner.DEAD if fields[4] == pid else _Owner.UNKNOWN
    return _Owner.UNKNOWN


def _is_server(pid: int) -> bool:
    """Whether that process lives, and is not known to be something else. False proves nothing."""
    if pid in {os.getpid(), os.getppid()}:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, and is another user's
    try:
        return "post" in Path(f"/proc/{pid}/comm").read_text("latin-1")
    except OSError:
        return True
