"""The files for the server: its role, its settings, and an archive_command that returns once a file is stored."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from infra.postgres.connect import connect
from infra.postgres.control import read_facts, switch_wal
from infra.postgres.problems import problems
from infra.postgres.processes import give, run_as
from infra.postgres.recovery_files import parse_conf
from infra.postgres.throwaway import make_folder
from infra.settings import Settings
from pipeline.errors import SourceError
from tests.rig import Rig
from tests.servers import NEWEST, StartServer, server_folder, start_server

__all__ = ["server_folder", "start_server"]  # fixtures

_FOLDER = Path(__file__).resolve().parents[2] / "infra" / "deploy" / "postgres"
_SCRIPT = _FOLDER / "archive_strict.sh"
_NAME = "000000010000000000000003"


def call(folder: Path, *options: str, wait: int = 0) -> subprocess.Popen[str]:
    """``options``: of the shell."""
    words = [folder / "pg_wal" / _NAME, _NAME, folder / "spool", wait]
    command = [str(word) for word in ("/bin/sh", *options, _SCRIPT, *words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a space and a quote in its name, a spool, and a segment to archive."""
    made = tmp_path / "it's here"
    (made / "pg_wal").mkdir(parents=True)
    (made / "spool").mkdir()
    (made / "pg_wal" / _NAME).write_bytes(b"segment" * 10000)
    return made


def spooled(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "spool").iterdir())


def until_spooled(folder: Path) -> Path:
    file = folder / "spool" / _NAME
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return file


def test_it_returns_once_the_file_was_taken(folder: Path) -> None:
    archiving = call(folder, wait=30)
    file = until_spooled(folder)
    assert file.read_bytes() == (folder / "pg_wal" / _NAME).read_bytes()
    time.sleep(0.2)
    assert archiving.poll() is None
    file.unlink()
    assert archiving.communicate(timeout=20) == ("", "")
    assert archiving.returncode == 0
    assert spooled(folder) == []


def test_what_is_not_stored_in_time_stays_and_is_waited_for_again(folder: Path) -> None:
    first = call(folder)
    _, told = first.communicate(timeout=20)
    assert first.returncode == 1
    assert told == (
        f"archive_strict: {_NAME} is in {folder}/spool, and not yet stored everywhere: walship status tells why\n"
    )
    assert spooled(folder) == [_NAME]
    again = call(folder, "-x", wait=30)
    assert again.stderr is not None
    # Taken away before it has looked, the file would be copied once more.
    assert any("-gt 0" in line for line in again.stderr), "it waits, says the shell"
    time.sleep(0.2)
    assert again.poll() is None
    (folder / "spool" / _NAME).unlink()
    again.communicate(timeout=20)
    assert again.returncode == 0


def test_other_bytes_of_that_name_are_not_overwritten(folder: Path) -> None:
    (folder / "spool" / _NAME).write_bytes(b"of another server")
    done = call(folder, wait=30)
    _, told = done.communicate(timeout=20)
    assert done.returncode == 1
    assert "with other bytes" in told
    assert (folder / "spool" / _NAME).read_bytes() == b"of another server"


def test_a_file_that_was_refused_is_not_archived(folder: Path) -> None:
    (folder / "spool" / "refused").mkdir()
    (folder / "spool" / "refused" / _NAME).write_bytes(b"from an earlier day")
    done = call(folder, wait=30)
    until_spooled(folder).rename(folder / "spool" / "refused" / f"{_NAME}.1")
    _, told = done.communicate(timeout=20)
    assert done.returncode == 1
    assert f"walship has moved {_NAME}" in told


def test_a_spool_that_is_away_is_an_error(folder: Path) -> None:
    shutil.rmtree(folder / "spool")
    done = call(folder)
    assert "there is no folder" in done.communicate(timeout=20)[1]
    assert done.returncode == 1


