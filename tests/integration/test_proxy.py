"""The proxy that stands between the service and the world in tests: what it is told to do, it does."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from infra.demo.seaweed import Seaweed
from infra.storage.s3 import S3Store
from infra.storage.s3_client import S3Options
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody
from tests.proxy import Mode, Proxy


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[Proxy]:
    with Proxy(int(seaweed.endpoint.rpartition(":")[2]), http=True) as made:
        yield made


def store(seaweed: Seaweed, proxy: Proxy) -> S3Store:
    return S3Store(
        S3Options(
            bucket=seaweed.bucket, endpoint=f"http://127.0.0.1:{proxy.port}", region="us-east-1",
            access_key=seaweed.access_key, secret_key=seaweed.secret_key,
        )
    )  # fmt: skip


async def test_it_passes_delays_refuses_and_recovers(seaweed: Seaweed, proxy: Proxy, s3_prefix: str) -> None:
    through = store(seaweed, proxy)
    body = MemoryBody((bytes(300_000),))
    try:
        await through.put(f"{s3_prefix}/a", body)
        proxy.to_client = 0.3
        began = time.monotonic()
        await through.put(f"{s3_prefix}/b", body)
        assert time.monotonic() - began >= 0.3
        put = proxy.requests[-1]
        assert (put.method, put.path) == ("PUT", f"/{seaweed.bucket}/{s3_prefix}/b")
        assert put.seconds is not None
        assert put.seconds >= 0.3
        proxy.to_client = 0.0
        for mode, word in ((Mode.BUSY, "503|SlowDown|Reduce"), (Mode.DOWN, None)):
            proxy.turn(mode)
            with pytest.raises(StoreError, match=word) as refused:
                await through.put(f"{s3_prefix}/c", body)
            assert refused.value.passing
        proxy.turn(Mode.PASS)
        await through.put(f"{s3_prefix}/c", body)
        assert proxy.cut() >= 1
        assert (await through.head(f"{s3_prefix}/c")).size == 300_000
    finally:
        await through.close()


async def test_a_stalled_connection_goes_on_where_it_was(seaweed: Seaweed, proxy: Proxy, s3_prefix: str) -> None:
    import asyncio

    through = store(seaweed, proxy)
    try:
        await through.put(f"{s3_prefix}/a", MemoryBody((b"a",)))
        proxy.turn(Mode.STALL)
        waiting = asyncio.create_task(through.put(f"{s3_prefix}/b", MemoryBody((b"b",))))
        done, _ = await asyncio.wait([waiting], timeout=0.3)
        assert not done
        proxy.turn(Mode.PASS)
        await asyncio.wait_for(waiting, 10)
    finally:
        await through.close()
