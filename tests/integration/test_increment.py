"""Incremental backups laid one over the other are, file by file, what pg_combinebackup makes of them."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
from pathlib import Path

import psycopg
import pytest

from handlers.increment import apply, patch
from infra.postgres.processes import give, run_as
from infra.postgres.programs import environment_for
from infra.postgres.throwaway import ThrowawayServer
from pipeline.errors import IntegrityError
from tests.servers import StartServer, server_folder, start_server

__all__ = ["server_folder", "start_server"]

SPARE = frozenset({"backup_manifest", "pg_wal"})
#: A first backup, and what happens before each of two more.
STEPS = (
    (
        "create table t as select n, md5(n::text) filler from generate_series(1, 60000) n",
        "create table shrinks as select n, repeat('x', 500) filler from generate_series(1, 4000) n",
        "create table goes as select 1 n",
        "create index on t (n)",
        "create database dropped",
    ),
    (
        "update t set filler = 'changed' where n % 500 = 0",
        "truncate shrinks",
        "insert into shrinks select n, 'y' from generate_series(1, 2000) n",
        "drop table goes",
        "drop database dropped",
        "create table comes as select n from generate_series(1, 1000) n",
    ),
    (
        "insert into t select n, 'more' from generate_series(1, 30000) n",
        "delete from shrinks where n > 100",
        "vacuum shrinks",
        "insert into shrinks select n, repeat('z', 800) from generate_series(1, 3000) n",
        "update comes set n = n + 1 where n < 10",
    ),
)


def contents(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file() and name.partition("/")[0] not in SPARE:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir() and not name.startswith("pg_wal/"):
            found[name] = "folder"
    return found


def run(server: ThrowawayServer, program: str, *words: str) -> None:
    subprocess.run(
        [server.bin_dir / program, *words], env=environment_for(server.bin_dir), check=True, capture_output=True
    )


@pytest.mark.parametrize("major", [17, 18])
def test_a_chain_laid_over_is_what_pg_combinebackup_makes(
    start_server: StartServer, tmp_path: Path, major: int
) -> None:
    server = start_server(major, settings={"summarize_wal": "on", "wal_level": "replica", "max_wal_senders": "5"})
    taken: list[Path] = []
    for own in ("INCREMENTAL.own", "pg_stat/INCREMENTAL.own"):  # somebody's, and none of PostgreSQL's
        (server.data_dir / own).write_bytes(b"own")
        give(server.data_dir / own, run_as())
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        for number, statements in enumerate(STEPS):
            for statement in statements:
                connection.execute(statement.encode())
            folder = tmp_path / str(number)
            since = ["--incremental", str(taken[-1] / "backup_manifest")] if taken else []
            run(server, "pg_basebackup", "-D", str(folder), "-d", server.dsn(), "-c", "fast", "-X", "none", *since)
            taken.append(folder)
    combined = tmp_path / "combined"
    run(server, "pg_combinebackup", "-o", str(combined), "--no-sync", *map(str, taken))
    ours = tmp_path / "ours"
    shutil.copytree(taken[0], ours)
    patched = [apply(stage, ours, None, spare=SPARE) for stage in taken[1:]]
    theirs, mine = contents(combined), contents(ours)
    assert mine == theirs
    assert {"INCREMENTAL.own", "pg_stat/INCREMENTAL.own"} < set(mine)
    assert all(patched), "nothing was incremental"
    assert not any(stage.exists() for stage in taken[1:])


def increment(path: Path, blocks: dict[int, bytes], shortest: int) -> None:
    front = struct.pack(f"<III{len(blocks)}I", 0xD3AE1F0D, len(blocks), shortest, *blocks)
    path.write_bytes(front + bytes(-len(front) % 8192 if blocks else 0) + b"".join(blocks.values()))


def test_blocks_take_their_places_and_the_length_is_theirs(tmp_path: Path) -> None:
    file, change = tmp_path / "1", tmp_path / "INCREMENTAL.1"
    file.write_bytes(b"a" * 8192 * 10)
    increment(change, {2: b"b" * 8192, 3: b"c" * 8192, 7: b"d" * 8192}, shortest=5)
    patch(change, file)
    content = file.read_bytes()
    assert len(content) == 8 * 8192
    assert [content[at * 8192 : at * 8192 + 1] for at in range(8)] == [b"a", b"a", b"b", b"c", b"a", b"\0", b"\0", b"d"]


def test_a_damaged_increment_is_refused(tmp_path: Path) -> None:
    file, change = tmp_path / "1", tmp_path / "INCREMENTAL.1"
    file.write_bytes(b"a" * 8192)
    increment(change, {0: b"b" * 8192}, shortest=1)
    whole = change.read_bytes()
    for content in (whole[:-1], whole[:8], b"x" + whole[1:], b""):
        change.write_bytes(content)
        with pytest.raises(IntegrityError, match=r"INCREMENTAL\.1"):
            patch(change, file)
        file.write_bytes(b"a" * 8192)
    change.write_bytes(whole)
    with pytest.raises(IntegrityError, match="the backup before has no such file"):
        patch(change, tmp_path / "2")
    (tmp_path / "2").symlink_to(file)
    with pytest.raises(OSError, match="symbolic"):
        patch(change, tmp_path / "2")
    assert file.stat().st_size == 8192
