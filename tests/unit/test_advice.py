"""What is said of common first mistakes: a port in use, settings in another folder, secrets that others can read."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from infra.checkup import env_file
from infra.postgres.restored import _what_to_do
from infra.postgres.server_log import ServerLog
from infra.settings import Settings
from infra.wiring import open_destinations
from pipeline.errors import ConfigError

_BOUND = 'LOG:  could not bind IPv4 address "127.0.0.1": '
_NO_SOCKET = "FATAL:  could not create any TCP/IP sockets"


@pytest.mark.parametrize(
    ("log", "port"),
    [
        (f"{_BOUND}Address already in use\n{_NO_SOCKET}\n", True),
        (f"{_BOUND}Cannot assign requested address\n{_NO_SOCKET}\n", False),
        ('FATAL:  lock file "/tmp/.s.PGSQL.5432.lock" already exists\n', True),
        ('FATAL:  could not open lock file "/tmp/.s.PGSQL.5432.lock": Permission denied\n', True),
        ('FATAL:  could not create lock file "/run/x/.s.PGSQL.5432.lock": Permission denied\n', False),
        ('FATAL:  lock file "postmaster.pid" already exists\n', False),
        (f"{_BOUND}Address already in use\nFATAL:  could not locate a valid checkpoint record\n", False),
    ],
)
def test_a_port_in_use_is_told_from_what_another_port_does_not_mend(tmp_path: Path, log: str, port: bool) -> None:
    path = tmp_path / "log"
    follow = ServerLog(path)
    path.write_text(log)
    follow.read()
    assert ("-o '-p N'" in _what_to_do(tmp_path, follow, "; ".join(follow.loud))) is port


@pytest.mark.parametrize(
    ("log", "label", "said", "again"),
    [
        ('postgres: could not access the server configuration file "/x/postgresql.conf": No such file\n', True,
         "pg_ctl -D", False),
        ("LOG:  starting PostgreSQL 18.6\nFATAL:  could not load pg_hba.conf\nLOG:  database system is shut down\n",
         True, "the directory is ready", False),
        ("LOG:  database system was interrupted\nFATAL:  could not restore file\n", True, "nothing is replayed", True),
        ("LOG:  database system was interrupted\nFATAL:  could not restore file\n", False, "half replayed", True),
        ("LOG:  entering standby mode\nFATAL:  recovery aborted because of insufficient parameter settings\n", False,
         "raise that setting", False),
    ],
)  # fmt: skip
def test_what_a_configuration_lacks_needs_no_other_restore(
    tmp_path: Path, log: str, label: bool, said: str, again: bool
) -> None:
    path = tmp_path / "log"
    follow = ServerLog(path)
    path.write_text(log)
    follow.read()
    if label:
        (tmp_path / "backup_label").touch()
    advice = _what_to_do(tmp_path, follow, "; ".join(follow.loud) or follow.last_line)
    assert said in advice
    assert ("--force" in advice) is again


@pytest.mark.parametrize("there", [False, True])
async def test_a_missing_file_of_settings_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / ".env").touch()
    with pytest.raises(ConfigError, match="WALSHIP_DESTINATIONS is not set") as error:
        async with open_destinations(Settings(_env_file=None).model_copy(update={"destinations": ()})):
            pass
    assert (f"there is no .env in {tmp_path}" in error.value.hint) is not there


@pytest.mark.parametrize(
    ("content", "mode", "warned"),
    [
        ("POSTGRES_PASSWORD=mellon\n", 0o644, True),
        ("POSTGRES_PASSWORD=mellon\n", 0o600, False),
        ("POSTGRES_PASSWORD=\nPOSTGRES_PORT=5432\n", 0o644, False),
        # As for the server's key: a group may read what root owns.
        ("POSTGRES_PASSWORD=mellon\n", 0o640, os.geteuid() != 0),
    ],
)
def test_secrets_that_others_can_read(tmp_path: Path, content: str, mode: int, warned: bool) -> None:
    path = tmp_path / ".env"
    path.write_text(content)
    path.chmod(mode)
    finding = env_file(path)
    assert (finding is not None) is warned
    if finding is not None:
        assert "POSTGRES_PASSWORD" in finding.fact
        assert "mellon" not in finding.fact


def test_the_command_in_the_hint_can_be_pasted(tmp_path: Path) -> None:
    path = tmp_path / "two words; and more" / ".env"
    path.parent.mkdir()
    path.write_text("POSTGRES_PASSWORD=mellon\n")
    path.chmod(0o644)
    finding = env_file(path)
    assert finding is not None
    subprocess.run(["/bin/sh", "-c", finding.hint], check=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    hint = _what_to_do(path.parent, ServerLog(tmp_path / "log"), f"{_BOUND}Address already in use; {_NO_SOCKET}")
    assert f"pg_ctl -D '{path.parent}' -o" in hint


def test_no_file_is_no_finding(tmp_path: Path) -> None:
    assert env_file(tmp_path / ".env") is None
