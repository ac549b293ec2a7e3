"""Three long days in synchronous mode: a server that is restarted again and again, a connection that is cut every
second, a store that answers 503 for minutes.

Afterwards nothing but the bucket is left, and it must hold every commit that was acknowledged, without a hole, each
finished segment byte for byte as pg_receivewal writes it.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psycopg

from infra.demo.seaweed import Seaweed
from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import ThrowawayServer, free_port, make_folder
from infra.settings import Settings
from infra.wiring import open_site
from pipeline.catalog import parse_wal_key
from pipeline.wal import WalKind
from tests.proxy import Mode, Proxy
from tests.rig import Rig, stop_started
from tests.servers import NEWEST

#: Commits that are waited for between two troubles.
_BETWEEN = 20

#: Bytes of memory that the service may have had at most, with segments of 1 MB (DESIGN, section 3).
_MEMORY = 200 << 20
#: Requests a second that a store which answers 503 may get: the lease's and the watch's, tails and whole segments.
_PACE = 5.0
#: Seconds after which commits return again once it answers.
_BACK = 30.0


@dataclass(frozen=True, slots=True)
class Scene:
    """What trouble can be made with."""

    rig: Rig
    clients: Clients
    #: Before the server and before the store.
    postgres: Proxy
    store: Proxy
    #: Process id of the service.
    service: int


class Clients:
    """Threads that commit numbered rows, come back whenever the server does, and remember what was acknowledged."""

    def __init__(self, server: ThrowawayServer, count: int = 4) -> None:
        self._dsn = server.dsn()
        self._stop = threading.Event()
        self.acknowledged: list[tuple[int, int]] = []
        self._threads = [threading.Thread(target=self._work, args=(client,), daemon=True) for client in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Their server has to be up, or gone: a commit that waits is waited for."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _work(self, client: int) -> None:
        n = 0
        while not self._stop.is_set():
            try:
                with psycopg.connect(self._dsn, autocommit=True) as connection:
                    while not self._stop.is_set():
                        n += 1  # never used again: nobody knows what became of one without an answer
                        connection.execute(
                            "insert into kept values (%s, %s, repeat(md5(%s), 30))", (client, n, f"{client}/{n}")
                        )
                        self.acknowledged.append((client, n))
            except psycopg.OperationalError:
                time.sleep(0.05)


def restarts(seaweed: Seaweed, prefix: str, *, count: int, tell: Callable[[str], None] = lambda _: None) -> None:
    """Restart the server so often, in every way, under load. AssertionError if anything is lost."""

    def trouble(scene: Scene) -> None:
        rig, clients = scene.rig, scene.clients
        for number in range(count):
            _more(rig, clients)
            began = time.monotonic()
            match number % 3:
                case 0:
                    rig.server.stop("fast")
                case 1:
                    rig.server.kill9()
                case _:
                    rig.server.stop("immediate")
            stopped = time.monotonic() - began
            rig.server.start()
            tell(f"restart {number + 1}: stopped in {stopped:.2f} s, {len(clients.acknowledged)} acknowledged so far")
        _more(rig, clients)

    _day(seaweed, prefix, trouble, tell)


def cuts(seaweed: Seaweed, prefix: str, *, seconds: float, tell: Callable[[str], None] = lambda _: None) -> None:
    """Cut all of the service's connections to the server every second. AssertionError if anything is lost."""

    def trouble(scene: Scene) -> None:
        end, cut = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            time.sleep(1)
            cut += scene.postgres.cut() > 0
        tell(f"cut {cut} times in {seconds:g} s, {len(scene.clients.acknowledged)} acknowledged so far")
        assert cut >= seconds / 4, "there was hardly anything to cut"
        _more(scene.rig, scene.clients)

    _day(seaweed, prefix, trouble, tell)


def busy(seaweed: Seaweed, prefix: str, *, seconds: float, tell: Callable[[str], None] = lambda _: None) -> None:
    """Have the store answer 503 for so long, while WAL is written. AssertionError if anything is lost.

    Or if the service takes more memory than it may, asks more often than it should, or is not back soon.
    """

    def trouble(scene: Scene) -> None:
        rig, store = scene.rig, scene.store
        _more(rig, scene.clients)
        store.turn(Mode.BUSY)
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            # Commits that wait make no WAL: these do not, some segments a minute.
            rig.sql(
                "begin; set local synchronous_commit = local;"
                " insert into bulk select n, md5(random()::text) from generate_series(1, 2000) n; commit"
            )
            time.sleep(1)
        refused = sum(request.failed for request in store.requests if request.began >= began) / seconds
        before = len(scene.clients.acknowledged)
        store.turn(Mode.PASS)
        began = time.monotonic()
        rig.wait(lambda: len(scene.clients.acknowledged) > before, "commits return", 120)
        back = time.monotonic() - began
        rig.caught_up()
        caught_up = time.monotonic() - began
        memory = high_water(scene.service)
        tell(
            f"503 for {seconds:g} s: {refused:.1f} requests a second meanwhile, at most {memory >> 20} MB of memory;"
            f" commits returned {back:.1f} s after, and all was stored {caught_up:.1f} s after"
        )
        assert refused <= _PACE, "a store that is overloaded is left alone"
        assert memory <= _MEMORY
        assert back <= _BACK

    _day(seaweed, prefix, trouble, tell, expected=frozenset({"not_shipped"}))


