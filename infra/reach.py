"""How far the WAL at a destination goes without a hole, by the names of what is stored there: nothing is read.

That the hashes of tails chain is taken from their names; ``walship verify``, a restore and ``list`` read them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from pipeline.backup import BackupInfo
from pipeline.catalog import Catalog
from pipeline.errors import RecoveryError
from pipeline.tail import TailName
from pipeline.wal import Lsn, WalFile


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a destination goes."""

    #: None if there is no WAL.
    lsn: Lsn | None
    #: So many bytes before it are in tails of an open segment.
    in_tails: int
    #: The first segment that is missing there although there is more behind it.
    missing: WalFile | None


def leads_to(catalog: Catalog, timeline: int, backup: BackupInfo) -> bool:
    """Whether a restore that begins with the backup can follow that timeline."""
    try:
        return catalog.lineage(timeline).holds(backup.timeline, backup.start_lsn)
    except RecoveryError:
        return False


def unbroken(catalog: Catalog, timeline: int, backup: BackupInfo | None) -> Reach:
    """How far the WAL that leads to ``timeline`` goes.

    It begins with the backup, if that is one that the timeline descends from; else with the timeline's first segment.
    """
    if backup is not None and leads_to(catalog, timeline, backup):
        path = catalog.wal_path(catalog.lineage(timeline), backup.start_lsn)
        return Reach(path.end, path.tail, path.missing)
    size = catalog.segment_size
    numbers = [number for number, reach in catalog.tails.get(timeline, {}).items() if reach]
    if runs := catalog.segments.get(timeline):
        numbers.append(runs.ranges[0][0])
    if not numbers:
        return Reach(None, 0, None)
    number = min(numbers)
    while catalog.has_segment(timeline, number) or catalog.tail_reach(timeline, number) == size:
        number += 1
    tail = catalog.tail_reach(timeline, number)
    lsn = Lsn(number * size + tail)
    return Reach(lsn, tail, catalog.file(timeline, number) if lsn < catalog.end_of(timeline) else None)


def with_claimed_tails(catalog: Catalog, tails: Collection[TailName]) -> Catalog:
    """The catalog of a listing that had these tails: each open segment reaches as far as their names say."""
    size = catalog.segment_size
    found: dict[int, dict[int, int]] = {}
    for file in {tail.file for tail in tails}:
        number = file.start(size) // size
        if not catalog.has_segment(file.timeline, number):
            found.setdefault(file.timeline, {})[number] = min(size, claimed(tails, file))
    return replace(catalog, tails=found)


def claimed(tails: Iterable[TailName], file: WalFile) -> int:
    """Up to which offset the names of the tails cover the segment without a hole."""
    reach = 0
    for tail in sorted((tail for tail in tails if tail.file == file), key=lambda tail: tail.start):
        if tail.start > reach:
            break
        reach = max(reach, tail.end)
    return reach
