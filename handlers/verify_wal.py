"""The WAL of a destination: what it has, and what it lacks of what the backups need. A million segments are ranges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from handlers.verify_objects import Inspector, Place, Wanted
from pipeline.catalog import Catalog, wal_key
from pipeline.lineage import Lineage, WalPath
from pipeline.runs import Gathering, Runs
from pipeline.wal import WalFile, WalKind, segments_per_log


@dataclass(slots=True)
class Needed:
    """WAL files that recovery from some backups reads."""

    #: Timeline → numbers of finished segments.
    segments: dict[int, Runs] = field(default_factory=dict)
    #: Names of ``.partial`` and history objects.
    others: set[str] = field(default_factory=set)

    @classmethod
    def by(cls, paths: Sequence[WalPath], lineages: Sequence[Lineage], catalog: Catalog) -> Needed:
        """Of these ways."""
        gathered: dict[int, Gathering] = {}
        others: set[str] = set()
        for path in paths:
            for stretch in (stretch for stretch in path.stretches if not stretch.tail):
                end = stretch.end - 1 if stretch.partial else stretch.end
                if end > stretch.first:
                    gathered.setdefault(stretch.timeline, Gathering()).add(stretch.first, end)
                if stretch.partial:
                    segment = catalog.file(stretch.timeline, end).name
                    others.add(f"wal/{segment[:16]}/{segment}.partial")
        timelines = {leg.timeline for lineage in lineages for leg in lineage.legs} & catalog.histories.keys()
        others |= {wal_key(WalFile.history(timeline)) for timeline in timelines}
        return cls({timeline: numbers.runs() for timeline, numbers in gathered.items()}, others)

    def lacking(self, there: dict[int, Runs], others: set[str], catalog: Catalog) -> Iterator[str]:
        """Names of what is needed and not there."""
        for timeline, runs in sorted(self.segments.items()):
            stored = there.get(timeline, Runs())
            for first, end in runs.ranges:
                number = stored.reach(first)
                while number < end:
                    yield wal_key(catalog.file(timeline, number))
                    number = stored.reach(number + 1)
        yield from sorted(self.others - others)


async def check_wal(place: Place, inspector: Inspector, needed: Needed, catalog: Catalog, *, whole: bool) -> None:
    """The WAL that is there (``whole``: also what no backup needs), and what should be."""
    there: dict[int, Gathering] = {}
    others: set[str] = set()
    per_log = segments_per_log(catalog.segment_size)
    async with inspector.crew() as begin:
        async for entry in inspector.listing(place, "wal/"):
            file = WalFile.parse(entry.key.rsplit("/", 1)[-1])
            if file is None:
                continue
            needs = entry.key in needed.others
            if file.kind is WalKind.SEGMENT and file.seg < per_log and wal_key(file) == entry.key:
                number = file.log * per_log + file.seg
                there.setdefault(file.timeline, Gathering()).add(number)
                needs = number in needed.segments.get(file.timeline, _NONE)
            elif needs:
                others.add(entry.key)
            wanted = Wanted(entry.key, spare=not needs)
            if (whole or needs) and not inspector.trusts(place, wanted, entry):
                await begin(inspector.read(place, wanted, entry))
        if inspector.answers(place, "wal/"):
            runs = {timeline: numbers.runs() for timeline, numbers in there.items()}
            for name in needed.lacking(runs, others, catalog):
                await begin(inspector.read(place, Wanted(name), None))


async def check_conflicts(place: Place, inspector: Inspector) -> None:
    """Files that were set aside, for people."""
    async with inspector.crew() as begin:
        async for entry in inspector.listing(place, "conflict/"):
            said = f"{entry.key} at {place.name}: two servers have used one timeline number"
            inspector.tally.warnings.append(said)
            if not inspector.trusts(place, Wanted(entry.key), entry):
                await begin(inspector.read(place, Wanted(entry.key), entry))


_NONE = Runs()
