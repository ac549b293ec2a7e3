"""Answers what a recovering PostgreSQL asks for: one file of the plan's lineage, whole, or "absent".

A segment that is not stored finished is made of its tails, at each request anew: they grow while a standby follows. The
same answers for the feed of a restore that is under way and for the ``fetch-wal`` verb.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.catalog import wal_key
from pipeline.contracts import Buffer, Fetch
from pipeline.errors import IntegrityError, ObjectMissing, StoreError
from pipeline.lineage import Lineage, Serve, Stretch
from pipeline.tail import Stitched
from pipeline.wal import Lsn, WalFile, WalKind
from pipeline.walrecords import Payload

#: No history of ten thousand timelines is longer.
_MOST_HISTORY = 1 << 20
#: How often a segment is looked for whose tails go while they are read.
_LOOKS = 5

_GONE = "a lifecycle rule or a person may have deleted it; another plan will say what can be reached now"


class WalServer:
    """What of the stored WAL belongs to one lineage.

    ``planned``: the segments that were stored when the restore was planned. "Absent" would end recovery in front of one
    that has vanished since, and promote without what follows, so that is an error.
    """

    def __init__(self, fetch: Fetch, lineage: Lineage, planned: Sequence[Stretch] = ()) -> None:
        self._fetch = fetch
        self._lineage = lineage
        self._planned = planned

    async def read(self, name: str) -> Buffer | None:
        """The file of that name, or None if it is absent everywhere or no part of the lineage.

        A segment that contains a fork of the lineage is cut at it, with zeros behind. One that is not stored finished
        is joined from its tails, as they are at that moment, with zeros behind. Any stored history is given:
        the plan's timeline is a number, so the server follows none of them; it asks for those above its own only to
        find the first number that is free for its next timeline. Raises StoreError and IntegrityError.
        """
        file = WalFile.parse(name)
        if file is None:
            return None
        if file.kind is WalKind.HISTORY:
            history = await self._get(file, _MOST_HISTORY)
            if history is None and file.timeline == self._lineage.timeline and len(self._lineage.legs) > 1:
                raise IntegrityError(f"{name} was there when the restore was planned, and is gone", hint=_GONE)
            return history
        serve = self._lineage.serve(file)
        if serve is None:
            return None
        plain = await self._segment(file, serve)
        if plain is not None and serve.cut is not None:
            plain[serve.cut :] = bytes(len(plain) - serve.cut)
        return plain

    async def pour(self, name: str, use: Callable[[Iterator[Buffer]], None]) -> bool:
        """Hand a segment that is stored finished, and is all of it part of the lineage, to ``use`` piece by piece.

        See ``Fetch.stream``: what was handed over is right only if this returns True. False: it is another file, or
        stored in another way, or nowhere, which is for ``read``. Raises StoreError, IntegrityError, and what ``use``
        does.
        """
        file = WalFile.parse(name)
        if file is None or file.kind is not WalKind.SEGMENT:
            return False
        serve = self._lineage.serve(file)
        if serve is None or serve.cut is not None:
            return False
        try:
            await self._fetch.stream(wal_key(file), use, most=self._lineage.segment_size)
        except ObjectMissing:
            return False
        return True

    async def _segment(self, file: WalFile, serve: Serve) -> bytearray | None:
        """The finished segment, or else what reaches furthest."""
        size = self._lineage.segment_size
        for _ in range(_LOOKS):
            if (plain := await self._whole(file)) is not None:
                return plain
            partial = await self._whole(serve.files[-1]) if len(serve.files) > 1 else None
            if partial is not None and file.timeline != self._lineage.timeline:
                return partial  # complete up to the fork
            try:
                made = await self._fetch.tail(file, size)
            except ObjectMissing:
                continue
            # Tails go when the finished segment is there, and their listing may have come between the two.
            if made is None or made.reach < size:
                if (plain := await self._whole(file)) is not None:
                    return plain
                if made is not None and made.usable <= serve.begin:
                    made = None
            return await self._furthest(file, partial, made)
        raise StoreError(
            f"the tails of segment {file} went {_LOOKS} times while they were read, and it is not stored finished",
            passing=True,
        )

    async def _furthest(self, file: WalFile, partial: bytearray | None, made: Stitched | None) -> bytearray | None:
        """Of the last timeline's ``.partial`` and the tails, whichever has more records. Raises IntegrityError."""
        size = self._lineage.segment_size
        if partial is not None:
            if made is None:
                return partial
            ends = [await asyncio.to_thread(_end, content, file.start(size)) for content in (partial, made.content)]
            return partial if ends[0] > ends[1] else made.content
        planned = next((stretch for stretch in self._planned if stretch.holds(file, size)), None)
        reach = made.reach if made else 0
        if planned is not None and reach < (planned.tail or size):
            what = f"had {planned.tail} bytes in tails" if planned.tail else "was there"
            now = f"has {reach}" if reach else "is gone"
            raise IntegrityError(
                f"segment {file} {what} when the restore was planned, and {now}",
                hint=_GONE,
            )
        return made.content if made else None

    async def _whole(self, file: WalFile) -> bytearray | None:
        """A file as long as a segment. Raises IntegrityError."""
        size = self._lineage.segment_size
        plain = await self._get(file, size)
        if plain is not None and len(plain) != size:
            raise IntegrityError(f"segment {file} holds {len(plain)} bytes, not {size}")
        return plain

    async def _get(self, file: WalFile, most: int) -> bytearray | None:
        try:
            return (await self._fetch(wal_key(file), most=most)).plain
        except ObjectMissing:
            return None


def _end(content: Buffer, start: Lsn) -> Lsn:
    """Behind the last complete record of a segment; its start, if there is none. Runs in a thread."""
    try:
        last = Payload(content, start).last_record()
    except IntegrityError:
        return start
    return last.end if last else start


async def deliver(server: WalServer, name: str, path: Path) -> bool:
    """Put the file at ``path``, whole or not at all. False if it is absent.

    Renamed into place, so that PostgreSQL never sees a part of it. Not synced: PostgreSQL does that before it relies on
    a restored segment, and after a crash it asks again. Raises StoreError, IntegrityError, OSError.
    """
    content = await server.read(name)
    if content is None:
        return False
    await asyncio.to_thread(_place, path, content)
    return True


def _place(path: Path, content: Buffer) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
