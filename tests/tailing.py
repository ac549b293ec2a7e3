"""A tail shipper over a store in memory, and the way back: what the tails there give when they are joined."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from handlers.body import collect
from handlers.checksum import Checksum
from handlers.compress import Compress
from handlers.fetch import Fetcher
from handlers.outlet import Outlet, Parcel
from handlers.tail import TailShipper
from handlers.tail_clean import LeftOvers
from handlers.upload import Uploader
from infra.storage.memory import MemoryStore
from pipeline.catalog import REPOSITORY, wal_key
from pipeline.chain import Chain, Expected
from pipeline.contracts import Abilities, Body, Buffer, Clock
from pipeline.errors import ObjectMissing, StoreError
from pipeline.events import Notice
from pipeline.objects import TRAILER_SIZE, MemoryBody, read_header
from pipeline.openwal import OpenSegment, OpenWal
from pipeline.tail import HASH_SIZE, Stitched, TailName, TailPart, stitch, tail_folder
from pipeline.wal import Lsn, WalFile
from tests.parts import PlainKeys
from tests.stores import Faulty

SIZE = 1 << 20
FILE = WalFile.segment(1, 3 * SIZE, SIZE)


class HandClock:
    """Time stands still until the test moves it."""

    def __init__(self) -> None:
        self._time = 1000.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def now(self) -> datetime:
        return datetime(2026, 1, 14, 12, tzinfo=UTC) + timedelta(seconds=self._time)

    def monotonic(self) -> float:
        return self._time

    async def sleep(self, seconds: float) -> None:
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._time + seconds, next(self._order), turn))
        await turn

    async def pass_by(self, seconds: float) -> None:
        """Move on; whoever wakes on the way acts at his time."""
        end = self._time + seconds
        await settled()
        while self._sleepers and self._sleepers[0][0] <= end + 1e-9:
            when, _, turn = heapq.heappop(self._sleepers)
            self._time = max(self._time, when)
            if not turn.done():
                turn.set_result(None)
                await settled()
        self._time = end
        await settled()


async def settled() -> None:
    """Whatever can go on without the time and without threads has gone on."""
    for _ in range(25):
        await asyncio.sleep(0)


@dataclass
class Tails:
    """One destination."""

    store: Faulty
    clock: Clock
    epoch: int = 7
    interval: float = 1.0
    fold_at: int = 256
    size: int = SIZE
    synchronous: bool = False
    wal: OpenWal = field(default_factory=OpenWal)
    notices: list[Notice] = field(default_factory=list)
    #: What the shipper said: segment, start, end.
    stored: list[tuple[WalFile, Lsn, Lsn]] = field(default_factory=list)
    lost: list[tuple[WalFile, Lsn, Lsn]] = field(default_factory=list)
    #: Keys in the order in which they were cut.
    cut: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chain = Chain([Compress("zstd", 1), Checksum()], PlainKeys(), "7")
        # Probed already: that takes threads, and so a time that the clock does not know.
        self.outlet = Outlet(self.store, abilities=Abilities(conditional_put=True))
        self.uploader = Uploader([self.outlet], clock=self.clock, notify=self.notices.append)
        self.shipper = TailShipper(
            self.wal,
            self.outlet,
            encode=self.encode,
            epoch=self.epoch,
            interval=self.interval,
            synchronous=lambda: self.synchronous,
            clock=self.clock,
            notify=self.notices.append,
            stored=self._stored,
            lost=self._lost,
            failed=self.uploader.failed,
            fold_at=self.fold_at,
        )

    async def encode(self, name: str, plain: Buffer) -> Parcel:
        self.cut.append(name)
        return self.parcel(name, plain)

    def parcel(self, name: str, plain: Buffer) -> Parcel:
        pieces = [bytes(piece) for piece in self.chain.encode(name, plain, created=self.clock.now())]
        header, _ = read_header(name, pieces[0])
        return Parcel(header, collect(pieces), pieces[-1][-TRAILER_SIZE:].hex())

    def _stored(self, destination: str, file: WalFile, start: Lsn, end: Lsn) -> None:
        assert destination == self.store.name
        self.stored.append((file, start, end))

    def _lost(self, destination: str, file: WalFile, start: Lsn, end: Lsn) -> None:
        assert destination == self.store.name
        self.lost.append((file, start, end))

    def left_overs(self) -> LeftOvers:
        return LeftOvers(self.outlet, Fetcher([self.store], self.chain, "7"), self.notices.append)

    def begin(self, file: WalFile = FILE) -> OpenSegment:
        segment = self.wal.begin(file, self.size)
        self.wal.tell()
        return segment

    def grow(self, segment: OpenSegment, data: bytes) -> None:
        segment.append(data, self.clock.monotonic())
        segment.ended = segment.whole
        self.wal.tell()

    async def finish(self, segment: OpenSegment) -> None:
        """The finished object is stored, by whomever."""
        name = wal_key(segment.file)
        body = self.parcel(name, bytes(segment.data)).body
        await self.store.store.put(name, body)
        self.shipper.segment_stored(segment.file)

    def told(self, kind: type[Notice]) -> list[Notice]:
        return [notice for notice in self.notices if isinstance(notice, kind)]

    async def names(self, file: WalFile = FILE) -> list[TailName]:
        """Tails of the segment that are stored."""
        keys = [info.key async for info in self.store.store.list(tail_folder(file))]
        return [name for name in map(TailName.parse, keys) if name is not None]

    async def ranges(self, file: WalFile = FILE) -> list[tuple[int, int]]:
        return sorted((name.start, name.end) for name in await self.names(file))

    async def recover(self, file: WalFile = FILE) -> Stitched:
        """What the tails that are stored give, as a restore joins them: one that vanishes means looking again."""
        while True:
            with suppress(ObjectMissing):
                return stitch(file, [await self._part(name) for name in await self.names(file)], self.size)

    async def _part(self, name: TailName) -> TailPart:
        body = await self.store.store.get(name.key)
        _, plain = self.chain.decode(Expected(name.key, "7"), body.chunks())
        return TailPart(name, bytes(plain[:HASH_SIZE]), bytes(plain[HASH_SIZE:]))


async def founded(name: str = "memory") -> Faulty:
    """A store that holds a repository."""
    store = MemoryStore(name)
    await store.put(REPOSITORY, MemoryBody([b"{}"]))
    return Faulty(store)


@asynccontextmanager
async def running(tails: Tails) -> AsyncIterator[asyncio.Task[None]]:
    """The shipper, and what brings a destination up again. Gives the shipper's task."""
    tasks = [asyncio.create_task(tails.shipper.run()), asyncio.create_task(tails.uploader.run())]
    try:
        async with asyncio.timeout(20):
            yield tasks[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def passing() -> StoreError:
    return StoreError("the store does not answer", passing=True)


def check_order(it: Tails) -> None:
    """What was said is per segment in order and without a hole."""
    reached: dict[WalFile, int] = {}
    for file, start, end in it.stored:
        assert start == reached.get(file, file.start(it.size))
        assert end > start
        reached[file] = end


async def check_recoverable(it: Tails, segment: OpenSegment) -> None:
    """What was said can be read back."""
    said = max((end for file, _, end in it.stored if file == segment.file), default=segment.start)
    joined = await it.recover(segment.file)
    assert segment.start + joined.reach >= said
    assert joined.content[: joined.reach] == segment.data[: joined.reach]


class Held(Faulty):
    """Tails are stored, and the answers wait until the test lets them go."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.waiting: dict[str, asyncio.Future[None]] = {}
        self.open = False

    async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
        self.calls.append(("put", key))
        turn = asyncio.get_running_loop().create_future()
        if not self.open:
            self.waiting[key] = turn
        await self.store.put(key, body, replace=replace, keep_until=keep_until)
        if not self.open:
            await turn


def stored_keys(it: Tails) -> list[str]:
    assert isinstance(it.store.store, MemoryStore)
    return [key for key in it.store.store._objects if key.startswith("tail/")]


async def tails(**options: object) -> tuple[Tails, HandClock]:
    clock = HandClock()
    return Tails(await founded(), clock, **options), clock  # type: ignore[arg-type]  # fields of Tails, as given
