"""Plaintext in, durable object out: encode once in a worker thread, then upload.

At most as many objects as the gate has places are held in memory, whatever waits behind them; the freshest data goes
first. A place is given back as soon as the object is safe *somewhere*: what another destination is still owed is copied
from there.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

from handlers.body import collect
from handlers.outlet import Parcel
from handlers.upload import Uploader
from pipeline.catalog import conflict_key, kind_of, wal_key
from pipeline.chain import Chain
from pipeline.contracts import Buffer, Clock, Shipped, Source
from pipeline.dispatcher import Gate
from pipeline.errors import ObjectConflict, StoreError
from pipeline.events import BackupReady, Event, FileSetAside, HistoryReady, Priority, SideFileReady
from pipeline.objects import TRAILER_SIZE, read_header

#: Seconds that a destination has once another one has an object: longer, and a service goes on without it.
STALLED = 10.0

#: Names whose fingerprint is remembered, so that another source's bytes can be compared.
MOST_REMEMBERED = 10_000


class Shipper:
    """Ships objects; ``ship`` is a ``pipeline.contracts.Ship``, ``carry`` a handler for the dispatcher.

    With ``patient`` a required destination that is down is waited for, for as long as it takes (the service); without,
    it is a StoreError (a command that a person waits for).
    """

    def __init__(
        self, chain: Chain, uploader: Uploader, *, gate: Gate, workers: Executor, clock: Clock, patient: bool
    ) -> None:
        self._chain = chain
        self._uploader = uploader
        self._gate = gate
        self._workers = workers
        self._clock = clock
        self._patient = patient
        self._fingerprints: OrderedDict[str, str] = OrderedDict()

    def fingerprint(self, name: str) -> str | None:
        """Of an object of WAL that was encoded lately; None if it is not remembered."""
        return self._fingerprints.get(name)

    async def ship(
        self, name: str, plain: Buffer, *, backup: str = "", encoded: Callable[[], None] | None = None
    ) -> Shipped:
        """Store an object made here. See ``pipeline.contracts.Ship``."""
        shipped = await self._send(name, lambda: plain, Priority.PART, backup, encoded)
        if (owed := self._uploader.owed(name)) is not None:
            await owed
        return shipped

    async def carry(self, source: Source, event: Event) -> asyncio.Future[None] | None:
        """Ship a file that a source has. A ``pipeline.dispatcher.Handle``."""
        if isinstance(event, BackupReady):
            raise TypeError("a base backup is not one object")
        priority = Priority.HISTORY if isinstance(event, HistoryReady) else Priority.WAL
        name = wal_key(event.file)
        await self._send(name, lambda: source.read(event), priority, "")
        return self._uploader.owed(name)

    async def set_aside(
        self, source: Source, event: HistoryReady | SideFileReady, conflict: ObjectConflict
    ) -> asyncio.Future[None] | None:
        """Ship it under a key of its own, since its name is taken: nobody waits for it, and nothing of it is lost.

        What is there may be another server's of the same timeline number, or this one's from before it was rolled back:
        only people can tell. Returns what ``carry`` does.
        """
        name = conflict_key(event.file, conflict.ours)
        await self._send(name, lambda: source.read(event), Priority.WAL, "")
        self._uploader.notify(
            FileSetAside(
                event.file,
                name,
                f"{conflict.fact}; fingerprint {conflict.theirs[:16]}, and that of {event.file} from the source"
                f" {source.name} is {conflict.ours[:16]}",
                f"two servers have used the number of timeline {event.file.timeline}: restores go by the stored file,"
                f" and this one is kept as {name}. Find out which server is right: docs/durability.md, Two promotions",
            )
        )
        return self._uploader.owed(name)

    async def _send(
        self, name: str, read: Callable[[], Buffer], priority: Priority, backup: str,
        encoded: Callable[[], None] | None = None,
    ) -> Shipped:  # fmt: skip
        """Store it somewhere at least; impatient shippers: at every required destination."""
        while self._patient:
            # Nothing is read and encoded for nobody: an outage must not keep the processors busy.
            await self._uploader.reachable()
            async with self._gate.place(priority):
                if self._uploader.is_reachable:
                    return await self._encode_and_store(name, read, backup, encoded)
        async with self._gate.place(priority):
            shipped = await self._encode_and_store(name, read, backup, encoded)
        if missing := self._uploader.missing(name):
            raise StoreError(
                f"{name} could not be stored at {', '.join(missing)}, which is required",
                hint="see the message about that destination above; nothing was acknowledged",
            )
        return shipped

    async def encode(self, name: str, plain: Buffer, *, workers: Executor | None = None) -> Parcel:
        """Only encode, in a worker thread: for whoever delivers by himself. The caller closes the parcel's body."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(workers or self._workers, self._encode, name, lambda: plain, "")

    async def _encode_and_store(
        self, name: str, read: Callable[[], Buffer], backup: str, encoded: Callable[[], None] | None
    ) -> Shipped:
        loop = asyncio.get_running_loop()
        parcel = await loop.run_in_executor(self._workers, self._encode, name, read, backup)
        if encoded is not None:
            encoded()
        if kind_of(name) == "wal":
            self._fingerprints[name] = parcel.header.fingerprint
            if len(self._fingerprints) > MOST_REMEMBERED:
                self._fingerprints.popitem(last=False)
        try:
            await self._uploader.store(parcel, patience=STALLED if self._patient else None)
        finally:
            parcel.body.close()
        return Shipped(name, parcel.body.size, parcel.digest)

    def _encode(self, name: str, read: Callable[[], Buffer], backup: str) -> Parcel:
        """Read, compress, encrypt, checksum: one hop to a thread for all of it."""
        front = trailer = b""

        def watched() -> Iterator[Buffer]:
            nonlocal front, trailer
            for piece in self._chain.encode(name, read(), backup=backup, created=self._clock.now()):
                front = front or bytes(piece)
                trailer = bytes(piece[-TRAILER_SIZE:])
                yield piece

        body = collect(watched())
        header, _ = read_header(name, front)
        return Parcel(header, body, trailer.hex())
