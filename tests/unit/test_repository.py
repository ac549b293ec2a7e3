"""repository.json is authenticated by nothing: a damaged one must not hide a good one, nor be believed."""

from __future__ import annotations

import asyncio
import json

import pytest
from structlog.testing import capture_logs

from infra import repository
from infra.repository import Destination, RepositoryFacts, find, read_facts
from infra.storage.memory import MemoryStore
from pipeline.contracts import Store
from pipeline.errors import ConfigError, IntegrityError, StoreError
from pipeline.objects import MemoryBody
from tests.stores import Faulty

FACTS = RepositoryFacts("7", 17, 1 << 24, "2026-01-14T12:00:00+00:00")
KEY = "7/repository.json"


async def holding(name: str, content: bytes | None = None) -> Destination:
    store = MemoryStore(name)
    await store.put(KEY, FACTS.encode() if content is None else MemoryBody([content]))
    return Destination(store, required=True)


def changed(**members: object) -> bytes:
    return json.dumps({**json.loads(b"".join(FACTS.encode().chunks())), **members}).encode()


@pytest.mark.parametrize("cluster", ["", "7"])
async def test_a_damaged_one_is_passed_over_and_told_of(cluster: str) -> None:
    damaged, good = await holding("damaged", b"{"), await holding("good")
    down: Store = Faulty(MemoryStore("down"), down={"get": StoreError("no"), "list": StoreError("no")})
    with capture_logs() as said:
        assert await find([damaged, Destination(down, required=True), good], cluster) == FACTS
    assert [(line["log_level"], line["destination"]) for line in said] == [("warning", "damaged"), ("warning", "down")]
    assert "7/repository.json at damaged cannot be read" in said[0]["error"]
    with capture_logs() as said:
        assert await find([good, damaged], cluster) == FACTS
    assert said == [], "nobody looked"


async def test_only_damaged_ones_are_an_error() -> None:
    with pytest.raises(IntegrityError, match="at damaged cannot be read"):
        await find([Destination(MemoryStore("empty"), required=True), await holding("damaged", b"{")], "7")
    with pytest.raises(ConfigError, match="there is no repository of cluster 8"):
        await find([await holding("good")], "8")


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (changed(system_id="8"), "contradicts itself"),
        (changed(system_id=7), "system_id is not str"),
        (changed(segment_size=0), "contradicts itself"),
        (changed(segment_size=16777216.0), "segment_size is not int"),
        (changed(server_major=True), "server_major is not int"),
        (changed(server_major=0), "contradicts itself"),
        (changed(created=None), "created is not str"),
        (changed(format=2, more=1), "is of format 2; this walship knows format 1"),
        (changed(format="1"), "format is not int"),
        (changed(more=1), "unknown or missing members: more"),
        (b'{"system_id":"8",' + changed()[1:], "a member is doubled"),
        (b"[" * 60_000, "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[]", "it is not an object"),
        (changed() + b" " * 70_000, "a repository.json has at most 65536"),
    ],
)
async def test_what_init_cannot_have_written_is_refused(content: bytes, fact: str) -> None:
    destination = await holding("bad", content)
    with pytest.raises(IntegrityError, match=fact):
        await read_facts(destination.root, "7")


@pytest.mark.parametrize("cluster", ["../..", "7a", "\u0667"])
async def test_a_cluster_is_a_number(cluster: str) -> None:
    with pytest.raises(ConfigError, match="is not a system identifier"):
        await find([], cluster)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "ANSWER", 0.05)


@pytest.mark.usefixtures("quick")
async def test_one_that_accepts_and_never_answers_is_gone_on_without() -> None:
    """However many they are, each costs so many seconds and no more; and it is told."""
    held = await holding("silent")
    silent = Destination(Faulty(held.root, delay={"get": 600.0}), required=True)
    async with asyncio.timeout(10):
        with capture_logs() as said:
            assert await find([silent, silent, await holding("good")], "7") == FACTS
        assert [line["destination"] for line in said] == ["silent", "silent"]
        assert "silent has not answered for 0.05 seconds, and another destination has" in said[0]["error"]
        with capture_logs() as said:
            assert await find([await holding("good"), silent], "7") == FACTS
        assert said == [], "nobody looked"


@pytest.mark.usefixtures("quick")
async def test_one_that_is_slow_has_all_its_time_where_no_other_serves() -> None:
    held = await holding("slow")
    slow = Destination(Faulty(held.root, delay={"list": 0.1, "head": 0.1, "get": 0.1}), required=True)
    down: Store = Faulty(MemoryStore("down"), down={"list": StoreError("no")})
    with capture_logs() as said:
        assert await find([slow, Destination(down, required=True)]) == FACTS
    assert [line["destination"] for line in said] == ["down"]
