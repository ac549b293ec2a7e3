"""Starting a restored server: where its log goes, and that an interrupted start leaves none behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from handlers.target_dir import folders
from infra.postgres.processes import give, run_as
from infra.postgres.programs import Programs
from infra.postgres.restored import _open_log, start_restored
from infra.postgres.throwaway import make_folder
from infra.postgres.wal_script import FOLDER
from pipeline.backup import Tablespace
from pipeline.errors import ConfigError, RecoveryError
from pipeline.targets import Action, Target
from tests.unit.test_recovery_files import plan


def folder(directory: Path) -> Path:
    (directory / FOLDER).mkdir(parents=True)
    return directory


def opened(directory: Path, log_file: Path | None = None) -> Path:
    handle, path = _open_log(directory, log_file)
    os.write(handle, b"words\n")
    os.close(handle)
    assert path.read_bytes().endswith(b"words\n")
    return path


def test_the_log_lies_beside_the_directory_and_in_it_where_that_cannot_be(tmp_path: Path) -> None:
    data = folder(tmp_path / "data")
    assert opened(data) == tmp_path / "data.log"
    assert opened(data) == tmp_path / "data.log"
    assert (tmp_path / "data.log").read_bytes() == b"words\nwords\n"
    inside = data / FOLDER / "server.log"
    (tmp_path / "data.log").unlink()
    (tmp_path / "data.log").symlink_to(tmp_path / "precious")
    assert opened(data) == inside, "nobody lays a link in our way"
    (tmp_path / "data.log").unlink()
    os.mkfifo(tmp_path / "data.log")
    assert opened(data) == inside, "nobody reads there, and we would wait"
    long = folder(tmp_path / ("n" * 252))
    assert opened(long) == long / FOLDER / "server.log"
    with pytest.raises(ConfigError, match=r"log .*/nowhere/log cannot be written: No such file") as caught:
        opened(data, tmp_path / "nowhere/log")
    assert "pg_ctl" in caught.value.hint


def test_the_log_is_for_the_servers_user_alone(tmp_path: Path) -> None:
    """Statements stand in it, and their data."""
    data, before = folder(tmp_path / "data"), os.umask(0)
    try:
        give(data, run_as())
        there = opened(data).stat()
    finally:
        os.umask(before)
    assert oct(there.st_mode & 0o777) == "0o600"
    assert there.st_uid == data.stat().st_uid, "who starts it again with pg_ctl -l may write there"
    assert opened(data) == tmp_path / "data.log"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_log_that_somebody_else_has_laid_there_is_not_written_to(tmp_path: Path) -> None:
    data = folder(tmp_path / "data")
    (tmp_path / "data.log").write_bytes(b"")
    os.chown(tmp_path / "data.log", 12345, 12345)
    assert opened(data) == data / FOLDER / "server.log"


def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    backup = replace(plan(Target()).backup, tablespaces=(Tablespace(1, str(tmp_path / "place")),))
    with pytest.raises(RecoveryError, match="cannot be looked at: File name too long"):
        folders(backup, tmp_path / ("n" * 256), {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_the_folder_of_somebody_else(tmp_path: Path) -> None:
    data = folder(tmp_path / "data")
    tmp_path.chmod(0o500)
    try:
        assert opened(data) == data / FOLDER / "server.log"
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("turns", range(4))
async def test_an_interrupt_at_the_very_start_leaves_no_server(turns: int) -> None:
    """A program takes the server's place that would run for a minute, and takes its time when it is told to end."""
    home = make_folder("walship-l-")
    try:
        data = folder(home / "data")
        program = home / "bin" / "postgres"
        program.parent.mkdir()
        program.write_text(
            "#!/bin/sh\ntrap 'sleep 0.3; rm -f \"$2/alive\"; kill $!; exit 1' INT\n"
            'touch "$2/alive"; echo $$ >"$2/pid"; sleep 60 & wait\n'
        )
        for path in (home, program.parent, program):
            path.chmod(0o755)
        give(data, run_as())
        task = asyncio.create_task(
            start_restored(data, Programs(program.parent, 18, "18.6"), action=Action.PROMOTE, log_file=home / "log")
        )
        if turns == 3:
            async with asyncio.timeout(20):
                while not (data / "pid").exists():
                    await asyncio.sleep(0.01)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0.1)
        task.cancel()  # whoever is impatient
        with pytest.raises((asyncio.CancelledError, RecoveryError)):
            await task
        assert not (data / "alive").exists()
        if turns == 3:
            with pytest.raises(ProcessLookupError):
                os.kill(int((data / "pid").read_text()), 0)
    finally:
        if (data / "pid").exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int((data / "pid").read_text()), signal.SIGKILL)
        shutil.rmtree(home)
