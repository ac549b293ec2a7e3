"""Runs one recovery and says what it took: a program of its own, small on purpose, like ``measured``.

It starts a command that starts a server, or the server itself, follows the server's log, and ends the server once it is
promoted, or when it is interrupted; nothing that it has started outlives it. It adopts what is left running, so the
processor time is that of everything that took part from "redo starts" on: the server, restore_command, who feeds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_CHILD_SUBREAPER = 36
#: How often the log and the command's memory are looked at.
_PAUSE = 0.02
_DEADLINE = 300.0
#: Seconds that a command may take to clean up when it is ended.
_PATIENCE = 30.0
_STARTS = re.compile(r"redo starts at")
_DONE = re.compile(r"redo done at .* elapsed: ([0-9.]+) s")
_COMPLETE = re.compile(r"archive recovery complete")


@dataclass(frozen=True, slots=True)
class Recovery:
    """What to run, and where its server is."""

    command: list[str]
    environment: dict[str, str]
    #: ``user``, ``group`` and ``extra_groups`` of the command, where it is the server itself.
    who: dict[str, Any]
    data_dir: str
    #: The server's log, and whatever the command says; the same where it is the server itself.
    server_log: str
    log: str


@dataclass(frozen=True, slots=True)
class Replayed:
    """What it took."""

    #: Seconds from "redo starts" to "redo done", as the server measured them: restore_command is in it.
    redo: float
    #: CPU seconds of all processes together, from "redo starts" on.
    cpu: float
    #: Bytes of the command's own process at its largest, from its start on.
    peak: int


class RecoveryFailedError(Exception):
    """The command or the server ended before it was promoted; the message has the last words of both."""


def recover(
    command: Sequence[str | Path], environment: Mapping[str, str], who: Mapping[str, Any], data_dir: Path,
    server_log: Path, log: Path,
) -> Replayed:  # fmt: skip
    """Run one recovery in a small process. See ``Recovery``."""
    job = Recovery(list(map(str, command)), dict(environment), dict(who), str(data_dir), str(server_log), str(log))
    with subprocess.Popen(
        [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        try:
            said, errors = process.communicate(json.dumps(asdict(job)))
        except BaseException:
            process.terminate()
            process.wait()  # until the server has ended: its folder is removed next
            raise
    if process.returncode:
        words = "".join(path.read_text("utf-8", "replace")[-3000:] for path in (log, server_log) if path.exists())
        raise RecoveryFailedError(f"{errors.strip()}\n{words}")
    return Replayed(**json.loads(said))


def _main() -> None:
    job = Recovery(**json.load(sys.stdin))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    with Path(job.log).open("wb") as log:
        process = subprocess.Popen(
            job.command, env=job.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
            start_new_session=True, **job.who,
        )  # fmt: skip
    try:
        before, peak, text = _followed(job, process)
    except BaseException:
        _end_command(process)  # first: it may be about to start a server
        raise
    finally:
        _end_server(Path(job.data_dir))
        process.wait()
        _adopted()
    if process.returncode and process.pid != _server(Path(job.data_dir)) and not _COMPLETE.search(text):
        sys.exit(f"the command ended with exit status {process.returncode}")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = _DONE.search(text)
    if done is None:
        sys.exit("the server does not say how long its redo took")
    print(json.dumps(asdict(Replayed(float(done[1]), usage.ru_utime + usage.ru_stime - before, peak))))


def _followed(job: Recovery, process: subprocess.Popen[bytes]) -> tuple[float, int, str]:
    """Wait until the server is promoted and the command, unless it is the server, has ended.

    Gives the CPU seconds of the command up to "redo starts", its peak in bytes, and the server's log.
    """
    before, peak, deadline = None, 0, time.monotonic() + _DEADLINE
    log = Path(job.server_log)
    while True:
        ended = process.poll() is not None
        if not ended:
            peak = max(peak, _peak(process.pid))
        text = log.read_text("utf-8", "replace") if log.exists() else ""
        if before is None and _STARTS.search(text):
            before = _cpu(process.pid)
        if _COMPLETE.search(text) and (ended or process.pid == _server(Path(job.data_dir))):
            return before or 0.0, peak, text
        if ended or time.monotonic() > deadline:
            sys.exit("the recovery did not come to its end")
        time.sleep(_PAUSE)


def _peak(pid: int) -> int:
    """Bytes; not the resource usage, in which a process starts with the peak of the one that it was forked from."""
    with contextlib.suppress(OSError):
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text("latin-1"))
        return int(match[1]) << 10 if match else 0
    return 0


def _cpu(pid: int) -> float:
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _server(data_dir: Path) -> int:
    """Process id of the server on a data directory; 0 if there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((data_dir / "postmaster.pid").read_text("utf-8").split()[0])
    return 0


def _interrupt(_number: int, _frame: object) -> NoReturn:
    """Ctrl-C comes here as well as to who then sends SIGTERM: the second of them must not end the cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit("interrupted")


def _end_command(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()


def _end_server(data_dir: Path) -> None:
    if pid := _server(data_dir):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGQUIT)


def _adopted() -> None:
    """Wait for everything that was left running."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    _main()
