"""The layout of a repository, and what a listing of it means.

Object names are keys below ``<destination>/<system identifier>/``. Nothing is ever inferred from a folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from pipeline.backup import BackupInfo
from pipeline.errors import IntegrityError, RecoveryError
from pipeline.lineage import Leg, Lineage, WalPath
from pipeline.runs import Hole, Runs, Window
from pipeline.wal import Fork, Lsn, WalFile, WalKind

#: For people and a first look; not a walship object.
REPOSITORY = "repository.json"

#: Plaintext bytes of one part of a base backup.
PART_SIZE = 16 << 20

_PIECE = re.compile(r"data/[A-Za-z0-9.]{1,32}/[0-9]{8,}|index/[0-9]{8,}|backup_manifest")
_INFO = re.compile(r"base/([A-Za-z0-9_.-]{1,200})/backup_info")


def wal_key(file: WalFile) -> str:
    """Where an archived file is kept. Segments lie in a folder per timeline and log: a listing can be narrow."""
    if file.kind is WalKind.HISTORY:
        return f"wal/{file.name}"
    return f"wal/{file.name[:16]}/{file.name}"


def part_key(backup: str, archive: str, number: int) -> str:
    """A range of a tar stream; ``archive`` is ``base`` or a tablespace's oid, numbers count from 1."""
    return f"base/{backup}/data/{archive}/{number:08d}"


def index_key(backup: str, number: int) -> str:
    """JSON lines that tell which file lies where in which part; numbers count from 1."""
    return f"base/{backup}/index/{number:08d}"


def manifest_key(backup: str) -> str:
    """PostgreSQL's own backup_manifest."""
    return f"base/{backup}/backup_manifest"


def info_key(backup: str) -> str:
    """Written last: without it there is no backup."""
    return f"base/{backup}/backup_info"


def is_piece(key: str, backup: str) -> bool:
    """Whether it is a part, an index object or the manifest of that backup: what walship has put there, no info."""
    below = key.removeprefix(f"base/{backup}/")
    return below != key and bool(_PIECE.fullmatch(below))


def conflict_key(file: WalFile, fingerprint: str) -> str:
    """Where a file goes whose own name is taken by other bytes; ``fingerprint`` is the one it has under that name."""
    return f"conflict/{file.name}.{fingerprint[:16]}"


def data_key_name(key_id: str) -> str:
    """A data key, sealed to the repository; never deleted."""
    return f"keys/data-{key_id}"


def kind_of(name: str) -> str:
    """What an object of that name is kept for: ``wal`` or ``base`` (a tail is WAL)."""
    return "base" if name.startswith("base/") else "wal"


def parse_wal_key(key: str) -> WalFile | None:
    """The archived file that is kept under this key, or None if none of ours is kept so."""
    file = WalFile.parse(key.rsplit("/", 1)[-1])
    return file if file is not None and wal_key(file) == key else None


def backup_of(key: str) -> str | None:
    """``base/<name>/backup_info`` → ``<name>``; None for every other key."""
    match = _INFO.fullmatch(key)
    return match[1] if match and match[1] not in {".", ".."} else None


