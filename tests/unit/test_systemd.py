"""The units are valid and closed, and the service tells systemd what it does."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import systemd
from tests.command_lines import below, folders_of_a_drill, parsed

_UNITS = Path(__file__).resolve().parents[2] / "infra" / "deploy" / "systemd"
#: Where the targets lie that units build upon.
_SYSTEM = Path("/usr/lib/systemd/system")

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None or not _SYSTEM.is_dir(), reason="systemd-analyze is not here"
)


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for path in _UNITS.iterdir():
        if path.suffix == ".conf":
            (units / "walship.service.d").mkdir()
            shutil.copy(path, units / "walship.service.d")
        else:
            shutil.copy(path, units)
    for target in _SYSTEM.glob("*.target"):
        if not target.is_symlink():
            shutil.copy(target, units)
    command = tmp_path / "opt/walship/bin/walship"
    command.parent.mkdir(parents=True)
    shutil.copy("/bin/true", command)
    names = [path.name for path in _UNITS.iterdir() if path.suffix != ".conf"]
    command_line = ["systemd-analyze", "verify", f"--root={tmp_path}", "--man=no", *names]
    done = subprocess.run(command_line, check=False, capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if "walship" in line] == []
    assert done.returncode == 0, done.stderr


@needs_systemd
@pytest.mark.parametrize("name", ["walship.service", "walship-drill.service"])
def test_the_units_are_closed(name: str) -> None:
    """Exposure as systemd counts it: 0 is closed, 10 open; a unit that says nothing has 9.6."""
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=20", str(_UNITS / name)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:]


def test_a_service_that_is_the_servers_user_leaves_the_servers_shared_memory_alone() -> None:
    drop_in = (_UNITS / "as-the-server.conf").read_text("utf-8").splitlines()
    assert {"User=postgres", "RemoveIPC=no"} <= {*drop_in}


def test_the_service_may_write_where_its_documents_put_things() -> None:
    unit = (_UNITS / "walship.service").read_text("utf-8")
    readme = (_UNITS.parents[2] / "README.md").read_text("utf-8")
    writable = re.findall(r"-(/\S+)", unit.split("\nReadWritePaths=")[1].splitlines()[0])
    made = re.search(r"install -d .*? (/var/.*)", readme)
    assert made is not None
    assert {*made[1].split()} == {*writable, "/etc/walship"}
    assert "/opt/walship/bin/walship run" in unit
    assert "/opt/walship/bin/walship" in readme


def _said(unit: str) -> dict[str, str]:
    lines = (_UNITS / unit).read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


@pytest.mark.parametrize("unit", ["walship.service", "walship-drill.service"])
def test_the_command_line_is_right(unit: str) -> None:
    program, *words = _said(unit)["ExecStart"].split()
    assert program == "/opt/walship/bin/walship"
    parsed(words)


def test_a_drill_writes_where_it_may() -> None:
    """Everything but the unit's own directories is read-only."""
    said = _said("walship-drill.service")
    folders = folders_of_a_drill(said["ExecStart"].split()[1:], here=said["WorkingDirectory"])
    states = [f"/var/lib/{name}" for name in said["StateDirectory"].split()]
    for option, folder in folders.items():
        assert below(folder, states), f"{option} {folder}"


def test_the_drop_in_of_the_documents_is_right_too() -> None:
    shown = (_UNITS.parents[2] / "docs" / "drill.md").read_text("utf-8")
    (line,) = re.findall(r"^    ExecStart=/opt/walship/bin/walship (.+)$", shown, re.MULTILINE)
    own = _said("walship-drill.service")["ExecStart"].removeprefix("/opt/walship/bin/walship ")
    assert line == f"{own} --check checks.sql"


@pytest.mark.parametrize("unit", ["walship.service", "walship-drill.service"])
def test_the_settings_folder_is_closed_as_the_readme_makes_it(unit: str) -> None:
    """Where the two modes differ, systemd warns at each start."""
    readme = (_UNITS.parents[2] / "README.md").read_text("utf-8")
    made = re.search(r"install -d .* -m (\d+) .*/etc/walship$", readme, re.MULTILINE)
    assert made is not None
    assert _said(unit)["ConfigurationDirectoryMode"] == f"0{made[1]}"


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "notify"))
        made.settimeout(20)
        yield made


def test_a_service_says_that_it_is_up_lives_and_ends(listener: socket.socket, tmp_path: Path) -> None:
    """No server and no repository is there: it waits for both, which is no reason to be started anew."""
    (tmp_path / "place").mkdir()
    (tmp_path / "spool").mkdir()
    settings = {
        "PATH": "/usr/bin:/bin", "WALSHIP_LISTEN": "off", "WALSHIP_SPOOL_DIR": str(tmp_path / "spool"),
        "WALSHIP_DESTINATIONS": "s3://bucket/prefix?endpoint=http://127.0.0.1:9&region=here",
        "AWS_ACCESS_KEY_ID": "some", "AWS_SECRET_ACCESS_KEY": "thing",
        "NOTIFY_SOCKET": listener.getsockname(), "WATCHDOG_USEC": "200000",
    }  # fmt: skip
    service = subprocess.Popen(
        [sys.executable, "-m", "infra.cli", "run"],
        env=settings, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        heard = [listener.recv(4096).decode()]
        while not (heard.count("WATCHDOG=1") > 2 and any(line.startswith("STATUS=waiting") for line in heard)):
            heard.append(listener.recv(4096).decode())
        service.send_signal(signal.SIGTERM)
        _, told = service.communicate(timeout=20)
    finally:
        service.kill()
        service.wait()
    assert heard[0] == "READY=1\nSTATUS=started"
    assert service.returncode == 0, told
    listener.settimeout(0.5)
    while not heard[-1].startswith("STOPPING=1"):
        heard.append(listener.recv(4096).decode())


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all"])
def test_nobody_who_listens_is_no_trouble(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.tell(READY="1")


@pytest.mark.parametrize(
    ("allowed", "process", "pause"), [("", "", None), ("0", "", None), ("x", "", None), ("30000000", "1", None)]
)
def test_who_is_not_watched_gives_no_sign(
    allowed: str, process: str, pause: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", allowed)
    if process:
        monkeypatch.setenv("WATCHDOG_PID", process)
    assert systemd.interval() is pause
