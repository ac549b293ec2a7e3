"""What it costs to find out what a destination lacks, with so many segments stored: time, memory and requests.

    python -m tests.benchmarks.comparing [SEGMENTS]

Without a number it runs itself for several, each in a process of its own, and prints a table.
"""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator

from handlers.copy import estimate
from handlers.upload import WANTED
from infra.storage.memory import MemoryStore
from pipeline.catalog import wal_key
from pipeline.contracts import ObjectInfo
from pipeline.wal import WalFile

SIZE = 16 << 20
COUNTS = (10_000, 100_000, 1_000_000)
#: Keys in one answer to a listing.
_PAGE = 1000


class Made(MemoryStore):
    """So many segments, made up when they are listed; every ``gap``-th is missing."""

    def __init__(self, name: str, segments: int, gap: int = 0) -> None:
        super().__init__(name)
        self._segments, self._gap = segments, gap
        self.requests = 0

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        self.requests += 1
        if prefix != "wal/" or shallow:
            async for info in super().list(prefix, after=after, shallow=shallow):
                yield info
            return
        for number in range(self._segments):
            if number % _PAGE == _PAGE - 1:
                self.requests += 1
                await asyncio.sleep(0)
            if not self._gap or number % self._gap:
                yield ObjectInfo(wal_key(WalFile.segment(1, number * SIZE, SIZE)), 5_000_000)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def _compare(segments: int) -> dict[str, float]:
    source, target = Made("a", segments), Made("b", segments, gap=100)
    await estimate(Made("c", 10), Made("d", 10), WANTED)  # what is loaded late
    before, began, cpu = _peak(), time.monotonic(), time.process_time()
    found = await estimate(source, target, WANTED)
    assert found.total.objects == -(-segments // 100)
    return {
        "segments": segments,
        "seconds": time.monotonic() - began,
        "cpu": time.process_time() - cpu,
        "grown": _peak() - before,
        "requests": source.requests + target.requests,
    }


def main() -> None:
    """See the head of this file."""
    if len(sys.argv) > 1:
        print(json.dumps(asyncio.run(_compare(int(sys.argv[1])))))
        return
    print("| segments at each | lacking | CPU seconds | memory grew by | list requests |\n|---:|---:|---:|---:|---:|")
    for count in COUNTS:
        words = [sys.executable, "-m", "tests.benchmarks.comparing", str(count)]
        row = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        found = f"{row['cpu']:.2f} | {row['grown'] / 1e6:.1f} MB | {row['requests']:,.0f}"
        print(f"| {count:,} | {count // 100:,} | {found} |")


if __name__ == "__main__":
    main()
