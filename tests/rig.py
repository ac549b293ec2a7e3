"""A whole installation for acceptance tests: a real server that archives, a bucket, a local store, and the command.

The command is always run as users run it: a process of its own, with settings in its environment and nothing else. Only
how that process comes to be is shorter, see ``tests.commands``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from infra.postgres import processes
from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import ThrowawayServer
from tests import commands
from tests.servers import new_server, programs

_OURS = "from pg_stat_replication where application_name = 'walship'"
_STARTED = '"event": "started"'
PASSPHRASE = "correct horse battery staple"
#: Variables of the machine that a command needs; settings of the person who runs the tests must not leak in.
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "SYSTEMROOT", "PYTHONDONTWRITEBYTECODE")


class WrongExitError(AssertionError):
    """The command ended with another exit code than was expected."""


class Rig:
    """One server, its spool, its destinations. Everything lives below ``folder``; ``close`` ends all processes."""

    def __init__(
        self, folder: Path, major: int, destinations: Sequence[str], *, settings: Mapping[str, str] | None = None,
        segment_mb: int = 1, server_settings: Mapping[str, str] | None = None, sources: str = "watch",
        as_installed: bool = False,
    ) -> None:  # fmt: skip
        """``sources``: as WALSHIP_SOURCES says them; without ``watch`` the server archives nothing.

        ``as_installed``: see ``tests.commands``.
        """
        self.folder = folder
        self.as_installed = as_installed
        self.major = major
        self.bin_dir = programs(major)
        self.spool = folder / "spool"
        self.spool.mkdir()
        give(self.spool, run_as())
        watched = "watch" in sources.split(",")
        self.destinations = tuple(destinations)
        for url in destinations:
            if url.startswith("file://"):
                Path(url.removeprefix("file://")).mkdir(exist_ok=True)
        self.server = new_server(
            major, folder, segment_mb=segment_mb,
            settings={
                "wal_level": "replica", "max_wal_senders": "5",
                **({"archive_mode": "on", "archive_library": "basic_archive",
                    "basic_archive.archive_directory": str(self.spool)} if watched else {}),
                **(server_settings or {}),
            },
        )  # fmt: skip
        self.extra = {
            "WALSHIP_DESTINATIONS": ",".join(destinations),
            **({"WALSHIP_SPOOL_DIR": str(self.spool)} if watched else {}),
            **({"WALSHIP_SOURCES": sources} if sources != "watch" else {}),
            "WALSHIP_PG_BIN_DIR": str(self.bin_dir),
            "WALSHIP_WAL_TIMEOUT": "60",
            "WALSHIP_LISTEN": "off",  # the default port is one service's, and many run at once here
            "BACKUP_ENCRYPTION_ENABLED": "true",
            "BACKUP_ENCRYPTION_PASSWORD": PASSPHRASE,
            **(settings or {}),
        }
        self._backed_up = ""
        self._services: list[commands.Process] = []
        self._restored: list[ThrowawayServer] = []
        self._targets: list[Path] = []

    # -- the command

    def environment(self, **changed: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        return {**kept, **self.server.environment(), **self.extra, **changed}

    def run(
        self, *words: str, expect: int = 0, timeout: float = 120.0, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """``walship WORDS``; fails the test with all that was printed if the exit code is another one."""
        if "backup" in words:
            self.next_second()
        done = commands.run(
            words, environment or self.environment(), self.folder, timeout=timeout, as_installed=self.as_installed
        )
        if "backup" in words:
            self._backed_up = _name_of_a_backup()
        if done.returncode != expect:
            raise WrongExitError(
                f"walship {' '.join(words)}: exit code {done.returncode}, not {expect}\n"
                f"--- stdout\n{done.stdout[-4000:]}\n--- stderr\n{done.stderr[-8000:]}"
            )
        return done

    def next_second(self) -> None:
        """Wait, if need be, until a backup that begins now gets a later name than all before: names are by seconds."""
        begun = [self._backed_up, *(path.name for path in self.folder.glob("*/*/base/base_*"))]
        while _name_of_a_backup() <= max(begun):
            time.sleep(0.02)

    def json(self, *words: str, expect: int = 0, timeout: float = 120.0) -> Any:
        """The result of ``walship WORDS --json``."""
        return json.loads(self.run(*words, "--json", expect=expect, timeout=timeout).stdout)

    def serve(self, *prefix: str, **changed: str) -> commands.Process:
        """Start ``walship run`` and wait until it ships; its log goes to ``service.log``.

        Or the Python program ``prefix`` in its place, which may end at any moment and is not waited for.
        """
        before = self.service_log().count(_STARTED)
        service: commands.Process
        environment, path = self.environment(**changed), self.folder / "service.log"
        if prefix or self.as_installed:
            command = [sys.executable, *(prefix or ("-m", "infra.cli")), "run"]
            with path.open("ab") as log:
                service = subprocess.Popen(
                    command, env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
        else:
            service = commands.Forked(("run",), environment, self.folder, out=path, err=path)
        self._services.append(service)
        if not prefix:
            self.wait(
                lambda: self.service_log().count(_STARTED) > before or service.poll() is not None,
                "the service has started",
            )
            assert service.poll() is None, f"the service ended with {service.poll()}\n{self.service_log()[-4000:]}"
        return service

    def stop(self, service: commands.Process, number: int = signal.SIGTERM, *, timeout: float = 40.0) -> int:
        if service.poll() is None:
            service.send_signal(number)
        return service.wait(timeout)

    def service_log(self) -> str:
        path = self.folder / "service.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    # -- the server

    def sql(self, statement: str, *, dbname: str = "postgres") -> list[tuple[Any, ...]]:
        return self.server.query(statement, dbname=dbname)

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
        """Until the condition holds; fails the test with the service's last words after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {timeout:.0f} s\n{self.service_log()[-4000:]}")
            time.sleep(0.05)

    def spooled(self) -> list[str]:
        """Names of the archived files that still wait in the spool."""
        return sorted(p.name for p in self.spool.iterdir() if p.is_file() and not p.name.startswith((".", "archtemp")))

    def drained(self) -> None:
        """Wait until PostgreSQL has archived all finished segments, and all are acknowledged."""
        self.wait(lambda: not self.spooled(), "the spool is empty")

    # -- the stream

    def streams(self) -> bool:
        """Whether the service is connected to the server and has caught up with its WAL once."""
        return self.sql(f"select 1 {_OURS} and state = 'streaming' and flush_lsn is not null") != []

    def caught_up(self) -> None:
        """Wait until the stream has reported something durable that is written now, and all before it.

        Something new: what was durable already says nothing of whether the stream still comes.
        """
        ((end,),) = self.sql("select pg_logical_emit_message(true, 'walship', '')::text")
        self.wait(
            lambda: self.sql(f"select 1 {_OURS} and flush_lsn >= '{end}'") != [], f"the stream is durable up to {end}"
        )

    def synchronous(self) -> None:
        """Commits wait for the service from now on; it has to stream already."""
        self.wait(self.streams, "the service streams")
        self.sql("alter system set synchronous_standby_names = 'walship'")
        self.server.reload()
        self.wait(
            lambda: self.sql(f"select sync_state {_OURS}") == [("sync",)], "the service is the synchronous standby"
        )

    # -- the end of it all

    def destroy(self, service: commands.Process, *, first: Callable[[], object] = lambda: None) -> float:
        """The host is lost: server and service get SIGKILL at one moment, and all that lies on it is deleted.

        ``first`` is called just before the signals. Returns when it happened, in monotonic seconds: before any of it.
        """
        postmaster = self.server.pid
        assert postmaster is not None, "the server runs"
        os.kill(postmaster, signal.SIGSTOP)  # or it could start another process behind our back
        doomed = [postmaster, *processes._descendants(postmaster), service.pid]
        moment = time.monotonic()
        first()
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        service.wait()
        self.server.close()
        self.wait(lambda: not any(processes._alive(pid) for pid in doomed), "all processes are gone")
        local = (Path(url.removeprefix("file://")) for url in self.destinations if url.startswith("file://"))
        for lost in (self.server.data_dir, self.spool, *local):
            shutil.rmtree(lost)
        return moment

    # -- restored clusters

    def target(self, name: str = "restored") -> Path:
        """A folder to restore into: empty, and the server user's."""
        target = self.folder / f"{name}{len(self._targets)}"
        target.mkdir(mode=0o700)
        give(target, run_as())
        self._targets.append(target)
        return target

    def adopt(self, target: Path) -> ThrowawayServer:
        """A server on a restored directory, not yet started; ended with the rig."""
        server = ThrowawayServer(self.bin_dir, target)
        self._restored.append(server)
        return server

    def close(self) -> None:
        for service in self._services:
            if service.poll() is None:
                service.kill()
                service.wait()
        for server in (*self._restored, self.server):
            server.close()
        for target in self._targets:
            stop_started(target)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _name_of_a_backup() -> str:
    return f"base_{datetime.now(UTC):%Y%m%d_%H%M%S}"


