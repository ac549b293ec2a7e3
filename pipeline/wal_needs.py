"""Which WAL the backups need that stay, on every timeline that descends from theirs. What is not certain is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.backup import BackupInfo
from pipeline.catalog import Catalog
from pipeline.errors import RecoveryError
from pipeline.lineage import Leg, Lineage


@dataclass(frozen=True, slots=True)
class Lines:
    """What is known of which timeline descends from which."""

    #: Timeline → the timeline with its ancestors.
    known: Mapping[int, Lineage]
    #: Timelines of which something is stored and whose ancestors are not known: they may be any lower ones.
    unsure: tuple[int, ...]

    @property
    def untouched(self) -> int:
        """What lies on this timeline or a lower one stays: an unsure timeline may descend from it. 0: nothing."""
        return max(self.unsure, default=0)

    def holds(self, timeline: int, backup: BackupInfo) -> bool:
        """Whether a restore that begins with the backup can follow the timeline."""
        line = self.known.get(timeline)
        return line is not None and line.holds(backup.timeline, backup.stop_lsn)


def lines_of(catalog: Catalog) -> Lines:
    """All timelines of which anything is stored. Where a history is missing, a descendant's history tells the same."""
    known: dict[int, Lineage] = {}
    for timeline in sorted({*catalog.timelines, 1}):
        try:
            known[timeline] = catalog.lineage(timeline)
        except RecoveryError:
            continue
    told: dict[int, Lineage] = {}
    for line in known.values():
        for position, leg in enumerate(line.legs[:-1]):
            own = Leg(leg.timeline, leg.begin, None)
            told.setdefault(leg.timeline, Lineage((*line.legs[:position], own), line.segment_size))
    unsure = []
    own_backups = {backup.timeline for backup in catalog.backups}
    for timeline in catalog.timelines:
        if timeline in known and (timeline == 1 or timeline in catalog.histories):
            continue
        if timeline in told:
            known[timeline] = told[timeline]
        elif timeline not in known or timeline not in own_backups:
            # Without a history it stands alone, which is right only for a cluster that was there when archiving began.
            known.pop(timeline, None)
            unsure.append(timeline)
    return Lines(known, tuple(unsure))


@dataclass(frozen=True, slots=True)
class WalNeeds:
    """Which segments have to stay. Of timelines that were not known when it was made, all."""

    #: Timeline → segment numbers ``[first, end)`` that are needed; an end of None: all from there on.
    spans: Mapping[int, tuple[tuple[int, int | None], ...]]

    def needs(self, timeline: int, number: int) -> bool:
        """Whether that segment has to stay, and with it its ``.partial``, its labels and its tails."""
        if timeline not in self.spans:
            return True
        return any(first <= number and (end is None or number < end) for first, end in self.spans[timeline])


def wal_needs(catalog: Catalog, staying: Iterable[BackupInfo], *, being_taken: bool) -> WalNeeds:
    """What the backups need that stay: all WAL from the start of each, wherever that leads.

    ``being_taken``: somebody takes a backup right now, and nobody can tell yet which WAL that will need. Where one
    that stays leads, it needs none before that one's.
    """
    backups, lines = tuple(staying), lines_of(catalog)
    spans: dict[int, list[tuple[int, int | None]]] = {timeline: [] for timeline in lines.known}
    followed: set[int] = set()
    for timeline, line in lines.known.items():
        for backup in backups:
            if lines.holds(timeline, backup):
                followed.add(timeline)
                for leg, span in _spans(line, backup):
                    spans.setdefault(leg, []).append(span)
    newest = max((backup.timeline for backup in backups), default=0)
    for timeline in list(spans):
        # No backup leads to it: one may come that does, unless newer timelines have theirs already.
        alone = timeline not in followed and (timeline >= newest or being_taken)
        if timeline <= lines.untouched or alone:
            del spans[timeline]
    return WalNeeds({timeline: _joined(found) for timeline, found in spans.items()})


def _spans(line: Lineage, backup: BackupInfo) -> Iterable[tuple[int, tuple[int, int | None]]]:
    """Timeline and segments of each leg that a recovery from the backup may read.

    At a fork both have the segment: the older timeline's stands in where the newer one's is missing.
    """
    size, start = line.segment_size, backup.start_lsn // line.segment_size
    for leg in line.legs:
        end = None if leg.end is None else leg.end // size + 1
        if end is None or end > start:
            yield leg.timeline, (max(leg.begin // size, start), end)


def _joined(spans: Sequence[tuple[int, int | None]]) -> tuple[tuple[int, int | None], ...]:
    """The same segments in as few spans as there can be, ascending."""
    found: list[tuple[int, int | None]] = []
    for first, end in sorted(spans, key=lambda span: (span[0], span[1] is not None)):
        if found and (found[-1][1] is None or first <= found[-1][1]):
            last = found[-1][1]
            found[-1] = found[-1][0], None if last is None or end is None else max(last, end)
        else:
            found.append((first, end))
    return tuple(found)
