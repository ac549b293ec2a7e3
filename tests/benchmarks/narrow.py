"""A network of so many megabits a second, on this machine: ``python -m tests.benchmarks.narrow PORT MBIT``.

A process of its own, so that what it costs is not charged to whom is measured. Prints the port that it listens on; what
comes from PORT is passed on no faster than that. Ends with its stdin.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PIECE = 64 << 10


@contextmanager
def narrow(port: int, mbit: int) -> Iterator[int]:
    """The port by which ``port`` of 127.0.0.1 is reached through it."""
    words = [sys.executable, "-m", "tests.benchmarks.narrow", str(port), str(mbit)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(words, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rate: float) -> None:
    loop = asyncio.get_running_loop()
    due = loop.time()
    while data := await reader.read(_PIECE):
        # What was not used for a while is gone: a network saves nothing up.
        due = max(due, loop.time() - 0.01) + len(data) / rate
        await asyncio.sleep(due - loop.time())
        writer.write(data)
        await writer.drain()
    writer.close()


async def _serve(port: int, mbit: int) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port, limit=4 * _PIECE)
        rate = mbit * 1e6 / 8
        await asyncio.gather(_pump(reader, back, rate), _pump(there, writer, rate), return_exceptions=True)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=4 * _PIECE)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
