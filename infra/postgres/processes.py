"""The processes of a throw-away server: which user they run as, and how all of them end."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import time
from pathlib import Path
from typing import TypedDict

from pipeline.errors import SourceError


class RunAs(TypedDict, total=False):
    """Arguments for ``subprocess`` that change the user; empty means: as we are."""

    user: int
    group: int
    extra_groups: list[int]


def run_as(folder: Path | None = None) -> RunAs:
    """PostgreSQL refuses root: as root, become the owner of ``folder``, else ``postgres``, else ``nobody``."""
    if os.geteuid() != 0:
        return {}
    if folder is not None and folder.exists() and (stat := folder.stat()).st_uid != 0:
        return {"user": stat.st_uid, "group": stat.st_gid, "extra_groups": []}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise SourceError(
        "PostgreSQL refuses to run as root, and there is neither a user postgres nor a user nobody",
        hint="create a user postgres, or run this as an ordinary user",
    )


def give(path: Path, who: RunAs) -> None:
    """Make a folder and all in it the server user's. Follows the links of ``pg_tblspc`` to its tablespaces."""
    if not who:
        return
    uid, gid = who["user"], who["group"]
    os.chown(path, uid, gid)
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            os.chown(os.path.join(folder, name), uid, gid, follow_symlinks=False)  # noqa: PTH118 - a million files
    tablespaces = path / "pg_tblspc"
    for link in tablespaces.iterdir() if tablespaces.is_dir() else ():
        if link.is_symlink() and link.is_dir():
            give(link.resolve(), who)


def guard(pid: int, who: RunAs) -> subprocess.Popen[bytes]:
    """A small shell that ends the server at once (SIGQUIT) when we are gone, however we went.

    It waits on a pipe whose other end only this process holds. The kernel's parent-death signal would be shorter, but
    it fires when the *thread* that started the child ends, and it is Linux only. ``dismiss`` it when the server has
    ended: it must not act on a number that another process has by then.
    """
    return subprocess.Popen(  # noqa: S603 - a fixed script; the pid is a number
        ["/bin/sh", "-c", 'read -r _; kill -QUIT "$1" 2>/dev/null', "walship-guard", str(pid)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, cwd="/", **who,
    )  # fmt: skip


def dismiss(shell: subprocess.Popen[bytes]) -> None:
    """End a guard without letting it act."""
    shell.kill()
    shell.wait()
    if shell.stdin is not None:
        shell.stdin.close()


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all its descendants, and wait until none is left.

    The parent is stopped first, or it could start another child between the look and the kill.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    family = [pid, *_descendants(pid)]
    for member in reversed(family):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    deadline = time.monotonic() + 30
    for member in family[1:]:
        while _alive(member):
            if time.monotonic() > deadline:
                raise SourceError(f"process {member} of a throw-away server does not end", hint="look at it with ps")
            time.sleep(0.01)


def started_at(pid: int) -> str:
    """When a process began, as its system says it: with the number it names one process. Empty if it is gone."""
    if Path("/proc/self/stat").exists():
        try:
            fields = _stat(pid)
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else fields[19]
    listing = subprocess.run(  # noqa: S603 - a number
        ["/bin/ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return listing.stdout.strip()


def works_in(pid: int) -> str:
    """The folder that a process works in; a PostgreSQL server's is its data directory. Empty if that is not known."""
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink())
    except OSError:
        return ""


def _descendants(pid: int) -> list[int]:
    """Parents before their children."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents().items():
        children.setdefault(parent, []).append(child)
    family, next_up = [], [pid]
    while next_up:
        below = children.get(next_up.pop(), [])
        family += below
        next_up += below
    return family


def _parents() -> dict[int, int]:
    """Every process and its parent."""
    if not Path("/proc/self/stat").exists():
        listing = subprocess.run(["/bin/ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
        return {int(pid): int(parent) for pid, parent in (line.split() for line in listing.stdout.splitlines())}
    parents: dict[int, int] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
    return parents


def _alive(pid: int) -> bool:
    if Path("/proc/self/stat").exists():
        try:
            return _stat(pid)[0] not in "ZX"  # a zombie waits for whoever inherits it, and holds nothing
        except OSError:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on; the name before them may hold blanks and brackets."""
    return Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()