def stop_started(target: Path) -> None:
    """End a server that ``restore --start`` left running on a directory, and wait until it is gone."""
    try:
        lines = (target / "postmaster.pid").read_text("utf-8").splitlines()
        pid = int(lines[0])
    except (OSError, ValueError, IndexError):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGQUIT)
    deadline = time.monotonic() + 20
    # Its parent, the command, is gone: whoever inherited it may take seconds to ask for its exit code.
    while processes._alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    if len(lines) > 4 and lines[4].strip():  # its socket, which nobody else removes
        lock = Path(lines[4], f".s.PGSQL.{lines[3]}.lock")
        if lock.exists() and lock.read_text("utf-8").splitlines()[:2] == lines[:2]:
            lock.with_suffix("").unlink(missing_ok=True)
            lock.unlink(missing_ok=True)


class Load:
    """Clients that commit numbered rows until they are stopped, and remember what was acknowledged."""

    def __init__(self, server: ThrowawayServer, *, pause: float = 0.005) -> None:
        """``pause``: seconds between commits. At full speed they would take a processor from what is tested."""
        self._server = server
        self._pause = pause
        self._stop = threading.Event()
        self.acknowledged: list[int] = []
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self._server.query("create table if not exists load (n bigint primary key, filler text)")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _work(self) -> None:
        import psycopg

        try:
            with psycopg.connect(self._server.dsn(), autocommit=True) as connection:
                number = connection.execute("select coalesce(max(n), 0) from load").fetchone()
                n = int(number[0]) if number else 0
                while not self._stop.wait(self._pause):
                    n += 1
                    connection.execute("insert into load values (%s, repeat(md5(%s::text), 20))", (n, n))
                    self.acknowledged.append(n)
        except psycopg.OperationalError:
            return  # the server was killed under us: what is in the list was acknowledged
