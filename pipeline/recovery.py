"""From what was asked for and what is stored to a restore plan, or to a refusal that says what can be reached instead.

Pure: whoever reads WAL to find the last record, a restore point or a transaction hands the result in. A plan is made
before anything is touched, because PostgreSQL notices a target that it cannot reach only after hours of replay:
"recovery ended before configured recovery target was reached". It looks at targets as records go by:

- a time: stops at the first commit or abort *later* than it (at or later, if exclusive), so a later one must exist;
- an LSN: compared with where a record *begins*, so the end of the last record is never reached;
- a name or a transaction: the record itself.

Source: ``recoveryStopsBefore`` and ``recoveryStopsAfter`` in PostgreSQL's ``xlogrecovery.c``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pipeline.backup import BackupInfo
from pipeline.catalog import Catalog
from pipeline.errors import RecoveryError
from pipeline.lineage import Lineage, WalPath
from pipeline.moments import show
from pipeline.targets import Action, Target, TargetKind
from pipeline.wal import Lsn, WalFile

#: Restore points that a refusal names, if none is like the one that was asked for.
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Ending:
    """What reading the last segments of a path found."""

    #: Where the last complete record begins; None if there is none.
    last_record: Lsn | None
    #: The first byte that no complete record covers; behind a switch, the end of the segment.
    end: Lsn
    #: Time of the last commit or abort; None if the path has none.
    last_transaction: datetime | None
    #: Its number: 32 bits; None if it is not known.
    last_xid: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedLeg:
    """The WAL of one timeline that recovery reads."""

    timeline: int
    #: Segments that carry this timeline's name.
    segments: int
    start: Lsn
    end: Lsn
    #: Bytes of them that come from tails of segments which are not finished.
    tail: int


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """All that is decided before a byte is written."""

    backup: BackupInfo
    #: As it was asked for.
    target: Target
    #: As PostgreSQL is told: the same moment, said so that it is reached.
    stop: Target
    lineage: Lineage
    #: The value of recovery_target_timeline: a number, or ``current`` where that timeline's history is not stored.
    timeline_setting: str
    #: The WAL that is there for it; recovery may stop anywhere inside.
    path: WalPath
    #: Time of the last commit or abort that is stored; None if there is none, or nobody had to know.
    last_transaction: datetime | None
    #: The first byte that no complete stored record covers: a recovery to the latest has to reach it. None: unknown.
    end: Lsn | None = None
    #: Sentences for people.
    notices: tuple[str, ...] = ()
    #: The record that was looked for: where the restore point or the transaction's end was found.
    found: Lsn | None = None
    #: What an incremental backup builds on, the full one first.
    before: tuple[BackupInfo, ...] = ()

    @property
    def goal(self) -> Lsn:
        """Where replay ends; for a time, where it ends at the latest."""
        if self.stop.kind is TargetKind.IMMEDIATE:
            return self.backup.stop_lsn
        return self.stop.lsn or self.found or self.end or self.path.end

    @property
    def legs(self) -> tuple[PlannedLeg, ...]:
        """The timelines on the way, the oldest first."""
        path, found = self.path, []
        for leg in self.lineage.legs:
            start, end = max(leg.begin, path.start), path.end if leg.end is None else min(leg.end, path.end)
            own = [stretch for stretch in path.stretches if stretch.timeline == leg.timeline]
            if own or start < end:
                segments, tail = sum(s.end - s.first for s in own), sum(s.tail for s in own)
                found.append(PlannedLeg(leg.timeline, segments, start, max(start, end), tail))
        return tuple(found)

    @property
    def timeline(self) -> int:
        return self.lineage.timeline

    @property
    def size(self) -> int:
        """Bytes of the base backup, and of those that it builds on."""
        return sum(backup.size for backup in (*self.before, self.backup))

    def summary(self) -> dict[str, object]:
        """For ``--dry-run`` and ``--json``."""
        return {
            "backup": self.backup.name,
            "backup_kind": self.backup.kind,
            "builds_on": [backup.name for backup in self.before],
            "backup_finished": self.backup.stopped.isoformat(),
            "server_major": self.backup.major,
            "target": str(self.target),
            "stops_at": str(self.stop),
            "timeline": self.timeline,
            "base_bytes": self.size,
            "wal_segments": self.path.count,
            "wal_bytes": self.path.size,
            "wal_start": str(self.path.start),
            "wal_end": str(self.path.end),
            "wal_tail_bytes": self.path.tail,
            "wal_timelines": [
                {
                    "timeline": leg.timeline,
                    "segments": leg.segments,
                    "start": str(leg.start),
                    "end": str(leg.end),
                    "tail_bytes": leg.tail,
                }
                for leg in self.legs
            ],
            "last_transaction": self.last_transaction.isoformat() if self.last_transaction else None,
            "notices": list(self.notices),
        }


def candidates(catalog: Catalog, target: Target, backup: str | None) -> tuple[Lineage, tuple[BackupInfo, ...]]:
    """The lineage to follow, and the backups it can start from, the newest first. Raises RecoveryError.

    Newest by time, never by timeline. A backup counts if it was taken on the lineage and ended before the fork.
    """
    if not catalog.backups:
        hint = "; ".join(catalog.problems) or "take one with: walship backup"
        raise RecoveryError("the repository holds no complete base backup", hint=hint)
    chosen = [catalog.backup(backup)] if backup else list(catalog.backups)
    timeline = target.timeline
    if timeline is None:
        immediate = target.kind is TargetKind.IMMEDIATE
        timeline = chosen[-1].timeline if immediate else catalog.newest_timeline
    lineage = catalog.lineage(timeline)
    able = tuple(b for b in reversed(chosen) if lineage.holds(b.timeline, b.stop_lsn))
    if not able:
        others = ", ".join(sorted({str(b.timeline) for b in chosen}))
        what = f"backup {backup}" if backup else "no backup"
        tail = f"is not on the way to timeline {timeline}" if backup else f"is on the way to timeline {timeline}"
        hint = f"--timeline with one of: {others}"
        unknown = ""
        if len(lineage.legs) == 1 and timeline != 1:
            unknown = f"; the history of timeline {timeline}, {WalFile.history(timeline)}, is not stored"
            hint = (
                f"a server of timeline {timeline} that still runs has that file: `walship run` with it ships it"
                f" (WALSHIP_SOURCES with stream); else {hint}"
            )
        raise RecoveryError(f"{what} {tail}{unknown}", hint=hint)
    return lineage, able


def choose(able: tuple[BackupInfo, ...], target: Target, backup: str | None) -> BackupInfo:
    """The newest backup that had ended by the target. ``able`` comes from ``candidates``. Raises RecoveryError."""
    for candidate in able:
        late_time = target.time is not None and candidate.stopped > target.time
        late_lsn = target.lsn is not None and candidate.stop_lsn > target.lsn
        if not late_time and not late_lsn:
            return candidate
    first = able[-1]
    whose = f"backup {backup}" if backup else f"the first backup ({first.name})"
    raise RecoveryError(
        f"the target, {target}, lies before the end of {whose} at {show(first.stopped)}, LSN {first.stop_lsn}",
        hint=f"the earliest that can be reached is {show(first.stopped)} or LSN {first.stop_lsn}"
        + (" with this backup; leave --backup out to have one chosen" if backup else ""),
    )


def check_start(backup: BackupInfo, path: WalPath) -> None:
    """Without the WAL up to its own end a backup is not consistent. Raises RecoveryError."""
    if path.end < backup.stop_lsn:
        lack = f"segment {path.missing} is missing" if path.missing else f"the stored WAL ends at LSN {path.end}"
        raise RecoveryError(
            f"{lack}, and backup {backup.name} cannot become consistent before its end at LSN {backup.stop_lsn}",
            hint="choose another backup with --backup; walship list shows what each can reach",
        )


def settle(
    target: Target, backup: BackupInfo, path: WalPath, ending: Ending, now: datetime, others: Sequence[str] = ()
) -> tuple[Target, str]:
    """What PostgreSQL is to be told so that it stops where ``target`` means, and a notice if that is not the same.

    For latest, time and LSN; the other kinds are found by whoever reads the WAL. ``others``: see ``elsewhere``. Raises
    RecoveryError.
    """
    if target.kind is TargetKind.TIME:
        return _settle_time(target, backup, path, ending, now)
    if target.kind is TargetKind.LSN:
        return _settle_lsn(target, backup, path, ending, others)
    if target.kind is TargetKind.LATEST:
        if path.missing is not None:
            raise hole(backup, path, ending, "the latest state")
        return _everything(target, backup, ending), ""
    return target, ""


def _settle_time(
    target: Target, backup: BackupInfo, path: WalPath, ending: Ending, now: datetime
) -> tuple[Target, str]:
    assert target.time is not None
    last = ending.last_transaction
    if last is not None and (last > target.time or (last == target.time and not target.inclusive)):
        return target, ""
    if path.missing is not None:
        raise hole(backup, path, ending, str(target))
    said = f"the last transaction that is stored ended at {show(last)}" if last else (
        f"no transaction is stored after backup {backup.name}"
    )  # fmt: skip
    if target.time > now:
        raise RecoveryError(f"the target, {target}, lies in the future; {said}", hint=_window(backup, path, ending))
    return _everything(target, backup, ending), (
        f"{said}, before {show(target.time)}: restoring to that, and no further. If the old server still runs, what it"
        " has committed since is not stored yet: `walship switch`, then restore again"
    )


def _settle_lsn(
    target: Target, backup: BackupInfo, path: WalPath, ending: Ending, others: Sequence[str]
) -> tuple[Target, str]:
    assert target.lsn is not None
    if ending.last_record is not None and target.lsn <= ending.last_record:
        return target, ""
    if target.lsn <= ending.end and path.missing is None:
        notice = f"the stored WAL ends at LSN {ending.end}: restoring to that, and no further"
        return _everything(target, backup, ending), notice
    if target.lsn <= ending.end and ending.last_record is not None:
        # All of it is there, but the next record, at which PostgreSQL would stop, is not.
        return (
            Target(TargetKind.LSN, lsn=ending.last_record, timeline=target.timeline, action=target.action),
            f"the stored WAL ends at LSN {ending.end}, in front of the missing segment {path.missing}",
        )
    if path.missing is not None:
        raise hole(backup, path, ending, str(target))
    raise RecoveryError(
        f"the target, {target}, lies behind the stored WAL of timeline {target.timeline or path_timeline(path)},"
        f" which ends at LSN {ending.end}",
        hint="; ".join((*others, _window(backup, path, ending))),
    )


def _everything(target: Target, backup: BackupInfo, ending: Ending) -> Target:
    """All that is stored now. To pause or shut down there PostgreSQL needs a target to stop at: the last record.

    So does a time or an LSN that lies behind it: WAL that is shipped while the restore runs may hold the very accident
    that the target was to leave out. PostgreSQL stops at no record in front of the backup's end, so where none is
    stored behind that, the end itself is the target: without any it would promote, whatever the action.
    """
    if target.kind is TargetKind.LATEST and target.action is Action.PROMOTE:
        return target.with_kind(TargetKind.LATEST)
    if ending.last_record is None or ending.last_record < backup.stop_lsn:
        return target.with_kind(TargetKind.IMMEDIATE)
    return Target(TargetKind.LSN, lsn=ending.last_record, timeline=target.timeline, action=target.action)


def path_timeline(path: WalPath) -> int:
    """The timeline that the path ends on; 1 for an empty one."""
    return path.stretches[-1].timeline if path.stretches else 1


def hole(backup: BackupInfo, path: WalPath, ending: Ending, wanted: str) -> RecoveryError:
    """The refusal for a target that lies behind a missing segment."""
    last = ending.last_transaction
    newest = f"the newest that can be reached is {show(last)}, " if last else "the newest that can be reached is "
    option = f"--to-lsn {ending.last_record}" if ending.last_record and ending.last_record >= backup.stop_lsn else (
        "--immediate"
    )  # fmt: skip
    return RecoveryError(
        f"segment {path.missing} is missing: {wanted} cannot be reached from backup {backup.name}",
        hint=f"{newest}LSN {ending.end} ({option})",
    )


def not_found(
    target: Target, backup: BackupInfo, path: WalPath, ending: Ending, known: Mapping[str, datetime]
) -> RecoveryError:
    """The refusal for a restore point or a transaction that is not in the stored WAL.

    ``known``: the restore points that are, in the order of the WAL, with their times.
    """
    behind = f"; segment {path.missing} is missing behind it" if path.missing else ""
    return RecoveryError(
        f"{target} is not in the stored WAL from LSN {path.start} to {ending.end}{behind}",
        hint=f"{_nearest(target, ending, known)}; {_window(backup, path, ending)}",
    )


def _nearest(target: Target, ending: Ending, known: Mapping[str, datetime]) -> str:
    """What was meant, perhaps."""
    if target.kind is TargetKind.XID:
        if ending.last_xid is None:
            return "no transaction is stored there"
        return (
            f"the last transaction that is stored is {ending.last_xid}; one that only read, still runs or was lost in a"
            " crash is nowhere"
        )
    if not known:
        return "no restore point is stored there"
    alike = difflib.get_close_matches(target.name, known, 3, 0.6)
    names = alike or list(known)[-_SHOWN:]
    listed = ", ".join(f"{name!r} ({show(known[name])})" for name in names)
    more = f" and {len(known) - len(names)} more" if len(known) > len(names) else ""
    return f"restore points that are stored: {listed}{more}"


def elsewhere(catalog: Catalog, lineage: Lineage, lsn: Lsn) -> tuple[str, ...]:
    """Other timelines whose stored WAL reaches so far; one sentence each."""
    own = {leg.timeline for leg in lineage.legs if leg.end is None or lsn <= leg.end}
    return tuple(
        f"timeline {timeline} has WAL up to LSN {catalog.end_of(timeline)}: --timeline {timeline} follows it"
        for timeline in catalog.timelines
        if timeline not in own and catalog.end_of(timeline) >= lsn
    )


def _window(backup: BackupInfo, path: WalPath, ending: Ending) -> str:
    if ending.last_transaction is None:
        last = f"LSN {ending.end}, and no transaction is stored after the first"
    else:
        last = f"{show(ending.last_transaction)} (LSN {ending.end})"
    return (
        f"timeline {path_timeline(path)} can be restored from {show(backup.stopped)} (LSN {backup.stop_lsn}) to {last}"
    )


def timeline_setting(catalog: Catalog, lineage: Lineage) -> str:
    """A number, so that nothing but the plan decides. PostgreSQL demands the history of any timeline but the first."""
    return str(lineage.timeline) if lineage.timeline == 1 or lineage.timeline in catalog.histories else "current"


def remarks(catalog: Catalog, lineage: Lineage) -> tuple[str, ...]:
    """What people have to know of the timelines before they restore along this lineage."""
    # First: of all that is said, only this may cost commits. A failover leaves a few there; a clone that has shipped by
    # mistake, all that the server has written since.
    found = [
        f"timeline {leg.timeline} has WAL behind LSN {leg.end}, where the restored history left it, up to LSN"
        f" {catalog.end_of(leg.timeline)}: commits there are not restored; --timeline {leg.timeline} brings them back"
        for leg in lineage.legs[:-1]
        if leg.end is not None and catalog.end_of(leg.timeline) > leg.end
    ]
    if lineage.timeline < catalog.newest_timeline:
        found.append(f"timeline {catalog.newest_timeline} is newer than timeline {lineage.timeline}, which is restored")
    if timeline_setting(catalog, lineage) == "current":
        found.append(f"the history of timeline {lineage.timeline} is not stored; only its own backups can be restored")
    for timeline in catalog.timelines:
        if timeline <= lineage.timeline or catalog.begun(timeline):
            continue
        if catalog.unconnected(timeline):
            found.append(
                f"timeline {timeline} has begun, and only tails of it are stored, up to LSN"
                f" {catalog.end_of(timeline)}: neither its history nor a backup says where it left its ancestor, so it"
                " is not followed"
            )
        else:
            fork = catalog.histories[timeline][-1].lsn if catalog.histories.get(timeline) else Lsn(0)
            found.append(f"timeline {timeline} began at LSN {fork}, nothing of it is stored: it is not followed")
    return (*found, *catalog.tail_notices, *catalog.problems)
