"""The memory of the service with the largest segments: one transaction of half a gigabyte, commits that wait for it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from infra.demo.seaweed import Seaweed
from tests.killtest.soak import high_water
from tests.proxy import Proxy
from tests.rig import Rig

#: Bytes of a segment, and what DESIGN allows: 100 MB + 4 × segment.
SEGMENT = 64 << 20
BOUND = (100 << 20) + 4 * SEGMENT


def memory(folder: Path, s3: Seaweed, proxy: Proxy, *, major: int, megabytes: int) -> Iterator[str]:
    """A table, line by line."""
    yield "| destinations | each answer slowed by | WAL, MB | seconds | peak MB | allowed MB |"
    yield "|---|---|---|---|---|---|"
    bucket = s3.url("memory{}").replace(s3.endpoint, f"http://127.0.0.1:{proxy.port}")
    for number, (local, delay) in enumerate(((False, 0.0), (False, 0.05), (True, 0.05))):
        place = folder / f"memory{number}"
        place.mkdir(mode=0o755)
        proxy.to_client = delay
        destinations = [bucket.format(number), *([f"file://{place}/store"] if local else [])]
        wal, seconds, peak = _once(place, destinations, s3, major, megabytes)
        yield (
            f"| S3{' and a local folder' if local else ''} | {delay * 1000:.0f} ms | {wal / 1e6:.0f} | {seconds:.1f}"
            f" | {peak >> 20} | {BOUND >> 20} |"
        )
        shutil.rmtree(place)


def _once(folder: Path, destinations: list[str], s3: Seaweed, major: int, megabytes: int) -> tuple[int, float, int]:
    """Bytes of WAL, seconds until it was committed, and the most memory that the service had."""
    with Rig(
        folder, major, destinations, segment_mb=SEGMENT >> 20, sources="stream", settings=s3.environment,
        as_installed=True,
        server_settings={"max_wal_size": "4GB", "min_wal_size": "256MB", "shared_buffers": "256MB"},
    ) as rig:  # fmt: skip
        rig.server.start()
        rig.run("init")
        service = rig.serve()
        rig.synchronous()
        rig.sql("create table t (n bigint, filler bytea)")
        # 20 MB that do not compress, nor do copies of them, further apart than zstd looks back: stored objects are
        # as large as they get.
        rolls = " || ".join(["decode(md5(random()::text), 'hex')"] * 60)
        rig.sql(f"create table dice as select {rolls} as f from generate_series(1, 20000)")
        rig.caught_up()
        ((start,),) = rig.sql("select pg_current_wal_lsn()::text")
        began = time.monotonic()
        rig.sql(f"insert into t select n, f from dice, generate_series(1, {megabytes // 20}) n")
        seconds = time.monotonic() - began
        ((wal,),) = rig.sql(f"select (pg_current_wal_lsn() - '{start}'::pg_lsn)::bigint")
        peak = high_water(service.pid)
        assert rig.stop(service) == 0
        return int(wal), seconds, peak
