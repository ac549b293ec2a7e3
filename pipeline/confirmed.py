"""Up to where the service has said that WAL is safe; and so whether a segment that is not stored is lost, or never was.

Several objects are on their way at once. When the host is lost, a later one may have arrived and an earlier one not:
that is no hole in what was stored, but its end. Nobody was told that any of it is safe. A segment that is missing
before the position that was told is another matter: it was stored and is gone, or the server had removed it.

The position is a member of the lease, which its holder writes anew every few seconds: so it may be that much behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from pipeline.events import Acknowledged, Notice, SegmentReady, WalMoved
from pipeline.lineage import Lineage, WalPath
from pipeline.wal import Lsn, WalFile


@dataclass(frozen=True, slots=True, order=True)
class Confirmed:
    """All WAL of the timeline's history before ``lsn`` was reported as safe: to the server, or to its archiver."""

    timeline: int
    lsn: Lsn

    def __str__(self) -> str:
        return f"{self.timeline} {self.lsn}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """What ``str`` made; None for anything else."""
        timeline, _, lsn = text.partition(" ")
        if not (timeline.isascii() and timeline.isdigit() and len(timeline) <= 10):
            return None
        try:
            return cls(int(timeline), Lsn.parse(lsn))
        except ValueError:
            return None


class Told:
    """A listener: what has been reported so far."""

    def __init__(self, segment_size: int) -> None:
        self._size = segment_size
        #: The furthest, of the newest timeline; None: nothing yet.
        self.newest: Confirmed | None = None

    def heard(self, notice: Notice) -> None:
        """To the server its flush position is reported; to its archiver, that a segment may be forgotten."""
        match notice:
            case WalMoved() if notice.flush:
                self._told(Confirmed(notice.timeline, notice.flush))
            case Acknowledged(SegmentReady() as event):
                self._told(Confirmed(event.file.timeline, event.file.end(self._size)))
            case _:
                pass

    def _told(self, position: Confirmed) -> None:
        self.newest = position if self.newest is None else max(self.newest, position)


def may_come(file: WalFile, segment_size: int, positions: Iterable[Confirmed]) -> bool:
    """Whether a segment that is not stored may be on its way still: it was not said to be safe, and its like was."""
    told = _furthest(file.timeline, positions)
    return told is not None and told.lsn < file.end(segment_size)


def never_confirmed(path: WalPath, lineage: Lineage, positions: Iterable[Confirmed]) -> Confirmed | None:
    """The last position that was told, if what ``path`` lacks was never said to be safe; else None.

    None also where nobody has told anything of the lineage's last timeline: then nothing is known.
    """
    if path.missing is None or path.missing.timeline != lineage.timeline:
        return None
    told = _furthest(lineage.timeline, positions)
    return told if told is not None and told.lsn <= path.end else None


def _furthest(timeline: int, positions: Iterable[Confirmed]) -> Confirmed | None:
    return max((each for each in positions if each.timeline == timeline), default=None)
