"""A PostgreSQL server that belongs to us: for tests, the demo, drills, and to start what was restored.

It has a port and a socket folder of its own, listens on 127.0.0.1 at most, and does not outlive this process (unless
told to): a guard ends it even when we are killed. As root it runs as another user, because servers refuse root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psycopg

from infra.postgres.processes import RunAs, dismiss, give, guard, kill_tree, run_as
from infra.postgres.programs import environment_for
from pipeline.errors import SourceError

#: For servers whose data nobody will miss: an initdb and a load are several times as fast. Never to test durability.
FAST: Mapping[str, str] = {"fsync": "off", "shared_buffers": "16MB"}

_STOP = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


def make_folder(prefix: str = "walship-") -> Path:
    """A new folder with a short path that the server's user owns and can reach. The caller removes it.

    As root, pytest's tmp_path and a home folder are closed to other users. And a socket's path may have 107 bytes.
    """
    base = "/tmp" if os.access("/tmp", os.W_OK) else None  # noqa: S108 - mkdtemp makes an unguessable name in it
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    if who := run_as():
        folder.chmod(0o755)
        os.chown(folder, who["user"], who["group"])
    return folder


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ThrowawayServer:
    """One data directory and the server on it. Blocking: call from a thread where that matters.

    ``data_dir``: made by ``init``, or an existing (restored) one; as root it is given to the server's user, and all
    folders above it must be open to that user: see ``make_folder``.
    ``tcp``: listen on 127.0.0.1, else on the socket alone. ``outlive``: leave the server running when we end.
    """

    def __init__(
        self, bin_dir: Path, data_dir: Path, *, port: int | None = None, tcp: bool = True, outlive: bool = False,
        superuser: str = "postgres", log_file: Path | None = None,
    ) -> None:  # fmt: skip
        self.bin_dir = bin_dir
        self.data_dir = data_dir
        self.superuser = superuser
        self.log_file = log_file or data_dir.with_name(data_dir.name + ".log")
        self.who: RunAs = run_as(data_dir)
        self.host = "127.0.0.1"
        self._fixed_port = port is not None
        self.port = port or free_port()
        self._tcp = tcp
        self._outlive = outlive
        self._socket_dir: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    # -- the data directory

    def init(
        self, settings: Mapping[str, str] | None = None, *, segment_mb: int = 16, checksums: bool = True,
        fast: bool = True, options: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Run initdb with local trust, UTF-8 and C locale. ``settings`` go into its postgresql.conf, behind FAST."""
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        give(self.data_dir, self.who)
        self.run(
            "initdb", "--pgdata", str(self.data_dir), "--username", self.superuser, "--auth=trust",
            "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions", f"--wal-segsize={segment_mb}",
            *(["--data-checksums"] if checksums else []), *options,
        )  # fmt: skip
        self.configure({**(FAST if fast else {}), **(settings or {})})

    def configure(self, settings: Mapping[str, str]) -> None:
        """Append to postgresql.conf, where the last word counts. A running server needs ``reload`` or a restart."""
        with (self.data_dir / "postgresql.conf").open("a", encoding="utf-8") as conf:
            for name, value in settings.items():
                conf.write(f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n")

    def allow(self, *lines: str) -> None:
        """Replace pg_hba.conf by these lines. A running server needs ``reload``."""
        (self.data_dir / "pg_hba.conf").write_text("".join(f"{line}\n" for line in lines), "utf-8")

    # -- the server

    def start(self, options: Mapping[str, str] | None = None, *, timeout: float = 60.0) -> None:
        """Start and wait until it takes connections. ``options`` go on the command line and win over any file.

        Raises SourceError with the end of the server's log if it ends before that.
        """
        if self.running:
            raise SourceError(f"the server in {self.data_dir} is running already, as process {self.pid}")
        give(self.data_dir, self.who)
        for attempt in range(5):
            self._launch(options or {})
            try:
                self._wait(timeout)
            except SourceError as error:
                # Somebody else may have taken the port between the look and the start.
                if self._fixed_port or attempt == 4 or "could not bind" not in error.fact:
                    raise
                self.port = free_port()
                continue
            self._fixed_port = True  # a restart comes back where clients expect it
            return

    def begin(self, options: Mapping[str, str] | None = None) -> None:
        """Start without waiting: for a server that is to recover for a while, or to fail. See ``start``."""
        give(self.data_dir, self.who)
        self._launch(options or {})

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast", *, timeout: float = 60.0) -> None:
        """Shut down and wait; nothing if it does not run. SourceError if it takes longer than ``timeout``."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(_STOP[mode])
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise SourceError(
                f"the server in {self.data_dir} did not stop within {timeout:g} s of a {mode} shutdown",
                hint=f"the end of {self.log_file} says what it waits for",
            ) from None
        self._forget()

    def kill9(self) -> None:
        """SIGKILL the postmaster and every process below it, as a power cut would; all are gone on return."""
        if self._process is None:
            return
        if self._process.poll() is None:
            kill_tree(self._process.pid)
        self._process.wait()
        self._forget()

    def restart(self) -> None:
        self.stop()
        self.start()

    def reload(self) -> None:
        """Have the configuration files read again. The server does so a moment later."""
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)

    def close(self) -> None:
        """End what runs (unless it shall outlive us) and remove the socket folder. Leaves the data. Idempotent.

        At once, but not by SIGKILL if that can be helped: what is killed leaves a System V shared memory segment
        behind, and Linux has room for 4096 of them until it is booted again.
        """
        if self._outlive and self.running:
            return
        with contextlib.suppress(SourceError):
            self.stop("immediate", timeout=5.0)
        self.kill9()
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Of a server that ended by itself after ``begin``; None while it runs."""
        return self._process.poll() if self._process is not None else None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def socket_dir(self) -> Path:
        """Folder of the server's socket; made with the first use."""
        if self._socket_dir is None:
            self._socket_dir = make_folder("walship-s-")
        return self._socket_dir

    # -- its clients

    def dsn(self, dbname: str = "postgres", *, user: str | None = None, **more: str) -> str:
        """A connection string: over TCP, or by the socket where the server does not listen."""
        host = self.host if self._tcp else str(self.socket_dir)
        return psycopg.conninfo.make_conninfo(
            host=host, port=self.port, user=user or self.superuser, dbname=dbname, connect_timeout=30, **more
        )

    def environment(self) -> dict[str, str]:
        """The settings that lead walship to this server."""
        host = self.host if self._tcp else str(self.socket_dir)
        return {"POSTGRES_HOST": host, "POSTGRES_PORT": str(self.port), "POSTGRES_USERNAME": self.superuser}

    def query(self, sql: str, *, dbname: str = "postgres", user: str | None = None) -> list[tuple[Any, ...]]:
        """One statement on a connection of its own, in autocommit; its rows, if it gives any."""
        with psycopg.connect(self.dsn(dbname, user=user), autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def run(self, program: str, *arguments: str, timeout: float = 120.0) -> str:
        """One of the installation's programs, as the server's user. Its output; SourceError if it fails."""
        try:
            done = subprocess.run(  # noqa: S603 - a program of the installation that the caller chose
                [self.bin_dir / program, *arguments], env=environment_for(self.bin_dir), capture_output=True, text=True,
                timeout=timeout, cwd="/", check=False, **self.who,
            )  # fmt: skip
        except PermissionError:
            raise self._closed_to_user(program) from None
        if done.returncode != 0:
            words = (done.stderr or done.stdout).strip()
            raise SourceError(f"{program} failed with exit status {done.returncode}: {words}")
        return done.stdout

    def log(self, size: int = 4000) -> str:
        """The end of the server's log."""
        try:
            content = self.log_file.read_bytes()
        except FileNotFoundError:
            return ""
        return content[-size:].decode("utf-8", "replace").strip()

    # -- inside

    def _launch(self, options: Mapping[str, str]) -> None:
        own = {
            "port": str(self.port),
            "listen_addresses": self.host if self._tcp else "",
            "unix_socket_directories": str(self.socket_dir),
            # Whatever a restored configuration says, its words come to our log.
            "logging_collector": "off",
            "log_destination": "stderr",
        }
        arguments = [f"--{name}={value}" for name, value in {**own, **options}.items()]
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            try:
                self._process = subprocess.Popen(  # noqa: S603 - as in run()
                    [self.bin_dir / "postgres", "-D", self.data_dir, *arguments],
                    env=environment_for(self.bin_dir), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    # A Ctrl-C on the terminal is for us; we stop the server in our own order.
                    start_new_session=True, cwd="/", **self.who,
                )  # fmt: skip
            except PermissionError:
                raise self._closed_to_user("postgres") from None
        if not self._outlive:
            self._guard = guard(self._process.pid, self.who)

    def _wait(self, timeout: float) -> None:
        """Until postmaster.pid says what pg_ctl waits for: ready, or standby (recovering, no connections wanted)."""
        process, deadline = self._process, time.monotonic() + timeout
        assert process is not None
        while self._status(process.pid) not in ("ready", "standby"):
            if process.poll() is not None:
                words = self.log_file.read_bytes()[self._log_start :][-4000:].decode("utf-8", "replace").strip()
                self._forget()
                raise SourceError(f"the server in {self.data_dir} did not start: {words}", hint=f"see {self.log_file}")
            if time.monotonic() > deadline:
                raise SourceError(
                    f"the server in {self.data_dir} takes no connections after {timeout:g} s",
                    hint=f"the end of {self.log_file} says what it is doing",
                )
            time.sleep(0.02)

    def _status(self, pid: int) -> str:
        with contextlib.suppress(OSError):
            lines = (self.data_dir / "postmaster.pid").read_text("utf-8").splitlines()
            if len(lines) >= 8 and lines[0].strip() == str(pid):
                return lines[7].strip()
        return ""

    def _forget(self) -> None:
        if self._guard is not None:
            dismiss(self._guard)
            self._guard = None
        self._process = None

    def _closed_to_user(self, program: str) -> SourceError:
        return SourceError(
            f"the user that runs PostgreSQL (id {self.who.get('user', os.geteuid())}) cannot run"
            f" {self.bin_dir / program}",
            hint="as root the server runs as another user: its programs must lie where that user can reach them",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
