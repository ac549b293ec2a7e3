"""What signals do to a verb."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

_PROGRAM = """
import asyncio, os, signal, sys
from infra.cli.verb import asynchronous

@asynchronous
async def command():
    try:
        os.kill(os.getpid(), signal.{first})
        await asyncio.sleep(60)
    finally:
        for _ in range({more}):
            os.kill(os.getpid(), signal.{first})
            await asyncio.sleep(0.1)
        print("clean", flush=True)

command()
"""


@pytest.mark.parametrize(("first", "code"), [("SIGTERM", 143), ("SIGINT", -signal.SIGINT)])
@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_second_signal_does_not_stop_the_cleaning_up_and_a_third_does(first: str, code: int, more: int) -> None:
    program = _PROGRAM.format(first=first, more=more)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    if more == 2:
        assert (done.returncode, done.stdout) == (-getattr(signal, first), "")
    else:
        assert (done.returncode, done.stdout) == (code, "clean\n"), done.stderr
    assert ("ending already" in done.stderr) == (more > 0)
