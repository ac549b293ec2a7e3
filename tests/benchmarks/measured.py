"""Runs commands and says what they cost: a program of its own, small on purpose, started by ``measure``.

A process starts with the peak memory of the one that it was forked from, so whoever starts what is measured must be
smaller than it: this program, without site-packages, has about 10 MB. It also adopts what its commands leave running
(pgBackRest's asynchronous processes), waits for it, and counts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Job:
    """What to run, and what to watch meanwhile."""

    #: Each is run when the one before it has ended; all must succeed.
    commands: list[list[str]]
    environment: dict[str, str]
    #: Their output, for the message if one fails.
    log: str
    #: Files that are renamed after each command, from the first name to the second, as PostgreSQL's archiver does.
    renames: list[tuple[str, str]] = field(default_factory=list)
    #: Take the time when below ``folder`` there are ``count`` files whose names end so.
    folder: str = ""
    suffix: str = ""
    count: int = 0
    #: End the command by SIGTERM once nothing in this folder begins like a WAL file.
    empties: str = ""
    #: How much nicer than usual the commands are.
    nice: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """What it took."""

    #: Seconds until the last command had ended.
    wall: float
    #: Seconds until everything was there: of ``Job.count`` files, or ``wall``.
    stored: float
    #: CPU seconds of all processes together, children and grandchildren included.
    cpu: float
    #: Bytes of the largest process at its largest.
    rss: int
    #: Bytes of all processes together at their largest, seen twenty times a second; 0 if nobody looked.
    together: int = 0
    #: CPU seconds of the whole machine meanwhile: what is more than the command's and the server's is the neighbours'.
    machine: float = 0.0


class CommandFailedError(Exception):
    """A command that was to be measured ended with an error; the message has its last words."""


def measure(
    commands: Sequence[Sequence[str | Path]],
    environment: Mapping[str, str],
    log: Path,
    *,
    renames: Sequence[tuple[Path, Path]] = (),
    stored: tuple[Path, str, int] | None = None,
    empties: Path | None = None,
    nice: int = 0,
) -> Cost:
    """Run the commands one after the other in a small process. See ``Job``. CommandFailedError if one fails."""
    folder, suffix, count = stored or ("", "", 0)
    job = Job(
        [list(map(str, command)) for command in commands], dict(environment), str(log),
        [(str(before), str(after)) for before, after in renames], str(folder), suffix, count, str(empties or ""),
        nice,
    )  # fmt: skip
    log.write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-I", "-S", __file__], input=json.dumps(asdict(job)), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        words = log.read_text("utf-8", "replace")[-3000:]
        raise CommandFailedError(f"{done.stderr.strip()}\n{words}")
    return Cost(**json.loads(done.stdout))


def _main() -> None:
    job = Job(**json.load(sys.stdin))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.nice(job.nice)
    log = os.open(job.log, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 2)
    silent = os.open(os.devnull, os.O_RDONLY)
    began, busy = time.monotonic(), _busy()
    watcher, memory = _Watcher(job), _Memory()
    for number, command in enumerate(job.commands):
        actions = [(os.POSIX_SPAWN_DUP2, silent, 0), (os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        pid = os.posix_spawn(command[0], command, job.environment, file_actions=actions)
        if job.empties:
            _drained(Path(job.empties), pid)
        _, status = os.waitpid(pid, 0)
        if status:
            os.write(log, f"\n{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}\n".encode())
            sys.exit(1)
        if job.renames:
            Path(job.renames[number][0]).rename(job.renames[number][1])
    wall, busy = time.monotonic() - began, _busy() - busy
    _adopted()
    stored = watcher.end() - began if job.count else wall
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    scale = 1 if sys.platform == "darwin" else 1024
    largest = usage.ru_maxrss * scale
    cost = Cost(wall, stored, usage.ru_utime + usage.ru_stime, largest, max(largest, memory.end()), busy)
    print(json.dumps(asdict(cost)))


class _Watcher:
    """Looks a hundred times a second whether all files are there."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._at = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        if job.count:
            self._thread.start()

    def end(self) -> float:
        """The moment when all files were there. Exits if they are not there by now."""
        self._over.set()
        self._thread.join()
        if not self._at:
            sys.exit(f"not all of {self._job.count} files have come")
        return self._at

    def _look(self) -> None:
        while not self._at:
            last = self._over.is_set()
            found = sum(name.endswith(self._job.suffix) for _, _, names in os.walk(self._job.folder) for name in names)
            if found >= self._job.count:
                self._at = time.monotonic()
            elif last:
                return
            self._over.wait(0.01)


class _Memory:
    """Adds up twenty times a second what all processes below this one hold. What they share counts for each."""

    def __init__(self) -> None:
        self._most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        if sys.platform == "linux":
            self._thread.start()

    def end(self) -> int:
        """Bytes."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        return self._most

    def _look(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._over.wait(0.05):
            self._most = max(self._most, page * sum(map(_pages, _below(os.getpid()))))


def _below(pid: int) -> list[int]:
    """All processes that it has started, and those that these have started."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # it has just ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text("ascii").split():
                found += [int(child), *_below(int(child))]
    return found


def _pages(pid: int) -> int:
    """Pages in memory."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    return 0


def _busy() -> float:
    """CPU seconds of all processors since the machine was started."""
    if sys.platform != "linux":
        return 0.0
    user, nice, system, _idle, _wait, interrupts, soft = map(int, Path("/proc/stat").read_text("ascii").split()[1:8])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def _drained(folder: Path, pid: int) -> None:
    """SIGTERM to the process once the folder holds no WAL file; it must not end before that."""
    while any(entry.name[:8].isalnum() and len(entry.name) == 24 for entry in os.scandir(folder)):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.005)
    os.kill(pid, signal.SIGTERM)


def _adopted() -> None:
    """Wait for everything that the commands have left running."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    _main()
