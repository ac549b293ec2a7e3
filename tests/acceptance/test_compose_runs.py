"""What docker-compose.yml says of the server, the store and walship, run as plain processes: it cannot rot unseen.

Only what an engine would do is done here: names of services are addresses, volumes are folders.
"""

from __future__ import annotations

import json
import os
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
            "/var/tmp": str(folder / "scratch"),
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    def here(self, text: str) -> str:
        """A word of the file, with this machine's places."""
        for there, place in self._here.items():
            text = text.replace(there, place)
        return text

    def start(self) -> None:
        user = run_as()
        (self.folder / "scratch").mkdir()
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
        command = [sys.executable, "-m", "infra.cli", *(words or self.services[name]["command"])]
        environment = self.environment(name)
        return subprocess.run(
            command, env=environment, cwd=self.folder, check=False, capture_output=True, text=True, timeout=120
        )

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
    composed.start()
    check = composed.services["s3"]["healthcheck"]["test"][-1]
    within(60, lambda: answers(check.replace("http://127.0.0.1:8333", composed.s3.endpoint)), check)
    # Started beside the server, which may not answer yet: tried again as often as the file says.
    tries = int(composed.services["init"]["restart"].partition(":")[2])
    for _ in range(tries):
        done = composed.walship("init")
        if done.returncode == 0:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stderr
    composed.serve()
    page = f"http://{composed.listen}"
    log = composed.folder / "service.log"
    within(60, lambda: answers(f"{page}/readyz"), log.read_text("utf-8"))
    assert answers(f"{page}/healthz")
    # The first backup is taken without a word, since backups are scheduled.
    within(120, lambda: bool(composed.backups()), log.read_text("utf-8"))
    (first,) = composed.backups()
    # Read from the files: each worker has an archive of its own, and no server sends any.
    assert list(composed.folder.glob(f"backups/*/base/{first}/data/base.1"))
    done = composed.walship("walship", "backup", "--incremental", "--json")
    assert done.returncode == 0, done.stderr
    name = json.loads(done.stdout)["name"]
    done = composed.walship("walship", "status")
    assert done.stdout.startswith("Safe: both destinations have all WAL"), done.stdout + done.stderr
    done = composed.walship("walship", "check")
    assert done.returncode == 0, done.stdout
    listed = json.loads(composed.walship("walship", "list", "--json").stdout)
    assert [backup["name"] for backup in listed["backups"]] == [first, name]
