"""What a restored directory gets whose backup holds no configuration, as on Debian."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.postgres.bare_conf import furnish, lacking, to_be_put
from infra.postgres.processes import give, run_as
from infra.postgres.programs import Programs
from infra.postgres.recovery_files import parse_conf
from infra.postgres.throwaway import make_folder
from pipeline.errors import RecoveryError

_BOTH = ("postgresql.conf", "pg_hba.conf")


class Ground:
    """A data directory, and a program that prints what pg_controldata does."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.data.mkdir()
        give(self.data, run_as())
        self.programs = Programs(folder / "bin", 18, "18.6")
        self.programs.bin_dir.mkdir()
        self.remember(100)

    def remember(self, connections: int) -> None:
        program = self.programs.bin_dir / "pg_controldata"
        program.write_text(
            f"#!/bin/sh\necho 'max_connections setting:              {connections}'\n"
            "echo 'max_locks_per_xact setting:           64'\necho 'wal_level setting:    replica'\n"
        )
        program.chmod(0o755)

    def furnish(self, port: int | None = None) -> str:
        about = self.data.stat()
        return furnish(self.data, self.programs, port=port, owner=(about.st_uid, about.st_gid))

    def read(self, name: str) -> str:
        return (self.data / name).read_text("utf-8")


@pytest.fixture
def ground() -> Iterator[Ground]:
    folder = make_folder("walship-c-")
    yield Ground(folder)
    shutil.rmtree(folder)


def test_both_files_are_written_and_told(ground: Ground) -> None:
    assert lacking(ground.data) == _BOTH
    said = ground.furnish(5433)
    assert said.startswith("postgresql.conf and pg_hba.conf are not in the backup (Debian keeps such files below /etc")
    assert f"walship wrote into {ground.data} a minimal postgresql.conf and a pg_hba.conf that lets" in said
    assert "put the old server's files there, or below /etc/postgresql if your service reads them there, before" in said
    assert parse_conf(ground.read("postgresql.conf")) == {
        "max_connections": "100", "max_locks_per_transaction": "64", "listen_addresses": "localhost", "port": "5433",
    }  # fmt: skip
    rules = [line for line in ground.read("pg_hba.conf").splitlines() if not line.startswith("#")]
    assert rules == ["local all all peer"], "nobody over the network"
    about = ground.data.stat()
    for path in ground.data.iterdir():
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o600, about.st_uid, about.st_gid)


@pytest.mark.parametrize("there", _BOTH)
def test_what_is_there_is_left_alone(ground: Ground, there: str) -> None:
    (ground.data / there).write_text("# mine\n")
    (missing,) = lacking(ground.data)
    said = ground.furnish()
    assert said.startswith(f"{missing} is not in the backup")
    assert "the old server's file there" in said
    assert there not in said
    assert ground.read(there) == "# mine\n"
    assert ground.read(missing).startswith("# walship restore --start: the backup holds no")
    (ground.data / missing).write_text("# theirs\n")
    assert ground.furnish() == ""
    assert to_be_put(ground.data) == ""
    assert ground.read(missing) == "# theirs\n"


@pytest.mark.parametrize("name", ["postgresql.conf", "postgresql.auto.conf"])
def test_rules_that_lie_elsewhere_are_not_looked_for_here(ground: Ground, name: str) -> None:
    (ground.data / "postgresql.conf").touch()
    (ground.data / name).write_text("hba_file = '/etc/postgresql/18/main/pg_hba.conf'\n")
    assert lacking(ground.data) == ()


def test_files_of_another_restore_are_none_until_somebody_changes_them(ground: Ground) -> None:
    """They get into the next backup, whose WAL may need more connections."""
    ground.furnish(5433)
    ground.remember(137)
    assert "put the old server's files into" in to_be_put(ground.data)
    assert ground.furnish() != ""
    assert parse_conf(ground.read("postgresql.conf"))["max_connections"] == "137"
    raised = ground.read("postgresql.conf").replace("137", "300")
    (ground.data / "postgresql.conf").write_text(raised)
    assert "postgresql.conf" not in ground.furnish()
    assert ground.read("postgresql.conf") == raised


def test_what_people_start_themselves(ground: Ground) -> None:
    said = to_be_put(ground.data)
    assert f"put the old server's files into {ground.data}, or below /etc/postgresql" in said
    assert "before the start, with max_connections and its like not below what they were" in said
    assert not any(ground.data.iterdir()), "nothing is written"
    (ground.data / "postgresql.conf").touch()
    assert to_be_put(ground.data).endswith("there, before the start")


def test_a_disk_that_takes_nothing(ground: Ground) -> None:
    (ground.data / "postgresql.conf.walship").mkdir()
    with pytest.raises(RecoveryError, match=r"postgresql\.conf and pg_hba\.conf cannot be written into") as caught:
        ground.furnish()
    assert f"pg_ctl -D {ground.data} start" in caught.value.hint
