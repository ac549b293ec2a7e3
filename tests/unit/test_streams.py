"""stdin, stdout and stderr that are closed, full, or nobody's any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from infra.cli.streams import UNPRINTED
from infra.monitoring import log

FULL = Path("/dev/full")
_LOGS = """
import sys
from infra.cli import streams, verb
from infra.monitoring import log
import structlog
streams.secure()
log.configure()
for _ in range(2000):
    structlog.get_logger().info("started", what="x" * 100)
    verb.say("said")
    print("also", file=sys.stderr)
print("alive")
sys.exit(streams.settle(7))
"""


def shell(command: str, *, folder: Path, script: str = "") -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WALSHIP_", "POSTGRES_", "BACKUP_"))}
    return subprocess.run(
        ["sh", "-c", command.replace("PYTHON", sys.executable), "sh", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2>&- <&-"])
def test_a_log_that_cannot_be_written_stops_nothing(where: str, tmp_path: Path) -> None:
    done = shell(f'PYTHON -P -c "$1" {where}', folder=tmp_path, script=_LOGS)
    assert (done.stdout, done.returncode) == ("alive\n", 7)


def test_a_log_whose_reader_has_gone_stops_nothing(tmp_path: Path) -> None:
    done = shell('{ PYTHON -P -c "$1" 2>&1 >&3 | true; } 3>&1', folder=tmp_path, script=_LOGS)
    assert done.stdout == "alive\n"


def test_lines_arrive_where_there_is_somebody(tmp_path: Path) -> None:
    done = shell('PYTHON -P -c "$1"', folder=tmp_path, script=_LOGS)
    assert done.stderr.count('"event": "started"') == done.stderr.count("said\n") == 2000


def test_a_result_that_cannot_be_printed_is_no_success(tmp_path: Path) -> None:
    done = shell("PYTHON -P -m infra.cli --help >/dev/full", folder=tmp_path)
    assert done.returncode == UNPRINTED
    assert done.stderr == "walship: stdout cannot be written: No space left on device\n"


def test_an_error_keeps_its_code_whatever_can_be_printed(tmp_path: Path) -> None:
    for where in (">/dev/full", "2>/dev/full", ">&- 2>&-"):
        done = shell(f"PYTHON -P -m infra.cli status --json {where}", folder=tmp_path)
        assert done.returncode == 2, (where, done)


def test_commands_log_for_people_and_the_service_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        log.configure(plain=True)
        structlog.get_logger().warning("repository", destination="file:///a b", hint="")
        log.configure()
        structlog.get_logger().info("started")
    finally:
        structlog.reset_defaults()
    plain, json = capsys.readouterr().err.splitlines()
    assert plain == "warning: repository (destination file:///a b)"
    assert '"event": "started"' in json
