"""pgBackRest's side: the same segments and the same server, encrypted, in a local repository, two processes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra.postgres.processes import give, run_as
from tests.benchmarks.ground import Ground
from tests.benchmarks.measured import Cost, measure

_STANZA = "bench"


def installed() -> str | None:
    """Path of the command, or None."""
    return shutil.which("pgbackrest")


def knows(major: int) -> bool:
    """Whether the one that is installed can back up that version of PostgreSQL."""
    since = {16: (2, 48), 17: (2, 54), 18: (2, 57)}
    return installed() is not None and numbers() >= since.get(major, (0, 0))


def numbers() -> tuple[int, ...]:
    """The version, to be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version())[:2])


def version() -> str:
    done = subprocess.run(["pgbackrest", "version"], capture_output=True, text=True, check=True)
    return done.stdout.removeprefix("pgBackRest").strip()


class PgBackRest:
    """One stanza. Everything, its locks and logs too, lies in a folder of its own."""

    name = "pgBackRest"

    def __init__(self, ground: Ground, more: Mapping[str, str] | None = None, *, nice: int = 0) -> None:
        """``more``: lines of its configuration. ``nice``: of backups."""
        self._nice = nice
        command = installed()
        assert command is not None
        self._more = dict(more or {})
        self._command = command
        self._ground = ground
        self._folder = ground.folder / "pgbackrest"
        for name in ("repository", "spool", "lock", "log"):
            (self._folder / name).mkdir(parents=True)
        self._repository = self._folder / "repository"
        self._pristine = self._folder / "pristine"
        self._config = self._folder / "pgbackrest.conf"
        self._log = self._folder / "output"
        self._config.write_text(self._settings(), "utf-8")
        #: What archive-push needs of a data directory: pg_control, and the segments with their status files.
        self._stand_in = self._folder / "data"
        subprocess.run([*self._words("stanza-create")], check=True, capture_output=True, env=self._environment())
        shutil.copytree(self._repository, self._pristine)

    def _settings(self) -> str:
        server = self._ground.server
        lines = {
            "repo1-path": self._repository, "repo1-cipher-type": "aes-256-cbc", "repo1-cipher-pass": "correct horse",
            "spool-path": self._folder / "spool", "lock-path": self._folder / "lock", "log-path": self._folder / "log",
            "log-level-console": "warn", "log-level-file": "off", "compress-type": "zst", "process-max": 2,
            "archive-async": "y", "start-fast": "y", **self._more,
        }  # fmt: skip
        of_server = {
            "pg1-path": server.data_dir, "pg1-socket-path": server.socket_dir, "pg1-port": server.port,
            "pg1-user": server.superuser, "pg1-database": "postgres",
        }  # fmt: skip
        text = ["[global]", *(f"{name}={value}" for name, value in lines.items())]
        text += [f"[{_STANZA}]", *(f"{name}={value}" for name, value in of_server.items())]
        return "\n".join(text) + "\n"

    def drain(self, segments: Sequence[Path], level: int) -> Cost:
        """archive-push for one segment after the other, as PostgreSQL calls it; the first call starts all the work."""
        self._fill(segments)
        status = self._stand_in / "pg_wal" / "archive_status"
        more = (f"--pg1-path={self._stand_in}", f"--compress-level={level}")
        calls, renames = [], []
        for segment in segments:
            path = f"{self._stand_in}/pg_wal/{segment.name}"
            calls.append(["/bin/sh", "-c", shlex.join([*self._words("archive-push", *more), path])])
            renames.append((status / f"{segment.name}.ready", status / f"{segment.name}.done"))
        stored = (self._repository, ".zst", len(segments))
        return measure(calls, self._environment(), self._log, renames=renames, stored=stored)

    def backup(self) -> Cost:
        """A full backup. It does not wait for its WAL (walship's does): the server archives elsewhere."""
        self._renew()
        words = self._words("backup", "--type=full", "--no-archive-check")
        return measure([words], self._environment(), self._log, nice=self._nice)

    def increment(self) -> Cost:
        """What has changed since the last backup, into the same repository."""
        os.sync()
        words = self._words("backup", "--type=incr", "--no-archive-check")
        return measure([words], self._environment(), self._log, nice=self._nice)

    def restore(self) -> Cost:
        """The base backup that was just taken, into an empty folder, which is removed."""
        target = self._folder / "restored"
        target.mkdir(mode=0o700)
        try:
            return measure([self._words("restore", f"--pg1-path={target}")], self._environment(), self._log)
        finally:
            shutil.rmtree(target)

    def archive_get(self) -> str:
        """restore_command for what was drained last. It runs as the server's user: see ``open_to_server``."""
        words = self._words("archive-get", f"--pg1-path={self._ground.folder / 'recovered'}")
        return f'{shlex.join(words)} %f "%p"'

    def open_to_server(self) -> None:
        """Give repository, spool, locks and log to the server's user."""
        give(self._folder, run_as())

    def empty_spool(self) -> None:
        """Nothing was fetched ahead by a run before."""
        spool = self._folder / "spool"
        shutil.rmtree(spool)
        spool.mkdir()
        give(spool, run_as())

    def stored(self) -> int:
        """Bytes in the repository."""
        return sum(path.stat().st_size for path in self._repository.rglob("*") if path.is_file())

    def _renew(self) -> None:
        shutil.rmtree(self._repository)
        shutil.copytree(self._pristine, self._repository)
        os.sync()  # what the run before has left to write is not this one's

    def _fill(self, segments: Sequence[Path]) -> None:
        """Make the stand-in data directory anew, with every segment ready and nothing in the spool."""
        for folder in (self._stand_in, self._folder / "spool"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        status = self._stand_in / "pg_wal" / "archive_status"
        status.mkdir(parents=True)
        for segment in segments:
            (self._stand_in / "pg_wal" / segment.name).hardlink_to(segment)
            (status / f"{segment.name}.ready").touch()
        source = self._ground.server.data_dir
        (self._stand_in / "global").mkdir()
        for name in ("PG_VERSION", "global/pg_control"):
            shutil.copy(source / name, self._stand_in / name)
        self._renew()

    def _words(self, verb: str, *options: str) -> list[str]:
        return [self._command, f"--config={self._config}", f"--stanza={_STANZA}", *options, verb]

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": str(self._folder), "LANG": "C.UTF-8"}
