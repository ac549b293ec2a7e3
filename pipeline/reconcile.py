"""Two sources of the same WAL: the one that has a segment first ships it, the other one's bytes are compared with it.

So nothing is encoded and uploaded twice, what one source misses is filled by the other and told, and bytes that differ
(a standby that archived a padded tail under its final name, a clone in the spool) never count as shipped.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.catalog import wal_key
from pipeline.contracts import Buffer, Source
from pipeline.dispatcher import Handle
from pipeline.errors import IntegrityError
from pipeline.events import Event, Notice, SegmentReady, SourcesDiffer
from pipeline.wal import WalFile

#: Segments that are remembered. The sources are never further apart, or the later one ships again: that is safe too.
MOST = 10_000


@dataclass(slots=True, eq=False)
class _First:
    """Who ships a segment."""

    source: str
    #: Resolved with the outcome of ``Handle`` once it is durable somewhere; cancelled if that failed.
    outcome: asyncio.Future[asyncio.Future[None] | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def failed(self) -> bool:
        if not self.outcome.done():
            return False
        owed = None if self.outcome.cancelled() else self.outcome.result()
        return self.outcome.cancelled() or (owed is not None and owed.done() and not _went_well(owed))


class Reconciler:
    """A ``pipeline.dispatcher.Handle`` around another one."""

    def __init__(
        self,
        handle: Handle,
        *,
        segment_size: int,
        fingerprint: Callable[[str, Buffer], str],
        shipped: Callable[[str], str | None],
        notify: Callable[[Notice], None],
    ) -> None:
        """``fingerprint`` of a name and its bytes; ``shipped``: that of an object shipped lately, None if unknown."""
        self._handle = handle
        self._size = segment_size
        self._fingerprint = fingerprint
        self._shipped = shipped
        self._notify = notify
        self._firsts: OrderedDict[WalFile, _First] = OrderedDict()
        #: (source, timeline) → number of the last segment that it announced.
        self._last: dict[tuple[str, int], int] = {}
        #: What a source has passed over: segment → the source.
        self._missed: dict[WalFile, str] = {}

    async def handle(self, source: Source, event: Event) -> asyncio.Future[None] | None:
        """See ``pipeline.dispatcher.Handle``. IntegrityError if the two sources have different bytes."""
        if not isinstance(event, SegmentReady):
            return await self._handle(source, event)
        self._notice_holes(source.name, event.file)
        while True:
            first = self._firsts.get(event.file)
            if first is None or first.failed or first.source == source.name:
                return await self._ship(source, event)
            await asyncio.wait([first.outcome])
            if not first.failed:
                return await self._compare(source, event, first)

    async def _ship(self, source: Source, event: SegmentReady) -> asyncio.Future[None] | None:
        first = self._firsts[event.file] = _First(source.name)
        while len(self._firsts) > MOST:
            self._firsts.popitem(last=False)
        try:
            owed = await self._handle(source, event)
        except BaseException:
            first.outcome.cancel()  # whoever waits ships it himself
            raise
        first.outcome.set_result(owed)
        if (late := self._missed.pop(event.file, None)) and late != source.name:
            self._tell_missed(late, event.file, source.name)
        return owed

    async def _compare(self, source: Source, event: SegmentReady, first: _First) -> asyncio.Future[None] | None:
        self._missed.pop(event.file, None)
        name = wal_key(event.file)
        expected = self._shipped(name)
        if expected is None:
            return await self._handle(source, event)
        found = await asyncio.to_thread(lambda: self._fingerprint(name, source.read(event)))
        if found == expected:
            return first.outcome.result()
        fact = f"{event.file} has other bytes in the source {source.name} than in {first.source}, which is shipped"
        hint = (
            "two servers write under one name: a standby with archive_mode=always archives unfinished segments, a clone"
            " its own; nothing was overwritten"
        )
        self._notify(SourcesDiffer(fact, hint))
        raise IntegrityError(fact, hint=hint)

    def _notice_holes(self, source: str, file: WalFile) -> None:
        """Sources announce the segments of a timeline in order: what one passes over it does not have."""
        number = file.start(self._size) // self._size
        key = (source, file.timeline)
        last = self._last.get(key)
        self._last[key] = max(number, number if last is None else last)
        if self._missed.get(file) == source:
            del self._missed[file]
        if last is None:
            return
        for skipped in range(max(last + 1, number - MOST), number):
            missed = WalFile.segment(file.timeline, skipped * self._size, self._size)
            first = self._firsts.get(missed)
            if first is not None and first.source != source:
                self._tell_missed(source, missed, first.source)
            elif first is None:
                self._missed[missed] = source

    def _tell_missed(self, source: str, file: WalFile, other: str) -> None:
        self._notify(
            SourcesDiffer(f"the source {source} passed over {file}, which {other} had", "nothing is lost; see its log")
        )


def _went_well(owed: asyncio.Future[None]) -> bool:
    return not owed.cancelled() and owed.exception() is None
