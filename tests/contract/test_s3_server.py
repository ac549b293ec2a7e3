"""What a real S3 server says when something is wrong, and that kill -9 of it loses nothing that it confirmed."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from handlers.body import joined
from infra.clock import SystemClock
from infra.demo.seaweed import Seaweed
from infra.storage.retry import Retrying, RetryPolicy
from infra.storage.s3 import S3Store
from pipeline.contracts import Store
from pipeline.errors import ObjectConflict, ObjectMissing, StoreError
from pipeline.objects import MemoryBody
from tests.stores import s3_store, versioned_bucket

BODY = MemoryBody((b"x",))


async def each_refused(store: Store, match: str, *, passing: bool = False) -> None:
    """Every operation fails with these words, and none of them calls it a missing object."""

    async def listing() -> None:
        async for _ in store.list("a"):
            pass

    for call in (
        lambda: store.put("a", BODY),
        lambda: store.put("a", BODY, replace=True),
        lambda: store.get("a"),
        lambda: store.get("a", (0, 5)),
        lambda: store.head("a"),
        lambda: store.delete(["a"]),
        listing,
    ):
        with pytest.raises(StoreError, match=match) as raised:
            await call()
        assert not isinstance(raised.value, ObjectMissing | ObjectConflict)
        assert raised.value.passing is passing
        assert raised.value.hint


@pytest.fixture
async def store(seaweed: Seaweed) -> AsyncIterator[S3Store]:
    store = s3_store(seaweed)
    yield store
    await store.close()


async def variant(store: S3Store, **options: object) -> S3Store:
    return S3Store(replace(store._options, **options))  # type: ignore[arg-type]  # names are checked by replace


async def test_an_unknown_access_key(store: S3Store) -> None:
    wrong = await variant(store, access_key="nobody")
    with pytest.raises(StoreError, match="does not know this access key") as raised:
        await wrong.put("a", BODY)
    assert "AWS_ACCESS_KEY_ID" in raised.value.hint
    await each_refused(wrong, "does not know this access key|access is denied")
    await wrong.close()


async def test_a_wrong_secret_is_never_printed(store: S3Store) -> None:
    wrong = await variant(store, secret_key="hunter2-hunter2")
    with pytest.raises(StoreError, match="secret key does not match") as raised:
        await wrong.put("a", BODY)
    assert "hunter2" not in raised.value.fact + raised.value.hint + repr(wrong._options)
    await each_refused(wrong, "secret key does not match|access is denied")
    await wrong.close()


async def test_a_missing_bucket(store: S3Store) -> None:
    wrong = await variant(store, bucket="not-there")
    with pytest.raises(StoreError, match=r"s3://not-there at http.*there is no such bucket") as raised:
        await wrong.put("a", BODY)
    assert "create the bucket" in raised.value.hint
    with pytest.raises(StoreError, match="no such bucket") as raised:
        await wrong.get("a")
    assert not isinstance(raised.value, ObjectMissing)
    with pytest.raises(StoreError, match="no such bucket") as raised:
        await wrong.head("a")
    assert not isinstance(raised.value, ObjectMissing)
    with pytest.raises(StoreError, match="no such bucket"):
        await anext(aiter(wrong.list("")))
    await wrong.close()


async def test_nobody_listens(store: S3Store) -> None:
    with socket.socket() as held:  # bound and not listening: nobody else can get the port meanwhile
        held.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{held.getsockname()[1]}"
        down = await variant(store, endpoint=endpoint)
        await each_refused(down, f"at {endpoint}: .*the store cannot be reached", passing=True)
        with pytest.raises(StoreError) as raised:
            await down.head("a")
        assert f"Cannot connect to host {endpoint.removeprefix('http://')} [" in raised.value.fact
        assert "ssl" not in raised.value.fact
        await down.close()


async def test_tls_to_a_server_without_it(store: S3Store) -> None:
    assert store._options.endpoint is not None
    wrong = await variant(store, endpoint=store._options.endpoint.replace("http:", "https:"))
    with pytest.raises(StoreError, match="TLS failed") as raised:
        await wrong.put("a", BODY)
    assert "ca=" in raised.value.hint
    assert " ssl:" not in raised.value.fact
    await wrong.close()


async def test_a_ca_file_that_is_not_there(store: S3Store, tmp_path: Path) -> None:
    assert store._options.endpoint is not None
    ca = str(tmp_path / "no.pem")
    wrong = await variant(store, endpoint=store._options.endpoint.replace("http:", "https:"), ca=ca)
    with pytest.raises(StoreError, match="certificates cannot be read") as raised:
        await wrong.put("a", BODY)
    assert not raised.value.passing
    assert "ca=" in raised.value.hint
    await wrong.close()


@pytest.mark.parametrize("bucket", ["versioned", "locked"])
async def test_a_bucket_that_keeps_every_version(seaweed: Seaweed, s3_prefix: str, bucket: str) -> None:
    """A delete is logical there, under any lock: the name is free again, and no listing shows it."""
    store = s3_store(seaweed, bucket=versioned_bucket(seaweed, bucket, locked=bucket == "locked"))
    key, other = f"{s3_prefix}/tail/a", f"{s3_prefix}/wal/b"
    for content in (b"one", b"two"):
        body = MemoryBody((content,))
        made = await asyncio.gather(*(store.put(key, body) for _ in range(4)), return_exceptions=True)
        assert made.count(None) == 1, made
        assert all(each is None or isinstance(each, ObjectConflict) for each in made)
        assert joined(await store.get(key)) == content
        await store.put(other, body, replace=True)
        assert [info.key async for info in store.list(f"{s3_prefix}/")] == [key, other]
        await store.delete([key])
        await store.delete([key])
        assert [info.key async for info in store.list(f"{s3_prefix}/tail/")] == []
        with pytest.raises(ObjectMissing):
            await store.head(key)
    assert joined(await store.get(other)) == b"two"
    probed = await store.probe(other, MemoryBody((b"two",)))
    assert probed.conditional_put
    await store.close()


async def test_kill_9_of_the_server_loses_nothing_it_confirmed(tmp_path: Path) -> None:
    server = Seaweed(tmp_path)
    await asyncio.to_thread(server.start)
    # Patience for a restart: it takes about a second here, and longer on a machine that is busy.
    policy = RetryPolicy(attempts=400, total=120, first=0.05, most=0.3)
    failed: list[StoreError] = []
    bare = s3_store(server)
    store = Retrying(bare, SystemClock(), policy, observe=lambda _, __, error: failed.append(error) if error else None)
    contents = {f"wal/{number:04d}": os.urandom(512 << 10) for number in range(60)}
    waiting = iter(contents.items())
    confirmed: dict[str, bytes] = {}
    killed = asyncio.Event()

    async def ship() -> None:
        for key, content in waiting:
            body = MemoryBody((content,))
            try:
                await store.put(key, body)
            except ObjectConflict:  # its first attempt was stored after all, and the answer lost
                assert joined(await store.get(key)) == content
            confirmed[key] = content
            if len(confirmed) >= 15:
                killed.set()

    async def kill() -> None:
        await killed.wait()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)

    try:
        async with asyncio.timeout(150), asyncio.TaskGroup() as tasks:
            tasks.create_task(kill())
            for _ in range(4):
                tasks.create_task(ship())
        assert failed, "the server was killed so gently that nobody noticed"
        assert confirmed == contents
        for key, content in contents.items():
            assert joined(await store.get(key)) == content
        assert sorted([info.key async for info in store.list("wal/")]) == sorted(contents)
    finally:
        await store.close()
        await asyncio.to_thread(server.kill)