@dataclass(frozen=True, slots=True)
class Catalog:
    """What a repository holds. Pure: made from a listing by ``Listing``."""

    system_id: str
    #: Bytes.
    segment_size: int
    #: Complete backups, the one that ended first in front: by time, never by timeline.
    backups: tuple[BackupInfo, ...] = ()
    #: Finished segments by timeline, as segment numbers.
    segments: dict[int, Runs] = field(default_factory=dict)
    #: ``.partial`` segments by timeline.
    partials: dict[int, Runs] = field(default_factory=dict)
    #: Open segments, of which nothing but tails is stored: timeline → segment number → bytes that can be joined.
    tails: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    histories: dict[int, tuple[Fork, ...]] = field(default_factory=dict)
    #: Timelines whose stored history could not be read, and why: what they descend from is not known, not "nothing".
    unreadable: dict[int, str] = field(default_factory=dict)
    #: ``.backup`` label files.
    labels: int = 0
    #: Names that no walship of this format makes, and a few of them.
    unknown: int = 0
    examples: tuple[str, ...] = ()
    #: What could not be read, one sentence each: a damaged backup_info is no reason not to use the others.
    problems: tuple[str, ...] = ()
    #: Tails that cannot be joined, one sentence each: recovery ends before them.
    tail_notices: tuple[str, ...] = ()
    #: Backups whose description cannot be opened here, and when it was stored: this host can only write.
    sealed: Mapping[str, datetime | None] = field(default_factory=dict)

    def backup(self, name: str) -> BackupInfo:
        """The backup of that name. Raises RecoveryError."""
        for backup in self.backups:
            if backup.name == name:
                return backup
        known = ", ".join(b.name for b in self.backups[-5:]) or "none"
        hint = f"complete backups: {known}"
        if fact := next((problem for problem in self.problems if problem.startswith(f"backup {name} ")), ""):
            raise RecoveryError(fact, hint=hint)  # it is there, and of no use
        if name in self.sealed:
            raise RecoveryError(f"backup {name} is there, and this host can only write: it cannot look into it")
        raise RecoveryError(f"there is no backup {name} in the repository", hint=hint)

    @property
    def newest_timeline(self) -> int:
        """The greatest timeline that has begun, like PostgreSQL's ``latest``; 1 if none has."""
        return max([1, *(timeline for timeline in self.timelines if self.begun(timeline))])

    @property
    def timelines(self) -> tuple[int, ...]:
        """All timelines of which anything is stored."""
        backups = (b.timeline for b in self.backups)
        stored = {*self.segments, *self.partials, *self.tails, *self.histories, *self.unreadable, *backups}
        return tuple(sorted(stored))

    def begun(self, timeline: int) -> bool:
        """Whether more of the timeline is stored than where it began: bytes behind its fork, or a backup.

        PostgreSQL archives the history first, and then may die: a restore that followed it would end at the fork and
        leave out what the old timeline had behind it. The stream ships the first bytes before the history, and may be
        killed in between (``unconnected``). One whose history cannot be read counts: nobody knows.
        """
        if any(timeline in stored for stored in (self.segments, self.partials, self.unreadable)):
            return True
        forks = self.histories.get(timeline, ())
        fork = forks[-1].lsn if forks else 0
        tails = any(number * self.segment_size + reach > fork for number, reach in self._joined(timeline).items())
        return (tails and not self.unconnected(timeline)) or any(b.timeline == timeline for b in self.backups)

    def unconnected(self, timeline: int) -> bool:
        """Whether nothing but tails is stored of it: no history (timeline 1 needs none), and no backup on it."""
        others = (self.segments, self.partials, self.histories, self.unreadable, {b.timeline for b in self.backups})
        return timeline > 1 and bool(self._joined(timeline)) and not any(timeline in stored for stored in others)

    def _joined(self, timeline: int) -> dict[int, int]:
        """Its open segments of which anything can be joined."""
        return {number: reach for number, reach in self.tails.get(timeline, {}).items() if reach}

    def lineage(self, timeline: int) -> Lineage:
        """The timeline with its ancestors. Raises RecoveryError when its history cannot be read, or makes no sense.

        Timeline 1 has no history. A cluster that was already on a later timeline when archiving began may have none
        stored either: then the lineage consists of that timeline alone, which serves for its own backups.
        """
        if timeline not in self.timelines and timeline != 1:
            known = ", ".join(map(str, self.timelines)) or "none"
            raise RecoveryError(
                f"nothing of timeline {timeline} is stored", hint=f"timelines in the repository: {known}"
            )
        if timeline in self.unreadable:
            others = ", ".join(str(t) for t in self.timelines if t not in self.unreadable) or "none"
            raise RecoveryError(
                f"the history of timeline {timeline} is stored and cannot be read: {self.unreadable[timeline]}",
                hint=f"try again, or follow another one with --timeline: {others}",
            )
        legs: list[Leg] = []
        begin = Lsn(0)
        for fork in self.histories.get(timeline, ()):
            if fork.lsn < begin or fork.timeline >= timeline:
                raise RecoveryError(
                    f"the history of timeline {timeline} contradicts itself at timeline {fork.timeline}"
                )
            legs.append(Leg(fork.timeline, begin, fork.lsn))
            begin = fork.lsn
        legs.append(Leg(timeline, begin, None))
        return Lineage(tuple(legs), self.segment_size)

    def wal_path(self, lineage: Lineage, start: Lsn, end: Lsn | None = None) -> WalPath:
        """The segments that recovery reads from ``start`` along the lineage, up to ``end`` or as far as they go.

        The path stops in front of the first missing segment and names it, if ``end`` lies behind it, or (without
        ``end``) if the lineage is known to go on behind it.
        """
        wanted = self.known_end(lineage) if end is None else end
        return lineage.path(self, start, wanted)

    def heirs(self, backup: BackupInfo) -> tuple[Lineage, ...]:
        """What the backup can be followed on: its own timeline and the newest one that descends from it, if another.

        Timelines whose history makes no sense are left out.
        """
        found: list[Lineage] = []
        for timeline in self.timelines:
            if timeline != backup.timeline and not self.begun(timeline):
                continue
            try:
                lineage = self.lineage(timeline)
            except RecoveryError:
                continue
            if lineage.holds(backup.timeline, backup.stop_lsn):
                found.append(lineage)
        return tuple(dict.fromkeys([n for n in found if n.timeline == backup.timeline] + found[-1:]))

    def windows(self) -> tuple[Window, ...]:
        """How far each backup reaches on its own timeline and on the newest one that descends from it."""
        found: list[Window] = []
        for backup in self.backups:
            for lineage in self.heirs(backup):
                path = self.wal_path(lineage, backup.start_lsn)
                if path.end >= backup.stop_lsn:
                    found.append(Window(backup, lineage.timeline, backup.stop_lsn, path.end, path.missing, path.tail))
        return tuple(found)

    def holes(self) -> tuple[Hole, ...]:
        """Every gap between stored segments of one timeline, the open one at its end included."""
        found: list[Hole] = []
        for timeline in sorted({*self.segments, *self.tails}):
            runs, tails = self.segments.get(timeline, _EMPTY), self.tails.get(timeline, {})
            last = max((number for number, reach in tails.items() if reach), default=None)
            if joined := [n for n, reach in tails.items() if reach == self.segment_size or n == last]:
                runs = Runs.of([*runs, *joined])
            found += [Hole(self.file(timeline, n), self.file(timeline, end - 1), end - n) for n, end in runs.holes()]
        return tuple(found)

    def has_segment(self, timeline: int, number: int) -> bool:
        return number in self.segments.get(timeline, _EMPTY)

    def run_end(self, timeline: int, number: int) -> int:
        """The first number from that one on whose segment is not stored finished."""
        return self.segments.get(timeline, _EMPTY).reach(number)

    def has_partial(self, timeline: int, number: int) -> bool:
        return number in self.partials.get(timeline, _EMPTY)

    def tail_reach(self, timeline: int, number: int) -> int:
        """Bytes of the segment that can be joined from tails; 0 if there are none, or not the first one."""
        return self.tails.get(timeline, {}).get(number, 0)

    def end_of(self, timeline: int) -> Lsn:
        """Behind the last byte that is stored of a timeline, holes or not; a ``.partial`` counts as a whole segment."""
        size = self.segment_size
        ends = [(runs.last + 1) * size for runs in (self.segments.get(timeline), self.partials.get(timeline)) if runs]
        ends += [number * size + reach for number, reach in self.tails.get(timeline, {}).items() if reach]
        return Lsn(max(ends, default=0))

    def file(self, timeline: int, number: int) -> WalFile:
        """The segment of that number."""
        return WalFile.segment(timeline, number * self.segment_size, self.segment_size)

    def known_end(self, lineage: Lineage) -> Lsn:
        """Up to where the lineage is known to have WAL, holes or not: its last fork, or the end of the last segment,
        finished or open.

        What an old timeline has behind its fork does not count.
        """
        ends = [lineage.legs[-1].begin]
        for leg in lineage.legs:
            end = self.end_of(leg.timeline)
            ends.append(end if leg.end is None else min(end, leg.end))
        return max(ends)


_EMPTY = Runs()


def checked_info(key: str, name: str, content: bytes | bytearray) -> BackupInfo:
    """The backup_info that was stored under ``key``, and is the one of the backup ``name``. Raises IntegrityError."""
    info = BackupInfo.decode(key, content)
    if info.name != name:
        raise IntegrityError(f"{key} describes the backup {info.name}")
    return info
