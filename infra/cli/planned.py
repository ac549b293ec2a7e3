"""The plan of a restore in words: what ``--dry-run`` prints, and what stands above the question before a real run."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from datetime import datetime
from typing import Any, TextIO

from handlers.occupant import Occupant
from handlers.shares import Pace, Share, Shares
from handlers.target_dir import Targets
from infra.cli.verb import human
from pipeline.moments import show
from pipeline.recovery import RestorePlan
from pipeline.targets import TargetKind

#: Bytes of WAL a second that a server is taken to replay; pgbench's replay runs at about 200 MB/s on two cores.
REPLAY_RATE = 100 << 20
_NOTE = "note: "
#: Columns of a terminal below which nothing is wrapped.
_NARROW = 40


def plan_lines(
    plan: RestorePlan,
    targets: Targets,
    found: Shares,
    occupants: Sequence[Occupant],
    pace: Pace | None,
    now: datetime,
    *,
    delta: bool,
) -> list[str]:
    """The plan, for people."""
    backup = plan.backup
    kind = f"{backup.kind}, PostgreSQL {backup.major}"
    age = lasting(max(0.0, (now - backup.stopped).total_seconds()))
    lines = [
        f"restore {plan.target} into {targets.directory}",
        f"  backup    {backup.name} ({kind}), finished {show(backup.stopped)}, {age} ago: {human(plan.size)}",
    ]
    if plan.before:
        lines.append(f"            it builds on {', '.join(before.name for before in reversed(plan.before))}")
    # The last commit is known, and not how far in front of it a time lies.
    early = plan.stop.kind is TargetKind.TIME
    word = "WAL"
    for leg in plan.legs:
        tail = f", the last {human(leg.tail)} from tails" if leg.tail else ""
        lines.append(
            f"  {word:<9} timeline {leg.timeline}: {leg.segments} {_plural(leg.segments, 'segment')},"
            f" LSN {leg.start} to {leg.end}{tail}"
        )
        word = ""
    if plan.goal < plan.path.end:
        lines.append(f"  {word:<9} replayed up to LSN {plan.goal}")
    elif early:
        lines.append(f"  {word:<9} replayed up to the target, which may lie before that end")
    lines += _fetches(found, most=delta or early)
    lines += _time(plan, pace)
    for tablespace, path in targets.tablespaces:
        lines.append(f"  tablespace {tablespace.oid}: {tablespace.location} goes to {path}")
    for there in occupants:
        what = "compares " if delta else "replaces "
        lines.append(f"  {what} {there.folder}: {there}, {human(there.size)}")
    if delta and occupants:
        lines.append("            what differs from the backup is overwritten, what it does not have is removed")
    lines += [f"  {_NOTE}{note}" for note in (*found.problems, *plan.notices, *targets.notices)]
    return lines


def fitted(line: str, stream: TextIO) -> str:
    """A long note over several lines where somebody sits at a terminal; else as it is, for a log."""
    start, note, _ = line.partition(_NOTE)
    if not note or start.strip() or not stream.isatty():
        return line
    width = os.get_terminal_size(stream.fileno()).columns
    if width < _NARROW:  # 0: it does not say
        return line
    indent = " " * len(start + note)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _fetches(found: Shares, *, most: bool) -> list[str]:
    """How much comes from where; a destination stands once for each kind that it serves."""
    lines = [f"  fetches   {'at most ' if most else ''}{human(found.size)}, as stored"]
    for what, shares in (("backup", found.base), ("WAL segments", found.wal), ("WAL tails", found.tails)):
        for share in shares:
            objects = _plural(share.objects, "object")
            lines.append(f"            {what}: {share.objects} {objects}, {human(share.size)} from {share.destination}")
    return lines


def expected(plan: RestorePlan, pace: Pace) -> tuple[float, float]:
    """Seconds for the base backup, and for replaying the WAL; a guess."""
    wal = min(REPLAY_RATE, pace.rate)
    return plan.size / pace.rate, max(0, plan.goal - plan.path.start) / wal


def _time(plan: RestorePlan, pace: Pace | None) -> list[str]:
    if pace is None:
        return []
    if not pace.parts:
        return [f"  time      unknown: no part of the backup came within {pace.seconds:.0f} s"]
    base, replay = expected(plan, pace)
    most = plan.stop.kind is TargetKind.TIME
    first = "part" if pace.parts == 1 else f"{pace.parts} parts"
    size, rate = human(pace.size), human(pace.rate)
    speed = human(min(REPLAY_RATE, pace.rate))
    took = f"{lasting(base)} for the backup, {lasting(replay, most=most)} for the WAL"
    return [
        f"  time      perhaps {lasting(base + replay, most=most)}: {took}",
        f"            no promise: the first {first} ({size}) came at {rate}/s, the WAL is taken to go at {speed}/s",
    ]


def plan_facts(
    plan: RestorePlan, targets: Targets, found: Shares, occupants: Sequence[Occupant], pace: Pace | None
) -> dict[str, Any]:
    """The same for a machine."""
    facts: dict[str, Any] = {
        **plan.summary(),
        "directory": str(targets.directory),
        "stored_bytes": found.size,
        "fetches": [
            _share(kind, share)
            for kind, shares in (("base", found.base), ("wal", found.wal), ("tail", found.tails))
            for share in shares
        ],
        "overwrites": [
            {"folder": str(o.folder), "files": o.files, "bytes": o.size, "version": o.version, "system_id": o.system_id}
            for o in occupants
        ],
    }
    if pace is not None and pace.parts:
        base, replay = expected(plan, pace)
        facts["expected_seconds"] = {"base": round(base, 3), "replay": round(replay, 3)}
    return facts


def _share(kind: str, share: Share) -> dict[str, Any]:
    return {"kind": kind, "destination": share.destination, "objects": share.objects, "bytes": share.size}


def lasting(seconds: float, *, most: bool = False) -> str:
    """``100`` → ``100 s``, ``7300`` → ``2.0 h``; for people. ``most``: with ``at most`` in front."""
    if most:
        return f"at most {lasting(max(1.0, seconds))}"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"
