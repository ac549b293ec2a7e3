"""Several destinations at once: what one lacks is owed to it, copied verbatim, and acknowledged once it is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime

import pytest

from handlers.body import joined
from handlers.checksum import Checksum
from handlers.compress import Compress
from handlers.encrypt import Encrypt
from handlers.outlet import Outlet, emptied
from handlers.ship import Shipper
from handlers.upload import Uploader
from infra.keys import Policy, RepositoryKeys, create_ring, open_keyring
from infra.storage.memory import MemoryStore
from pipeline.catalog import REPOSITORY
from pipeline.chain import Chain, Expected
from pipeline.contracts import Body, ObjectInfo
from pipeline.dispatcher import Gate
from pipeline.errors import IntegrityError, ObjectConflict, StoreError
from pipeline.events import DestinationCaughtUp, DestinationFailed, Notice
from pipeline.objects import MemoryBody, read_header
from tests.clock import FastClock

SYSTEM = "7301234567890123456"
NAME = "wal/0000000100000000/000000010000000000000001"
OTHER = "wal/0000000100000000/000000010000000000000002"


class Switchable(MemoryStore):
    """A memory store that can be taken away, and that can break one object on its way in."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.away = False
        self.lose_answer = False
        self.refuses = ""
        self.failing_lists = 0
        self.stalled = False
        self.puts: list[str] = []

    async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
        if self.away:
            raise StoreError(f"{self.name} does not answer", passing=True)
        if key == self.refuses:
            raise StoreError(f"{self.name} does not like {key}")
        while self.stalled:
            await asyncio.sleep(0.001)
        self.puts.append(key)
        await super().put(key, body, replace=replace, keep_until=keep_until)
        if self.lose_answer:
            self.lose_answer = False
            raise StoreError(f"{self.name} was cut off before it answered", passing=True)

    async def head(self, key: str) -> ObjectInfo:
        if self.away:
            raise StoreError(f"{self.name} does not answer", passing=True)
        return await super().head(key)

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        if self.failing_lists:
            self.failing_lists -= 1
            raise StoreError(f"{self.name} cannot be listed now", passing=True)
        async for info in super().list(prefix, after=after, shallow=shallow):
            yield info

    def content(self, name: str) -> bytes:
        return self._objects[name][0]

    def names(self) -> set[str]:
        return {name for name in self._objects if name.startswith("wal/")}


class Bench:
    """A shipper over two switchable destinations."""

    def __init__(self, a: Switchable, b: Switchable, shipper: Shipper, uploader: Uploader, chain: Chain) -> None:
        self.a, self.b, self.shipper, self.uploader, self.chain = a, b, shipper, uploader, chain
        self.notices: list[Notice] = []


