"""Answers what a recovering PostgreSQL asks for: one file of the plan's lineage, whole, or "absent".

The same answers for the feed of a restore that is under way and for the ``fetch-wal`` verb.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.catalog import wal_key
from pipeline.contracts import Buffer, Fetch
from pipeline.errors import IntegrityError, ObjectMissing
from pipeline.lineage import Lineage, Stretch
from pipeline.wal import WalFile, WalKind

#: No history of ten thousand timelines is longer.
_MOST_HISTORY = 1 << 20


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

        A segment that contains a fork of the lineage is cut at it, with zeros behind. Any stored history is given:
        the plan's timeline is a number, so the server follows none of them; it asks for those above its own only to
        find the first number that is free for its next timeline. Raises StoreError and IntegrityError.
        """
        file = WalFile.parse(name)
        if file is None:
            return None
        if file.kind is WalKind.HISTORY:
            return await self._get(file, _MOST_HISTORY)
        serve = self._lineage.serve(file)
        if serve is None:
            return None
        size = self._lineage.segment_size
        for stored in serve.files:
            plain = await self._get(stored, size)
            if plain is None:
                continue
            if len(plain) != size:
                raise IntegrityError(f"segment {stored} holds {len(plain)} bytes, not {size}")
            if serve.cut is not None:
                plain[serve.cut :] = bytes(size - serve.cut)
            return plain
        if any(stretch.holds(file, size) for stretch in self._planned):
            raise IntegrityError(
                f"segment {file} was there when the restore was planned, and is gone",
                hint="a lifecycle rule or a person may have deleted it; another plan will say what can be reached now",
            )
        return None

    async def _get(self, file: WalFile, most: int) -> bytearray | None:
        try:
            return (await self._fetch(wal_key(file), most=most)).plain
        except ObjectMissing:
            return None


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
