"""Destinations that lack what was stored before the stream began: where they really are, and help where copying fails.

What they lack is owed to them by the uploader, which copies it from whoever has it. Whether that has happened, their
own listing tells, and nothing else: "nothing is owed any more" may also mean that it is lost. What stays missing while
the destination answers is fetched from the server once more, which keeps it: PostgreSQL was never told that it is safe.
"""

from __future__ import annotations

from contextlib import suppress

import structlog

from handlers.outlet import Outlet
from handlers.ship import Shipper
from handlers.upload import Uploader
from infra.postgres.walstream import fetch_segment
from infra.sources.receiver import Receiver
from infra.stored import Stored, segments_at
from infra.wiring import Site
from pipeline.catalog import wal_key
from pipeline.errors import WalshipError
from pipeline.wal import Lsn, WalFile

log = structlog.get_logger()

#: Seconds between looks.
LOOK_EVERY = 3.0
#: So many looks without headway, and the segment is fetched from the server.
PATIENCE = 4


class Lagging:
    """``run`` beside the stream; does nothing while no destination lacks anything."""

    def __init__(self, site: Site, receiver: Receiver, uploader: Uploader, shipper: Shipper) -> None:
        self._site = site
        self._receiver = receiver
        self._uploader = uploader
        self._shipper = shipper
        self._stores = {store.name: store for store in site.stores}
        #: Where the stream began, and what was stored then.
        self.origin = Lsn(0)
        self.stored = Stored()
        #: Where it has to be looked for: what lies behind each gap is stored, and was not told by anybody.
        self._after = [0]
        #: destination → its position and what it was still to be filled with at the last look, and for how many looks
        #: neither has moved.
        self._stuck: dict[str, tuple[Lsn, int, int]] = {}

    def skip(self, gap_end: int, origin: Lsn) -> None:
        """The stream goes on at ``origin``; from the end of the gap to there, WAL is stored somewhere."""
        self._after.append(gap_end)
        self.origin = origin

    async def run(self) -> None:
        """Look every few seconds, until cancelled."""
        while True:
            await self._site.clock.sleep(LOOK_EVERY)
            durable = self._receiver.durable
            if durable is None:
                continue
            for name, reached in durable.reached().items():
                if reached < self.origin and not self._is_down(name):
                    with suppress(WalshipError):  # told by whoever stores something there, and tried again
                        await self._look(name)

    def _is_down(self, name: str) -> bool:
        return self._outlet(name).down

    def _outlet(self, name: str) -> Outlet:
        return next(outlet for outlet in self._uploader.outlets if outlet.name == name)

    async def _look(self, name: str) -> None:
        durable, lineage = self._receiver.durable, self._receiver.lineage
        if durable is None or lineage is None:
            return
        self.stored.segments[name] = await segments_at(self._stores[name], self._site)
        for after in self._after:
            if (end := min(self.stored.end(name, lineage, after), self.origin)) > after:
                durable.stored(name, after, end)
        self._receiver.report_soon()
        reached = durable.reached()[name]
        outlet = self._outlet(name)
        # While it is filled from others, what it lacks comes in its turn: not to be asked of the server, too.
        left = outlet.backlog.objects if outlet.backlog else 0
        before, left_before, looks = self._stuck.get(name, (reached, left, 0))
        looks = looks + 1 if (before, left_before) == (reached, left) else 0
        self._stuck[name] = reached, left, looks
        if looks >= PATIENCE and 0 < reached < self.origin:
            size = self._site.facts.segment_size
            leg = lineage.newest(reached // size)
            await self._give(name, WalFile.segment(leg.timeline, reached, size))
            self._stuck[name] = reached, left, 0

    async def _give(self, name: str, file: WalFile) -> None:
        """Ship a segment to one destination that nobody else can give it."""
        outlet = self._outlet(name)
        try:
            content = await fetch_segment(self._receiver.server, file, self._site.facts.segment_size)
            parcel = await self._shipper.encode(wal_key(file), content)
            try:
                await self._uploader.give(parcel, outlet)
            finally:
                parcel.body.close()
        except WalshipError as error:
            log.warning("still_missing", destination=name, segment=file.name, error=error.fact, hint=error.hint)
        else:
            log.info("fetched_again", destination=name, segment=file.name)
