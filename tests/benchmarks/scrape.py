"""``python -m tests.benchmarks.scrape`` (``make bench-scrape``): what it costs to be watched.

A repository of 30 days, at two folders: a segment a minute (43,200) and 60 base backups. The service as users run it,
with the stream; once it answers on WALSHIP_LISTEN, once it does not.

    answers   time of a request, while the service lists again and again, and how long another one waits meanwhile
    memory    of the service with and without
    database  connections and queries a minute, with and without
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from infra.postgres.throwaway import free_port, make_folder
from infra.settings import load
from infra.wiring import open_shipping, open_site
from pipeline.backup import ArchiveInfo, BackupInfo
from pipeline.catalog import info_key, wal_key
from pipeline.wal import Lsn, WalFile
from tests.killtest.soak import high_water
from tests.rig import Rig

MAJOR = 17
DAYS = 30
SEGMENTS, BACKUPS = DAYS * 1440, DAYS * 2
SIZE = 1 << 20
#: Where the server's WAL begins: behind all that is made up.
_BEGIN = 0x10 * ((1 << 32) // SIZE)
_PATHS = ("/metrics", "/api/status", "/readyz", "/")


@dataclass(frozen=True, slots=True)
class Watched:
    """One service, for a while. Bytes; connections and queries a minute."""

    memory: int
    peak: int
    connections: float
    queries: float
    cpu: float
    #: path → seconds of each answer.
    answers: dict[str, list[float]]
    #: path → seconds of CPU that one answer costs the service.
    costs: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scrape", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each service is watched")
    seconds = parser.parse_args(arguments).seconds
    folder = make_folder("walship-scrape-")
    try:
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {datetime.now(UTC):%Y-%m-%d}", end="\n\n")
        for line in tables(folder, seconds):
            print(line, flush=True)
    finally:
        shutil.rmtree(folder)


def tables(folder: Path, seconds: float) -> Iterator[str]:
    """All of it, line by line."""
    listen = f"127.0.0.1:{free_port()}"
    places = [f"file://{folder}/{name}" for name in ("near", "far")]
    with Rig(folder, MAJOR, places, sources="stream", settings={"WALSHIP_LISTEN": "off"}, as_installed=True) as rig:
        rig.server.run(
            "pg_resetwal", "-f", "-l", WalFile.segment(1, _BEGIN * SIZE, SIZE).name, str(rig.server.data_dir)
        )
        rig.server.start()
        rig.run("init")
        service = rig.serve()  # the end of the WAL has to be real: the stream compares it with the server's
        rig.caught_up()
        rig.sql("select pg_switch_wal()")
        rig.caught_up()
        rig.stop(service)
        asyncio.run(_fill(rig))
        often = _watch(rig, seconds, WALSHIP_LISTEN=listen, WALSHIP_SURVEY_INTERVAL="5")
        usual = _watch(rig, seconds, WALSHIP_LISTEN=listen)
        none = _watch(rig, seconds)
    yield f"| {SEGMENTS} segments, {BACKUPS} backups | CPU ms | median ms | 99 % ms | most ms |"
    yield "|---|---|---|---|---|"
    for words, watched in (("listed every 300 s", usual), ("listed every 5 s", often)):
        for path, answers in watched.answers.items():
            ordered = sorted(answers)
            numbers = [watched.costs[path], ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)], ordered[-1]]
            yield f"| `{path}`, {words} | " + " | ".join(f"{1000 * number:.1f}" for number in numbers) + " |"
    yield ""
    yield "| service | memory MB | peak MB | CPU % | connections a minute | queries a minute |"
    yield "|---|---|---|---|---|---|"
    for words, each in (("not watched", none), ("watched", usual), ("watched, listed every 5 s", often)):
        yield (
            f"| {words} | {each.memory / 1e6:.0f} | {each.peak / 1e6:.0f} | {each.cpu * 100:.1f}"
            f" | {each.connections:.1f} | {each.queries:.1f} |"
        )


async def _fill(rig: Rig) -> None:
    """Names of segments, and descriptions of backups: nothing else is read of them."""
    environment = rig.environment()
    os.environ.update({name: environment[name] for name in environment if name.startswith(("WALSHIP_", "BACKUP_"))})
    begin, now = _BEGIN - SEGMENTS, datetime.now(UTC)
    async with open_site(load(), writer=True) as site, open_shipping(site) as shipping:
        uploads = asyncio.create_task(shipping.uploader.run())
        for number in range(BACKUPS):
            ended = now - timedelta(days=DAYS) * (BACKUPS - number) / BACKUPS
            start = Lsn((begin + number * SEGMENTS // BACKUPS) * SIZE + 40)
            name = f"base_{ended:%Y%m%d_%H%M%S}"
            info = BackupInfo(
                name=name, id=f"{number:032x}", kind="full", system_id=site.facts.system_id, server_version=170000,
                segment_size=SIZE, timeline=1, start_lsn=start, stop_lsn=Lsn(start + 1000),
                started=ended - timedelta(minutes=10), stopped=ended, tablespaces=(),
                archives=(ArchiveInfo("base", 1000, ("a" * 64,) * 6000),), index=(), manifest="",
                stored_size=100 << 30,
            )  # fmt: skip
            await shipping.command.ship(info_key(name), info.encode(), backup=info.id)
        uploads.cancel()
        system_id = site.facts.system_id
    for place in ("near", "far"):
        root = rig.folder / place / system_id
        for number in range(begin, _BEGIN):
            path = root / wal_key(WalFile.segment(1, number * SIZE, SIZE))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")


def _watch(rig: Rig, seconds: float, **changed: str) -> Watched:
    """Let a service run, and look at it."""
    service = rig.serve(**changed)
    rig.wait(rig.streams, "the service streams")
    time.sleep(15)  # it has started, and listed
    before, began = _sessions(rig), time.monotonic()
    cpu = _cpu(service.pid)
    answers: dict[str, list[float]] = {}
    listen = changed.get("WALSHIP_LISTEN", "")
    while time.monotonic() < began + seconds:
        time.sleep(0.1)
        if listen:
            for path in _PATHS:
                answers.setdefault(path, []).append(_ask(listen, path))
    passed = time.monotonic() - began
    cpu = (_cpu(service.pid) - cpu) / passed
    after = _sessions(rig)
    memory, peak = _resident(service.pid), high_water(service.pid)
    costs = {path: _cost(service.pid, listen, path) for path in answers}
    assert rig.stop(service) == 0
    # Our own looks: a connection and two queries.
    connections, queries = (
        60 * max(0, new - old - own) / passed for old, new, own in zip(before, after, (1, 2), strict=True)
    )
    return Watched(memory, peak, connections, queries, cpu, answers, costs)


def _ask(listen: str, path: str) -> float:
    """Seconds until all of the answer is there, the connection included."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection(listen, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert answer.status == 200 or path == "/readyz", (path, answer.status)
    return time.perf_counter() - began


def _cost(pid: int, listen: str, path: str) -> float:
    """Of one answer: the kernel counts in hundredths of a second, so many are asked for."""
    before = _cpu(pid)
    for _ in range(200):
        _ask(listen, path)
    return (_cpu(pid) - before) / 200


def _sessions(rig: Rig) -> tuple[int, int]:
    """Connections that were made to the database, and transactions, so far."""
    time.sleep(1.5)  # the server counts what a connection did a second later
    rig.sql("select pg_stat_clear_snapshot()")
    ((sessions, queries),) = rig.sql("select sessions, xact_commit from pg_stat_database where datname = 'postgres'")
    return int(sessions), int(queries)


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
