"""What is measured: a real server with a pgbench database, and WAL that pgbench clients made it write."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from infra.postgres.processes import give, run_as
from infra.postgres.programs import environment_for
from infra.postgres.throwaway import ThrowawayServer, make_folder
from tests.servers import programs

#: The newest server that Debian 12's pgBackRest knows.
MAJOR = 15

_SETTINGS = {
    "archive_mode": "on", "archive_library": "basic_archive", "wal_level": "replica", "max_wal_senders": "5",
    "shared_buffers": "256MB", "synchronous_commit": "off", "max_wal_size": "2GB",
    # Often, so that the WAL has page images all along, as that of a busy server has.
    "checkpoint_timeout": "30s",
}  # fmt: skip

#: Tables of ``fill``, and bytes of one row with its share of the page, and of the index.
_TABLES = 4
_ROW = 200
#: Characters of a row that are random, or blank.
_WORDS = 64


class Ground:
    """A folder of its own with a server on it; ``close`` ends and removes everything."""

    def __init__(self, say: Callable[[str], None], major: int = MAJOR) -> None:
        self.major = major
        self._say = say
        self.bin_dir = programs(major)
        self.folder = make_folder("walship-b-")
        #: Where the server archives to: walship's spool while base backups are taken.
        self.archive = self.folder / "archive"
        self.archive.mkdir()
        give(self.archive, run_as())
        self.server = ThrowawayServer(self.bin_dir, self.folder / "data")

    def build(self, *, scale: int, segment_mb: int) -> None:
        """A cluster with pgbench's tables: about 15 MB for each unit of ``scale``."""
        began = time.monotonic()
        self.server.init({**_SETTINGS, "basic_archive.archive_directory": str(self.archive)}, segment_mb=segment_mb)
        self.server.start()
        self._pgbench("--initialize", "--quiet", f"--scale={scale}")
        self.server.query("checkpoint")
        self._say(f"a cluster of {self.size >> 20} MB, in {time.monotonic() - began:.0f} s")

    def fill(self, megabytes: int, *, blank: bool = False) -> None:
        """A cluster with tables of about that size together, and room in each page.

        They compress three times by zstd's level 1; ``blank``: about ten times, as pgbench's do.
        """
        began = time.monotonic()
        # Vacuum would change pages that nobody asked for.
        settings = {**_SETTINGS, "basic_archive.archive_directory": str(self.archive), "autovacuum": "off"}
        if self.major >= 17:
            settings |= {"summarize_wal": "on"}
        self.server.init(settings)
        self.server.start()
        each = megabytes * 1_000_000 // _TABLES // _ROW
        words = f"repeat('x', {_WORDS})" if blank else "md5(n::text) || md5((-n)::text)"
        for number in range(_TABLES):
            self.server.query(
                f"create table ledger_{number} with (fillfactor = 90) as select n::bigint as id,"
                " (n::bigint * 7919 % 100003)::int as amount, timestamptz '2026-01-01' + n * interval '1.7 s' as at,"
                f" {words} || ' paid by standing order' as note"
                f" from generate_series({number * each + 1}, {(number + 1) * each}) n"
            )
            self.server.query(f"alter table ledger_{number} add primary key (id)")
        self.server.query("checkpoint")
        self.settled()
        self.empty_archive()
        self._say(f"a cluster of {self.size >> 20} MB, in {time.monotonic() - began:.0f} s")

    def change(self, number: int) -> int:
        """Change a row in every hundredth page of the tables, other ones for each ``number``; the pages changed."""
        changed = 0
        for table in range(_TABLES):
            # Rows are of one size, so pages hold the same number of them.
            ((rows, first),) = self.server.query(
                f"select count(*), min(id) from ledger_{table} where ctid < '(1,0)'::tid"
            )
            ((count,),) = self.server.query(
                f"with changed as (update ledger_{table} set amount = amount + 1"
                f" where (id - {first}) % ({rows} * 100) = {rows} * {number % 100} returning 1)"
                " select count(*) from changed"
            )
            changed += count
        self.server.query("checkpoint")
        return changed

    def warm_files(self) -> None:
        """Have the data directory in the page cache: whoever reads it drops it from there, or does not."""
        self.settled()
        self.empty_archive()
        os.sync()
        for path in (self.server.data_dir / "base").rglob("*"):
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    while file.read(1 << 20):
                        pass

    @property
    def size(self) -> int:
        """Bytes of the data directory without its WAL: about what a base backup holds."""
        total = 0
        for path, folders, files in os.walk(self.server.data_dir):
            if Path(path) == self.server.data_dir:
                folders.remove("pg_wal")
            total += sum((Path(path) / name).stat().st_size for name in files)
        return total

    @property
    def server_cpu(self) -> float:
        """CPU seconds of the postmaster and of all its processes that have ended: walsenders, for one."""
        fields = Path(f"/proc/{self.server.pid}/stat").read_text("latin-1").rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def backlog(self, count: int) -> list[Path]:
        """The first ``count`` segments that pgbench's transactions fill, in their order."""
        began = time.monotonic()
        self.server.query("select pg_switch_wal()")
        self.settled()
        self.empty_archive()
        # Only what the load itself fills: a segment that a switch has padded with zeros would flatter everybody.
        self.more(count)
        kept = self.folder / "backlog"
        kept.mkdir()
        segments = [path.rename(kept / path.name) for path in self._archived()[:count]]
        self.empty_archive()
        self._say(f"{len(segments)} segments by pgbench, in {time.monotonic() - began:.0f} s")
        return segments

    def more(self, count: int) -> list[Path]:
        """Have pgbench's transactions fill segments until ``count`` or more are in the archive; all of those."""
        while len(self._archived()) < count:
            self._pgbench("--client=4", "--jobs=1", "--time=3" if count > 8 else "--time=1")
            self.settled()
        return self._archived()

    def warm(self, segments: Sequence[Path]) -> None:
        """Have the segments in the page cache, where they are when they were just archived; walship drops them."""
        for segment in segments:
            segment.read_bytes()

    def settled(self) -> None:
        """Wait until everything that is finished is archived."""
        deadline = time.monotonic() + 120
        ready = "select count(*) from pg_ls_archive_statusdir() where name like '%.ready'"
        while self.server.query(ready)[0][0]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not archive: {self.server.log()}")
            time.sleep(0.1)

    def empty_archive(self) -> None:
        for path in self.archive.iterdir():
            path.unlink()

    def close(self) -> None:
        self.server.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _archived(self) -> list[Path]:
        return sorted(path for path in self.archive.iterdir() if len(path.name) == 24)

    def _pgbench(self, *options: str) -> None:
        where = ["--host", self.server.host, "--port", str(self.server.port), "--username", self.server.superuser]
        subprocess.run(
            [self.bin_dir / "pgbench", *options, *where, "postgres"], env=environment_for(self.bin_dir), check=True,
            capture_output=True, timeout=600,
        )  # fmt: skip
