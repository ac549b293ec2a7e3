"""``python -m tests.benchmarks.near_zero`` (``make bench-stream``): what the stream costs commits, and how far it lags.

    commits   added latency of synchronous commits beside the latency of a PUT: store × clients
    lag       how long bytes take to be durable off the host, asynchronous, under full-speed pgbench
    memory    what the service takes with segments of 64 MB and one transaction of 500 MB
    catch-up  how fast a backlog of WAL is streamed to a local store, beside pg_receivewal

A real server, a real S3 server behind a proxy that delays its answers, the command as users run it. PUT times are taken
at the proxy, at the side of the service, in the same run. ``docs/benchmarks.md`` says how to read the result.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from infra.demo.seaweed import Seaweed
from infra.postgres.processes import give, run_as
from infra.postgres.programs import environment_for
from infra.postgres.throwaway import make_folder
from tests.benchmarks.stream_memory import memory
from tests.proxy import Proxy
from tests.rig import Rig

MAJOR = 17
_SERVER = {"max_wal_size": "4GB", "shared_buffers": "256MB", "max_connections": "120", "wal_keep_size": "0"}
_INSERT = "\\set n random(1, 1000000000)\ninsert into t (n, filler) values (:n, repeat('x', 100));\n"
_BEGUN = '"event": "stream_started"'
_TICKS = os.sysconf("SC_CLK_TCK")


def quantile(values: Sequence[float], share: float) -> float:
    """Of unsorted values; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


@dataclass(slots=True)
class Run:
    """What one run of pgbench showed. Times in seconds."""

    commits: list[float] = field(default_factory=list)
    #: Of tails, and of whole segments.
    puts: list[float] = field(default_factory=list)
    segments: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    #: CPU seconds of the service for each second.
    cpu: float = 0.0
    #: Bytes of WAL for each second.
    wal: float = 0.0


