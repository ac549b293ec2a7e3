"""A small whole repository in memory for restore tests: what a real server archived and streamed, and the way back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

from handlers.base_backup import Cluster, take
from handlers.fetch import Fetcher
from infra.clock import SystemClock
from infra.keys import Policy, RepositoryKeys
from infra.postgres.basebackup import stream
from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import ThrowawayServer, free_port
from infra.restore import Place, Repository
from infra.settings import Settings
from pipeline.backup import BackupInfo
from pipeline.catalog import wal_key
from pipeline.contracts import Clock
from pipeline.wal import Lsn, WalFile
from tests.parts import Shelf


async def nothing_to_wait_for(_start: Lsn, _stop: Lsn, _timeline: int) -> None:
    """The WAL is shipped by ``Bank.ship_wal``."""


def archiving(folder: Path) -> dict[str, str]:
    """Settings of a server that archives into a folder which is made here."""
    folder.mkdir()
    give(folder, run_as())
    # Renamed, or we would now and then read a segment that is half copied.
    command = f"test ! -f {folder}/%f && cp %p {folder}/.%f && mv {folder}/.%f {folder}/%f"
    return {"archive_mode": "on", "archive_command": command}


@dataclass
class Bank:
    """The repository of one server."""

    server: ThrowawayServer
    #: Where the server archives to.
    archive: Path
    segment_size: int = 1 << 20
    shelf: Shelf = field(init=False)
    shipped: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        identifier = str(self.server.query("select system_identifier from pg_control_system()")[0][0])
        self.shelf = Shelf(identifier)
        self.version = int(self.server.query("show server_version_num")[0][0])

    async def back_up(self, clock: Clock | None = None) -> BackupInfo:
        cluster = Cluster(self.shelf.system_id, self.version, self.segment_size)
        return await take(
            stream(self.settings()),
            ship=self.shelf,
            cluster=cluster,
            wal_safe=nothing_to_wait_for,
            clock=clock or SystemClock(),
        )

    def settings(self) -> Settings:
        return Settings(
            POSTGRES_HOST=self.server.host, POSTGRES_PORT=self.server.port, POSTGRES_USERNAME=self.server.superuser
        )

    async def ship_wal(self, *, switch: bool = True) -> None:
        """Everything that the server has archived, and first all that it wrote."""
        if switch:
            # At the very start of a segment there would be nothing to switch.
            self.server.query("select pg_logical_emit_message(false, 'walship', 'switch')")
            wanted = self.server.query("select pg_walfile_name(pg_switch_wal())")[0][0]
            deadline = time.monotonic() + 30
            while not (self.archive / wanted).exists():
                assert time.monotonic() < deadline, f"{wanted} is not archived: {self.server.log()}"
                await asyncio.sleep(0.05)
        for path in sorted(self.archive.iterdir()):
            file = WalFile.parse(path.name)
            if file is not None and path.name not in self.shipped:
                await self.shelf(wal_key(file), path.read_bytes())
                self.shipped.add(path.name)

    def repository(self) -> Repository:
        keys = RepositoryKeys(
            self.shelf.system_id, None, Policy(wal=False, base=False), store=None, allow_unencrypted=False
        )
        fetch = Fetcher([self.shelf.store], self.shelf.chain, self.shelf.system_id)
        return Repository(
            self.settings(), ("memory",), (self.shelf.store,), self.shelf.system_id, keys, fetch, SystemClock()
        )

    def place(self, name: str, *, start: bool = True, **more: str) -> Place:
        """A new folder beside the server's, of the server's user."""
        directory = self.server.data_dir.with_name(name)
        directory.mkdir()
        give(directory, run_as())
        options = {"port": str(free_port()), "listen_addresses": "127.0.0.1", **more}
        options["unix_socket_directories"] = ""
        return Place(directory, start=start, bin_dir=self.server.bin_dir, options=options)
