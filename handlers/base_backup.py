"""A base backup: the server's stream in, parts, index and manifest out, and backup_info when all of it is safe.

    messages → cut into parts of 16 MiB → ship (at most three at a time) → digests in order
            ↘ read as tar → index lines → ship
    then the manifest, while the WAL is waited for; when all of it is safe, backup_info: without it there is no backup

Memory: 16 MiB for the part that is being filled, of each archive that is open (where several workers read files, that
is one for each of them), and for each of the parts in flight, beside what ``ship`` makes of these; and the manifest,
which has to be one object and so is held whole: about 150 bytes per file of the cluster.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from pipeline.backup import (
    ArchiveBegan,
    ArchiveData,
    ArchiveEnded,
    ArchiveInfo,
    BackupInfo,
    BackupMessage,
    BackupStarted,
    BackupStopped,
    ManifestData,
    area_of,
)
from pipeline.catalog import PART_SIZE, index_key, info_key, manifest_key, part_key
from pipeline.contracts import Buffer, Clock, Ship, Shipped
from pipeline.errors import ObjectConflict, SourceError, StoreError, WalshipError
from pipeline.index import slices
from pipeline.manifest import check_manifest
from pipeline.objects import MAX_PLAIN
from pipeline.tar import Entry, TarReader
from pipeline.wal import Lsn

#: Parts that may be under way at once: while two are compressed, one is stored, which is waiting for a disk mostly.
IN_FLIGHT = 3

#: Plaintext bytes of one index object, about.
INDEX_SIZE = 4 << 20

#: Bytes between two reports of progress.
_REPORT_EVERY = 1 << 20


class WalSafe(Protocol):
    """How a backup waits for the WAL that makes it consistent."""

    async def __call__(self, start: Lsn, stop: Lsn, timeline: int, /) -> None:
        """Returns once all WAL from ``start`` to ``stop`` is durable at every required destination.

        ``timeline`` is that of ``stop``. Raises WalshipError when it waited too long.
        """
        ...


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where a backup comes from."""

    #: Decimal digits.
    system_id: str
    #: As ``server_version_num`` says it: 170011.
    server_version: int
    #: Bytes.
    segment_size: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a backup has come."""

    #: Bytes of plaintext taken from the server.
    done: int
    #: Bytes the server expected at the start; 0 if unknown. The data may have grown since.
    estimate: int
    #: ``base``, a tablespace's oid, or what is being done behind the archives: ``manifest``, ``wal``.
    current: str


async def take(
    messages: AsyncIterator[BackupMessage],
    *,
    ship: Ship,
    cluster: Cluster,
    wal_safe: WalSafe,
    clock: Clock,
    label: str = "walship",
    report: Callable[[Progress], None] = lambda _: None,
    in_flight: int = IN_FLIGHT,
    parent: BackupInfo | None = None,
) -> BackupInfo:
    """Take one base backup to the end and return what was written as its backup_info.

    ``parent``: the backup that an incremental one builds on. ``messages`` are closed in any case, which ends the backup
    on the server. If anything fails, the error of its cause is raised, there is no backup_info, and what is stored
    already stays behind, named in the hint. Where it is backup_info that a store failed to take, another may have it.
    """
    backup = _Backup(ship, cluster, clock, label, report, in_flight, parent)
    try:
        async for message in messages:
            await backup.add(message)
        return await backup.finish(wal_safe)
    except WalshipError as error:
        if backup.begun:
            left = f"no backup was made; what was stored below base/{backup.name}/ is of no use and may be deleted"
            if backup.ending and isinstance(error, StoreError):  # one destination may have taken it, and another not
                left = f"{backup.name} may be complete all the same, at some destination: `walship list` tells"
            error.hint = f"{error.hint.removesuffix('.')}; {left}" if error.hint else left
        raise
    finally:
        await backup.abandon()
        if isinstance(messages, AsyncGenerator):
            await messages.aclose()


class _Backup:
    """One backup under way."""

    def __init__(
        self, ship: Ship, cluster: Cluster, clock: Clock, label: str, report: Callable[[Progress], None],
        in_flight: int, parent: BackupInfo | None,
    ) -> None:  # fmt: skip
        self.name = ""
        #: Our name belongs to another backup, which must not be called useless.
        self._theirs = False
        #: Whether backup_info is, or was, on its way.
        self.ending = False
        self._id = secrets.token_hex(16)
        self._cluster = cluster
        self._clock = clock
        self._label = label
        self._report = report
        self._ship = ship
        self._in_flight = in_flight
        self._parent = parent
        self._started: BackupStarted | None = None
        self._stopped: BackupStopped | None = None
        self._began: datetime | None = None
        self._ended: datetime | None = None
        self._archives: list[_Archive] = []
        self._index = bytearray()
        self._index_digests: list[str] = []
        self._manifest = bytearray()
        self._done = 0
        self._reported = 0
        self._stored = 0
        #: Objects under way, oldest first, each with the list that its digest belongs in.
        self._under_way: deque[tuple[asyncio.Task[Shipped], list[str]]] = deque()
        #: Parts that were sent: room for others.
        self._spare: list[bytearray] = []

    @property
    def begun(self) -> bool:
        """Whether anything of ours may be stored below our name."""
        return bool(self.name) and not self._theirs

    async def add(self, message: BackupMessage) -> None:
        """Take the next message of the stream."""
        if isinstance(message, ArchiveData):
            await self._data(message)
        elif isinstance(message, ArchiveEnded):
            await self._end(self._archive(message.archive))
        elif isinstance(message, ManifestData):
            await self._end_archives()
            if len(self._manifest) + len(message.data) > MAX_PLAIN:
                raise SourceError(
                    f"the backup_manifest is larger than {MAX_PLAIN} bytes, the most that an object holds"
                )
            self._manifest += message.data
        elif isinstance(message, ArchiveBegan):
            if area_of(message.archive) == message.archive:  # workers' archives are mixed, others follow one another
                await self._end_archives()
            self._archives.append(_Archive(message.archive))
            self._tell(message.archive)
        elif isinstance(message, BackupStarted):
            self._started = message
            now = self._clock.now()
            self._began = min(message.at or now, now)
            # A second backup in the same second has the same name and another id: its first part is a conflict. So the
            # name tells when we began: a second attempt at a backup made long ago must not meet what the first left.
            self.name = f"base_{now:%Y%m%d_%H%M%S}"
        else:
            await self._end_archives()
            self._stopped = message
            now = self._clock.now()
            self._ended = min(message.at or now, now)

    async def finish(self, wal_safe: WalSafe) -> BackupInfo:
        """What is still to come; and once all of it and the WAL are safe, backup_info, which makes it a backup."""
        started, stopped, began, ended = self._started, self._stopped, self._began, self._ended
        if started is None or stopped is None or began is None or ended is None or not self._archives:
            raise SourceError("the base backup ended before it was complete", hint="the server's log may tell why")
        # On its way since the server ended the backup: it need not be looked for only when all else is done.
        safe = asyncio.create_task(_wait(wal_safe, started.start_lsn, stopped))
        try:
            if self._index:
                await self._send(index_key(self.name, self._index_number()), self._index, self._index_digests)
                self._index = bytearray()
            manifest: list[str] = []
            if self._manifest:
                self._tell("manifest")
                # A manifest of a million files takes a while to hash.
                await asyncio.to_thread(
                    check_manifest, self._manifest, system_id=self._cluster.system_id,
                    start=started.start_lsn, stop=stopped.stop_lsn, timeline=stopped.timeline,
                )  # fmt: skip
                await self._send(manifest_key(self.name), self._manifest, manifest)
                self._manifest = bytearray()
            await self._settle()
            self._tell("wal")
            await safe
        finally:
            safe.cancel()
            await asyncio.gather(safe, return_exceptions=True)
        info = BackupInfo(
            name=self.name,
            id=self._id,
            kind="incremental" if self._parent else "full",
            system_id=self._cluster.system_id,
            server_version=self._cluster.server_version,
            segment_size=self._cluster.segment_size,
            timeline=stopped.timeline,
            start_lsn=started.start_lsn,
            stop_lsn=stopped.stop_lsn,
            started=began,
            stopped=ended,
            tablespaces=started.tablespaces,
            archives=tuple(archive.info() for archive in self._archives),
            index=tuple(self._index_digests),
            manifest=manifest[0] if manifest else "",
            stored_size=self._stored,
            label=self._label,
            parent=self._parent.name if self._parent else "",
            parent_id=self._parent.id if self._parent else "",
        )
        self.ending = True
        await self._ship(info_key(self.name), info.encode(), backup=self._id)
        return info

    async def abandon(self) -> None:
        """Stop what is under way, if anything is, and wait until it has stopped."""
        tasks = [task for task, _ in self._under_way]
        self._under_way.clear()
        for task in tasks:
            task.cancel()
        # Whatever they end with: the error that brought us here is the one to tell.
        await asyncio.gather(*tasks, return_exceptions=True)

    def _archive(self, name: str) -> _Archive:
        """The open archive of that name; the last one for an empty name."""
        for archive in reversed(self._archives):
            if not archive.closed and name in ("", archive.name):
                return archive
            if not name:
                break
        raise SourceError("the base backup holds data that belongs to no archive")

    async def _data(self, message: ArchiveData) -> None:
        archive = self._archive(message.archive)
        for item in archive.tar.feed(message.data):
            if isinstance(item, Entry):
                await self._list(archive, item)
        view = memoryview(message.data)
        whole = len(view) == PART_SIZE or (message.last and 0 < len(view) < PART_SIZE)
        if whole and not archive.filled:
            await self._part(archive, view, message.free)  # a part as it is: nothing is copied
        else:
            await self._gather(archive, view)
            if message.free is not None:
                message.free()
        self._done += len(message.data)
        if self._done - self._reported >= _REPORT_EVERY:
            self._tell(archive.name)

    async def _gather(self, archive: _Archive, view: memoryview) -> None:
        while view:
            if archive.filling is None:
                # Used again and again: to get 16 MiB anew from the kernel takes longer than to fill it.
                archive.filling = self._spare.pop() if self._spare else bytearray(PART_SIZE)
            taken = min(PART_SIZE - archive.filled, len(view))
            archive.filling[archive.filled : archive.filled + taken] = view[:taken]
            archive.filled += taken
            view = view[taken:]
            if archive.filled == PART_SIZE:
                await self._gathered(archive)

    async def _list(self, archive: _Archive, entry: Entry) -> None:
        for line in slices(archive.name, entry):
            self._index += line.encode()
        if len(self._index) >= INDEX_SIZE:
            full, self._index = self._index, bytearray()
            await self._send(index_key(self.name, self._index_number()), full, self._index_digests)

    def _index_number(self) -> int:
        under_way = sum(digests is self._index_digests for _, digests in self._under_way)
        return len(self._index_digests) + under_way + 1

    async def _end_archives(self) -> None:
        for archive in self._archives:
            await self._end(archive)

    async def _end(self, archive: _Archive) -> None:
        if not archive.closed:
            archive.tar.finish()
            archive.closed = True
            if archive.filled:
                await self._gathered(archive)

    async def _gathered(self, archive: _Archive) -> None:
        """Send what was gathered."""
        full, filled = archive.filling, archive.filled
        assert full is not None
        archive.filling, archive.filled = None, 0
        await self._part(archive, memoryview(full)[:filled], lambda: self._spare.append(full))

    async def _part(self, archive: _Archive, plain: memoryview, free: Callable[[], None] | None) -> None:
        archive.begun += 1
        await self._send(part_key(self.name, archive.name, archive.begun), plain, archive.parts, free)

    async def _send(self, name: str, plain: Buffer, digests: list[str], free: Callable[[], None] | None = None) -> None:
        """Ship behind the others. Waits while too much is under way, and so slows the server down."""
        while len(self._under_way) >= self._in_flight:
            await self._settle_oldest()
        self._under_way.append((asyncio.create_task(self._store(name, plain, free)), digests))

    async def _store(self, name: str, plain: Buffer, free: Callable[[], None] | None) -> Shipped:
        """``free`` is called once ``plain`` is not needed any more: its sender may wait for that, and we for him."""

        def encoded() -> None:
            nonlocal free
            if free is not None:
                free()
            free = None

        try:
            return await self._ship(name, plain, backup=self._id, encoded=encoded)
        except ObjectConflict as error:
            self._theirs = True
            raise ObjectConflict(
                f"{name} exists already, from another backup that began in the same second: {error.fact}",
                hint="take the backup again",
            ) from None
        finally:
            encoded()

    async def _settle_oldest(self) -> None:
        """In order of sending, so that digests are in order too."""
        task, digests = self._under_way[0]
        shipped = await task
        self._under_way.popleft()
        digests.append(shipped.digest)
        self._stored += shipped.size

    async def _settle(self) -> None:
        while self._under_way:
            await self._settle_oldest()

    def _tell(self, current: str) -> None:
        self._reported = self._done
        self._report(Progress(self._done, self._started.estimate if self._started else 0, current))


async def _wait(wal_safe: WalSafe, start: Lsn, stopped: BackupStopped) -> None:
    await wal_safe(start, stopped.stop_lsn, stopped.timeline)


class _Archive:
    """One tar stream under way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tar = TarReader(name)
        #: The part that is gathered, if any is, and how much of it is there.
        self.filling: bytearray | None = None
        self.filled = 0
        #: Parts sent, and the digests of those that are safe.
        self.begun = 0
        self.parts: list[str] = []
        self.closed = False

    def info(self) -> ArchiveInfo:
        return ArchiveInfo(self.name, self.tar.size, tuple(self.parts))
