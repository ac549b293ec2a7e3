"""walship's side: its command as users run it, in processes of its own, with a local encrypted repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from infra.postgres.wal_script import CONTEXT, FOLDER
from tests.benchmarks.ground import Ground
from tests.benchmarks.measured import Cost, measure

_COMMAND = (sys.executable, "-m", "infra.cli")
#: Variables of the machine that the command needs; settings of whoever runs this must not leak in.
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV")


class Walship:
    """One installation; every drain gets a repository of its own that was just made."""

    name = "walship"

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._folder = ground.folder / "walship"
        self._folder.mkdir()
        self._pristine = self._folder / "pristine"
        self._repository = self._folder / "repository"
        self._spool = self._folder / "spool"
        self._log = self._folder / "log"
        self._repository.mkdir()
        subprocess.run([*_COMMAND, "init"], env=self.environment(), cwd=self._folder, check=True, capture_output=True)
        shutil.copytree(self._repository, self._pristine)

    def drain(self, segments: Sequence[Path], level: int) -> Cost:
        """`walship push` with the segments in the spool."""
        self._fill(segments)
        environment = self.environment(WALSHIP_COMPRESSION_LEVEL=str(level))
        return measure([[*_COMMAND, "push"]], environment, self._log)

    def serve(self, segments: Sequence[Path]) -> Cost:
        """`walship run` until the spool is empty, then SIGTERM."""
        self._fill(segments)
        return measure([[*_COMMAND, "run"]], self.environment(), self._log, empties=self._spool)

    def backup(self, **changed: str) -> Cost:
        """``changed``: settings."""
        self._renew()
        self._ground.empty_archive()
        environment = self.environment(WALSHIP_SPOOL_DIR=str(self._ground.archive), **changed)
        return measure([[*_COMMAND, "backup"]], environment, self._log)

    def increment(self, **changed: str) -> Cost:
        """What has changed since the last backup, into the same repository."""
        os.sync()
        environment = self.environment(WALSHIP_SPOOL_DIR=str(self._ground.archive), **changed)
        return measure([[*_COMMAND, "backup", "--incremental"]], environment, self._log)

    def restore(self) -> Cost:
        """The base backup that was just taken, into an empty folder, which is removed."""
        target = self._folder / "restored"
        target.mkdir(mode=0o700)
        try:
            return measure([[*_COMMAND, "restore", "--target-dir", target]], self.environment(), self._log)
        finally:
            shutil.rmtree(target)

    def push(self, segments: Sequence[Path]) -> None:
        """Into the repository as it is."""
        self._spool.mkdir(exist_ok=True)
        for segment in segments:
            (self._spool / segment.name).hardlink_to(segment)
        measure([[*_COMMAND, "push"]], self.environment(), self._log)

    def lay_down(self, directory: Path) -> None:
        """The base backup, ready to recover, not started."""
        measure([[*_COMMAND, "restore", "--target-dir", directory]], self.environment(), self._log)

    def start_restored(self, directory: Path, port: int) -> list[str | Path]:
        """The command that lays it down, starts a server on it, and feeds that until it is promoted."""
        return [*_COMMAND, "restore", "--target-dir", directory, "--start", "--port", str(port)]

    def fetch_wal(self, name: str, path: Path, directory: Path) -> None:
        """One stored WAL file, as the server on a restored directory gets it without a feed."""
        context = directory / FOLDER / CONTEXT
        measure([[*_COMMAND, "fetch-wal", "--context", context, name, path]], self.environment(), self._log)

    def stored(self) -> int:
        """Bytes in the repository."""
        return sum(path.stat().st_size for path in self._repository.rglob("*") if path.is_file())

    def stored_backups(self) -> int:
        """Bytes in the repository without WAL and keys."""
        return sum(path.stat().st_size for path in self._repository.glob("*/base/**/*") if path.is_file())

    def _renew(self) -> None:
        shutil.rmtree(self._repository)
        shutil.copytree(self._pristine, self._repository)
        os.sync()  # what the run before has left to write is not this one's

    def _fill(self, segments: Sequence[Path]) -> None:
        """Link the segments into an empty spool: each file there leaves it, the bytes stay."""
        shutil.rmtree(self._spool, ignore_errors=True)
        self._spool.mkdir()
        for segment in segments:
            (self._spool / segment.name).hardlink_to(segment)
        self._renew()

    def environment(self, **changed: str) -> dict[str, str]:
        """Settings of the command."""
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        # The command is found wherever this was started from.
        root = str(Path(__file__).parents[2])
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, (root, kept.get("PYTHONPATH", ""))))
        return {
            **kept,
            # Compiled once, by init, as in an installation; and nothing is left in anybody's source tree.
            "PYTHONPYCACHEPREFIX": str(self._folder / "pycache"),
            **self._ground.server.environment(),
            "WALSHIP_PG_BIN_DIR": str(self._ground.bin_dir),
            "WALSHIP_DESTINATIONS": f"file://{self._repository}",
            "WALSHIP_SPOOL_DIR": str(self._spool),
            "BACKUP_ENCRYPTION_ENABLED": "true",
            "BACKUP_ENCRYPTION_PASSWORD": "correct horse battery staple",
            **changed,
        }
