"""Keys of one or several destinations on their way to a catalog: what is stored, and what of it is of use."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from pipeline.backup import BackupInfo
from pipeline.backup_chain import whole_ones
from pipeline.catalog import Catalog, parse_wal_key
from pipeline.runs import Gathering, Runs
from pipeline.tail import Stitched, TailName
from pipeline.wal import Fork, Lsn, WalFile, WalKind, segments_per_log


class Listing:
    """Collects the keys of one or several destinations, then makes a catalog of what any of them has."""

    def __init__(self, system_id: str) -> None:
        self._system_id = system_id
        #: Timeline → log << 32 | seg: what that makes of numbers is known once the segment size is.
        self._segments: dict[int, Gathering] = {}
        self._partials: dict[int, Gathering] = {}
        self._tails: dict[int, dict[int, int]] = {}
        self._tail_notices: list[str] = []
        self._labels: set[str] = set()
        self._unknown: set[str] = set()
        self._backups: dict[str, BackupInfo] = {}
        self._sealed: dict[str, datetime | None] = {}
        self._histories: dict[int, tuple[Fork, ...]] = {}
        self._unreadable: dict[int, str] = {}
        self._problems: list[str] = []
        #: Timelines whose history file was listed.
        self.history_files: set[WalFile] = set()
        #: Segments of which tails were listed.
        self.tail_files: set[WalFile] = set()

    def add(self, key: str) -> None:
        """A key below ``wal/`` or ``tail/``; folders (they end in ``/``) say nothing."""
        if key.endswith("/"):
            return
        if tail := TailName.parse(key):
            self.tail_files.add(tail.file)
            return
        file = parse_wal_key(key)
        if file is None:
            self._unknown.add(key)
        elif file.kind is WalKind.SEGMENT:
            self._segments.setdefault(file.timeline, Gathering()).add(file.log << 32 | file.seg)
        elif file.kind is WalKind.PARTIAL:
            self._partials.setdefault(file.timeline, Gathering()).add(file.log << 32 | file.seg)
        elif file.kind is WalKind.HISTORY:
            self.history_files.add(file)
        else:
            self._labels.add(file.name)

    def add_backup(self, backup: BackupInfo) -> None:
        if backup.system_id != self._system_id:
            self.problem(f"backup {backup.name} belongs to the cluster {backup.system_id}, not to {self._system_id}")
        else:
            self._backups[backup.name] = backup

    def unfinished(self, segment_size: int) -> list[WalFile]:
        """Segments of which tails were listed and nothing finished, and that some backup may need: to be joined."""
        done = {timeline: members.runs() for timeline, members in self._segments.items()}
        per_log = segments_per_log(segment_size)
        first = min((backup.start_lsn for backup in self._backups.values()), default=Lsn(0))
        return sorted(
            file
            for file in self.tail_files
            if file.seg < per_log
            and file.end(segment_size) > first
            and (file.log << 32 | file.seg) not in done.get(file.timeline, _NONE)
        )

    def add_tail(self, made: Stitched) -> None:
        """What the tails of an open segment make; its content is not kept."""
        number = made.file.start(len(made.content)) // len(made.content)
        self._tails.setdefault(made.file.timeline, {})[number] = made.usable
        if made.notices:
            end = Lsn(number * len(made.content) + made.reach)
            self._tail_notices.append(
                f"the tails of segment {made.file} reach LSN {end} and no further: {'; '.join(made.notices)}"
            )

    def add_sealed(self, name: str, stored: datetime | None = None) -> None:
        """A complete backup of which no more is known: this host can only write."""
        self._sealed[name] = stored

    def add_history(self, timeline: int, forks: tuple[Fork, ...]) -> None:
        self._histories[timeline] = forks

    def unreadable_history(self, timeline: int, reason: str) -> None:
        self._unreadable[timeline] = reason
        self.problem(f"the history of timeline {timeline} cannot be read: {reason}")

    def problem(self, fact: str) -> None:
        """Something that people have to know, and that the rest of the repository does not suffer from."""
        self._problems.append(fact)

    @property
    def any_segment(self) -> WalFile | None:
        """Some finished segment, by which the segment size can be found out."""
        for timeline, members in self._segments.items():
            first = members.runs().ranges[0][0]
            return WalFile.parse(f"{timeline:08X}{first >> 32:08X}{first & _SEGS:08X}")
        return None

    @property
    def segment_size(self) -> int | None:
        """As the newest backup says; None if there is no backup."""
        newest = max(self._backups.values(), key=lambda b: b.stopped, default=None)
        return newest.segment_size if newest else None

    def catalog(self, segment_size: int) -> Catalog:
        """What has been added. Names that cannot exist with that segment size count as unknown."""
        unknown, backups = set(self._unknown), whole_ones(self._backups.values(), self.problem)
        return Catalog(
            system_id=self._system_id,
            segment_size=segment_size,
            backups=tuple(sorted(backups, key=lambda b: (b.stopped, b.stop_lsn, b.name))),
            segments=self._runs(self._segments, segment_size, unknown, ""),
            partials=self._runs(self._partials, segment_size, unknown, ".partial"),
            tails={timeline: dict(reaches) for timeline, reaches in self._tails.items()},
            histories=dict(self._histories),
            unreadable=dict(self._unreadable),
            labels=len(self._labels),
            unknown=len(unknown),
            examples=tuple(sorted(unknown)[:5]),
            problems=tuple(self._problems),
            tail_notices=tuple(self._tail_notices),
            sealed=dict(sorted(self._sealed.items())),
        )

    def merge(self, other: Listing) -> None:
        """All names of another listing as well."""
        for mine, theirs in ((self._segments, other._segments), (self._partials, other._partials)):
            for timeline, members in theirs.items():
                for first, end in members.runs().ranges:
                    mine.setdefault(timeline, Gathering()).add(first, end)
        self._labels |= other._labels
        self._unknown |= other._unknown
        self.history_files |= other.history_files
        self.tail_files |= other.tail_files

    @staticmethod
    def _runs(found: dict[int, Gathering], segment_size: int, unknown: set[str], suffix: str) -> dict[int, Runs]:
        per_log = segments_per_log(segment_size)
        runs: dict[int, Runs] = {}
        for timeline, members in found.items():
            numbers = Gathering()
            for log, first, end in _by_logs(members.runs()):
                if first < per_log:
                    numbers.add(log * per_log + first, log * per_log + min(end, per_log))
                for seg in range(max(first, per_log), end):
                    unknown.add(f"wal/{timeline:08X}{log:08X}/{timeline:08X}{log:08X}{seg:08X}{suffix}")
            if made := numbers.runs():
                runs[timeline] = made
        return runs


def _by_logs(members: Runs) -> Iterator[tuple[int, int, int]]:
    """(log, first, end) for each stretch of segments of one log."""
    for first, end in members.ranges:
        for log in range(first >> 32, (end - 1 >> 32) + 1):
            base = log << 32
            yield log, max(first, base) - base, min(end - base, 1 << 32)


#: The last eight digits of a segment's name.
_SEGS = 0xFFFFFFFF
_NONE = Runs()
