"""The folder that a drill works in, and that nothing is left of: not after a failure, Ctrl-C, or SIGKILL.

    <work-dir>/walship-drill-XXXXXXXX/
        drill.json        whose it is: process id and start time; locked for as long as that process lives
        data/  tablespace-…/  sockets/  server.log  pg_hba.conf  pg_ident.conf

A drill that is killed cannot clean up. A guard ends its server at once, and the next drill in the same work folder
removes the rest: only folders of that very name, with such a marker, whose process is gone and has let go of the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from infra.postgres.leftovers import MARK, end_family, forget_memory
from infra.postgres.processes import RunAs, dismiss, give, kill_tree, run_as, started_at, works_in
from pipeline.errors import ConfigError, SourceError

_PREFIX = "walship-drill-"
_NAME = re.compile(r"walship-drill-[a-z0-9_]{8}")
_MARKER = "drill.json"
#: Bytes of a socket's path, on the system that allows least.
_SOCKET_PATH = 103
#: Seconds that the server gets to end by itself.
_GRACE = 10.0
#: Like ``processes.guard``, for a server whose number is not known yet: it may just be starting.
_GUARD = """read -r _
for _ in 1 2 3 4 5; do
    if pid=$(head -n 1 "$1/postmaster.pid" 2>/dev/null) && kill -QUIT "$pid" 2>/dev/null; then exit; fi
    sleep 1
