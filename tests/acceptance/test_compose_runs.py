"""What docker-compose.yml says of the server, the store and walship, run as plain processes: it cannot rot unseen.

Only what an engine would do is done here: names of services are addresses, volumes are folders.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.demo.seaweed import Seaweed
from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import ThrowawayServer, free_port, make_folder
from tests.docs_blocks import blocks_of
from tests.rig import stop_started
from tests.servers import NEWEST, programs

_HOME = Path(__file__).resolve().parents[2]


class Composed:
    """The services of the file, each as an engine would start it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.services: dict[str, Any] = yaml.safe_load((_HOME / "docker-compose.yml").read_text("utf-8"))["services"]
        store = self.services["s3"]
        options = dict(word.split("=", 1) for word in store["command"] if "=" in word)
        self.s3 = Seaweed(folder / "s3", bucket=options["-bucket"])
        self.s3.access_key = store["environment"]["AWS_ACCESS_KEY_ID"]
        self.s3.secret_key = store["environment"]["AWS_SECRET_ACCESS_KEY"]
        self.server = ThrowawayServer(programs(NEWEST), folder / "postgres-data")
        self.listen = f"127.0.0.1:{free_port()}"
        data = self.services["walship"]["environment"]["WALSHIP_DATA_DIR"]
        self._here = {
            # The longest first: one place may lie in another.
            data: str(folder / "postgres-data"),
            "/run/secrets": str(_HOME / "infra/deploy/compose/secrets"),
            "http://s3:8333": self.s3.endpoint,
            "0.0.0.0:9432": self.listen,
            "/backups": str(folder / "backups"),
            "/spool": str(folder / "spool"),
            "/restored": str(folder / "restored"),
            "/var/tmp": str(folder / "scratch"),
            "5433": str(free_port()),
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def here(self, text: str) -> str:
        """A word of the file, with this machine's places."""
        for there, place in self._here.items():
            text = text.replace(there, place)
        return text

    def start(self) -> None:
        user = run_as()
        for volume in ("scratch", "restored"):
            (self.folder / volume).mkdir()
            give(self.folder / volume, user)
        for place in self.services["volumes"]["entrypoint"][-2:]:  # install -d, for the server's user
            Path(self.here(place)).mkdir(mode=0o700)
            give(Path(self.here(place)), user)
        self.s3.start()
        # What the image's entry point does: a superuser with the password of the secret, who is asked for it.
        secret = Path(self.here(self.services["postgres"]["environment"]["POSTGRES_PASSWORD_FILE"]))
        password = self.folder / "password"
        shutil.copy(secret, password)
        if user:
            os.chown(password, user["user"], user["group"])
        self.server.init(options=["--auth-host=scram-sha-256", f"--pwfile={password}"])
        with (self.server.data_dir / "pg_hba.conf").open("a", encoding="utf-8") as file:
            file.write("host all all all scram-sha-256\n")
        for volume in self.services["postgres"]["volumes"]:
            script, _, place = volume.partition(":")
            if place.startswith("/docker-entrypoint-initdb.d/"):
                environment = {"PGDATA": str(self.server.data_dir), "PATH": os.environ["PATH"]}
                subprocess.run(["/bin/sh", _HOME / script], env=environment, check=True)
        conf = self.server.data_dir / "postgresql.conf"
        conf.write_text(self.here(conf.read_text("utf-8")), "utf-8")
        self.server.begin()

    def environment(self, name: str) -> dict[str, str]:
        told = {key: self.here(value) for key, value in self.services[name]["environment"].items()}
        kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "VIRTUAL_ENV") if key in os.environ}
        address = {"POSTGRES_HOST": self.server.host, "POSTGRES_PORT": str(self.server.port)}
        return {**kept, **told, **address}

    def walship(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """The command of a service, or other words in its container."""
        return self.execute(name, "walship", *(words or self.services[name]["command"]))

    def execute(self, name: str, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        """A program in the container of a service, as the user of the image."""
        first = [sys.executable, "-m", "infra.cli"] if program == "walship" else [str(programs(NEWEST) / program)]
        environment = self.environment(name)
        if (running := self.folder / "restored" / "now" / "postmaster.pid").exists():
            environment["PGHOST"] = running.read_text("utf-8").splitlines()[
                4
            ]  # Debian's psql looks where its server is
        return subprocess.run(
            [*first, *map(self.here, words)], env=environment, cwd=self.folder, check=False, capture_output=True,
            text=True, timeout=120, **run_as(),
        )  # fmt: skip

    def up(self) -> None:
        """What the engine does for `up --wait`: until every service is done or healthy."""
        self.start()
        check = self.services["s3"]["healthcheck"]["test"][-1]
        within(60, lambda: answers(check.replace("http://127.0.0.1:8333", self.s3.endpoint)), check)
        # Started beside the server, which may not answer yet: tried again as often as the file says.
        tries = int(self.services["init"]["restart"].partition(":")[2])
        for _ in range(tries):
            done = self.walship("init")
            if done.returncode == 0:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stderr
        self.serve()
        log = self.folder / "service.log"
        within(60, lambda: answers(f"http://{self.listen}/readyz"), log.read_text("utf-8"))
        # The first backup is taken without a word, since backups are scheduled.
        within(120, lambda: bool(self.backups()), log.read_text("utf-8"))

    def follow(self, document: str) -> list[str]:
        """Play the engine for the block that brings all of it up, line by line. What each further line prints."""
        (block,) = [each for each in blocks_of(document) if each.first == "docker compose up --build --detach --wait"]
        said = []
        for line in block.lines[1:]:
            engine, compose, verb, name, *words = shlex.split(line)
            assert (engine, compose, verb) == ("docker", "compose", "exec"), line
            done = self.execute(name, *words)
            assert done.returncode == 0, (line, done.stdout, done.stderr)
            said.append(done.stdout)
        return said

    def backups(self) -> list[str]:
        """Names of the complete ones."""
        return sorted(path.parent.name for path in self.folder.glob("backups/*/base/*/backup_info"))

    def serve(self) -> None:
        command = [sys.executable, "-m", "infra.cli", *self.services["walship"]["command"]]
        with (self.folder / "service.log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    command,
                    env=self.environment("walship"),
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    **run_as(),
                )
            )

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.wait(40)
        self.server.close()
        self.s3.stop()
        shutil.rmtree(self.folder)


@pytest.fixture
def composed() -> Iterator[Composed]:
    made = Composed(make_folder("walship-c-"))
    try:
        yield made
    finally:
        made.close()


def within(seconds: float, true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_the_services_work_together_as_the_file_says(composed: Composed) -> None:
    """And as README and docs/deploy.md go on behind `docker compose up`."""
    composed.up()
    assert answers(f"http://{composed.listen}/healthz")
    (first,) = composed.backups()
    # Read from the files: each worker has an archive of its own, and no server sends any.
    assert list(composed.folder.glob(f"backups/*/base/{first}/data/base.1"))
    composed.follow("README.md")
    names = composed.backups()
    assert len(names) == 2
    try:
        status, *_, rows = composed.follow("docs/deploy.md")
    finally:
        stop_started(composed.folder / "restored" / "now")
    assert status.startswith("Safe on this host only: both destinations have all WAL"), status
    assert " f " in rows, "the restored server was promoted"
    done = composed.walship("walship", "check")
    assert done.returncode == 0, done.stdout
    listed = json.loads(composed.walship("walship", "list", "--json").stdout)
    assert [backup["kind"] for backup in listed["backups"]] == ["full", "full", "full", "incremental"]
    assert list(composed.folder.glob("restored/drills/*.md"))
