"""The parts of a backup, several at once: fetched, compared with backup_info, opened, and written where they belong.

Where a part begins in the middle of a file, the index tells which one. That is believed only until the part before has
been read: where each part ended and the next one began is compared at the end, so that all of them together were read
as the one tar stream that they are. Without an index the parts of an archive come one after another.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from handlers.to_the_end import ended
from handlers.unpack import Unpacker
from pipeline.backup import ArchiveInfo, BackupInfo
from pipeline.catalog import part_key
from pipeline.contracts import Buffer, Fetch
from pipeline.errors import IntegrityError, ObjectMissing
from pipeline.layout import Layout
from pipeline.tar import Inside, TarReader

#: Parts that are under way at once. Each holds what is stored of it, and a few hundred KB of plaintext.
_AT_ONCE = 4
#: Of these, those that are opened and written: more than there are processors would only wait for one another.
_WRITTEN_AT_ONCE = min(_AT_ONCE, max(2, os.cpu_count() or 2))


@dataclass(slots=True)
class _Seen:
    """How a part was read."""

    size: int
    first: Inside | None
    last: Inside | None
    began: bool
    zero_blocks: int
    whole_blocks: bool


class Parts:
    """Lays down the parts that are needed. ``unpackers``: one for each archive, by its name."""

    def __init__(
        self,
        backup: BackupInfo,
        fetch: Fetch,
        unpackers: Mapping[str, Unpacker],
        layout: Layout,
        *,
        part_size: int,
        progress: Callable[[str, int], None],
    ) -> None:
        self._backup = backup
        self._fetch = fetch
        self._unpackers = unpackers
        self._layout = layout
        self._part_size = part_size
        self._progress = progress
        self._turn = threading.Semaphore(_WRITTEN_AT_ONCE)
        self._seen: dict[tuple[str, int], _Seen] = {}
        #: Bytes of plaintext of the parts that were fetched.
        self.fetched = 0

    async def lay(self) -> None:
        """Returns once everything is written (not yet durable). When it raises, nothing writes any more."""
        jobs = iter(self._jobs())
        workers = [asyncio.create_task(self._work(jobs)) for _ in range(_AT_ONCE)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await ended(workers)
            for worker in workers:  # whatever they ended with: the error that brought us here is the one to tell
                if not worker.cancelled():
                    worker.exception()
        for archive in self._backup.archives:
            self._check(archive)
            self._unpackers[archive.name].finish()

    def _jobs(self) -> Iterator[Sequence[tuple[ArchiveInfo, int, str]]]:
        """Parts that have to be read one after another; the others of the list may be read at the same time."""
        for archive in self._backup.archives:
            parts = [(archive, number, digest) for number, digest in enumerate(archive.parts, 1)]
            if not self._backup.index:
                yield parts
                continue
            for part in parts:
                if (archive.name, part[1]) in self._layout.needed:
                    yield [part]
                else:
                    size = min(self._part_size, archive.size - (part[1] - 1) * self._part_size)
                    self._done(archive.name, part[1], size)

    async def _work(self, jobs: Iterator[Sequence[tuple[ArchiveInfo, int, str]]]) -> None:
        for job in jobs:
            reader: TarReader | None = None
            for archive, number, digest in job:
                reader = await self._part(archive, number, digest, reader)

    async def _part(self, archive: ArchiveInfo, number: int, digest: str, before: TarReader | None) -> TarReader:
        inside = self._layout.inside.get((archive.name, number))
        reader = before or TarReader(archive.name, start=(number - 1) * self._part_size, inside=inside)
        start, first = reader.size, reader.inside
        began, zero_blocks = reader.began, reader.zero_blocks

        def use(pieces: Iterator[Buffer]) -> None:
            with self._turn:
                self._unpackers[archive.name].unpack(reader, pieces)

        try:
            name = part_key(self._backup.name, archive.name, number)
            await self._fetch.into(name, use, digest=digest, backup=self._backup.id)
        except ObjectMissing as error:
            raise IntegrityError(
                f"{error.fact}: backup {self._backup.name} is not complete", hint="choose another one with --backup"
            ) from None
        size = reader.size - start
        self._seen[archive.name, number] = _Seen(
            size, first, reader.inside, reader.began and not began, reader.zero_blocks - zero_blocks,
            reader.between_blocks,
        )  # fmt: skip
        self.fetched += size
        self._done(archive.name, number, size)
        return reader

    def _done(self, archive: str, number: int, size: int) -> None:
        self._progress(archive, size - self._layout.kept.get((archive, number), 0))

    def _check(self, archive: ArchiveInfo) -> None:
        """All parts that were read, together, are the archive. Raises IntegrityError."""
        size = zeros = 0
        known = whole = True  # whether the part before was read
        last: Inside | None = None
        for number in range(1, len(archive.parts) + 1):
            seen = self._seen.get((archive.name, number))
            if seen is None:
                known, zeros = False, 0
                size = min(number * self._part_size, archive.size)
                continue
            if known and seen.first != last:
                raise IntegrityError(
                    f"part {number} of the archive {archive.name} does not go on where the one before it ends"
                )
            if zeros and (seen.began or seen.first):
                raise IntegrityError(f"the archive {archive.name} goes on in part {number}, behind its end")
            known, last, size, zeros = True, seen.last, size + seen.size, zeros + seen.zero_blocks
            whole = seen.whole_blocks
            if self._backup.index and number < len(archive.parts) and seen.size != self._part_size:
                raise IntegrityError(f"part {number} of the archive {archive.name} has {seen.size} bytes")
        if known and (zeros < 2 or last or not whole):
            raise IntegrityError(f"the archive {archive.name} is cut after {size} bytes")
        if size != archive.size:
            raise IntegrityError(
                f"the archive {archive.name} of {self._backup.name} has {size} bytes, not the {archive.size} that its"
                " backup_info says"
            )
