"""The benchmark of replay, interrupted: what it started is gone before its folders are removed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Starts to recover, and takes its time to end.
_SERVER = """
trap 'sleep 0.5; echo gone >> {log}; exit 0' QUIT TERM
echo $$ > {folder}/postmaster.pid
echo 'redo starts at 0/1' >> {log}
while :; do sleep 0.05; done
"""

_RECOVER = """
import signal, sys
from pathlib import Path
from tests.benchmarks.recovering import recover

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, interrupt)
folder, log = map(Path, sys.argv[1:3])
try:
    recover(["/bin/sh", folder / "server"], {"PATH": "/usr/bin:/bin"}, {}, folder, log, folder / "output")
except KeyboardInterrupt:
    print("then", log.read_text().split()[-1], flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_recovery_leaves_no_server(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    (tmp_path / "server").write_text(_SERVER.format(folder=tmp_path, log=log), "utf-8")
    with subprocess.Popen(
        [sys.executable, "-c", _RECOVER, str(tmp_path), str(log)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not (log.exists() and "redo starts" in log.read_text("utf-8")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert said == "then gone\n"
