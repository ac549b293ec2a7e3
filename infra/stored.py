"""What WAL is stored where, as a listing tells: what the stream asks before it begins."""

from __future__ import annotations

from dataclasses import dataclass, field

from handlers.fetch import Fetcher
from infra.wiring import Site
from pipeline.backup import BackupInfo
from pipeline.catalog import backup_of, checked_info, info_key
from pipeline.contracts import Store
from pipeline.errors import IntegrityError, ObjectMissing, Sealed, StoreError
from pipeline.lineage import Lineage
from pipeline.listing import Listing
from pipeline.resume import go_on
from pipeline.runs import Runs
from pipeline.tail import TailName
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
    #: Timelines of which there are tails.
    tails: set[int] = field(default_factory=set)

    @property
    def newest_timeline(self) -> int:
        """The greatest timeline that has bytes; 1 if nothing is stored. A history alone is ignored by restores too."""
        return max([1, *self.tails, *(timeline for each in self.segments.values() for timeline in each)])

    def end(self, destination: str, lineage: Lineage, after: int = 0) -> Lsn:
        """Up to where a destination has the lineage without a hole, from ``after`` on, the end of a gap.

        0 if it has nothing, or did not answer.
        """
        segments = self.segments.get(destination)
        own = go_on(lineage, segments, begin=self.begin(lineage), after=after) if segments else None
        return own.lsn if own is not None else Lsn(0)

    @property
    def anywhere(self) -> dict[int, Runs]:
        """What at least one destination has."""
        timelines = {timeline for each in self.segments.values() for timeline in each}
        return {t: Runs.of(n for each in self.segments.values() for n in each.get(t, Runs())) for t in timelines}

    def begin(self, lineage: Lineage) -> Lsn | None:
        """Where the newest backup of the lineage begins; None if there is none."""
        return next((b.start_lsn for b in self.backups if lineage.holds(b.timeline, b.stop_lsn)), None)


async def look_at_stored(site: Site) -> Stored:
    """List all destinations. StoreError if none answers."""
    stored = Stored()
    names: set[str] = set()
    failures: list[StoreError] = []
    for store in site.stores:
        try:
            # A writer begins with a key of its own alone, and what is stored is of earlier ones.
            await site.keys.refresh(store)
            listing = await _listed(store, site)
            tails = [TailName.parse(entry.key) async for entry in store.list("tail/")]
            folders = [entry.key async for entry in store.list("base/", shallow=True)]
        except StoreError as error:
            failures.append(error)
            continue
        stored.segments[store.name] = listing.catalog(site.facts.segment_size).segments
        stored.tails |= {tail.file.timeline for tail in tails if tail is not None}
        found = (folder.removeprefix("base/").rstrip("/") for folder in folders)
        names |= {name for name in found if backup_of(info_key(name))}
    if len(failures) == len(site.stores):
        raise failures[0]
    stored.backups = await _backups(site.fetch, names)
    return stored


async def segments_at(store: Store, site: Site) -> dict[int, Runs]:
    """The finished segments at one destination, by timeline. StoreError."""
    return (await _listed(store, site)).catalog(site.facts.segment_size).segments


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
        except Sealed:
            break  # this host only writes: the stream goes on behind the last run of segments, as without a backup
        except (IntegrityError, StoreError):
            continue  # told by whoever wants to restore from it; an older one only makes us look further back
        if found[-1].timeline == 1 or len(found) == 3:
            break
    return found
