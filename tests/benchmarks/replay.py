"""The task ``replay``: one base and the same WAL, recovered with three ways to fetch it, in turn.

The floor is ``mv`` from a scratch copy that was synced to disk before: less than that no restore_command can do. It is
never a link, and never the repository: the server writes over what it was given when it recycles it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from infra.postgres.processes import give, run_as
from infra.postgres.programs import environment_for
from infra.postgres.recovery_files import quoted
from infra.postgres.throwaway import free_port, make_folder
from pipeline.wal import WalFile
from tests.benchmarks.bench import Row
from tests.benchmarks.ground import Ground
from tests.benchmarks.measured import Cost
from tests.benchmarks.pgbackrest import PgBackRest
from tests.benchmarks.recovering import Replayed, recover
from tests.benchmarks.walship import Walship

_MEGABYTE = 1 << 20


class Replay:
    """A base in walship's repository, and WAL behind it: in there, in pgBackRest's, and in a folder for the floor."""

    def __init__(self, ground: Ground, walship: Walship, peer: PgBackRest | None) -> None:
        self._ground = ground
        self._walship = walship
        self._peer = peer
        self._wal = ground.folder / "wal"
        self._log = ground.folder / "replay.output"

    def prepare(self, count: int, segment_mb: int) -> int:
        """Take the base and fill ``count`` segments or more behind it. Bytes of WAL that recovery reads."""
        # The replay is that of a server that means it; the one that makes the WAL need not sync.
        self._ground.server.query("alter system set fsync = on")
        self._walship.backup()
        archived = self._ground.more(count)
        self._wal.mkdir()
        with self._base() as directory:
            label = (directory / "backup_label").read_text("utf-8")
            match = re.search(r"START WAL LOCATION: \S+ \(file (\w+)\)", label)
            assert match is not None
            # What was stored while the backup was taken has left the archive.
            size = segment_mb * _MEGABYTE
            file = WalFile.parse(match[1])
            assert file is not None
            number = file.start(size) // size
            while (file := WalFile.segment(1, number * size, size)).name != archived[0].name:
                self._walship.fetch_wal(file.name, self._wal / file.name, directory)
                number += 1
        for path in archived:
            shutil.copy(path, self._wal / path.name)
        self._walship.push(archived)
        self._ground.empty_archive()
        segments = sorted(self._wal.iterdir())
        if self._peer is not None:
            self._peer.drain(segments, level=3)
            self._peer.open_to_server()
        return sum(path.stat().st_size for path in segments)

    def floor(self) -> Replayed:
        """``mv`` from a copy of the segments."""
        scratch = self._ground.folder / "scratch"
        shutil.copytree(self._wal, scratch)
        give(scratch, run_as())
        try:
            return self._recover(f'mv {scratch}/%f "%p"')
        finally:
            shutil.rmtree(scratch)

    def peer(self) -> Replayed:
        """Through archive-get of pgBackRest, asynchronous, two processes."""
        assert self._peer is not None
        self._peer.empty_spool()
        return self._recover(self._peer.archive_get())

    def walship(self) -> Replayed:
        """``walship restore --start``, as users run it. Its base is laid down first, which is not counted."""
        directory = self._folder()
        os.sync()
        try:
            command = self._walship.start_restored(directory, free_port())
            log = directory.with_name(f"{directory.name}.log")
            return recover(command, self._walship.environment(), {}, directory, log, self._log)
        finally:
            shutil.rmtree(directory)

    def _recover(self, restore_command: str) -> Replayed:
        """The same base with another restore_command."""
        with self._base() as directory:
            with (directory / "postgresql.auto.conf").open("a", encoding="utf-8") as conf:
                conf.write(f"restore_command = {quoted(restore_command)}\n")
            sockets = make_folder("walship-b-")
            command: list[str | Path] = [
                self._ground.bin_dir / "postgres", "-D", directory, f"--port={free_port()}", "--logging_collector=off",
                "--log_destination=stderr", "--listen_addresses=127.0.0.1", f"--unix_socket_directories={sockets}",
            ]  # fmt: skip
            os.sync()  # the scratch copy is on disk: syncing it once more costs the server nothing
            try:
                environment = environment_for(self._ground.bin_dir)
                return recover(command, environment, run_as(directory), directory, self._log, self._log)
            finally:
                shutil.rmtree(sockets)

    @contextmanager
    def _base(self) -> Iterator[Path]:
        directory = self._folder()
        try:
            self._walship.lay_down(directory)
            yield directory
        finally:
            shutil.rmtree(directory)

    def _folder(self) -> Path:
        directory = self._ground.folder / "recovered"
        directory.mkdir(mode=0o700)
        give(directory, run_as())
        directory.with_name("recovered.log").unlink(missing_ok=True)
        return directory


def replay(
    ground: Ground, walship: Walship, peer: PgBackRest | None, *, segments: int, segment_mb: int, rounds: int,
    say: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """The three of them in turn. The floor's row is what walship's is compared with."""
    ways = Replay(ground, walship, peer)
    size = ways.prepare(segments, segment_mb)
    runs: list[tuple[Row, Callable[[], Replayed]]] = [
        (Row("replay", "walship", size), ways.walship),
        (Row("replay", "mv", size), ways.floor),
    ]
    if peer is not None:
        runs.append((Row("replay", peer.name, size), ways.peer))
    for number in range(rounds):
        for row, run in runs:
            row.costs.append(_cost(run()))
        _tell([row for row, _ in runs], number, say)
    return [row for row, _ in runs]


def _cost(took: Replayed) -> Cost:
    return Cost(took.redo, took.redo, took.cpu, took.peak)


def _tell(rows: Sequence[Row], number: int, say: Callable[[str], None]) -> None:
    seconds = ", ".join(f"{row.tool} {row.costs[-1].stored:.2f} s" for row in rows)
    say(
        f"replay, run {number + 1}: {seconds} (walship is {rows[0].costs[-1].stored / rows[1].costs[-1].stored:.2f} mv)"
    )
