"""Segments that the feed writes while they are decoded: what is wrong with one may be found at its last byte."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from handlers.feed import Feed
from handlers.fetch import Fetcher
from handlers.serve_wal import WalServer
from infra.postgres.wal_script import FEED, FOLDER
from infra.storage.memory import MemoryStore
from pipeline.catalog import wal_key
from pipeline.chain import Chain
from pipeline.contracts import Body, Buffer, Span, Store
from pipeline.errors import IntegrityError, ObjectMissing, StoreError
from pipeline.lineage import Leg, Lineage
from pipeline.objects import MAGIC, TRAILER_SIZE, MemoryBody
from pipeline.wal import Lsn, WalFile
from tests.keys import SYSTEM_ID, chain, encrypting_keys, stored
from tests.stores import Faulty
from tests.unit.test_wal_script import PATH, ask_feed, lay, running

SIZE = 4 << 20
FIRST = 3
#: Does not compress well, so that it is more than one chunk of the encryption, and more than one piece.
PLAIN = random.Random(7).randbytes(SIZE // 2) + bytes(SIZE // 2)
KEYS = encrypting_keys()
CHAIN = chain(KEYS, "zstd", "aes-256-gcm")
#: The same key ring opened with --allow-unencrypted: with nothing but the checksum against damage.
BARE = chain(encrypting_keys(allow_unencrypted=True), "none", "none")
ONE = Lineage((Leg(1, Lsn(0), None),), SIZE)


def segment(number: int) -> WalFile:
    return WalFile.segment(1, number * SIZE, SIZE)


NAME = segment(FIRST).name
KEY = wal_key(segment(FIRST))


async def holding(content: bytes, name: str = "memory", *, key: str = KEY) -> MemoryStore:
    store = MemoryStore(name)
    await store.put(key, MemoryBody([content[at : at + 100_000] for at in range(0, len(content), 100_000)]))
    return store


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lay(tmp_path, "exit 126")
    return tmp_path


class Told(Feed):
    """Remembers how many bytes each try has left in stage/."""

    def __init__(
        self, data: Path, stores: list[Store], *, order: list[WalFile] | None = None, chosen: Chain = CHAIN,
        turns: int = 1,
    ) -> None:  # fmt: skip
        self.said: list[str] = []
        self.tries: list[int] = []
        self.home = data / FOLDER / FEED
        fetch = Fetcher(stores, chosen, SYSTEM_ID, notify=self.said.append, turns=asyncio.Semaphore(turns))
        server = WalServer(fetch, ONE)
        super().__init__(self.home, server.read, order or [], SIZE, pour=server.pour, notify=self.said.append)

    def _write(self, name: str, pieces: Iterable[Buffer]) -> None:
        try:
            super()._write(name, pieces)
        finally:
            if name == NAME and (size := (self.home / "stage" / name).stat().st_size):
                self.tries.append(size)

    def left(self) -> list[str]:
        return [path.name for folder in ("stage", "ready") for path in (self.home / folder).iterdir()]


def resealed(content: bytes) -> bytes:
    """With a checksum that fits."""
    return content + hashlib.sha256(content).digest()


def with_plain_size(content: bytes, size: int) -> bytes:
    """An object that claims another size."""
    end = 12 + int.from_bytes(content[8:12], "big")
    text = json.dumps({**json.loads(content[12:end]), "plain_size": size}, separators=(",", ":")).encode()
    return resealed(MAGIC + len(text).to_bytes(4, "big") + text + content[end:-TRAILER_SIZE])


def flipped(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 4
    return bytes(changed)


WHOLE, WHOLE_BARE = stored(CHAIN, KEY, PLAIN), stored(BARE, KEY, PLAIN)


@pytest.mark.parametrize(
    ("damaged", "chosen", "fact"),
    [
        (flipped(WHOLE, -1), CHAIN, "do not match its SHA-256 trailer"),
        (flipped(WHOLE, -TRAILER_SIZE - 5), CHAIN, "do not match its SHA-256 trailer"),
        (resealed(flipped(WHOLE[:-TRAILER_SIZE], -5)), CHAIN, "does not decrypt"),
        (WHOLE[:-1], CHAIN, "do not match its SHA-256 trailer"),
        (WHOLE + b"\0", CHAIN, "do not match its SHA-256 trailer"),
        (resealed(WHOLE[:-TRAILER_SIZE] + b"\0"), CHAIN, "does not decrypt"),
        (flipped(WHOLE_BARE, -TRAILER_SIZE - 5), BARE, "do not match its SHA-256 trailer"),
        (with_plain_size(WHOLE_BARE, SIZE - 1), BARE, "more than the"),
        (with_plain_size(stored(BARE, KEY, PLAIN[:-1]), SIZE), BARE, "1 bytes less than the"),
        (with_plain_size(WHOLE_BARE, SIZE + 1), BARE, "at most"),
    ],
)  # fmt: skip
async def test_what_is_damaged_is_never_handed_over_and_the_next_destination_serves(
    data: Path, damaged: bytes, chosen: Chain, fact: str
) -> None:
    bad = await holding(damaged, "bad")
    feed = Told(data, [bad], chosen=chosen)
    async with running(feed):
        assert await ask_feed(data, NAME) == 200
        assert not (data / PATH).exists()
        assert not feed.left()
        assert f"bad: {KEY} " in feed.said[-1]
        assert fact in feed.said[-1]
        assert isinstance(feed.failures[-1], IntegrityError)
    good = await holding(WHOLE if chosen is CHAIN else WHOLE_BARE, "good")
    feed = Told(data, [bad, good], chosen=chosen)
    async with running(feed):
        assert await ask_feed(data, NAME) == 0
        assert (data / PATH).read_bytes() == PLAIN
        assert not feed.left()
        assert feed.said[-1].startswith(f"bad: {KEY} ")
        assert feed.said[-1].endswith("good served it instead")
        if fact != "at most":
            assert feed.tries[0] > 0, "it was written before it was known to be damaged"
        assert feed.tries[-1] == SIZE


async def test_what_is_damaged_is_not_read_ahead_either(data: Path) -> None:
    store = await holding(flipped(WHOLE, -1))
    feed = Told(data, [store], order=[segment(FIRST)])
    async with running(feed):
        async with asyncio.timeout(20):
            while not feed.tries or feed.left():
                await asyncio.sleep(0.01)
        assert await ask_feed(data, NAME) == 200
        assert not (data / PATH).exists()


async def test_a_segment_that_is_whole_and_of_another_size_is_not_handed_over(data: Path) -> None:
    store = await holding(stored(CHAIN, KEY, PLAIN[: SIZE // 2]))
    feed = Told(data, [store])
    async with running(feed):
        assert await ask_feed(data, NAME) == 200
        assert not feed.left()
        assert f"{NAME} has {SIZE // 2} bytes, which is not all of it" in feed.said[-1]


async def test_a_disk_that_fills_while_a_segment_is_written(data: Path) -> None:
    """What was fetched ahead makes room; with none of that recovery stops, and nothing is left of the segment."""
    room = True

    class Full(Told):
        def _write(self, name: str, pieces: Iterable[Buffer]) -> None:
            def some() -> Iterator[Buffer]:
                for piece in pieces:
                    yield piece
                    if name == NAME and (not room or any((self.home / "ready").iterdir())):
                        raise OSError(errno.ENOSPC, "No space left on device")

            super()._write(name, some())

    store = await holding(WHOLE)
    ahead = segment(FIRST + 5)
    await store.put(wal_key(ahead), MemoryBody([stored(CHAIN, wal_key(ahead), PLAIN)]))
    feed = Full(data, [store], order=[ahead])
    async with running(feed):
        async with asyncio.timeout(20):
            while not (feed.home / "ready" / ahead.name).exists():
                await asyncio.sleep(0.01)
        assert await ask_feed(data, NAME) == 0
        assert (data / PATH).read_bytes() == PLAIN
        (data / PATH).unlink()
        assert feed.tries[0] < SIZE == feed.tries[-1]
        room = False
        assert await ask_feed(data, NAME) == 200
        assert not feed.left()
        assert not (data / PATH).exists()
        assert "No space left on device" in feed.said[-1]
        assert isinstance(feed.failures[-1], OSError)


async def test_what_is_half_fetched_ahead_makes_room_as_well(data: Path) -> None:
    """It is not in ready/ yet, and cannot be removed there: it is waited for, and then it can."""
    begun, go_on = threading.Event(), threading.Event()
    ahead = segment(FIRST + 5)

    class Full(Told):
        def _write(self, name: str, pieces: Iterable[Buffer]) -> None:
            def some() -> Iterator[Buffer]:
                for piece in pieces:
                    yield piece
                    if name == ahead.name:
                        begun.set()
                        assert go_on.wait(30)
                    elif name == NAME and any(
                        (self.home / place / ahead.name).exists() for place in ("stage", "ready")
                    ):
                        go_on.set()
                        raise OSError(errno.ENOSPC, "No space left on device")

            super()._write(name, some())

    store = await holding(WHOLE)
    await store.put(wal_key(ahead), MemoryBody([stored(CHAIN, wal_key(ahead), PLAIN)]))
    feed = Full(data, [store], order=[ahead], turns=2)
    async with running(feed):
        assert await asyncio.to_thread(begun.wait, 20)
        assert await ask_feed(data, NAME) == 0
    assert (data / PATH).read_bytes() == PLAIN
    assert not feed.failures


async def test_half_a_segment_is_seen_by_nobody(data: Path) -> None:
    """Whatever is killed then: only what is under its name in ready/ is ever taken, and stage/ is emptied."""
    go_on = threading.Event()

    class Slow(MemoryBody):
        def chunks(self) -> Iterator[bytes]:
            content = b"".join(super().chunks())
            yield content[:-100]
            assert go_on.wait(30)
            yield content[-100:]

    class Dripping(Faulty):
        async def get(self, key: str, span: Span | None = None) -> Body:
            return Slow((await super().get(key, span)).chunks())

    store = await holding(WHOLE)
    feed = Told(data, [Dripping(store)])
    async with running(feed):
        asking = asyncio.create_task(ask_feed(data, NAME))
        stage = feed.home / "stage" / NAME
        async with asyncio.timeout(20):
            while not stage.exists() or not stage.stat().st_size:
                await asyncio.sleep(0.01)
        assert 0 < stage.stat().st_size < SIZE
        assert not list((feed.home / "ready").iterdir())
        assert not (data / PATH).exists()
        again = Told(data, [Dripping(store)])
        again.open()
        assert not stage.exists()
        again.close()
        go_on.set()
        assert await asking != 0


async def test_a_store_that_fails_is_not_taken_for_absent(data: Path) -> None:
    down = Faulty(MemoryStore("down"), down={"get": StoreError("down does not answer", passing=True)})
    feed = Told(data, [MemoryStore("empty"), down])
    async with running(feed):
        assert await ask_feed(data, NAME) == 200
        assert "down does not answer" in feed.said[-1]
    feed = Told(data, [MemoryStore("empty"), MemoryStore("other")])
    async with running(feed):
        assert await ask_feed(data, NAME) == 1
        assert not feed.said


async def test_only_whole_segments_of_the_lineage_are_poured() -> None:
    fork = FIRST * SIZE + SIZE // 2
    forked = Lineage((Leg(1, Lsn(0), Lsn(fork)), Leg(2, Lsn(fork), None)), SIZE)
    poured: list[bytes] = []

    def use(pieces: Iterator[Buffer]) -> None:
        poured.append(b"".join(map(bytes, pieces)))

    async def pour(lineage: Lineage, name: str, key: str = KEY) -> bool:
        store = await holding(stored(CHAIN, key, PLAIN), key=key)
        return await WalServer(Fetcher([store], CHAIN, SYSTEM_ID), lineage).pour(name, use)

    assert await pour(ONE, NAME)
    assert poured == [PLAIN]
    assert not await pour(forked, NAME), "it is cut at the fork"
    assert not await pour(ONE, WalFile.segment(2, FIRST * SIZE, SIZE).name), "no timeline of this lineage"
    assert not await pour(ONE, NAME, f"{KEY}.partial")
    assert not await pour(ONE, f"{NAME}.partial", f"{KEY}.partial")
    assert not await pour(ONE, "00000002.history", "wal/00000002.history")
    assert len(poured) == 1


async def streamed(store: Store, use: Callable[[Iterator[Buffer]], None]) -> None:
    await Fetcher([store], CHAIN, SYSTEM_ID).stream(KEY, use)


async def test_what_is_not_read_to_its_end_was_not_checked() -> None:
    store = await holding(WHOLE)
    with pytest.raises(IntegrityError, match=f"memory: {KEY} was not read to its end"):
        await streamed(store, lambda pieces: [next(pieces) for _ in range(2)].clear())
    with pytest.raises(ObjectMissing):
        await streamed(MemoryStore(), lambda _: pytest.fail("there is nothing to use"))


async def test_an_error_of_who_uses_it_is_no_fault_of_the_destination() -> None:
    def full(pieces: Iterator[Buffer]) -> None:
        next(pieces)
        raise OSError(errno.ENOSPC, "No space left on device")

    said: list[str] = []
    store = await holding(WHOLE)
    fetch = Fetcher([store, store], CHAIN, SYSTEM_ID, notify=said.append)
    with pytest.raises(OSError, match="No space left"):
        await fetch.stream(KEY, full)
    assert not said


async def test_cancelled_it_ends_once_nobody_uses_it_any_more() -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def use(pieces: Iterator[Buffer]) -> None:
        begun.set()
        assert go_on.wait(30)
        for _ in pieces:
            pass
        ended.set()

    task = asyncio.create_task(streamed(await holding(WHOLE), use))
    assert await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
