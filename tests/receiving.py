"""The stream source with somebody behind it who plays the shippers: stores what comes, or does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from infra.clock import SystemClock
from infra.postgres.throwaway import ThrowawayServer
from infra.settings import Settings
from infra.sources.receiver import Receiver
from pipeline.durable import Durable
from pipeline.events import HistoryReady, Notice, SegmentReady
from pipeline.lineage import Lineage
from pipeline.openwal import OpenSegment, OpenWal
from pipeline.resume import GoOn, go_on
from pipeline.runs import Runs
from pipeline.wal import Lsn, WalFile

SEGMENT = 1 << 20
N = TypeVar("N", bound=Notice)


def settings_for(*servers: ThrowawayServer) -> Settings:
    """The first that is primary."""
    return Settings(
        POSTGRES_HOST=",".join(server.host for server in servers),
        POSTGRES_PORT=",".join(str(server.port) for server in servers),
        POSTGRES_USERNAME="postgres",
    )


class Repository:
    """What is stored; outlives the receivers."""

    def __init__(self) -> None:
        self.segments: dict[WalFile, bytes] = {}
        #: The longest beginning of each open segment.
        self.tails: dict[WalFile, bytes] = {}
        self.histories: dict[int, bytes] = {}
        #: Names in the order in which they were stored; an open segment by its first byte.
        self.order: list[str] = []

    async def resume(self, lineage: Lineage, after: int = 0) -> GoOn | None:
        timelines = {file.timeline for file in self.segments}
        stored = {
            t: Runs.of(file.start(SEGMENT) // SEGMENT for file in self.segments if file.timeline == t)
            for t in timelines
        }
        return go_on(lineage, stored, begin=None, after=after)

    def timeline(self, number: int) -> list[WalFile]:
        return sorted(file for file in self.segments if file.timeline == number)


class Receiving:
    """One receiver, running; ``storing`` and ``histories`` are doors that can be shut."""

    def __init__(self, settings: Settings, repository: Repository, system_id: str, *, grace: float = 10.0) -> None:
        self.repository = repository
        self.notices: list[Notice] = []
        self.wal = OpenWal()
        self.storing, self.storing_histories = asyncio.Event(), asyncio.Event()
        self.storing.set()
        self.storing_histories.set()
        self._names: list[str] = []
        #: Most segments that were in memory at a time.
        self.most = 0
        self.receiver = Receiver(
            settings, system_id=system_id, segment_size=SEGMENT, wal=self.wal, resume=repository.resume,
            make_durable=lambda origin: Durable({"store": True}, origin, notify=self.notices.append),
            clock=SystemClock(), notify=self.notices.append, grace=grace, pauses=(0.1, 0.3),
        )  # fmt: skip

    @property
    def durable(self) -> Durable:
        assert self.receiver.durable is not None
        return self.receiver.durable

    def told(self, kind: type[N]) -> list[N]:
        return [notice for notice in self.notices if isinstance(notice, kind)]

    async def until(self, condition: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
        """Poll; fails with what was told."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {timeout:g} s; told: {self.notices[-12:]}"
            assert not self._task.done(), f"{what}: the receiver has ended: {self._task}"
            await asyncio.sleep(0.01)

    async def caught_up(self, server: ThrowawayServer) -> Lsn:
        """All that the server has written is durable here."""
        end = Lsn.parse((await ask(server, "select pg_current_wal_flush_lsn()::text"))[0][0])
        await self.until(lambda: self.receiver.durable is not None and self.stored_to() >= end, f"{end} is stored")
        return end

    def stored_to(self) -> Lsn:
        return self.durable.reached()["store"]

    def announced(self) -> list[str]:
        """Names of what was announced, in order."""
        return self._names

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled() and (failure := self._task.exception()) is not None:
            raise failure

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.receiver.run())
            group.create_task(self._store_segments())
            group.create_task(self._store_tails())
            group.create_task(self._measure())

    async def _store_segments(self) -> None:
        repository, receiver = self.repository, self.receiver
        async for event in receiver.events():
            assert isinstance(event, SegmentReady | HistoryReady)
            self._names.append(event.file.name)
            await (self.storing if isinstance(event, SegmentReady) else self.storing_histories).wait()
            await receiver.ready(event)
            content = bytes(await asyncio.to_thread(receiver.read, event))
            repository.order.append(event.file.name)
            if isinstance(event, HistoryReady):
                repository.histories[event.file.timeline] = content
                await receiver.done(event)
                receiver.report_soon()
                continue
            assert event.file not in repository.segments, "announced twice"
            repository.segments[event.file] = content
            start = event.file.start(SEGMENT)
            receiver.stored("store", event.file, start, start + SEGMENT)
            receiver.stored_somewhere(event)
            await receiver.done(event)

    async def _store_tails(self) -> None:
        """Each open end, as soon as it grows: no interval."""
        version = -1
        while True:
            version = await self.wal.changed(version)
            if self.storing.is_set():
                for segment in list(self.wal.segments):
                    self._store_tail(segment)
            else:
                await self.storing.wait()
                version = -1

    async def _measure(self) -> None:
        version = -1
        while True:
            version = await self.wal.changed(version)
            self.most = max(self.most, len(self.wal.segments))

    def _store_tail(self, segment: OpenSegment) -> None:
        if segment.whole:
            return
        tails = self.repository.tails
        if segment.file not in tails and segment.filled:
            self.repository.order.append(segment.file.name)
        tails[segment.file] = bytes(segment.view(0, segment.filled))
        self.receiver.stored("store", segment.file, segment.start, segment.end)


async def ask(server: ThrowawayServer, sql: str) -> list[tuple[Any, ...]]:
    return await asyncio.to_thread(server.query, sql)