def high_water(pid: int) -> int:
    """The most memory that a process has ever had in use, in bytes: VmHWM (proc(5))."""
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise ValueError(f"the kernel does not tell the memory of process {pid}")


def _more(rig: Rig, clients: Clients) -> None:
    """A segment and a half, and commits of all kinds."""
    rig.sql("insert into bulk select n, md5(random()::text) from generate_series(1, 15000) n")
    before = len(clients.acknowledged)
    rig.wait(lambda: len(clients.acknowledged) >= before + _BETWEEN, "clients commit")


def _day(
    seaweed: Seaweed,
    prefix: str,
    trouble: Callable[[Scene], None],
    tell: Callable[[str], None],
    *,
    expected: frozenset[str] = frozenset(),
) -> None:
    folder = make_folder("walship-s-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        store = stack.enter_context(Proxy(int(seaweed.endpoint.rpartition(":")[2])))
        url = seaweed.url(prefix).replace(seaweed.endpoint, f"http://127.0.0.1:{store.port}")
        rig = stack.enter_context(
            Rig(folder, NEWEST, [url], settings=seaweed.environment, sources="stream", as_installed=True)
        )
        rig.server.start()
        rig.sql("create table kept (client int, n int, filler text, primary key (client, n))")
        rig.sql("create table bulk (n int, filler text)")
        # It keeps what pg_receivewal gets in the end.
        rig.sql("select pg_create_physical_replication_slot('reference', true)")
        rig.run("init")
        postgres = stack.enter_context(Proxy(rig.server.port))
        service = rig.serve(POSTGRES_PORT=str(postgres.port))
        rig.synchronous()
        rig.json("backup")
        with Clients(rig.server) as clients:
            trouble(Scene(rig, clients, postgres, store, service.pid))
        rig.sql("select pg_switch_wal()")
        rig.caught_up()
        reference = _received(rig)
        log = rig.service_log()
        for bad in {"gap_opened", "sources_differ", "not_shipped", "timeline_left"} - expected:
            assert f'"event": "{bad}"' not in log, f"{bad}: {log[-4000:]}"
        stored = asyncio.run(_stored(rig, len(reference)))
        rig.destroy(service)
        # Without a hole, and each as the reference: the same names, the same bytes.
        assert stored == reference, f"stored: {sorted(stored)}, pg_receivewal: {sorted(reference)}"
        kept = _restored(rig)
        missing = set(clients.acknowledged) - kept
        assert not missing, f"{len(missing)} of {len(clients.acknowledged)} are missing: {sorted(missing)[:9]}"
        verified = rig.json("verify")
        assert verified["ok"], verified
        tell(
            f"{len(clients.acknowledged)} acknowledged, none missing; {len(stored)} segments as pg_receivewal has them"
        )


def _received(rig: Rig) -> dict[str, bytes]:
    """The finished segments as pg_receivewal writes them."""
    folder = rig.folder / "received"
    folder.mkdir()
    give(folder, run_as())
    ((end,),) = rig.sql("select pg_current_wal_lsn()::text")
    rig.server.run(
        "pg_receivewal", "--directory", str(folder), "--slot", "reference", "--no-loop", "--endpos", end,
        "--dbname", rig.server.dsn(),
    )  # fmt: skip
    return {path.name: path.read_bytes() for path in folder.iterdir() if len(path.name) == 24}


async def _stored(rig: Rig, count: int) -> dict[str, bytes]:
    """The finished segments in the bucket, decoded; waits until there are so many."""
    ours = ("WALSHIP_", "BACKUP_", "WAL_", "AWS_")
    values: dict[str, Any] = {name: value for name, value in rig.environment().items() if name.startswith(ours)}
    settings = Settings(**values)
    async with open_site(settings) as site:
        (store,) = site.stores
        for _ in range(600):
            segments = {
                file: entry.key
                async for entry in store.list("wal/")
                if (file := parse_wal_key(entry.key)) and file.kind is WalKind.SEGMENT
            }
            if len(segments) >= count:
                break
            await asyncio.sleep(0.05)
        return {file.name: bytes((await site.fetch(key)).plain) for file, key in segments.items()}


def _restored(rig: Rig) -> set[tuple[int, int]]:
    target, port = rig.target(), free_port()
    rig.json("restore", "--latest", "--target-dir", str(target), "--start", "--port", str(port))
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
        rows = connection.execute("select client, n, filler = repeat(md5(client || '/' || n), 30) from kept").fetchall()
    stop_started(target)
    assert all(right for _, _, right in rows), "rows are not what was written"
    return {(client, n) for client, n, _ in rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--restarts", type=int, default=20, help="how often the server is restarted (default 20; 0: skip)"
    )
    parser.add_argument("--seconds", type=float, default=60, help="for how long connections are cut (default 60)")
    parser.add_argument("--busy", type=float, default=30, help="for how long the store answers 503 (default 30)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="walship-bucket-") as folder:
        seaweed = Seaweed(Path(folder))
        try:
            seaweed.start()
            if options.restarts:
                restarts(seaweed, "restarts", count=options.restarts, tell=_say)
            if options.seconds:
                cuts(seaweed, "cuts", seconds=options.seconds, tell=_say)
            if options.busy:
                busy(seaweed, "busy", seconds=options.busy, tell=_say)
        finally:
            seaweed.kill()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
