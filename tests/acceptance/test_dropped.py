"""A ``pg_basebackup -Ft`` that somebody drops into the spool becomes a base backup like any other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import psycopg
import pytest

from infra.postgres.processes import run_as
from infra.postgres.throwaway import free_port, make_folder
from tests.rig import Rig, stop_started
from tests.servers import NEWEST, SERVER_VERSIONS


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    folder = make_folder("walship-d-")
    with Rig(folder, getattr(request, "param", NEWEST), [f"file://{folder}/local"]) as made:
        yield made
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("rig", "options"),
    [
        # A manifest without system identifier: by the WAL, and by pg_control.
        (SERVER_VERSIONS[0], ["-X", "stream"]),
        (SERVER_VERSIONS[0], ["-X", "none", "-z"]),
        (NEWEST, ["-X", "none", "-z"]),
    ],
    indirect=["rig"],
    ids=["pg15, with WAL", "pg15, compressed", "newest, compressed"],
)
def test_it_is_shipped_listed_restored_and_gone_from_the_spool(rig: Rig, options: list[str]) -> None:
    rig.server.start()
    rig.run("init")
    rig.sql("create table t as select n from generate_series(1, 5000) n")
    making = rig.folder / "making"
    rig.server.run(
        "pg_basebackup",
        "--dbname",
        rig.server.dsn(),
        "-D",
        str(making),
        "-Ft",
        "--checkpoint=fast",
        "--no-sync",
        *options,
    )
    making.rename(rig.spool / "nightly")
    rig.sql("insert into t select n from generate_series(5001, 6000) n")
    rig.sql("select pg_switch_wal()")
    rig.wait(
        lambda: rig.server.query("select last_archived_wal is not null from pg_stat_archiver") == [(True,)], "archived"
    )
    rig.server.stop()
    assert rig.json("push")["shipped"] >= 2
    assert not (rig.spool / "nightly").exists()
    (backup,) = rig.json("list")["backups"]
    assert backup["server_version"] // 10000 == rig.major
    (record,) = rig.json("history")
    assert (record["ok"], record["summary"]["name"]) == (True, backup["name"])
    assert rig.json("verify")["ok"]
    target, port = rig.target(), free_port()
    rig.json("restore", "--target-dir", str(target), "--start", "--port", str(port))
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
        assert connection.execute("select count(*) from t").fetchall() == [(6000,)]
    stop_started(target)


def test_the_backup_of_another_cluster_is_refused_and_stays(rig: Rig) -> None:
    rig.server.start()
    rig.run("init")
    folder = rig.spool / "stranger"
    folder.mkdir()
    for name, content in (
        ("base.tar", b""),
        ("backup_manifest", b'{ "PostgreSQL-Backup-Manifest-Version": 1, "Files": [] }'),
    ):
        (folder / name).write_bytes(content)
    if who := run_as():
        shutil.chown(folder, who["user"], who["group"])
    rig.server.stop()
    done = rig.run("push", expect=10)
    assert "stranger" in done.stderr
    assert (folder / "base.tar").exists()
    assert rig.json("list")["backups"] == []
