"""What signals do to a verb."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

_PROGRAM = """
import asyncio, os, signal, time
from infra.cli.verb import asynchronous

def work():
    time.sleep(0.3)
    if {late}:  # all tasks have ended, and this thread is waited for
        os.kill(os.getpid(), signal.{first})
        time.sleep(0.1)
    print("clean", flush=True)

@asynchronous
async def command():
    try:
        os.kill(os.getpid(), signal.{first})
        await asyncio.sleep(60)
    finally:
        for _ in range({more}):
            os.kill(os.getpid(), signal.{first})
            await asyncio.sleep(0.1)
        asyncio.get_running_loop().run_in_executor(None, work)

command()
"""


@pytest.mark.parametrize(("first", "code"), [("SIGTERM", 143), ("SIGINT", -signal.SIGINT)])
@pytest.mark.parametrize(("more", "late"), [(0, False), (0, True), (1, False), (2, False)])
def test_a_second_signal_does_not_stop_the_cleaning_up_and_a_third_does(
    first: str, code: int, more: int, late: bool
) -> None:
    program = _PROGRAM.format(first=first, more=more, late=late)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    if more == 2:
        assert (done.returncode, done.stdout) == (-getattr(signal, first), "")
    else:
        assert (done.returncode, done.stdout) == (code, "clean\n"), done.stderr
    assert ("ending already" in done.stderr) == (more > 0 or late)
