"""What it means when the server refuses to send WAL, and where the stream goes on afterwards."""

from __future__ import annotations

from collections.abc import Callable

from infra.postgres.connect import RefusedError
from infra.sources.assembly import ROLLED_BACK
from infra.sources.primary import Primary, stretches
from pipeline.errors import SourceError
from pipeline.events import GapOpened, Notice
from pipeline.wal import Lsn, WalFile

_TAKE_BACKUP = "take a new base backup now: `walship backup`; nothing can be restored across the gap"


class Refusals:
    """Remembers between two connections what the last one has taught."""

    def __init__(self, notify: Callable[[Notice], None]) -> None:
        self._notify = notify
        #: Where stored segments begin again behind the first that are missing; None: nowhere.
        self.hole_end: Lsn | None = None
        #: The gap that has opened: from where to where WAL was never stored and never will be. None: none has.
        self.gap: tuple[Lsn, Lsn] | None = None
        #: The slot does not keep what it says it keeps.
        self.slot_lies = False

    def explain(self, error: RefusedError, primary: Primary, *, timeline: int, begin: Lsn, kept: Lsn) -> SourceError:
        """WAL of ``timeline`` from ``begin`` on was asked for; the slot says that it keeps what is from ``kept`` on."""
        match error.state:
            case "58P01":
                return self._open_gap(error, primary, timeline, begin, kept)
            case "55000":
                self.slot_lies = True
                return error
            case "XX000":
                return SourceError(error.fact, hint=ROLLED_BACK, lasting=True)
            case _:
                return error

    def _open_gap(
        self, error: RefusedError, primary: Primary, timeline: int, begin: Lsn, kept: Lsn
    ) -> SourceError:  # fmt: skip
        """Go on at what the slot keeps, or at what is stored before that. Never at the same position again."""
        size = primary.lineage.segment_size
        end = min(Lsn(kept // size * size), self.hole_end or kept)
        if end <= begin:
            self.slot_lies = True  # a new one tells where WAL really begins
            return error
        for leg, first, last in stretches(primary.lineage, timeline, begin, end):
            files = [WalFile.segment(leg.timeline, lsn, size) for lsn in (first, last)]
            self._notify(GapOpened(leg.timeline, files[0], files[1], _TAKE_BACKUP))
        self.gap = begin, end
        return SourceError(
            f"PostgreSQL at {primary.place} has removed WAL that was not stored, from {begin} to {end}: {error.fact}",
            hint="take a new base backup; max_slot_wal_keep_size, if set, is too small for how long stores were away",
        )
