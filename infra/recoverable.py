"""What one can go back to: backups, and the stretches of time that the stored WAL covers behind them.

Which LSNs are covered, the listings tell. Which times these are, nothing tells but the WAL itself: where it goes on,
the caller knows up to when it is stored; where it ended once, its last segments are read, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from handlers.plan import last_moment
from pipeline.backup import BackupInfo
from pipeline.catalog import Catalog
from pipeline.contracts import Fetch
from pipeline.errors import IntegrityError, RecoveryError, StoreError
from pipeline.runs import Window
from pipeline.wal import Lsn

#: Timeline and end of a stretch → time of the last transaction before it; None if there is none behind the backup.
Moments = dict[tuple[int, Lsn], datetime | None]

#: More holes than these are counted, and not named.
_MOST_HOLES = 100


@dataclass(frozen=True, slots=True)
class Backup:
    """A complete base backup."""

    name: str
    kind: str
    timeline: int
    started: datetime
    stopped: datetime
    #: Bytes of the cluster, and as stored.
    size: int
    stored_size: int
    #: Names of the destinations that have it.
    destinations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Any moment in it can be restored on that timeline, which may begin on an ancestor of it."""

    timeline: int
    #: End of its first backup.
    begins: datetime
    #: None: not known.
    ends: datetime | None
    begin_lsn: str
    end_lsn: str
    #: ``open``: the WAL goes on; ``hole``: a segment is missing behind it; ``left``: the server left the timeline.
    ended_by: Literal["open", "hole", "left"]
    #: The first missing segment; empty if none is.
    missing: str
    #: So many bytes at its end are in tails of the open segment.
    tail_bytes: int
    backups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gap:
    """Consecutive segments that are missing between stored ones, at every destination."""

    timeline: int
    first: str
    last: str
    segments: int


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a timeline came from. ``parent`` is 0 for one without a stored history."""

    timeline: int
    parent: int
    fork_lsn: str


@dataclass(frozen=True, slots=True)
class Recoverable:
    """All destinations together: what a restore can use."""

    #: The one that a restore follows unless it is told another.
    newest_timeline: int = 1
    backups: tuple[Backup, ...] = ()
    stretches: tuple[Stretch, ...] = ()
    #: The first ones, by timeline and position.
    holes: tuple[Gap, ...] = ()
    #: Missing segments in all.
    missing_segments: int = 0
    timelines: tuple[Origin, ...] = field(default=())

    @property
    def first(self) -> datetime | None:
        """The earliest moment that can be restored."""
        return min((stretch.begins for stretch in self.stretches), default=None)

    @property
    def newest(self) -> Stretch | None:
        """The one that a restore of the latest state is in."""
        return next((each for each in reversed(self.stretches) if each.timeline == self.newest_timeline), None)

    @property
    def last(self) -> datetime | None:
        """The latest moment on the newest timeline; None if there is none, or it is not known."""
        return self.newest.ends if self.newest else None


def recoverable(
    catalog: Catalog, places: Mapping[str, tuple[str, ...]], *, until: datetime | None, moments: Moments
) -> Recoverable:
    """``catalog`` is that of all destinations together; ``places``: backup → destinations that have it.

    ``until``: WAL that was written up to then is stored at the open end; None if that is not known.
    """
    groups: dict[tuple[int, Lsn], list[Window]] = {}
    for window in catalog.windows():
        groups.setdefault((window.timeline, window.end), []).append(window)
    stretches = [_stretch(catalog, windows, until, moments) for windows in groups.values()]
    holes = catalog.holes()
    return Recoverable(
        newest_timeline=catalog.newest_timeline,
        backups=tuple(_backup(backup, places.get(backup.name, ())) for backup in catalog.backups),
        stretches=tuple(sorted(stretches, key=lambda each: (each.timeline, each.begins))),
        holes=tuple(Gap(h.first.timeline, h.first.name, h.last.name, h.count) for h in holes[:_MOST_HOLES]),
        missing_segments=sum(hole.count for hole in holes),
        timelines=tuple(_origin(catalog, timeline) for timeline in catalog.timelines),
    )


async def read_moments(catalog: Catalog, fetch: Fetch, moments: Moments, *, opened: bool) -> list[str]:
    """Read when the WAL of each stretch ended that is not in ``moments`` yet; of the open ones only if ``opened``.

    A few segments each. Returns what could not be read, one sentence each; that is tried again the next time.
    """
    problems = []
    windows = catalog.windows()
    for window in reversed(windows):  # the newest backup needs the least reading
        key = window.timeline, window.end
        if key in moments or (_goes_on(catalog, window) and not opened):
            continue
        try:
            moments[key] = (await last_moment(catalog, window.backup, window.timeline, fetch=fetch)).last_transaction
        except (IntegrityError, RecoveryError, StoreError) as error:
            problems.append(f"the last WAL of timeline {window.timeline} cannot be read: {error.fact}")
    for old in moments.keys() - {(window.timeline, window.end) for window in windows}:
        del moments[old]
    return problems


def _goes_on(catalog: Catalog, window: Window) -> bool:
    return window.timeline == catalog.newest_timeline and window.missing is None


def _stretch(catalog: Catalog, windows: list[Window], until: datetime | None, moments: Moments) -> Stretch:
    first, last = windows[0], windows[-1]
    begins, ends = first.backup.stopped, None
    if _goes_on(catalog, last) and until is not None:
        ends = until
    elif (key := (last.timeline, last.end)) in moments:
        ends = moments[key] or last.backup.stopped
    ended_by: Literal["open", "hole", "left"] = "open" if _goes_on(catalog, last) else "left"
    return Stretch(
        timeline=last.timeline,
        begins=begins,
        ends=None if ends is None else max(ends, last.backup.stopped),
        begin_lsn=str(first.start),
        end_lsn=str(last.end),
        ended_by="hole" if last.missing else ended_by,
        missing=last.missing.name if last.missing else "",
        tail_bytes=last.tail,
        backups=tuple(window.backup.name for window in windows),
    )


def _backup(backup: BackupInfo, destinations: tuple[str, ...]) -> Backup:
    return Backup(
        backup.name,
        backup.kind,
        backup.timeline,
        backup.started,
        backup.stopped,
        backup.size,
        backup.stored_size,
        destinations,
    )


def _origin(catalog: Catalog, timeline: int) -> Origin:
    forks = catalog.histories.get(timeline, ())
    return Origin(timeline, forks[-1].timeline if forks else 0, str(forks[-1].lsn if forks else Lsn(0)))
