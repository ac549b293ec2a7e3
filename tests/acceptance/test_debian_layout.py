"""A server as Debian has it: its configuration lies outside the data directory, and so in no backup."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from infra.postgres.processes import give, run_as
from infra.postgres.programs import environment_for
from infra.postgres.recovery_files import parse_conf
from infra.postgres.throwaway import free_port, make_folder
from tests.rig import Rig, stop_started
from tests.servers import NEWEST

_FILES = ("postgresql.conf", "pg_hba.conf", "pg_ident.conf")


class Debian(Rig):
    """Its server's three files lie in ``etc``."""

    def move_out(self) -> None:
        self.etc = self.folder / "etc"
        self.etc.mkdir()
        data = self.server.data_dir
        for name in _FILES:
            shutil.move(data / name, self.etc / name)
        self.say(data_directory=str(data), hba_file=str(self.etc / _FILES[1]), ident_file=str(self.etc / _FILES[2]))

    def say(self, **settings: str) -> None:
        with (self.etc / _FILES[0]).open("a", encoding="utf-8") as conf:
            conf.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def start(self) -> None:
        self.server.start({"config_file": str(self.etc / _FILES[0])})

    def ask(self, restored: dict[str, object], query: str) -> str:
        """As README does: psql, as the server's user, over the socket."""
        words = ["-h", str(restored["socket_dir"]), "-p", str(restored["port"]), "-d", "postgres", "-Atc", query]
        return subprocess.run(
            [self.bin_dir / "psql", *words], env=environment_for(self.bin_dir), capture_output=True, text=True,
            check=True, cwd="/", timeout=60, **run_as(self.server.data_dir),
        ).stdout.strip()  # fmt: skip


@pytest.fixture
def rig() -> Iterator[Debian]:
    folder = make_folder("walship-e-")
    try:
        # Above the default: the server would refuse to recover with that.
        with Debian(folder, NEWEST, [f"file://{folder}/one"], server_settings={"max_connections": "137"}) as made:
            made.move_out()
            made.start()
            made.run("init")
            who = pwd.getpwuid(made.server.data_dir.stat().st_uid).pw_name
            if who != "postgres":
                made.sql(f'create role "{who}" superuser login')
            made.sql("create table t (n int)")
            made.json("backup")
            made.sql("insert into t values (1)")
            made.json("switch")
            yield made
    finally:
        shutil.rmtree(folder)


def test_it_is_restored_and_answers_its_user(rig: Debian) -> None:
    outside = ", ".join(sorted(str(rig.etc / name) for name in _FILES))
    said = rig.run("check").stdout
    fact = f"outside the data directory lie {outside}: in no backup"
    assert f"warning  backups: {fact}\n         hint: keep copies of them elsewhere\n" in said
    target, port = rig.target(), free_port()
    words = ("restore", "--target-dir", str(target), "--start", "--port", str(port))
    restored = rig.json(*words)
    assert (restored["state"], restored["port"]) == ("in production", port)
    assert rig.ask(restored, "select sum(n), current_setting('max_connections') from t") == "1|137"
    (said,) = [note for note in restored["notes"] if "pg_hba.conf" in note]
    assert said.startswith("postgresql.conf and pg_hba.conf are not in the backup")
    owner = target.stat().st_uid
    for name in _FILES[:2]:
        about = (target / name).stat()
        assert (stat.S_IMODE(about.st_mode), about.st_uid) == (0o600, owner)
    with pytest.raises(psycopg.OperationalError, match=r"no pg_hba\.conf entry"):
        psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres")
    stop_started(target)

    # Theirs: another restore into the same folder leaves it there, and has its own for what they did not bring.
    theirs = "# ours\nmax_connections = 140\n"
    (target / "postgresql.conf").write_text(theirs)
    restored = rig.json(*words, "--delta")
    assert rig.ask(restored, "select sum(n), current_setting('max_connections') from t") == "1|140"
    assert (target / "postgresql.conf").read_text() == theirs
    assert f"kept, for the backup has none: {target}/postgresql.conf" in restored["notes"]
    assert [note[:22] for note in restored["notes"] if "pg_hba.conf" in note] == ["pg_hba.conf is not in "]
    stop_started(target)
    (target / "pg_hba.conf").write_text("local all all nonsense\n")
    refused = rig.run(*words, "--delta", expect=13).stderr
    assert f"pg_ctl -D {target} start, for the directory is ready" in refused
    assert "half replayed" not in refused
    assert "--force" not in refused


def test_a_standby_and_a_setting_that_was_raised_since(rig: Debian) -> None:
    target, out, said = rig.target(), rig.folder / "restored.json", rig.folder / "restored.log"
    words = ("restore", "--standby", "--start", "--port", str(free_port()), "--target-dir", str(target), "--json")
    with out.open("wb") as stdout, said.open("wb") as stderr:
        command = subprocess.Popen(
            [sys.executable, "-m", "infra.cli", *words], env=rig.environment(), cwd=rig.folder, stdout=stdout,
            stderr=stderr, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        rig.wait(lambda: "follows timeline 1" in said.read_text() or command.poll() is not None, "it follows")
        assert command.poll() is None, said.read_text()
        restored = json.loads(out.read_text())
        assert rig.ask(restored, "select sum(n), pg_is_in_recovery() from t") == "1|t"
        assert f"walship wrote into {target} a minimal postgresql.conf" in said.read_text()
        os.kill(command.pid, signal.SIGINT)
        assert command.wait(30) == 0, said.read_text()
    finally:
        command.kill()
        command.wait()
        stop_started(target)

    rig.server.stop()
    rig.say(max_connections="200")
    rig.start()
    rig.sql("insert into t values (2)")
    rig.json("switch")
    later = rig.target()
    refused = rig.run("restore", "--target-dir", str(later), "--start", "--port", str(free_port()), expect=13).stderr
    assert "max_connections = 137 is a lower setting than on the primary server, where its value was 200" in refused
    assert f"raise that setting, in {later}/postgresql.conf" in refused
    conf = Path(later / "postgresql.conf")
    assert parse_conf(conf.read_text())["max_connections"] == "137"
    conf.write_text(conf.read_text() + "max_connections = 200\n")
    give(rig.folder / "one", run_as())  # from here on the server fetches by itself
    server = rig.adopt(later)
    server.allow("host all all 127.0.0.1/32 trust")
    server.start()
    rig.wait(lambda: server.query("select sum(n) from t") == [(3,)], "it goes on where it was")
