"""What WAL is stored where, as a listing tells: what the stream asks before it begins."""

from __future__ import annotations

from dataclasses import dataclass, field

from handlers.fetch import Fetcher
from infra.wiring import Site
from pipeline.backup import BackupInfo
from pipeline.catalog import Listing, backup_of, checked_info, info_key
from pipeline.contracts import Store
from pipeline.errors import IntegrityError, ObjectMissing, StoreError
from pipeline.lineage import Lineage
from pipeline.runs import Runs
from pipeline.wal import Lsn

#: Most bytes that the description of a backup may have.
_MOST_INFO = 256 << 20


@dataclass(slots=True)
class Stored:
    """Finished segments by destination, and the backups that need WAL."""

    #: destination → timeline → numbers of segments. A destination that did not answer is not in it.
    segments: dict[str, dict[int, Runs]] = field(default_factory=dict)
    #: Complete backups, the newest first: enough of them to find one of any lineage.
    backups: list[BackupInfo] = field(default_factory=list)
    #: Timelines that a server of this cluster has gone over to: their histories are stored.
    histories: set[int] = field(default_factory=set)

    @property
    def newest_timeline(self) -> int:
        """The greatest timeline that has a history or a finished segment; 1 if nothing is stored."""
        return max([1, *self.histories, *(timeline for each in self.segments.values() for timeline in each)])

    @property
    def anywhere(self) -> dict[int, Runs]:
        """What at least one destination has."""
        timelines = {timeline for each in self.segments.values() for timeline in each}
        return {t: Runs.of(n for each in self.segments.values() for n in each.get(t, Runs())) for t in timelines}

    def begin(self, lineage: Lineage) -> Lsn | None:
        """Where the newest backup of the lineage begins; None if there is none."""
        return next((b.start_lsn for b in self.backups if lineage.holds(b.timeline, b.stop_lsn)), None)


async def look_at_stored(site: Site) -> Stored:
    """List all destinations. StoreError if a required one has to be known and none answers."""
    stored = Stored()
    names: set[str] = set()
    failures: list[StoreError] = []
    for store in site.stores:
        try:
            # A writer begins with a key of its own alone, and what is stored is of earlier ones.
            await site.keys.refresh(store)
            listing = await _listed(store, site)
            stored.segments[store.name] = listing.catalog(site.facts.segment_size).segments
            stored.histories |= {file.timeline for file in listing.history_files}
            async for entry in store.list("base/", shallow=True):
                name = entry.key.removeprefix("base/").rstrip("/")
                if backup_of(info_key(name)):
                    names.add(name)
        except StoreError as error:
            failures.append(error)
    if len(failures) == len(site.stores):
        raise failures[0]
    stored.backups = await _backups(site.fetch, names)
    return stored


async def _listed(store: Store, site: Site) -> Listing:
    listing = Listing(site.facts.system_id)
    async for entry in store.list("wal/"):
        listing.add(entry.key)
    return listing


async def _backups(fetch: Fetcher, names: set[str]) -> list[BackupInfo]:
    """Those that can be read, the newest first, up to the first of timeline 1: an older one is never begun with."""
    found: list[BackupInfo] = []
    for name in sorted(names, reverse=True):
        try:
            fetched = await fetch(info_key(name), backup=None, most=_MOST_INFO)
            found.append(checked_info(info_key(name), name, fetched.plain))
        except ObjectMissing:
            continue  # being taken, or never finished
        except (IntegrityError, StoreError):
            continue  # told by whoever wants to restore from it; an older one only makes us look further back
        if found[-1].timeline == 1 or len(found) == 3:
            break
    return found