@asynccontextmanager
async def bench(*, b_required: bool = True, patient: bool = True, encrypted: bool = False) -> AsyncIterator[Bench]:
    a, b = Switchable("a"), Switchable("b")
    clock = FastClock()
    for store in (a, b):
        await MemoryStore.put(store, REPOSITORY, MemoryBody([b"{}"]))
    if encrypted:
        await create_ring(a, SYSTEM, "passphrase", Policy(wal=True, base=True), clock)
        keys = await open_keyring(a, SYSTEM, "passphrase", writer=True, clock=clock)
    else:
        keys = RepositoryKeys(SYSTEM, None, Policy(wal=False, base=False), store=None, allow_unencrypted=False)
    cipher = "aes-256-gcm" if encrypted else "none"
    chain = Chain([Compress("zstd"), Encrypt(keys, lambda _: cipher), Checksum()], keys, SYSTEM)
    notices: list[Notice] = []
    outlets = [Outlet(a, True, keys.key_object), Outlet(b, b_required, keys.key_object)]
    uploader = Uploader(outlets, clock=clock, notify=notices.append)
    with ThreadPoolExecutor(1) as workers:
        shipper = Shipper(chain, uploader, gate=Gate(2), workers=workers, clock=clock, patient=patient)
        made = Bench(a, b, shipper, uploader, chain)
        made.notices = notices
        background = asyncio.create_task(uploader.run())
        try:
            async with asyncio.timeout(20):
                yield made
        finally:
            background.cancel()
            await asyncio.gather(background, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_the_same_bytes_go_to_every_destination() -> None:
    async with bench() as it:
        shipped = await it.shipper.ship(NAME, b"plain" * 1000)
        assert it.a.content(NAME) == it.b.content(NAME)
        assert shipped.digest == it.a.content(NAME)[-32:].hex()
        assert shipped.size == len(it.a.content(NAME))


async def test_a_required_destination_that_is_down_holds_back_the_acknowledgement_and_nothing_else() -> None:
    async with bench() as it:
        it.b.away = True
        first = asyncio.create_task(it.shipper.ship(NAME, b"one"))
        second = asyncio.create_task(it.shipper.ship(OTHER, b"two"))
        await until(lambda: it.a.names() == {NAME, OTHER})
        await until(lambda: it.uploader.outlets[1].owed.keys() == {NAME, OTHER})
        assert not first.done()
        assert not second.done()
        it.b.away = False
        await asyncio.gather(first, second)
        assert {n: it.a.content(n) for n in it.a.names()} == {n: it.b.content(n) for n in it.b.names()}
        await until(lambda: DestinationCaughtUp("b") in it.notices)


async def test_a_destination_that_is_not_required_holds_back_nothing_and_gets_it_later() -> None:
    async with bench(b_required=False) as it:
        it.b.away = True
        await it.shipper.ship(NAME, b"one")
        assert it.b.names() == set()
        it.b.away = False
        await until(lambda: it.b.names() == {NAME})


async def test_with_no_destination_up_the_error_comes_back_to_the_dispatcher() -> None:
    async with bench() as it:
        it.a.away = it.b.away = True
        with pytest.raises(StoreError, match="a does not answer"):
            await it.shipper.ship(NAME, b"one")
        it.a.away = it.b.away = False
        await until(lambda: not it.uploader.outlets[0].down and not it.uploader.outlets[1].down)
        await it.shipper.ship(NAME, b"one")


async def test_a_command_does_not_wait_for_a_required_destination() -> None:
    async with bench(patient=False) as it:
        it.b.away = True
        with pytest.raises(StoreError, match=r"could not be stored at b, which is required"):
            await it.shipper.ship(NAME, b"one")


async def test_a_command_says_of_an_emptied_destination_what_the_service_says() -> None:
    """Its error names the message above: that one says what to do."""
    async with bench(patient=False) as it:
        await it.b.delete([REPOSITORY])
        with pytest.raises(StoreError, match=r"could not be stored at b, which is required"):
            await it.shipper.ship(NAME, b"one")
        known = emptied(it.b)
        told = {(n.fact, n.hint) for n in it.notices if isinstance(n, DestinationFailed)}
        assert told == {(known.fact, known.hint)}
        assert not it.b.puts


async def test_an_answer_that_was_lost_is_no_conflict() -> None:
    async with bench() as it:
        await it.shipper.ship(OTHER, b"zero")
        it.b.lose_answer = True
        await it.shipper.ship(NAME, b"one")
        assert it.b.puts.count(NAME) == 2
        assert it.a.content(NAME) == it.b.content(NAME)


async def test_the_same_file_shipped_again_is_a_success_and_changes_nothing() -> None:
    async with bench(encrypted=True) as it:
        await it.shipper.ship(NAME, b"one")
        before = it.a.content(NAME)
        await it.shipper.ship(NAME, b"one")
        assert it.a.content(NAME) == before


async def test_a_part_of_another_backup_is_never_taken_for_the_same() -> None:
    """They have no fingerprint: two that are of one length are not equal for that."""
    part = "base/base_20260114_120000/data/base/00000001"
    async with bench(encrypted=True) as it:
        await it.shipper.ship(part, b"one", backup="aa")
        before = it.a.content(part)
        assert read_header(part, before)[0].fingerprint == ""
        for plain in (b"one", b"two"):
            with pytest.raises(ObjectConflict, match=f"{part} is stored at a with other bytes"):
                await it.shipper.ship(part, plain, backup="bb")
        assert it.a.content(part) == it.b.content(part) == before


async def test_other_bytes_under_one_name_are_refused_and_nothing_is_overwritten() -> None:
    async with bench() as it:
        await it.shipper.ship(NAME, b"one")
        before = it.a.content(NAME)
        with pytest.raises(ObjectConflict, match=f"{NAME} is stored at a with other bytes") as caught:
            await it.shipper.ship(NAME, b"two")
        assert "two servers write to one repository" in caught.value.hint
        assert it.a.content(NAME) == it.b.content(NAME) == before
        assert not it.uploader.outlets[0].down, "one object is wrong, not the destination"


async def test_a_conflict_at_a_destination_that_is_not_required_is_told_and_blocks_nothing() -> None:
    async with bench(b_required=False) as it:
        await it.shipper.ship(NAME, b"one")
        await it.a.delete([NAME])
        await it.shipper.ship(NAME, b"two")
        assert any(isinstance(n, DestinationFailed) and n.destination == "b" for n in it.notices)


async def test_a_damaged_object_in_the_way_is_not_taken_for_the_same() -> None:
    async with bench() as it:
        await it.shipper.ship(NAME, b"one")
        stored = bytearray(it.b.content(NAME))
        stored[-40] ^= 1
        await it.b.put(NAME, MemoryBody([bytes(stored)]), replace=True)
        with pytest.raises(IntegrityError, match=r"at b; it was to be stored again"):
            await it.shipper.ship(NAME, b"one")


async def test_a_copy_that_is_lost_is_shipped_anew_and_never_copied_damaged() -> None:
    async with bench() as it:
        it.b.away = True
        task = asyncio.create_task(it.shipper.ship(NAME, b"one"))
        await until(lambda: NAME in it.uploader.outlets[1].owed)
        good = it.a.content(NAME)
        bad = good[:-40] + bytes([good[-40] ^ 1]) + good[-39:]
        await MemoryStore.put(it.a, NAME, MemoryBody([bad]), replace=True)
        it.b.away = False
        with pytest.raises(StoreError, match="is lost where it was stored"):
            await task
        assert it.b.names() == set()
        await it.a.delete([NAME])
        await it.shipper.ship(NAME, b"one")
        assert it.a.content(NAME) == it.b.content(NAME)


async def test_while_no_destination_is_up_nothing_is_read_or_encoded() -> None:
    async with bench() as it:
        it.a.away = it.b.away = True
        with pytest.raises(StoreError):
            await it.shipper.ship(NAME, b"one")
        it.chain.encode = None  # type: ignore[assignment,method-assign]  # whoever encodes now fails
        task = asyncio.create_task(it.shipper.ship(OTHER, b"two"))
        await until(lambda: sum(isinstance(n, DestinationFailed) for n in it.notices) > 6)
        assert not task.done()
        task.cancel()


async def test_a_backup_is_not_listed_where_parts_of_it_are_still_owed() -> None:
    part, info = "base/base_1/data/base/00000001", "base/base_1/backup_info"
    async with bench(b_required=False) as it:
        it.b.away = True
        await it.shipper.ship(part, b"part")
        it.b.away = False
        it.uploader.outlets[1].down = False  # it is up again, and the part has not been copied yet
        await it.shipper.ship(info, b"info")
        await until(lambda: info in it.b._objects)  # now or later: what is owed is copied meanwhile
        assert it.b.puts.index(part) < it.b.puts.index(info)


async def test_what_an_earlier_process_left_owing_is_found_and_copied() -> None:
    async with bench() as it:
        await it.shipper.ship(NAME, b"one")
        for name in ("base/whole/data/base/00000001", "base/whole/backup_info", "base/torso/data/base/00000001"):
            await it.shipper.ship(name, b"content")
            await it.b.delete([name])
        await it.b.delete([NAME])
        again = Uploader([Outlet(it.a), Outlet(it.b)], clock=FastClock(), notify=it.notices.append)
        task = asyncio.create_task(again.run())
        await until(lambda: "base/whole/backup_info" in it.b._objects)
        task.cancel()
        assert it.b.content(NAME) == it.a.content(NAME)
        assert "base/torso/data/base/00000001" not in it.b._objects, "a backup that never was one is not copied"


async def test_an_object_that_is_refused_for_good_does_not_take_the_destination_down() -> None:
    async with bench(b_required=False) as it:
        it.b.refuses = NAME
        await it.shipper.ship(NAME, b"one")
        assert not it.uploader.outlets[1].down
        await it.shipper.ship(OTHER, b"two")
        assert it.b.names() == {OTHER}


async def test_the_data_key_is_stored_before_anything_encrypted_under_it() -> None:
    async with bench(encrypted=True) as it:
        await it.shipper.ship(NAME, b"one")
        for store in (it.a, it.b):
            (key,) = (name for name in store.puts if name.startswith("keys/data-"))
            assert store.puts.index(key) < store.puts.index(NAME)
        header, plain = it.chain.decode(Expected(NAME, SYSTEM), MemoryBody([joined(await it.b.get(NAME))]).chunks())
        assert (header.cipher, bytes(plain)) == ("aes-256-gcm", b"one")


async def test_an_older_object_takes_its_data_key_along() -> None:
    async with bench(encrypted=True) as it:
        await it.shipper.ship(NAME, b"one")
        (old_key,) = (name for name in it.b.puts if name.startswith("keys/data-"))
        await it.b.delete([NAME, old_key])  # as if b had been away when an earlier process shipped it
        it.b.away = True
        task = asyncio.create_task(it.shipper.ship(NAME, b"one"))
        await until(lambda: NAME in it.uploader.outlets[1].owed)
        it.b.away = False
        await task
        assert it.b.content(NAME) == it.a.content(NAME)
        assert it.b.content(old_key) == it.a.content(old_key)


@pytest.mark.parametrize("who", ["a", "b"])
async def test_a_destination_that_could_not_be_listed_at_the_start_is_compared_once_it_can_be(who: str) -> None:
    """Whichever of the two it was: what one has and the other lacks is not known before."""
    async with bench() as it:
        await it.shipper.ship(NAME, b"one")
        await it.b.delete([NAME])
        (it.a if who == "a" else it.b).failing_lists = 2
        again = Uploader([Outlet(it.a), Outlet(it.b)], clock=FastClock(), notify=it.notices.append)
        task = asyncio.create_task(again.run())
        await until(lambda: NAME in it.b._objects)
        await until(lambda: DestinationCaughtUp("b") in it.notices)
        task.cancel()


async def test_a_destination_that_accepts_and_never_answers_holds_up_no_other() -> None:
    async with bench() as it:
        it.b.stalled = True
        parcel = await it.shipper.encode(NAME, b"one")
        assert await it.uploader.store(parcel, patience=0.05) == {"a"}
        assert any(
            isinstance(n, DestinationFailed) and "has not answered for 0.05 seconds" in n.fact for n in it.notices
        )
        assert it.uploader.missing(NAME) == ["b"]
        it.b.stalled = False
        await until(lambda: NAME in it.b._objects)


async def test_who_waits_for_a_command_waits_for_every_destination() -> None:
    async with bench() as it:
        it.b.stalled = True
        parcel = await it.shipper.encode(NAME, b"one")
        stored = asyncio.create_task(it.uploader.store(parcel))
        await until(lambda: NAME in it.a._objects)
        await asyncio.sleep(0.05)
        assert not stored.done()
        it.b.stalled = False
        assert await stored == {"a", "b"}


async def test_a_destination_that_was_emptied_counts_for_nothing_until_it_is_a_repository_again() -> None:
    async with bench() as it:
        await it.shipper.ship(NAME, b"one")
        watching = asyncio.create_task(it.uploader.watch())
        it.b._objects.clear()
        await until(lambda: any(isinstance(n, DestinationFailed) and "it was emptied" in n.fact for n in it.notices))
        assert it.uploader.outlets[1].down
        assert await it.uploader.store(await it.shipper.encode(OTHER, b"two")) == {"a"}
        await MemoryStore.put(it.b, REPOSITORY, MemoryBody([b"{}"]))
        await until(lambda: {NAME, OTHER} <= it.b.names())
        watching.cancel()
