"""The image: what it is, and that the service in it ships, is healthy, ends on SIGTERM, and that it restores."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from infra.postgres.processes import RunAs, give
from infra.postgres.throwaway import free_port, make_folder
from tests.image.builder import MAJOR, NEEDED, Builder
from tests.rig import Rig, stop_started

pytestmark = [
    pytest.mark.skipif(not os.environ.get("IMAGE_TEST"), reason="it takes minutes: make image-test"),
    pytest.mark.timeout(1200),
]

_USER = 999


@pytest.fixture(scope="module")
def builder() -> Iterator[Builder]:
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.fail(f"not installed: {', '.join(missing)} (Debian: apt-get install {' '.join(NEEDED)})")
    made = Builder(make_folder("walship-image-"))
    try:
        made.make_base("localhost/base")
        made.build("localhost/walship", base="localhost/base")
        made.build("localhost/shipper", base="localhost/base", target="shipper")
        yield made
    finally:
        made.close()


def test_what_the_image_says_of_itself(builder: Builder) -> None:
    for name, entry in (("localhost/walship", ["tini", "-s", "--", "walship"]), ("localhost/shipper", ["walship"])):
        told = builder.settings(name)
        assert (told["User"], told["Entrypoint"], told["Cmd"]) == ("999:999", entry, ["run"])
        assert "healthz" in told["Healthcheck"]["Test"][-1]
    print({name: builder.megabytes(f"localhost/{name}") for name in ("base", "shipper", "walship")}, "MB")


def test_nothing_of_the_build_is_left(builder: Builder) -> None:
    found = _output(builder, ["find", "/opt", "/src", "/dist", "-maxdepth", "1", "-not", "-empty"])
    assert found.split() == ["/opt", "/opt/walship"]
    own = _output(builder, ["find", "/", "-xdev", "-user", str(_USER), "-not", "-path", "/proc/*"]).split()
    assert sorted(own) == ["/backups", "/restored", "/run/postgresql", "/spool", "/var/lib/walship"]
    assert _output(builder, ["find", "/", "-xdev", "-name", "*snakeoil*"]) == ""
    assert _output(builder, ["id", "-u"]).strip() == str(_USER)


def _output(builder: Builder, words: list[str], *, image: str = "localhost/walship") -> str:
    container = builder.container(image)
    done = builder.run(container, words, environment={}, folder=builder.folder)
    return done.communicate(timeout=60)[0]


def test_the_service_ships_and_restores(builder: Builder) -> None:
    """The server runs beside it, as its own user; the two share the spool, as in docker-compose.yml."""
    folder = make_folder("walship-i-")
    try:
        listen = f"127.0.0.1:{free_port()}"
        settings = {"WALSHIP_LISTEN": listen, "WALSHIP_PG_BIN_DIR": ""}
        # For the one that is restored, in the container; here the command line wins.
        sockets = {"unix_socket_directories": "/run/postgresql"}
        with Rig(
            folder, MAJOR, [f"file://{folder}/near"], sources="stream", settings=settings, server_settings=sockets
        ) as rig:
            rig.server.start()
            give(folder / "near", _user())
            environment = {
                k: v for k, v in rig.environment().items() if k not in ("PATH", "HOME", "WALSHIP_PG_BIN_DIR")
            }
            entry = builder.settings("localhost/walship")["Entrypoint"]

            def walship(*words: str) -> str:
                container = builder.container("localhost/walship")
                done = builder.run(container, [*entry, *words], environment=environment, folder=folder)
                out, told = done.communicate(timeout=120)
                assert done.returncode == 0, told
                return out

            assert walship("--version").startswith("walship, version")
            walship("init")
            service = builder.container("localhost/walship")
            running = builder.run(service, [*entry, "run"], environment=environment, folder=folder)
            try:
                rig.sql("create table t as select generate_series(1, 1000) as n")
                name = json.loads(walship("backup", "--json"))["name"]
                rig.sql("insert into t select generate_series(1, 500)")
                health = builder.settings("localhost/walship")["Healthcheck"]["Test"][1:]
                beside = builder.run(service, health, environment=environment, folder=folder)
                assert beside.communicate(timeout=60)[1] == ""
                assert beside.returncode == 0
                walship("switch")
                _end(running)
            finally:
                if running.poll() is None:
                    _end(running)
            told = running.communicate(timeout=60)[1]
            assert running.returncode == 0, told[-3000:]
            assert '"event": "stopped"' in told or "stopped" in told
            rig.server.stop("fast")
            assert name in walship("list")
            for place in ("restored", "scratch"):
                (folder / place).mkdir()
                (folder / place).chmod(0o1777)
            compose = yaml.safe_load((Path(__file__).parents[2] / "docker-compose.yml").read_text("utf-8"))
            service = compose["services"]["walship"]
            assert service["read_only"]
            tmpfs = service["tmpfs"]

            def walled(*words: str, user: int = _USER) -> subprocess.CompletedProcess[str]:
                return builder.confined(
                    "localhost/walship",
                    words,
                    environment={**environment, "TMPDIR": service["environment"]["TMPDIR"]},
                    user=user,
                    tmpfs=tmpfs,
                    volumes={
                        f"{folder}/near": f"{folder}/near",
                        f"{folder}/restored": "/restored",
                        f"{folder}/scratch": service["environment"]["TMPDIR"],
                    },
                )

            assert walled("touch", "/opt/walship/some").returncode == 1
            for user in (_USER, 4321):
                for words in (
                    ["touch", *(f"{place}/some" for place in tmpfs)],
                    ["walship", "key", "new-identity", "k"],
                ):
                    done = walled(*words, user=user)
                    assert done.returncode == 0, done.stderr
            done = walled(*entry, "drill", "--report", "/restored/drills", "--json")
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["verdict"] == "passed"
            target, port = folder / "restored" / "now", free_port()
            restore = f"walship restore --target-dir /restored/now --start --port {port} >&2"
            ask = f"psql -U postgres -p {port} -tAc 'select count(*) from t'"
            done = walled(*entry[:-1], "/bin/sh", "-euc", f"{restore}; {ask}")
            try:
                assert (done.returncode, done.stdout) == (0, "1500\n"), done.stderr
            finally:
                stop_started(target)
    finally:
        shutil.rmtree(folder)


def _user() -> RunAs:
    return {"user": _USER, "group": _USER, "extra_groups": []}


def _end(running: subprocess.Popen[str]) -> None:
    """SIGTERM to the first process of the container, as ``docker stop`` sends it."""
    first = _descendants(running.pid, "tini")
    os.kill(first, signal.SIGTERM)
    deadline = time.monotonic() + 40
    while running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def _descendants(pid: int, program: str) -> int:
    """The process below ``pid`` that runs the program."""
    waiting = [pid]
    while waiting:
        below = Path(f"/proc/{(current := waiting.pop())}/task")
        if Path(f"/proc/{current}/comm").read_text("utf-8").strip() == program:
            return current
        for task in below.iterdir():
            waiting += [int(child) for child in (task / "children").read_text("utf-8").split()]
    raise AssertionError(f"no {program} below process {pid}")
