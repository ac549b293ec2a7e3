"""What the stream has announced and is not told done: where its bytes are, in memory or again on the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from infra.postgres.walstream import fetch_segment
from infra.settings import Settings
from pipeline.contracts import Buffer
from pipeline.errors import SourceError
from pipeline.events import Event, HistoryReady, SegmentReady
from pipeline.openwal import OpenSegment
from pipeline.wal import WalFile

#: Segments that are fetched once more, because they were stored somewhere and are lost there, and held at a time.
_MOST_FETCHED = 1


class Announced:
    """The source's events and their bytes."""

    def __init__(self, settings: Settings, segment_size: int) -> None:
        #: Where to fetch again what was let go.
        self.server = settings
        self._size = segment_size
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        #: Whole segments whose buffer is held.
        self._held: dict[WalFile, OpenSegment] = {}
        self._histories: dict[WalFile, bytes] = {}
        self._fetched: dict[WalFile, bytearray] = {}
        self._places = asyncio.Semaphore(_MOST_FETCHED)

    def segment(self, segment: OpenSegment) -> None:
        """A segment is whole."""
        self._held[segment.file] = segment
        self._queue.put_nowait(SegmentReady("stream", segment.file, len(segment.data)))

    def history(self, timeline: int, content: bytes) -> None:
        """A timeline's first bytes are stored: its history may follow."""
        file = WalFile.history(timeline)
        self._histories[file] = content
        self._queue.put_nowait(HistoryReady("stream", file, len(content)))

    async def events(self) -> AsyncIterator[Event]:
        """In the order in which they happened; without an end."""
        while True:
            yield await self._queue.get()

    async def ready(self, event: Event) -> None:
        """Fetch a segment again whose buffer was released. SourceError if the server does not have it any more."""
        if not isinstance(event, SegmentReady) or event.file in self._held or event.file in self._fetched:
            return
        await self._places.acquire()
        try:
            self._fetched[event.file] = await fetch_segment(self.server, event.file, self._size)
        except BaseException:
            self._places.release()
            raise

    def read(self, event: Event) -> Buffer:
        """See ``pipeline.contracts.Source``. Called from a worker thread."""
        assert isinstance(event, SegmentReady | HistoryReady)
        if isinstance(event, HistoryReady):
            content: Buffer | None = self._histories.get(event.file)
        else:
            held = self._held.get(event.file)
            content = held.data if held is not None else self._fetched.get(event.file)
        if content is None:
            raise SourceError(f"{event.file} of the stream is not in memory any more")
        return content

    def release(self, event: Event) -> OpenSegment | None:
        """Let go of a segment's buffer; returns the segment if it was held. Idempotent."""
        if not isinstance(event, SegmentReady):
            return None
        if self._fetched.pop(event.file, None) is not None:
            self._places.release()
        return self._held.pop(event.file, None)

    def forget(self, event: Event) -> None:
        """It is done. Idempotent."""
        if isinstance(event, HistoryReady):
            self._histories.pop(event.file, None)
