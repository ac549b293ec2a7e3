"""What every store promises (``pipeline.contracts.Store``), tried on each, bare and wrapped. S3 is a real server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from handlers.body import FileBody, collect, joined
from infra.clock import SystemClock
from infra.storage.local import LocalStore
from infra.storage.memory import MemoryStore
from infra.storage.retry import Retrying
from infra.storage.rooted import Rooted
from pipeline.contracts import Store
from pipeline.errors import ObjectConflict, ObjectMissing, StoreError
from pipeline.objects import MemoryBody
from tests.stores import s3_store

WRAPPERS: dict[str, Callable[[Store], Store]] = {
    "bare": lambda store: store,
    "rooted": lambda store: Rooted(store, "some/where"),
    "retrying": lambda store: Retrying(store, SystemClock()),
    "rooted in retrying": lambda store: Retrying(Rooted(store, "7412"), SystemClock()),
}


#: S3 is bare only below a prefix of its own, because the bucket is everybody's.
VARIANTS = [
    "memory-bare",
    "memory-rooted",
    "memory-retrying",
    "local-bare",
    "local-rooted in retrying",
    "s3-bare",
    "s3-rooted in retrying",
]


@pytest.fixture(params=VARIANTS)
async def store(request: pytest.FixtureRequest, tmp_path: Path, s3_prefix: str) -> AsyncIterator[Store]:
    kind, wrapper = request.param.split("-", 1)
    base: Store
    if kind == "memory":
        base = MemoryStore()
    elif kind == "local":
        base = LocalStore(tmp_path)
    else:
        base = Rooted(s3_store(request.getfixturevalue("seaweed")), s3_prefix)
    store = WRAPPERS[wrapper](base)
    yield store
    await store.close()


def body(content: bytes) -> MemoryBody:
    return MemoryBody((content,))


async def read(store: Store, key: str, span: tuple[int, int] | None = None) -> bytes:
    got = await store.get(key, span)
    content = await asyncio.to_thread(joined, got)
    assert len(content) == got.size
    got.close()
    return content


async def keys(store: Store, prefix: str = "", after: str = "", *, shallow: bool = False) -> list[str]:
    found = [info.key async for info in store.list(prefix, after=after, shallow=shallow)]
    assert len(found) == len(set(found))
    return sorted(found)


async def test_what_is_put_comes_back(store: Store) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    await store.put("wal/0001/a", MemoryBody((b"one", b"", b"two")))
    assert await read(store, "wal/0001/a") == b"onetwo"
    info = await store.head("wal/0001/a")
    assert (info.key, info.size) == ("wal/0001/a", 6)
    assert info.modified is not None
    assert before <= info.modified <= datetime.now(UTC) + timedelta(seconds=2)


async def test_create_does_not_replace_unless_told_to(store: Store) -> None:
    await store.put("a", body(b"first"))
    with pytest.raises(ObjectConflict, match=r"has an object .*a already"):
        await store.put("a", body(b"second"))
    with pytest.raises(ObjectConflict):
        await store.put("a", body(b"first"))
    assert await read(store, "a") == b"first"
    await store.put("a", body(b"third"), replace=True)
    assert await read(store, "a") == b"third"
    await store.put("new", body(b"x"), replace=True)
    assert await read(store, "new") == b"x"


async def test_of_sixteen_creators_one_wins(store: Store) -> None:
    async def create(number: int) -> int | None:
        try:
            await store.put("race", body(b"%02d" % number * 1000))
        except ObjectConflict:
            return None
        return number

    winners = [n for n in await asyncio.gather(*map(create, range(16))) if n is not None]
    assert len(winners) == 1
    assert await read(store, "race") == b"%02d" % winners[0] * 1000


@pytest.mark.parametrize("span", [(0, 3), (2, 5), (9, 10), (8, 99), (0, 10), (4, 4), (10, 12), (50, 60)])
async def test_a_span_is_cut_at_the_end(store: Store, span: tuple[int, int]) -> None:
    await store.put("ten", body(b"0123456789"))
    assert await read(store, "ten", span) == b"0123456789"[slice(*span)]


@pytest.mark.parametrize("span", [None, (0, 5), (3, 3)])
async def test_missing_is_said(store: Store, span: tuple[int, int] | None) -> None:
    await store.put("folder/a", body(b"x"))
    for key in ("no", "folder", "folder/a/b", "folder/b"):
        with pytest.raises(ObjectMissing, match="is missing from"):
            await store.get(key, span)
        with pytest.raises(ObjectMissing, match="is missing from"):
            await store.head(key)


async def test_an_empty_object_is_an_object(store: Store) -> None:
    await store.put("empty", MemoryBody(()))
    assert await read(store, "empty") == b""
    assert await read(store, "empty", (0, 10)) == b""
    assert (await store.head("empty")).size == 0
    with pytest.raises(ObjectConflict):
        await store.put("empty", body(b"x"))


async def test_delete_is_idempotent(store: Store) -> None:
    for name in ("d/1", "d/2", "d/3"):
        await store.put(name, body(b"x"))
    await store.delete(["d/1", "d/2", "d/never", "elsewhere/never"])
    assert await keys(store, "d/") == ["d/3"]
    await store.delete(["d/1", "d/3", "d/3"])
    await store.delete([])
    assert await keys(store, "d/") == []
    await store.put("d/1", body(b"again"))
    assert await read(store, "d/1") == b"again"


async def test_list_by_prefix_behind_a_key_and_shallow(store: Store) -> None:
    names = ["wal/01/a", "wal/01/b", "wal/02/a", "wal/2.history", "wal.x", "walrus", "base/b1/data/base/1", "top"]
    for name in names:
        await store.put(name, body(name.encode()))
    assert await keys(store) == sorted(names)
    assert await keys(store, "wal/") == ["wal/01/a", "wal/01/b", "wal/02/a", "wal/2.history"]
    assert await keys(store, "wal/0") == ["wal/01/a", "wal/01/b", "wal/02/a"]
    assert await keys(store, "nothing") == []
    assert await keys(store, "wal/01/a") == ["wal/01/a"]
    assert await keys(store, "wal/", "wal/01/a") == ["wal/01/b", "wal/02/a", "wal/2.history"]
    assert await keys(store, "", "wal") == ["wal.x", "wal/01/a", "wal/01/b", "wal/02/a", "wal/2.history", "walrus"]
    assert await keys(store, "", "wal.x") == ["wal/01/a", "wal/01/b", "wal/02/a", "wal/2.history", "walrus"]
    assert await keys(store, "", "wal.x/y") == ["wal/01/a", "wal/01/b", "wal/02/a", "wal/2.history", "walrus"]
    assert await keys(store, "wal/", "wal/01") == ["wal/01/a", "wal/01/b", "wal/02/a", "wal/2.history"]
    assert await keys(store, "wal/", "wal/01/zz") == ["wal/02/a", "wal/2.history"]
    assert await keys(store, "wal/", "x") == []
    assert await keys(store, shallow=True) == ["base/", "top", "wal.x", "wal/", "walrus"]
    assert await keys(store, "wal", shallow=True) == ["wal.x", "wal/", "walrus"]
    assert await keys(store, "wal/", shallow=True) == ["wal/01/", "wal/02/", "wal/2.history"]
    assert await keys(store, "wal/", "wal/01/", shallow=True) == ["wal/02/", "wal/2.history"]
    folder = [info async for info in store.list("base/", shallow=True)]
    assert [(info.key, info.size) for info in folder] == [("base/b1/", 0)]
    sizes = {info.key: info.size async for info in store.list("wal/")}
    assert sizes["wal/2.history"] == len("wal/2.history")


# Wrappers know nothing of pages: one S3 store fills one.
@pytest.mark.parametrize("store", [v for v in VARIANTS if v != "s3-rooted in retrying"], indirect=True)
async def test_a_listing_of_more_than_a_page(store: Store) -> None:
    names = [f"many/{number:05d}" for number in range(1101)]
    for start in range(0, len(names), 16):
        await asyncio.gather(*(store.put(name, MemoryBody(())) for name in names[start : start + 16]))
    assert await keys(store, "many/") == names
    assert await keys(store, "many/", "many/00999") == names[1000:]
    await store.delete(names)
    assert await keys(store, "many/") == []


async def test_a_large_object(store: Store) -> None:
    content = os.urandom(20 << 20)
    await store.put("large", MemoryBody((content[: 7 << 20], content[7 << 20 :])))
    assert await read(store, "large") == content
    assert await read(store, "large", (5_000_000, 19_000_000)) == content[5_000_000:19_000_000]


async def test_a_body_that_spilled_to_a_file(store: Store) -> None:
    piece = os.urandom(1 << 20)
    spilled = await asyncio.to_thread(collect, (piece for _ in range(66)))
    assert isinstance(spilled, FileBody)
    await store.put("spilled", spilled)
    with pytest.raises(ObjectConflict):  # it can be read again
        await store.put("spilled", spilled)
    spilled.close()
    got = await store.get("spilled")
    assert got.size == 66 << 20
    assert await asyncio.to_thread(joined, got) == piece * 66
    got.close()


@pytest.mark.parametrize(
    "key",
    [
        "with space",
        "plus+and%25",
        "käse/zoë/雪",
        "a=b&c=d?e#f",
        "~tilde/(paren)'quote",
        "x" * 200,
        ".dot",
        "a..b",
        "-",
        "*",
    ],
)
async def test_strange_keys_are_only_keys(store: Store, key: str) -> None:
    await store.put(f"strange/{key}", body(key.encode()))
    assert await read(store, f"strange/{key}") == key.encode()
    assert (await store.head(f"strange/{key}")).key == f"strange/{key}"
    assert await keys(store, "strange/") == [f"strange/{key}"]
    assert await keys(store, f"strange/{key}") == [f"strange/{key}"]
    await store.delete([f"strange/{key}"])
    assert await keys(store, "strange/") == []


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../up", "a/../b", "a//b", "a/", "./a", "a/.", "nul\0", "line\n", f".walship-{'0' * 32}.tmp"],
)
async def test_keys_that_could_escape_are_refused(store: Store, key: str) -> None:
    with pytest.raises(StoreError, match="cannot be a key"):
        await store.put(key, body(b"x"))
    with pytest.raises(StoreError, match="cannot be a key"):
        await store.get(key)
    with pytest.raises(StoreError, match="cannot be a key"):
        await store.head(key)
    with pytest.raises(StoreError, match="cannot be a key"):
        await store.delete([key])


async def test_keeping_is_refused_where_there_is_no_object_lock(store: Store) -> None:
    with pytest.raises(StoreError) as raised:
        await store.put("kept", body(b"x"), keep_until=datetime.now(UTC) + timedelta(days=1))
    assert not raised.value.passing
    assert "lock" in f"{raised.value.fact} {raised.value.hint}"
    with pytest.raises(ObjectMissing):
        await store.head("kept")


async def test_probing_finds_that_create_is_one_step(store: Store) -> None:
    await store.put("probe", body(b"x"))
    found = await store.probe("probe", body(b"x"))
    assert found.conditional_put
    assert found.remark
    assert await read(store, "probe") == b"x"


async def test_close_twice(store: Store) -> None:
    await store.put("a", body(b"x"))
    await store.close()
    await store.close()
