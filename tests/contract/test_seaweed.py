"""The S3 server of the demo and the tests: it keeps its data over a crash, and never outlives who started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from handlers.body import joined
from infra.clock import SystemClock
from infra.demo.seaweed import Seaweed
from infra.storage.retry import Retrying
from pipeline.contracts import Store
from pipeline.objects import MemoryBody
from tests.stores import s3_store

ROOT = Path(__file__).parents[2]

#: Starts a server in a thread that ends at once, says its process, and waits.
STARTER = """
import sys, threading, time
from pathlib import Path
from infra.demo.seaweed import Seaweed

server = Seaweed(Path(sys.argv[1]))
thread = threading.Thread(target=server.start)
thread.start()
thread.join()
print(server.pid, flush=True)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@asynccontextmanager
async def patient(server: Seaweed) -> AsyncIterator[Store]:
    """A server that has just started may answer 500 for a moment, as any S3 server may: patience is for that."""
    store = Retrying(s3_store(server), SystemClock())
    try:
        yield store
    finally:
        await store.close()


async def test_it_goes_on_with_its_data_after_stop_and_kill(tmp_path: Path) -> None:
    with Seaweed(tmp_path, bucket="other-bucket") as server:
        async with patient(server) as store:
            await store.put("a", MemoryBody((b"one",)))
        for end in (server.kill, server.stop):
            end()
            end()
            assert server.pid is None
            server.start()
            async with patient(server) as store:
                assert joined(await store.get("a")) == b"one"
    assert server.log.stat().st_size > 0


def test_it_dies_with_who_started_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        alive = is_alive(pid)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    gone = not is_alive(pid)
    if not gone:
        os.kill(pid, signal.SIGKILL)
    assert alive
    assert gone
