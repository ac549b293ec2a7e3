"""Records of operations, written to and read from stores."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from handlers.fetch import Fetcher
from infra.keys import Policy
from infra.records import listed, read, recording
from infra.ring import fresh_ring, ring_name, seal_ring
from infra.storage.memory import MemoryStore
from pipeline.errors import IntegrityError, SourceError, StoreError
from pipeline.objects import MemoryBody, begin_reading
from tests.keys import NOW, SYSTEM_ID, chain, plain_keys, stored
from tests.sites import site_at
from tests.stores import Faulty

PASSPHRASE = "correct horse"


async def encrypted() -> MemoryStore:
    store = MemoryStore("bucket")
    sealed = seal_ring(fresh_ring(SYSTEM_ID, Policy(wal=True, base=True)), [PASSPHRASE], [], NOW, scrypt_n=1024)
    await store.put(ring_name(1), MemoryBody([stored(chain(plain_keys(), "none"), ring_name(1), sealed)]))
    return store


async def test_what_was_done_is_recorded_at_every_destination() -> None:
    site = await site_at(MemoryStore("a"), MemoryStore("b"))
    said: list[str] = []
    async with recording(site, "verify", ("--all",), tell=said.append) as entry:
        await site.clock.sleep(90)
        entry.summary["objects"] = 7
    assert not said
    for store in site.stores:
        (name,) = (await listed([store])).names
        assert (name.verb, name.ok, name.ended) == ("verify", True, site.clock.now())
    found = await read(site.fetch, name)
    assert (found.seconds, found.arguments, found.summary) == (90, ("--all",), {"objects": 7})
    assert found.ok
    assert len((await listed(site.stores)).names) == 1  # one, although it is at two


async def test_a_failure_is_recorded_and_goes_on() -> None:
    site = await site_at(MemoryStore())
    with pytest.raises(ExceptionGroup):
        async with recording(site, "backup", tell=pytest.fail):
            raise ExceptionGroup("", [SourceError("the server is gone", hint="start it")])
    there = await listed(site.stores)
    assert there.newest("backup", ok=True) is None
    name = there.newest("backup")
    assert name is not None
    found = await read(site.fetch, name)
    assert (found.ok, found.error, found.hint) == (False, "the server is gone", "start it")


async def test_a_bad_outcome_is_a_failure_without_an_exception() -> None:
    site = await site_at(MemoryStore())
    async with recording(site, "verify", tell=pytest.fail) as entry:
        entry.fail("2 objects are damaged")
        entry.fail("and more")
    (name,) = (await listed(site.stores)).names
    assert not name.ok
    assert (await read(site.fetch, name)).error == "2 objects are damaged"


async def test_what_is_stopped_says_so() -> None:
    site = await site_at(MemoryStore())
    begun = asyncio.Event()

    async def work() -> None:
        async with recording(site, "copy", tell=pytest.fail):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (name,) = (await listed(site.stores)).names
    found = await read(site.fetch, name)
    assert "stopped" in found.error
    assert found.stopped


async def test_a_destination_that_only_lets_read_is_told_of_and_costs_nothing() -> None:
    refusing = Faulty(MemoryStore("read-only"), down={"put": StoreError("access denied")})
    site, said = await site_at(MemoryStore("good"), refusing), list[str]()
    async with recording(site, "restore", tell=said.append):
        pass
    assert said == ["read-only took no record of this: access denied"]
    assert len((await listed(site.stores)).names) == 1


async def test_an_answer_that_got_lost_is_no_failure() -> None:
    store = Faulty(MemoryStore(), lose={("put", 1): StoreError("the connection broke", passing=True)})
    site, said = await site_at(store), list[str]()
    async with recording(site, "restore", tell=said.append):
        pass
    assert len((await listed(site.stores)).names) == 1


@pytest.mark.parametrize("writer", [True, False])
async def test_records_are_encrypted_as_the_repository_says_also_by_those_who_read(*, writer: bool) -> None:
    store = await encrypted()
    site = await site_at(store, MemoryStore("new"), passphrase=PASSPHRASE, writer=writer)
    assert not site.settings.wal_encrypted  # a restore's host may know no more than the passphrase
    for _ in range(2):
        async with recording(site, "restore", tell=pytest.fail):
            pass
    again = await site_at(store, passphrase=PASSPHRASE)
    async with recording(again, "restore", tell=pytest.fail):
        pass
    assert len([info async for info in store.list("keys/data-")]) == 1  # a later reader makes no key of its own
    for name in (await listed([store])).names:
        header, _ = begin_reading(name.key, (await store.get(name.key)).chunks())
        assert header.cipher == "aes-256-gcm"
        assert (await read(again.fetch, name)).ok
    # What is at the other destination can be read with what is there.
    other = replace(again, fetch=Fetcher([site.stores[1]], again.chain, SYSTEM_ID))
    assert [info async for info in site.stores[1].list("keys/data-")]
    assert (await read(other.fetch, (await listed([site.stores[1]])).names[0])).ok


async def test_destinations_that_do_not_answer_are_named() -> None:
    down = Faulty(MemoryStore("down"), down={"list": StoreError("no answer", passing=True)})
    site = await site_at(MemoryStore("up"))
    async with recording(site, "drill", tell=pytest.fail):
        pass
    there = await listed([down, *site.stores])
    assert len(there.names) == 1
    assert list(there.failures) == ["down"]
    with pytest.raises(StoreError, match="no answer"):
        await listed([down])


async def test_a_damaged_record_is_an_error_that_names_it() -> None:
    site = await site_at(MemoryStore())
    async with recording(site, "drill", tell=pytest.fail):
        pass
    (name,) = (await listed(site.stores)).names
    content = b"".join((await site.stores[0].get(name.key)).chunks())
    await site.stores[0].put(name.key, MemoryBody([content[:-1]]), replace=True)
    with pytest.raises(IntegrityError, match="log/20260114"):
        await read(site.fetch, name)