class Bench:
    """One installation; ``close`` ends and removes all of it."""

    def __init__(self, folder: Path, s3: Seaweed, proxy: Proxy, *, seconds: int) -> None:
        self.seconds = seconds
        self.proxy = proxy
        self._logs = Path(tempfile.mkdtemp(prefix="pgbench-", dir=folder))
        give(self._logs, run_as())
        url = f"s3://{s3.bucket}/bench?endpoint=http://127.0.0.1:{proxy.port}&region=us-east-1"
        self.rig = Rig(
            folder,
            MAJOR,
            [url],
            settings=s3.environment,
            segment_mb=16,
            server_settings=_SERVER,
            sources="stream",
            as_installed=True,
        )
        self.rig.server.start()
        self.rig.run("init")
        self.rig.sql("create table t (n bigint, filler text)")
        self.service = self.rig.serve()
        self.rig.wait(self.rig.streams, "the service streams")

    def run(self, clients: int, *, lag: bool = False) -> Run:
        """Run pgbench at full speed, with as many clients."""
        result = Run()
        before, cpu, lsn, began = len(self.proxy.requests), self._cpu(), self._lsn(), time.monotonic()
        with sampled(self.rig.server.dsn(), result.lags) if lag else nothing():
            result.commits = self._pgbench(clients)
            spent = time.monotonic() - began
            result.wal = (self._lsn() - lsn) / spent
            result.cpu = (self._cpu() - cpu) / spent
            if lag:
                time.sleep(2.0)  # the last samples have to arrive
        requests = self.proxy.requests[before:]
        puts = [r for r in requests if r.method == "PUT" and r.seconds is not None]
        result.puts = [r.seconds or 0.0 for r in puts if "/tail/" in r.path]
        result.segments = [r.seconds or 0.0 for r in puts if "/wal/" in r.path]
        return result

    def _pgbench(self, clients: int) -> list[float]:
        script = self._logs / "insert.sql"
        script.write_text(_INSERT, "utf-8")
        script.chmod(0o644)
        server = self.rig.server
        command = [
            self.rig.bin_dir / "pgbench", "-n", "-f", script, "-c", str(clients), "-j", "2", "-T", str(self.seconds),
            "-l", "--log-prefix", self._logs / "log", "-M", "prepared", server.dsn(),
        ]  # fmt: skip
        done = subprocess.run(
            list(map(str, command)), env=environment_for(self.rig.bin_dir), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        latencies: list[float] = []
        for log in self._logs.glob("log*"):
            latencies += [int(line.split()[2]) / 1e6 for line in log.read_text("utf-8").splitlines()]
            log.unlink()
        return latencies

    def synchronous(self, *, on: bool) -> None:
        self.rig.sql(f"alter system set synchronous_standby_names = '{'walship' if on else ''}'")
        self.rig.sql("select pg_reload_conf()")
        state = "sync" if on else "async"
        query = "select sync_state from pg_stat_replication where application_name = 'walship'"
        self.rig.wait(lambda: self.rig.sql(query) == [(state,)], f"commits are {state}")
        time.sleep(2.5)  # the service looks every two seconds

    def _cpu(self) -> float:
        words = Path(f"/proc/{self.service.pid}/stat").read_text("utf-8").rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / _TICKS

    def _lsn(self) -> int:
        ((lsn,),) = self.rig.sql("select pg_current_wal_lsn() - '0/0'::pg_lsn")
        return int(lsn)

    def close(self) -> None:
        self.rig.close()


@contextmanager
def nothing() -> Iterator[None]:
    yield


@contextmanager
def sampled(dsn: str, lags: list[float]) -> Iterator[None]:
    """Meanwhile, how long each position takes from the server's own flush to the flush that walship reports."""
    stop = threading.Event()
    query = (
        "select extract(epoch from clock_timestamp())::float8, pg_current_wal_flush_lsn() - '0/0',"
        " (select flush_lsn - '0/0' from pg_stat_replication where application_name = 'walship')"
    )

    def work() -> None:
        waiting: list[tuple[float, int]] = []
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not stop.is_set():
                row = connection.execute(query).fetchone()
                assert row is not None
                now, current, durable = float(row[0]), int(row[1]), int(row[2] or 0)
                while waiting and waiting[0][1] <= durable:
                    lags.append(now - waiting.pop(0)[0])
                if not waiting or waiting[-1][1] < current:
                    waiting.append((now, current))
                stop.wait(0.005)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join(10)


def commits(bench: Bench, delays: Sequence[float], clients: Sequence[int]) -> Iterator[str]:
    """A table, line by line."""
    yield "| store slowed by | clients | PUT p50 | PUT p99 | commit p50 | commit p99 | added p50 | over the PUT | CPU |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for delay in delays:
        bench.proxy.to_client = delay
        for count in clients:
            bench.synchronous(on=False)
            alone = bench.run(count)
            bench.synchronous(on=True)
            run = bench.run(count)
            p50, put = quantile(run.commits, 0.5), quantile(run.puts, 0.5)
            cells = [
                f"{delay * 1000:.0f} ms", str(count), milliseconds(put), milliseconds(quantile(run.puts, 0.99)),
                milliseconds(p50), milliseconds(quantile(run.commits, 0.99)),
                milliseconds(p50 - quantile(alone.commits, 0.5)), milliseconds(p50 - put), f"{run.cpu:.0%}",
            ]  # fmt: skip
            yield f"| {' | '.join(cells)} |"
    bench.synchronous(on=False)


def lag(bench: Bench, delays: Sequence[float]) -> Iterator[str]:
    """A table, line by line."""
    yield "| store slowed by | commits/s | WAL MB/s | PUT p99, tails | segments | lag p50 | lag p99 | CPU |"
    yield "|---|---|---|---|---|---|---|---|"
    for delay in delays:
        bench.proxy.to_client = delay
        run = bench.run(16, lag=True)
        cells = [
            f"{delay * 1000:.0f} ms", f"{len(run.commits) / bench.seconds:.0f}", f"{run.wal / 1e6:.1f}",
            milliseconds(quantile(run.puts, 0.99)), milliseconds(quantile(run.segments, 0.99)),
            milliseconds(quantile(run.lags, 0.5)),
            milliseconds(quantile(run.lags, 0.99)), f"{run.cpu:.0%}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def catch_up(folder: Path, megabytes: int, rounds: int) -> Iterator[str]:
    """A table, line by line: a backlog that a slot has kept, to a local store and by pg_receivewal."""
    yield "| round | walship MB/s | pg_receivewal MB/s | ratio | CPU seconds for each GB | peak MB |"
    yield "|---|---|---|---|---|---|"
    destination = f"file://{folder}/store"
    with Rig(
        folder, MAJOR, [destination], segment_mb=16, sources="stream", as_installed=True,
        server_settings={"synchronous_commit": "off", **_SERVER},
    ) as rig:  # fmt: skip
        rig.server.start()
        for slot in ("walship", "peer"):
            rig.sql(f"select pg_create_physical_replication_slot('{slot}', true)")
        rig.sql("create table t (n bigint, filler text)")
        while _position(rig) < megabytes << 20:
            rig.sql("insert into t select n, repeat(md5(random()::text), 6) from generate_series(1, 100000) n")
        rig.sql("select pg_switch_wal()")
        rig.sql("checkpoint")
        ((start, end),) = rig.sql(
            "select (select restart_lsn from pg_replication_slots where slot_name = 'peer')::text,"
            " pg_current_wal_lsn()::text"
        )
        ((size,),) = rig.sql(f"select '{end}'::pg_lsn - '{start}'::pg_lsn")
        for number in range(1, rounds + 1):
            shutil.rmtree(folder / "store", ignore_errors=True)
            (folder / "store").mkdir()
            rig.run("init")
            ours, cpu, peak = _walship(rig, end)
            theirs = _receivewal(rig, folder / f"peer{number}", end)
            speeds = float(size) / 1e6 / ours, float(size) / 1e6 / theirs
            yield (
                f"| {number} | {speeds[0]:.0f} | {speeds[1]:.0f} | {speeds[0] / speeds[1]:.2f}"
                f" | {cpu / (float(size) / 1e9):.1f} | {peak >> 20} |"
            )
            # For the next round the slot has to be where it was.
            rig.sql("select pg_drop_replication_slot('walship')")
            rig.sql("select pg_copy_physical_replication_slot('peer', 'walship')")


def _position(rig: Rig) -> int:
    ((lsn,),) = rig.sql("select pg_current_wal_lsn() - '0/0'::pg_lsn")
    return int(lsn)


def _walship(rig: Rig, end: str) -> tuple[float, float, int]:
    """Seconds from the first byte until all is durable, CPU seconds, peak of memory in bytes."""
    before = rig.service_log().count(_BEGUN)
    service = rig.serve()
    rig.wait(lambda: rig.service_log().count(_BEGUN) > before, "the stream has begun", 30)
    began = time.monotonic()
    query = f"select flush_lsn >= '{end}'::pg_lsn from pg_stat_replication where application_name = 'walship'"
    rig.wait(lambda: rig.sql(query) == [(True,)], "all is durable", 300)
    spent = time.monotonic() - began
    words = Path(f"/proc/{service.pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    status = Path(f"/proc/{service.pid}/status").read_text("utf-8")
    peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
    rig.stop(service)
    return spent, (int(words[11]) + int(words[12])) / _TICKS, peak


def _receivewal(rig: Rig, folder: Path, end: str) -> float:
    """Seconds that pg_receivewal takes for the same WAL, into a folder, synced; the segments are removed again."""
    folder.mkdir()
    rig.sql("select pg_copy_physical_replication_slot('peer', 'peer2')")
    give(folder, run_as())
    began = time.monotonic()
    subprocess.run(
        [rig.bin_dir / "pg_receivewal", "-D", folder, "-S", "peer2", "-E", end, "-d", rig.server.dsn(), "--no-loop"],
        env=environment_for(rig.bin_dir), check=True, capture_output=True,
    )  # fmt: skip
    spent = time.monotonic() - began
    rig.sql("select pg_drop_replication_slot('peer2')")
    shutil.rmtree(folder)
    return spent


def main() -> None:
    options = _options()
    folder = make_folder("walship-n-")
    try:
        if {"commits", "lag"} & options.tasks:
            with Seaweed(folder) as s3, Proxy(_port(s3), http=True) as proxy:
                bench = Bench(_below(folder, "commits"), s3, proxy, seconds=options.seconds)
                try:
                    if "commits" in options.tasks:
                        _print(commits(bench, options.delays, options.clients))
                    if "lag" in options.tasks:
                        _print(lag(bench, options.delays))
                finally:
                    bench.close()
        if "memory" in options.tasks:
            below = _below(folder, "memory")
            with Seaweed(below / "s3") as s3, Proxy(_port(s3)) as proxy:
                _print(memory(below, s3, proxy, major=MAJOR, megabytes=500))
        if "catch-up" in options.tasks:
            _print(catch_up(_below(folder, "catch-up"), options.megabytes, options.rounds))
    finally:
        shutil.rmtree(folder)


def _below(folder: Path, name: str) -> Path:
    made = folder / name
    made.mkdir()
    made.chmod(0o755)
    return made


def _port(s3: Seaweed) -> int:
    return int(s3.endpoint.rpartition(":")[2])


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        print(line, flush=True)
    print(flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench-stream", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=10, help="each run of pgbench (default 10)")
    parser.add_argument("--delays", type=_delays, default=(0, 0.005, 0.02, 0.05), help="in ms (default 0,5,20,50)")
    parser.add_argument("--clients", type=_numbers, default=(1, 16, 64), help="default 1,16,64")
    parser.add_argument("--megabytes", type=int, default=1200, help="backlog to catch up with (default 1200)")
    parser.add_argument("--rounds", type=int, default=3, help="of catching up (default 3)")
    parser.add_argument("--tasks", type=lambda t: set(t.split(",")), default={"commits", "lag", "memory", "catch-up"})
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _delays(text: str) -> tuple[float, ...]:
    return tuple(int(part) / 1000 for part in text.split(","))


if __name__ == "__main__":
    main()
