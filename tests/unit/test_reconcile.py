"""Two sources of the same WAL: the first ships, the second is compared, what one misses is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from pipeline.catalog import wal_key
from pipeline.contracts import Buffer, Source
from pipeline.errors import IntegrityError, StoreError
from pipeline.events import Event, HistoryReady, Notice, SegmentReady, SourcesDiffer
from pipeline.reconcile import Reconciler
from pipeline.wal import WalFile

MB = 1 << 20


class Held:
    """A source whose segments are what they were set to."""

    def __init__(self, name: str, content: bytes = b"the same") -> None:
        self.name = name
        self.content = content

    async def events(self) -> AsyncIterator[Event]:
        return
        yield

    def read(self, event: Event) -> Buffer:  # noqa: ARG002  the signature is the contract's
        return self.content

    async def done(self, event: Event) -> None:  # noqa: ARG002  the same
        raise AssertionError("only the dispatcher acknowledges")


def segment(source: Held, number: int) -> SegmentReady:
    return SegmentReady(source.name, WalFile.segment(1, number * MB, MB), MB)


class Shop:
    """Ships what it is given, after ``open`` is set, and remembers the bytes."""

    def __init__(self) -> None:
        self.shipped: list[tuple[str, str]] = []
        self.prints: dict[str, str] = {}
        self.open = asyncio.Event()
        self.open.set()
        self.failures = 0
        self.owed: asyncio.Future[None] | None = None
        self.notices: list[Notice] = []
        self.reconciler = Reconciler(
            self.handle,
            segment_size=MB,
            fingerprint=lambda name, data: f"{name} {bytes(data)!r}",
            shipped=self.prints.get,
            notify=self.notices.append,
        )

    async def handle(self, source: Source, event: Event) -> asyncio.Future[None] | None:
        assert isinstance(event, SegmentReady | HistoryReady)
        await self.open.wait()
        if self.failures:
            self.failures -= 1
            raise StoreError("the store is away", passing=True)
        name = wal_key(event.file)
        self.shipped.append((source.name, event.file.name))
        self.prints[name] = f"{name} {bytes(source.read(event))!r}"
        return self.owed

    def told(self) -> list[str]:
        return [notice.fact for notice in self.notices if isinstance(notice, SourcesDiffer)]


async def test_the_second_source_ships_nothing_when_the_bytes_are_the_same() -> None:
    shop, watch, stream = Shop(), Held("watch"), Held("stream")
    assert await shop.reconciler.handle(stream, segment(stream, 1)) is None
    assert await shop.reconciler.handle(watch, segment(watch, 1)) is None
    assert shop.shipped == [("stream", "000000010000000000000001")]
    assert not shop.notices


async def test_the_second_waits_until_the_first_is_stored() -> None:
    shop, watch, stream = Shop(), Held("watch"), Held("stream")
    shop.open.clear()
    first = asyncio.create_task(shop.reconciler.handle(stream, segment(stream, 1)))
    await asyncio.sleep(0)
    second = asyncio.create_task(shop.reconciler.handle(watch, segment(watch, 1)))
    await asyncio.sleep(0.01)
    assert not second.done()
    shop.open.set()
    await asyncio.gather(first, second)
    assert len(shop.shipped) == 1


async def test_the_second_ships_what_the_first_could_not() -> None:
    shop, watch, stream = Shop(), Held("watch"), Held("stream")
    shop.failures = 1
    with pytest.raises(StoreError):
        await shop.reconciler.handle(stream, segment(stream, 1))
    await shop.reconciler.handle(watch, segment(watch, 1))
    await shop.reconciler.handle(stream, segment(stream, 1))
    assert shop.shipped == [("watch", "000000010000000000000001")]


async def test_the_second_is_told_when_the_first_is_owed_somewhere_and_ships_anew_when_that_fails() -> None:
    shop, watch, stream = Shop(), Held("watch"), Held("stream")
    shop.owed = asyncio.get_running_loop().create_future()
    assert await shop.reconciler.handle(stream, segment(stream, 1)) is shop.owed
    assert await shop.reconciler.handle(watch, segment(watch, 1)) is shop.owed
    shop.owed.set_exception(StoreError("lost where it was stored", passing=True))
    shop.owed = None
    assert await shop.reconciler.handle(watch, segment(watch, 1)) is None
    assert [source for source, _ in shop.shipped] == ["stream", "watch"]


async def test_other_bytes_are_refused_and_told() -> None:
    shop, watch, stream = Shop(), Held("watch", b"padded"), Held("stream")
    await shop.reconciler.handle(stream, segment(stream, 1))
    with pytest.raises(IntegrityError, match="has other bytes in the source watch than in stream, which is shipped"):
        await shop.reconciler.handle(watch, segment(watch, 1))
    assert len(shop.shipped) == 1
    assert len(shop.told()) == 1


async def test_what_a_source_passes_over_is_told_once_the_other_has_shipped_it() -> None:
    shop, watch, stream = Shop(), Held("watch"), Held("stream")
    for number in (1, 2, 3):
        await shop.reconciler.handle(stream, segment(stream, number))
    await shop.reconciler.handle(watch, segment(watch, 1))
    await shop.reconciler.handle(watch, segment(watch, 3))
    assert shop.told() == ["the source watch passed over 000000010000000000000002, which stream had"]
    await shop.reconciler.handle(watch, segment(watch, 6))
    assert len(shop.told()) == 1, "nobody has 4 and 5 yet"
    await shop.reconciler.handle(stream, segment(stream, 4))
    assert shop.told()[1:] == ["the source watch passed over 000000010000000000000004, which stream had"]
    await shop.reconciler.handle(watch, segment(watch, 5))
    await shop.reconciler.handle(stream, segment(stream, 5))
    assert len(shop.told()) == 2, "it came late, and was not passed over"


async def test_a_cancelled_first_leaves_it_to_the_second() -> None:
    shop, watch, stream = Shop(), Held("watch"), Held("stream")
    shop.open.clear()
    first = asyncio.create_task(shop.reconciler.handle(stream, segment(stream, 1)))
    await asyncio.sleep(0)
    second = asyncio.create_task(shop.reconciler.handle(watch, segment(watch, 1)))
    await asyncio.sleep(0)
    first.cancel()
    shop.open.set()
    await second
    assert shop.shipped == [("watch", "000000010000000000000001")]