def test_a_call_that_is_ended_leaves_nothing_half(folder: Path) -> None:
    """PostgreSQL ends the command when it shuts down: the whole file may stay, a part of it may not."""
    for pause in (0.0, 0.01, 0.03, 0.1):
        archiving = call(folder, wait=30)
        time.sleep(pause)
        archiving.terminate()
        assert archiving.wait(timeout=20) != 0
        archiving.communicate()
        for name in spooled(folder):
            assert name == _NAME
            assert (folder / "spool" / name).read_bytes() == (folder / "pg_wal" / _NAME).read_bytes()


def test_what_the_server_takes_for_archived_is_at_every_destination() -> None:
    folder = make_folder("walship-a-")
    try:
        script = shutil.copy(_SCRIPT, folder)
        command = f'{script} "%p" "%f" {folder / "spool"} 1'
        places = [f"file://{folder}/near", f"file://{folder}/far"]
        archiving = {"archive_library": "", "archive_command": command}
        with Rig(folder, NEWEST, places, server_settings=archiving) as rig:
            rig.server.start()
            rig.run("init")
            rig.sql("create table t as select generate_series(1, 1000)")
            ((name,),) = rig.sql("select pg_walfile_name(pg_switch_wal())")
            # Nobody ships: it is in the spool, and PostgreSQL keeps it nevertheless.
            rig.wait(lambda: rig.sql("select failed_count > 0 from pg_stat_archiver") == [(True,)], "it has failed")
            assert rig.spooled()
            assert rig.sql("select archived_count from pg_stat_archiver") == [(0,)]
            told = [
                finding for finding in rig.json("check", expect=10)["findings"] if "archive_command" in finding["fact"]
            ]
            assert told == []
            rig.serve()
            rig.wait(
                lambda: rig.sql(f"select last_archived_wal >= '{name}' from pg_stat_archiver") == [(True,)],
                "it is archived",
            )
            for place in ("near", "far"):
                assert list((folder / place).glob(f"*/wal/*/{name}"))
    finally:
        shutil.rmtree(folder)


async def test_the_role_and_the_settings_are_all_that_is_asked_for(
    server_folder: Path, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = parse_conf((_FOLDER / "watch.conf").read_text("utf-8"))
    spool = server_folder / "spool"
    spool.mkdir()
    give(spool, run_as())
    conf["basic_archive.archive_directory"] = str(spool)
    server = start_server(segment_mb=1, settings={**conf, "fsync": "on"})
    words = ["-Xqd", server.dsn(), "-v", "ON_ERROR_STOP=1", "-f", str(shutil.copy(_FOLDER / "role.sql", server_folder))]
    monkeypatch.delenv("POSTGRES_PASSWORD", raising=False)
    with pytest.raises(SourceError, match="no password"):
        server.run("psql", *words)
    server.run("psql", *words, "-v", "password=another")
    # Run again it goes on behind the role that is there, and brings what that lacks.
    server.query("alter role walship nologin noreplication")
    server.query("drop owned by walship")  # all that was granted
    # Not as a word, which everybody sees who lists the processes.
    monkeypatch.setenv("POSTGRES_PASSWORD", "its own")
    server.run("psql", *words)
    settings = Settings(
        POSTGRES_HOST=server.host, POSTGRES_PORT=server.port, POSTGRES_USERNAME="walship",
        POSTGRES_PASSWORD="its own", WALSHIP_SPOOL_DIR=str(spool),
    )  # fmt: skip
    async with await connect(settings) as connection:
        assert problems(await read_facts(connection), settings) == []
        await switch_wal(connection, segment_size=1 << 20)
        await connection.execute("select pg_backup_start('walship', true)")
        await connection.execute("select pg_backup_stop(false)")
    # Nothing in it that the service needs no more: each line of the role is missed.
    server.query("alter role walship noreplication")
    server.query("revoke pg_monitor from walship")
    server.query("revoke execute on function pg_switch_wal(), pg_create_restore_point(text) from walship")
    async with await connect(settings) as connection:
        assert len(problems(await read_facts(connection), settings)) == 4
