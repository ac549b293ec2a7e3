"""``python -m tests.benchmarks.repository`` (``make bench-repository``): what it costs to keep a repository in order.

commands   10,000 WAL objects and 60 base backups, small and real, encrypted, in a local folder, with the server that
           they are of: list, status, expire --dry-run, verify of everything, and verify with nothing new
growth     a store in memory with 10,000, 100,000 and a million segments that are made up as they are listed: what one
           listing, the catalog, the decision of expire and the comparison of verify take, each in a process of its own
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path

from infra.postgres.throwaway import make_folder
from infra.settings import load
from infra.wiring import Site, open_site
from pipeline.catalog import info_key, wal_key
from pipeline.wal import Lsn, WalFile
from tests.benchmarks.growing import OPERATIONS
from tests.benchmarks.measured import measure
from tests.laying import cluster, store
from tests.parts import Shelf
from tests.rig import Rig

MAJOR = 17
SEGMENTS, BACKUPS, DAYS = 10_000, 60, 30
SIZE = 1 << 20
#: Where the server's WAL begins: behind all that is made up.
_BEGIN = 0x10 * ((1 << 32) // SIZE)
_COMMANDS = {
    "list": ["list", "--json"],
    "status": ["status", "--json"],
    "expire --dry-run": ["expire", "--dry-run", "--json"],
    "verify, all of it": ["verify", "--all", "--json"],
    "verify, nothing new": ["verify", "--json"],
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.repository", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--segments", type=int, default=SEGMENTS, help=f"of the commands (default {SEGMENTS})")
    parser.add_argument("--backups", type=int, default=BACKUPS, help=f"likewise (default {BACKUPS})")
    parser.add_argument(
        "--sizes", type=lambda text: [int(part) for part in text.split(",")], default=[10**4, 10**5, 10**6],
        metavar="N,N", help="segments of the growth (default 10000,100000,1000000)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {datetime.now(UTC):%Y-%m-%d}", end="\n\n")
    for line in chain(commands(options.segments, options.backups), [""], growth(options.sizes)):
        print(line, flush=True)


def commands(segments: int, backups: int) -> Iterator[str]:
    """A table of what each command takes, line by line."""
    folder = make_folder("walship-repository-")
    try:
        with Rig(folder, MAJOR, [f"file://{folder}/store"], settings={"WALSHIP_KEEP_WINDOW": "14d"}) as rig:
            begin = WalFile.segment(1, _BEGIN * SIZE, SIZE).name
            rig.server.run("pg_resetwal", "-f", "-l", begin, str(rig.server.data_dir))
            rig.server.start()
            rig.run("init")
            rig.sql("select pg_switch_wal()")
            rig.json("switch")
            rig.run("push")
            asyncio.run(_fill(rig, segments, backups))
            yield f"| {segments} WAL objects, {backups} backups | seconds | CPU s | peak MB |"
            yield "|---|---|---|---|"
            for name, words in _COMMANDS.items():
                # Whatever it finds: of the made-up server it says that it is not safe.
                line = f'"$0" -m infra.cli {" ".join(words)} > {folder}/said || test $? = 1'
                strict = [sys.executable, "-m", "infra.cli", *words]
                wrapped = ["/bin/sh", "-c", line, sys.executable]
                environment = rig.environment(PYTHONPATH=str(Path(__file__).parents[2]))
                cost = measure([wrapped if words[0] == "status" else strict], environment, folder / "log")
                yield f"| `walship {name}` | {cost.wall:.1f} | {cost.cpu:.1f} | {cost.rss / 1e6:.0f} |"
    finally:
        shutil.rmtree(folder)


async def _fill(rig: Rig, segments: int, backups: int) -> None:
    """Small objects under real names, all of which can be decoded; the backups are whole, with index and manifest."""
    environment = rig.environment()
    os.environ.update({name: environment[name] for name in environment if name.startswith(("WALSHIP_", "BACKUP_"))})
    now, begin, plain = datetime.now(UTC), _BEGIN - segments, os.urandom(4096)
    async with open_site(load(), writer=True) as site:
        assert site.keys.key_object is not None
        await site.stores[0].put(*site.keys.key_object)
        root = rig.folder / "store" / site.facts.system_id
        for number in range(begin, _BEGIN):
            _write(site, root, wal_key(WalFile.segment(1, number * SIZE, SIZE)), plain, now)
        for number in range(backups):
            stopped = now - timedelta(days=DAYS) * (backups - number) / backups
            name, start = f"base_{stopped:%Y%m%d_%H%M%S}", Lsn((begin + number * segments // backups) * SIZE + 40)
            shelf = Shelf(site.facts.system_id)
            shelf.chain = site.chain
            info = await store(shelf, {"base": cluster()}, name=name)
            info = replace(
                info, system_id=site.facts.system_id, start_lsn=start, stop_lsn=Lsn(start + 1000), started=stopped,
                stopped=stopped,
            )  # fmt: skip
            await shelf(info_key(name), info.encode(), backup=info.id)
            for key, (content, _) in shelf.store._objects.items():
                path = root / key
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


def _write(site: Site, root: Path, name: str, plain: bytes, now: datetime) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(bytes(piece) for piece in site.chain.encode(name, plain, created=now)))


def growth(sizes: Sequence[int]) -> Iterator[str]:
    """A table of seconds and megabytes of each operation, line by line."""
    folder = make_folder("walship-growth-")
    # Without settings of the commands above, which are in our environment.
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("WALSHIP_", "BACKUP_"))}
    try:
        heads = "".join(f" {size:,}: CPU s | MB |" for size in sizes)
        yield f"| segments in memory, 60 backups |{heads}"
        yield "|---|" + "---|---|" * len(sizes)
        for operation, words in OPERATIONS.items():
            cells = ""
            for size in sizes:
                command = [sys.executable, "-m", "tests.benchmarks.growing", operation, str(size), str(folder)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
                cost = json.loads(done.stdout)
                cells += f" {cost['seconds']:.2f} | {cost['bytes'] / 1e6:.0f} |"
            yield f"| {words} |{cells}"
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
