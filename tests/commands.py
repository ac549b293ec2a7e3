"""``walship WORDS`` in a process of its own that does not load everything anew.

A command costs 0.3 to 0.7 s of CPU time before it does anything: the modules, and the key ring's passphrase, which is
slow on purpose. Hundreds of commands are run by the acceptance tests, and dozens of services. So each is forked off a
process that has loaded the modules and has done nothing else (``multiprocessing``'s fork server): it has its own
process id, environment, folder, streams, signals and exit code, as any other. The key rings that ``init`` makes here
are cheap to open; what opening costs stands in the ring, and every command obeys that. And where a command (not a
service) waits for nothing but time to pass, less time is enough here: see ``_hurry``.

``as_installed=True`` is the real start, the real cost and the real waits.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Protocol

from handlers import upload
from infra import cli, ring, safety
from infra.cli import VERBS
from infra.sources import watcher
from infra.storage import retry

#: What commands load when they are called: the verbs, and what those load late.
_LOADED = (
    *(f"infra.cli.{verb.replace('-', '_')}" for verb in VERBS),
    "infra.cli.group", "infra.storage.local", "infra.storage.s3", "aiobotocore.session", "rich.progress",
)  # fmt: skip
#: The cost of a passphrase (2**16 in production).
SCRYPT_N = 1 << 10
#: Starting a process asks after all others, and an exit code can be asked for only once.
_lock = threading.Lock()


def run(
    words: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    *,
    timeout: float,
    as_installed: bool = False,
    started: Callable[[int], None] = lambda _: None,
) -> subprocess.CompletedProcess[str]:
    """Run the command and wait for it. Raises subprocess.TimeoutExpired, and has killed it then.

    ``started`` is told its process id, unless it runs as installed.
    """
    command = [sys.executable, "-m", "infra.cli", *words]
    if as_installed:
        return subprocess.run(
            command, env=dict(environment), cwd=folder, capture_output=True, text=True, timeout=timeout, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    # Files, not pipes: servers that outlive the command may keep them open.
    with tempfile.TemporaryDirectory(prefix="walship-c-") as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        process = Forked(words, environment, folder, out=out, err=err, hurry=True)
        late = None
        try:
            started(process.pid)
            code = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            late = error
        finally:
            process.kill()
            process.wait()
        said = [path.read_text("utf-8") if path.exists() else "" for path in (out, err)]
    if late is not None:
        raise subprocess.TimeoutExpired(command, timeout, *said)
    return subprocess.CompletedProcess(command, code, *said)


class Process(Protocol):
    """What is used of a ``subprocess.Popen``."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...
    def kill(self) -> None: ...


class Forked:
    """A command under way, a ``Process``."""

    def __init__(
        self, words: Sequence[str], environment: Mapping[str, str], folder: Path, *, out: Path, err: Path,
        hurry: bool = False,
    ) -> None:  # fmt: skip
        """Start it. What it prints is added to the files ``out`` and ``err``. ``hurry``: see ``_hurry``."""
        with _lock:
            self._process = _server().Process(
                target=_command, args=(words, dict(environment), str(folder), str(out), str(err), hurry), daemon=True
            )
            self._process.start()
        self.pid = self._process.pid or 0
        self._words = words
        self._code: int | None = None

    def poll(self) -> int | None:
        with _lock:
            if self._code is None and self._process.exitcode is not None:
                self._code = self._process.exitcode
                self._process.close()
            return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired, and leaves it running then."""
        if self.poll() is None and not connection.wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired(list(self._words), timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, sig: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> ForkServerContext:
    """One for each test process; it ends with that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LOADED))
    return context


def _command(words: Sequence[str], environment: dict[str, str], folder: str, out: str, err: str, hurry: bool) -> None:
    """The forked process becomes the command: everything that it could have inherited is replaced."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    # As the interpreter makes them for files.
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(open(1, "wb", closefd=False), "utf-8")  # type: ignore[misc]  # noqa: SIM115 - open to the end
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(  # type: ignore[misc]  # to be replaced, as ``secure`` does
        open(2, "wb", closefd=False), "utf-8", "backslashreplace", line_buffering=True  # noqa: SIM115 - likewise
    )  # fmt: skip
    if hurry:
        _hurry()
    sys.argv = ["walship", *words]
    cli.main()


def _hurry() -> None:
    """Lower what is slow on purpose; unit and contract tests look at how long each is, with a clock of their own."""
    defaults = ring.seal_ring.__kwdefaults__
    assert defaults is not None
    assert defaults["scrypt_n"] > SCRYPT_N
    defaults["scrypt_n"] = SCRYPT_N
    # A file that nobody was seen to close: what archives in these tests renames whole files into the spool.
    assert watcher.SETTLE > 0.2
    watcher.SETTLE = 0.2
    # Before the next look at whether a segment has arrived, and before the next attempt where a store has failed.
    assert min(safety.PAUSE, upload.FIRST_PAUSE) > 0.1
    safety.PAUSE = upload.FIRST_PAUSE = 0.1
    patient = retry.RetryPolicy
    retry.RetryPolicy = functools.partial(patient, first=patient().first / 10)  # type: ignore[misc,assignment]
