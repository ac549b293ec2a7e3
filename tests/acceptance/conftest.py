"""Installations for acceptance tests; the repository that tests may spoil is a copy of one that was made once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from infra.postgres.throwaway import make_folder
from tests.rig import Rig
from tests.servers import NEWEST


@dataclass(frozen=True)
class Shipped:
    """A repository with one backup and WAL behind it, its server stopped, its spool empty."""

    rig: Rig
    local: Path
    system_id: str
    backup: str
    #: Rows of table t at the end.
    rows: int
    #: Just after the last commit, by the server's clock.
    end: datetime


class Copy:
    """A copy of the repository that a test may spoil, and the command on it."""

    def __init__(self, shipped: Shipped, folder: Path) -> None:
        self.shipped = shipped
        self.rig = shipped.rig
        self.local = folder
        self.root = folder / shipped.system_id

    def run(self, *words: str, expect: int = 0, **changed: str) -> Any:
        environment = self.rig.environment(**{"WALSHIP_DESTINATIONS": f"file://{self.local}"} | changed)
        return self.rig.run(*words, expect=expect, environment=environment)

    def object(self, name: str) -> Path:
        return self.root / name

    def segments(self) -> list[Path]:
        return sorted(path for path in (self.root / "wal").glob("*/*") if len(path.name) == 24)

    def parts(self) -> list[Path]:
        return sorted((self.root / "base" / self.shipped.backup / "data").rglob("0*"))


@pytest.fixture(scope="session")
def shipped() -> Iterator[Shipped]:
    """Made once per test process; nobody may change it."""
    folder = make_folder("walship-a-")
    try:
        local = folder / "local"
        with Rig(folder, NEWEST, [f"file://{local}"]) as rig:
            rig.server.start()
            rig.run("init")
            rig.sql("create table t (n int primary key, filler text)")
            rig.sql("insert into t select n, md5(n::text) from generate_series(1, 2000) n")
            backup = rig.json("backup")["name"]
            for start in range(2001, 30001, 7000):
                rig.sql(f"insert into t select n, md5(n::text) from generate_series({start}, {start + 6999}) n")
                rig.sql("select pg_switch_wal()")
            ((rows, end, system_id),) = rig.sql(
                "select count(*), clock_timestamp(), (select system_identifier::text from pg_control_system()) from t"
            )
            rig.json("switch")
            rig.server.stop()
            rig.run("push")
            yield Shipped(rig, local, system_id, backup, rows, end)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def copy(shipped: Shipped) -> Iterator[Copy]:
    """A copy of ``shipped`` to spoil."""
    folder = make_folder("walship-c-")
    shutil.copytree(shipped.local, folder / "local")
    for record in folder.glob("local/*/log/*"):  # other tests have drilled and verified what this is a copy of
        if "-backup-" not in record.name:
            record.unlink()
    yield Copy(shipped, folder / "local")
    shutil.rmtree(folder)


@pytest.fixture
def rig() -> Iterator[Rig]:
    """An installation of its own: one folder as destination, its server started, its repository made."""
    folder = make_folder("walship-o-")
    with Rig(folder, NEWEST, [f"file://{folder}/near"]) as made:
        made.server.start()
        made.run("init")
        yield made
    shutil.rmtree(folder)
