"""The stream in the service: the receiver, a tail shipper for each destination, and what is durable where.

Receiver ──> OpenWal ──> TailShipper per destination ──┐
   │ whole segments: dispatcher ──> uploader ──────────┴──> Durable ──> the flush position that PostgreSQL is told
   └──────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import structlog

from handlers.fetch import Fetcher
from handlers.outlet import Outlet, Parcel
from handlers.ship import Shipper
from handlers.tail import TailShipper
from handlers.tail_clean import LeftOvers
from infra.lagging import Lagging
from infra.overlap import check_overlap, refuse_demoted
from infra.sources.primary import leg_of
from infra.sources.receiver import Receiver
from infra.stored import look_at_stored
from infra.wiring import Shipping, Site
from pipeline.catalog import parse_wal_key
from pipeline.contracts import Buffer, Source
from pipeline.dispatcher import Handle
from pipeline.durable import Durable
from pipeline.errors import IntegrityError, ObjectConflict, ObjectMissing, StoreError
from pipeline.events import DestinationFailed, Event, GapClosed, GapOpened, Notice, ObjectStored, SegmentReady
from pipeline.lineage import Lineage
from pipeline.openwal import OpenWal
from pipeline.resume import GoOn, go_on
from pipeline.tail import tail_folder
from pipeline.wal import Lsn, WalFile, WalKind

log = structlog.get_logger()

#: Seconds between looks whether the newest tail is still there.
LOOK_EVERY = 5.0

#: Segments that are remembered to be the server's: as many as may wait for a destination that is away.
MOST_PROVEN = 200_000

#: Seconds between looks for tails that nobody needs any more: an earlier process was killed before it removed them.
CLEAN_EVERY = 3600.0


async def keep_clean(site: Site, shipping: Shipping) -> None:
    """Remove left-over tails at each destination, now and every hour. Runs until cancelled.

    A host that only writes cannot compare them with the finished segment: they stay until one that reads comes by.
    """
    left_overs = [
        LeftOvers(outlet, Fetcher([outlet.store], site.chain, site.facts.system_id), site.notify)
        for outlet in shipping.uploader.outlets
    ]
    told = ""
    while True:
        for each in left_overs:
            with suppress(StoreError, IntegrityError):  # whoever stores something there tells; nothing is deleted
                await site.keys.refresh(each.outlet.store)  # what earlier writers left lies under keys of theirs
                if site.keys.reads:
                    await each.clean()
        if (fact := site.keys.superseded()) and fact != told:
            told = fact
            log.warning("keys", error=fact, hint="restart it, with what opens the new ring: walship key list")
        await site.clock.sleep(CLEAN_EVERY)


class Streaming:
    """``run`` beside the dispatcher, which is given ``receiver`` as a source and ``around`` its handle.

    ``epoch`` is the number of the writer's lease; without one (a command that ships for a while) no tails are made.
    """

    def __init__(self, site: Site, shipping: Shipping, *, epoch: int | None) -> None:
        self._site = site
        self._uploader = shipping.uploader
        self._size = site.facts.segment_size
        self.wal = OpenWal()
        self.receiver = Receiver(
            site.settings,
            system_id=site.facts.system_id,
            segment_size=self._size,
            wal=self.wal,
            resume=self._resume,
            make_durable=self._make_durable,
            clock=site.clock,
            notify=site.notify,
        )
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tail")
        self._tails: dict[str, TailShipper] = {}
        if epoch is not None:
            self._tails = {
                outlet.name: self._tail_shipper(outlet, shipping.service, epoch) for outlet in self._uploader.outlets
            }
        self._lagging = Lagging(site, self.receiver, self._uploader, shipping.service)
        #: Segments whose bytes are the stream's, and those that another source stored before that was known: where.
        self._ours: OrderedDict[WalFile, None] = OrderedDict()
        self._unproven: dict[WalFile, set[str]] = {}
        #: Segments that are missing and told.
        self._missing: set[WalFile] = set()
        #: What was told between the first listing and ``Durable``: the one may not have seen it, the other not yet.
        self._early: list[ObjectStored] | None = None

    async def run(self) -> None:
        """Stream until cancelled, or until another writer uses our epoch."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.receiver.run())
                group.create_task(self._lagging.run())
                group.create_task(self._look_for_tails())
                for shipper in self._tails.values():
                    group.create_task(shipper.run())
        finally:
            self._worker.shutdown(wait=False, cancel_futures=True)

    async def _look_for_tails(self) -> None:
        """A rule or a person may have removed tails: what comes behind them would be stored, and be of no use."""
        while True:
            await self._site.clock.sleep(LOOK_EVERY)
            for outlet in self._uploader.outlets:
                shipper = self._tails.get(outlet.name)
                key = shipper.newest if shipper is not None and not outlet.down else None
                if key is None or shipper is None:
                    continue
                try:
                    await outlet.store.head(key)
                except ObjectMissing:
                    if shipper.newest == key:  # else folded, or the segment is finished
                        outlet.outages += 1  # as if it had been away: it is looked at whole
                except StoreError:
                    continue  # whoever stores something there tells

    def shipping(self, handle: Handle) -> Handle:
        """The handle that stores what it is given, and now knows which segments are the stream's own bytes."""

        async def shipped(source: Source, event: Event) -> asyncio.Future[None] | None:
            if source is self.receiver and isinstance(event, SegmentReady):
                self._prove(event.file)
            return await handle(source, event)

        return shipped

    def around(self, handle: Handle) -> Handle:
        """The handle, with what the stream's segments need before and after. Goes around a ``Reconciler``."""

        async def streamed(source: Source, event: Event) -> asyncio.Future[None] | None:
            if source is not self.receiver or not isinstance(event, SegmentReady):
                return await handle(source, event)
            await self.receiver.ready(event)
            durable, start = self.receiver.durable, event.file.start(self._size)
            assert durable is not None
            try:
                owed = await handle(source, event)
            except (ObjectConflict, IntegrityError):
                durable.doubt(start)
                self._ours.pop(event.file, None)
                self.receiver.stored_somewhere(event)
                raise
            durable.trust(start)
            self._prove(event.file)
            self.receiver.stored_somewhere(event)
            return owed

        return streamed

    def _prove(self, file: WalFile) -> None:
        """What is stored under this name are the server's bytes: positions may count on it."""
        self._ours[file] = None
        while len(self._ours) > MOST_PROVEN:
            self._ours.popitem(last=False)
        for destination in self._unproven.pop(file, ()):
            self._count(destination, file)

    def heard(self, notice: Notice) -> None:
        """A listener: what is stored anywhere takes the positions further."""
        if self._early is not None and isinstance(notice, ObjectStored):
            self._early.append(notice)
            return
        match notice:
            case ObjectStored():
                self._object_stored(notice)
            case GapOpened():
                file = notice.first
                while file <= notice.last:
                    self._missing.add(file)
                    file = file.next(self._size)
            case _:
                pass

    async def _resume(self, lineage: Lineage, after: int = 0) -> GoOn | None:
        """Where nobody has anything: what only some have is copied to the others. See ``pipeline.resume``."""
        if self.receiver.durable is None:
            self._early = []
        stored = self._lagging.stored = await look_at_stored(self._site)
        refuse_demoted(lineage.timeline, stored.newest_timeline)
        where = go_on(lineage, stored.anywhere, begin=stored.begin(lineage), after=after)
        if where is not None:
            await check_overlap(replace(self._site, settings=self.receiver.server), lineage, stored.anywhere, where)
            if self.receiver.durable is not None:
                self._lagging.skip(after, where.lsn)
        return where

    def _make_durable(self, origin: Lsn) -> Durable:
        destinations = {outlet.name: outlet.required for outlet in self._uploader.outlets}
        behind: dict[str, Lsn] = {}
        lineage, stored = self.receiver.lineage, self._lagging.stored
        self._lagging.origin = origin
        if lineage is not None and stored.anywhere:
            # One that did not answer, or has nothing yet: nothing counts there until its listing shows it.
            behind = {name: min(origin, stored.end(name, lineage)) for name in destinations}
        # As soon as the receiver has it: it is told what came too late for the listing.
        asyncio.get_running_loop().call_soon(self._hear_again)
        return Durable(
            destinations,
            origin,
            notify=self._site.notify,
            patience=self._site.settings.sync_timeout,
            behind=behind,
        )

    def _hear_again(self) -> None:
        early, self._early = self._early, None
        for notice in early or ():
            self.heard(notice)

    def _object_stored(self, notice: ObjectStored) -> None:
        file = parse_wal_key(notice.name)
        if file is None:
            return
        if file.kind is WalKind.HISTORY:
            self.receiver.history_stored(notice.destination, file)
        if file.kind is not WalKind.SEGMENT:
            return
        if file in self._ours or file.end(self._size) <= self._lagging.origin:
            self._count(notice.destination, file)
        else:
            self._unproven.setdefault(file, set()).add(notice.destination)
            if len(self._unproven) > MOST_PROVEN:
                del self._unproven[next(iter(self._unproven))]
        if file in self._missing:
            self._missing.discard(file)
            self._site.notify(GapClosed(file))

    def _count(self, destination: str, file: WalFile) -> None:
        """A finished segment of the server's bytes is stored there."""
        if destination in self._tails:
            self._tails[destination].segment_stored(file)
        self.receiver.stored(destination, file, file.start(self._size), file.end(self._size))

    def _tail_shipper(self, outlet: Outlet, shipper: Shipper, epoch: int) -> TailShipper:
        async def encode(name: str, plain: Buffer) -> Parcel:
            return await shipper.encode(name, plain, workers=self._worker)

        return TailShipper(
            self.wal,
            outlet,
            encode=encode,
            epoch=epoch,
            interval=self._site.settings.tail_interval,
            synchronous=lambda: self.receiver.synchronous,
            clock=self._site.clock,
            notify=self._site.notify,
            stored=self._tail_stored,
            lost=self._tail_lost,
            failed=self._uploader.failed,
        )

    def _tail_stored(self, destination: str, file: WalFile, start: Lsn, end: Lsn) -> None:
        self.receiver.stored(destination, file, start, end)

    def _tail_lost(self, destination: str, file: WalFile, start: Lsn, end: Lsn) -> None:
        """What it had of the server's lineage does not count there any more: it was emptied, or tails were removed."""
        durable, lineage = self.receiver.durable, self.receiver.lineage
        leg = leg_of(lineage, file.timeline) if lineage is not None else None
        if durable is not None and leg is not None:
            durable.retreat(destination, start, end if leg.end is None else min(leg.end, end))
        fact = f"tails of segment {file} that were stored at {destination} are gone; they are stored once more"
        hint = "does a rule or a person remove what begins with tail/? it is needed until its segment is finished"
        self._site.notify(DestinationFailed(destination, tail_folder(file), fact, hint))
