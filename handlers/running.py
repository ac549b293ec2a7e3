"""Whether a server may be running on a data directory, or on a tablespace's folder. Blocking; changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path

from handlers.target_walk import read_file
from pipeline.errors import RecoveryError

#: postmaster.pid has a few lines.
_MOST = 8192


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
    file = directory / "postmaster.pid"
    there = os.path.lexists(file)
    lines = (read_file(file, _MOST) or b"").decode("latin-1").split("\n")
    pid = abs(int(lines[0])) if lines[0].strip().lstrip("-").isdecimal() else 0
    owner = _attached(pid, lines) if there else _Owner.DEAD
    if owner is _Owner.RUNS or (owner is _Owner.UNKNOWN and pid and _is_server(pid)):
        raise _runs(directory, pid)
    for worker, works_in in servers():  # somebody may have removed the file
        if _is_same(works_in, directory):
            raise _runs(directory, worker)
    if owner is _Owner.UNKNOWN and not ours:
        named = f"process {pid}" if pid else "no number"
        raise RecoveryError(
            f"{directory} has a postmaster.pid, and the server that it names ({named}) may be running elsewhere",
            hint="in another container, or on another machine that shares the folder; if it is certain that no server"
            f" runs on it, remove {directory}/postmaster.pid",
        )


def _runs(directory: Path, pid: int) -> RecoveryError:
    return RecoveryError(
        f"{directory} belongs to a running server, process {pid}", hint="stop it first, or restore into another folder"
    )


def servers() -> Iterator[tuple[int, Path]]:
    """Process and data directory of the servers that can be seen from here: as root all of this machine's, else ours.

    Every process of a server works in its data directory. The path leads there through /proc, also out of a container.
    """
    with suppress(OSError):
        for process in Path("/proc").iterdir():
            if process.name.isdecimal():
                with suppress(OSError):  # it has ended, or is another user's
                    name = (process / "comm").read_text("latin-1").strip()
                    if name in ("postgres", "postmaster") and (process / "cwd").is_dir():
                        yield int(process.name), process / "cwd"


def user_of(folder: Path) -> str:
    """Which server that can be seen from here has a tablespace in that folder; empty for none."""
    seen: set[tuple[int, int]] = set()
    for pid, works_in in servers():
        with suppress(OSError):
            about = works_in.stat()
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            for link in (works_in / "pg_tblspc").iterdir():
                # Where it leads in the file system that this process sees.
                there = Path(f"/proc/{pid}/root", str(link.readlink()).lstrip("/")) if link.is_symlink() else link
                if _is_same(there, folder):
                    return f"process {pid} in {works_in.readlink()}"
    return ""


def _is_same(path: Path, folder: Path) -> bool:
    with suppress(OSError):
        return path.samefile(folder)
    return False


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
