"""Delta restores of what a real server made: its manifest, its tablespaces, its own verdict on the result."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from handlers.fetch import Fetcher
from handlers.restore import Laid, lay_down
from handlers.target_dir import look
from infra.postgres.processes import give, run_as
from pipeline.backup import BackupInfo
from pipeline.errors import RecoveryError
from tests.restoring import Bank, archiving
from tests.servers import StartServer, server_folder, start_server

__all__ = ["server_folder", "start_server"]


async def lay(bank: Bank, info: BackupInfo, directory: Path, moves: dict[str, str], *, delta: bool = True) -> Laid:
    targets = look(info, directory, moves, force=False, delta=delta, wal_margin=0)
    fetch = Fetcher([bank.shelf.store], bank.shelf.chain, bank.shelf.system_id)
    return await lay_down(info, targets, fetch=fetch, complete=lambda _: None)


def verify(bank: Bank, directory: Path) -> None:
    """PostgreSQL's own check: every file of the manifest, and none beside; the map says where the tablespace went."""
    ours = ("--ignore=pgsql_tmp.walship", "--ignore=tablespace_map")
    bank.server.run("pg_verifybackup", "--no-parse-wal", *ours, str(directory))


async def test_a_data_directory_is_brought_back(start_server: StartServer, server_folder: Path) -> None:
    archive, space, moved = (server_folder / name for name in ("archive", "space", "moved"))
    server = start_server(settings=archiving(archive), segment_mb=1)
    space.mkdir()
    give(space, run_as())
    bank = Bank(server, archive)
    server.query(f"create tablespace elsewhere location '{space}'")
    server.query("create table t tablespace elsewhere as select generate_series(1, 200000) as n")
    server.query("create unlogged table u (n int)")
    server.query("create table kept as select generate_series(1, 1000000) as n")
    server.query("checkpoint")
    info = await bank.back_up()
    directory = server_folder / "copy"
    directory.mkdir()
    give(directory, run_as())
    moves = {str(space): str(moved)}
    first = await lay(bank, info, directory, moves)
    assert (first.kept, first.fetched) == (0, info.size)
    verify(bank, directory)

    # As a server would have left it: another block, more, less, temporary files, WAL.
    tables = sorted(moved.glob("PG_*/*/*"), key=lambda path: path.stat().st_size)
    content = bytearray(tables[-1].read_bytes())
    content[8192:8200] = b"changed!"
    tables[-1].write_bytes(content)
    conf = directory / "postgresql.conf"
    conf.write_text(re.sub("#", "%", conf.read_text("utf-8"), count=1), "utf-8")
    (directory / "base/1/1249").unlink()
    os.truncate(directory / "base/1/1259", 0)
    (directory / "base/pgsql_tmp").mkdir()
    (directory / "base/pgsql_tmp/pgsql_tmp1.0").write_bytes(b"sorted")
    (directory / "pg_wal/000000010000000000000001").write_bytes(bytes(1 << 20))
    (directory / "base/1/424242").write_bytes(b"a table of later")
    laid = await lay(bank, info, directory, moves)
    verify(bank, directory)
    assert laid.removed == 3
    assert laid.files == first.files
    assert first.size - laid.kept < 16 << 20
    assert 0 < laid.fetched <= info.size
    again = await lay(bank, info, directory, moves)
    assert again.kept > laid.kept
    # All files but pg_control stay: what is fetched are the parts with folders, and the last one.
    verify(bank, directory)

    control = directory / "global/pg_control"
    other = bytearray(control.read_bytes())
    other[0] ^= 0xFF
    control.write_bytes(other)
    with pytest.raises(RecoveryError, match=f"and backup {info.name} is of the cluster {info.system_id}"):
        await lay(bank, info, directory, moves)