done
"""


class Room:
    """Made with ``with``; on exit the server is ended and the folder removed, unless ``keep``. Blocking."""

    def __init__(self, work_dir: Path, *, keep: bool = False) -> None:
        self._work_dir = Path(os.path.abspath(work_dir))  # noqa: PTH100 - resolve() would make the socket's path longer
        self._keep = keep
        self._who: RunAs = {}
        self._lock = -1
        self._guard: subprocess.Popen[bytes] | None = None
        #: Process id of the server, and when it began.
        self._server = (0, "")
        self.folder = Path()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def sockets(self) -> Path:
        return self.folder / "sockets"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    @property
    def who(self) -> RunAs:
        """The user that the server runs as."""
        return self._who

    @property
    def environment(self) -> dict[str, str]:
        """For the server, so that whatever is started in it can be found in the end."""
        return {MARK: str(self.folder)}

    def remember(self, pid: int) -> None:
        """The server that runs in here: its data directory, which says so too, may not outlive the checks."""
        self._server = (pid, started_at(pid))

    def __enter__(self) -> Self:
        self._who = run_as()
        try:
            self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._work_dir))
        except OSError as error:
            raise ConfigError(
                f"a drill cannot make a folder in {self._work_dir}: {error.strerror}",
                hint="--work-dir names a folder on a disk with room for the whole cluster",
            ) from None
        try:
            self._furnish()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nothing here waits for the event loop: a second Ctrl-C cannot come in between.
        if self._guard is not None:
            dismiss(self._guard)
        if not self._keep:
            end_server(self.data, self._server)
            _end_rest(self.folder, self.data, self._server[0])
            self._remove()

    def _furnish(self) -> None:
        if self._who:
            self.folder.chmod(0o711)  # the server's user passes through, and changes nothing of ours
        if not self._keep:
            self._mark()
        self._check_reach()
        for folder in (self.data, self.sockets):
            folder.mkdir(mode=0o700)
            give(folder, self._who)
        # Whoever reaches the socket is us: its folder is closed to everybody else.
        for name, content in (("pg_hba.conf", "local all all trust\n"), ("pg_ident.conf", "")):
            path = self.folder / name
            path.write_text(content, "utf-8")
            path.chmod(0o644)
        if not self._keep:
            self._guard = subprocess.Popen(  # noqa: S603 - a fixed script
                ["/bin/sh", "-c", _GUARD, "walship-guard", str(self.data)],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True, cwd="/", **self._who,
            )  # fmt: skip

    def _mark(self) -> None:
        self._lock = os.open(self.folder / _MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        content = {"walship_drill": 1, "pid": os.getpid(), "started": started_at(os.getpid())}
        os.write(self._lock, json.dumps(content).encode())

    def _check_reach(self) -> None:
        """What would otherwise be noticed once everything has been fetched."""
        if len(os.fsencode(self.sockets / ".s.PGSQL.65535")) > _SOCKET_PATH:
            raise ConfigError(
                f"the path of {self._work_dir} is too long for a server's socket",
                hint="--work-dir with a shorter path; a symbolic link to the folder is enough",
            )
        reached = subprocess.run(  # noqa: S603 - a fixed script
            ["/bin/sh", "-c", 'cd "$1"', "walship-drill", str(self.folder)],
            stdin=subprocess.DEVNULL, capture_output=True, cwd="/", check=False, **self._who,
        )  # fmt: skip
        if reached.returncode != 0:
            raise ConfigError(
                f"the user that runs PostgreSQL (id {self._who.get('user', os.geteuid())}) cannot reach"
                f" {self._work_dir}",
                hint="--work-dir names a folder that is open to that user, as are all above it",
            )

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep(work_dir: Path) -> list[Path]:
    """Remove what drills that were killed have left in the folder, their servers first. Blocking. Returns what."""
    who = run_as()
    owners = {os.geteuid(), *([who["user"]] if who else [])}
    try:
        entries = sorted(work_dir.iterdir())
    except OSError:
        return []  # ``Room`` says what is wrong with it
    removed = []
    for entry in entries:
        if not _NAME.fullmatch(entry.name) or entry.is_symlink() or not entry.is_dir():
            continue
        if entry.lstat().st_uid in owners and _abandoned(entry / _MARKER):
            pid = end_server(entry / "data")
            _end_rest(entry, entry / "data", pid)
            shutil.rmtree(entry, ignore_errors=True)
            removed.append(entry)
    return removed


def _abandoned(marker: Path) -> bool:
    """Whether it is a drill's marker, and that drill has ended."""
    try:
        handle = os.open(marker, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        content = json.loads(os.read(handle, 4096))
        if not isinstance(content, dict) or content.get("walship_drill") != 1:
            return False
        pid, started = int(content["pid"]), str(content["started"])
    except (OSError, ValueError, KeyError, TypeError):  # locked, so its drill lives; or it is not ours
        return False
    else:
        return started_at(pid) != started
    finally:
        os.close(handle)


def end_server(data: Path, known: tuple[int, str] = (0, "")) -> int:
    """End the server that runs on a drill's data directory, if one does: at once, for nobody needs its data.

    ``known``: its process id and when that began, if anybody remembers. Returns the process id; 0 if there was none.
    """
    try:
        pid = int((data / "postmaster.pid").read_text("latin-1").splitlines()[0])
    except (OSError, ValueError, IndexError):
        pid = known[0]
    if pid <= 1 or not ((pid, started_at(pid)) == known or _works_on(pid, data)):
        return pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGQUIT)  # unlike SIGKILL it leaves no shared memory behind
    deadline = time.monotonic() + _GRACE
    while _lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    if _lives(pid):
        with contextlib.suppress(SourceError):  # a process that does not even end then holds files, and no more
            kill_tree(pid)
    return pid


def _end_rest(folder: Path, data: Path, pid: int) -> None:
    """What is left of a server that has ended: see ``leftovers``."""
    end_family(folder, data)
    if pid:
        with contextlib.suppress(OSError):
            forget_memory(pid, (folder / _MARKER).stat().st_mtime)


def _works_on(pid: int, data: Path) -> bool:
    """Whether the process is that directory's server: since the machine was restarted any other may have its number."""
    if folder := works_in(pid):
        return folder == os.path.realpath(data)
    listing = subprocess.run(["/bin/ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)  # noqa: S603 - a number
    return str(data) in listing.stdout


def _lives(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return started_at(pid) != ""
