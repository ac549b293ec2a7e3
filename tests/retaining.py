"""Random repositories for tests of retention: timelines with forks, backups in chains, WAL with holes, and policies."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from hypothesis import strategies as st

from pipeline.backup import BackupInfo
from pipeline.catalog import Catalog
from pipeline.pins import Pin
from pipeline.policy import Policy
from pipeline.retention import Decision, Holdings
from pipeline.runs import Runs
from pipeline.wal import Fork, Lsn

SIZE = 1 << 20
#: Positions are counted in quarters of a segment.
QUARTER = SIZE // 4
START = datetime(2026, 1, 1, tzinfo=UTC)


def backup_at(
    number: int, stopped: datetime, begin: int, end: int, *, timeline: int = 1, parent: BackupInfo | None = None
) -> BackupInfo:
    """A backup whose WAL is the quarters from ``begin`` to ``end``."""
    return BackupInfo(
        f"base_{stopped:%Y%m%d_%H%M%S}_{number}", f"{number:032x}", "incremental" if parent else "full", "7", 170000,
        SIZE, timeline, Lsn(begin * QUARTER), Lsn(end * QUARTER), stopped, stopped, (), (), (), "", 100,
        parent=parent.name if parent else "", parent_id=parent.id if parent else "",
    )  # fmt: skip


@dataclass
class World:
    """What is stored, and what is known besides."""

    held: Holdings
    now: datetime


@dataclass
class _Growing:
    forks: dict[int, tuple[Fork, ...]] = field(default_factory=lambda: {1: ()})
    position: dict[int, int] = field(default_factory=lambda: {1: 1})
    begin: dict[int, int] = field(default_factory=lambda: {1: 0})
    backups: list[BackupInfo] = field(default_factory=list)
    now: datetime = START


@st.composite
def worlds(draw: st.DrawFn, *, lost_histories: bool = True) -> World:
    """As it can come about: time goes on, servers write, fork (also back in time, and both go on), are backed up."""
    grown = _Growing()
    for number in range(draw(st.integers(1, 14))):
        grown.now += timedelta(hours=draw(st.integers(1, 60)))
        timeline = draw(st.sampled_from(sorted(grown.position)))
        action = draw(st.sampled_from(["backup", "backup", "backup", "write", "fork"]))
        at = grown.position[timeline]
        if action == "write":
            grown.position[timeline] = at + draw(st.integers(1, 9))
        elif action == "fork" and len(grown.position) < 4:
            new, where = max(grown.position) + 1, draw(st.integers(min(grown.begin[timeline] + 1, at), at))
            grown.forks[new] = (*grown.forks[timeline], Fork(timeline, Lsn(where * QUARTER)))
            grown.begin[new], grown.position[new] = where, where + draw(st.integers(0, 5))
        elif action == "backup":
            end = at + draw(st.integers(1, 4))
            before = [b for b in grown.backups if b.timeline == timeline]
            incremental = draw(st.booleans())
            parent = before[-1] if before and incremental else None
            grown.backups.append(backup_at(number, grown.now, at, end, timeline=timeline, parent=parent))
            grown.position[timeline] = end
    return _stored(draw, grown, lost_histories=lost_histories)


def _stored(draw: st.DrawFn, grown: _Growing, *, lost_histories: bool) -> World:
    segments, tails, partials = {}, {}, {}
    for timeline, position in grown.position.items():
        numbers = set(range(grown.begin[timeline] // 4, position // 4))
        numbers -= draw(st.sets(st.integers(0, 20), max_size=2)) if draw(st.booleans()) else set()
        segments[timeline] = Runs.of(numbers)
        if position % 4:
            tails[timeline] = {position // 4: position % 4 * QUARTER}
        if draw(st.integers(0, 5)) == 0:
            partials[timeline] = Runs.of([position // 4])
    histories = {t: forks for t, forks in grown.forks.items() if t > 1}
    unreadable = {}
    if lost_histories and histories and draw(st.integers(0, 3)) == 0:
        lost = draw(st.sampled_from(sorted(histories)))
        del histories[lost]
        if draw(st.booleans()):
            unreadable[lost] = "damaged"
    catalog = Catalog(
        "7", SIZE, tuple(sorted(grown.backups, key=lambda b: (b.stopped, b.stop_lsn, b.name))),
        {t: runs for t, runs in segments.items() if runs}, partials, tails, histories, unreadable,
    )  # fmt: skip
    names = [backup.name for backup in catalog.backups]
    some = st.sets(st.sampled_from(names), max_size=2) if names else st.just(set[str]())
    pins = {
        name: [Pin(name, "why", draw(st.sampled_from([None, START, grown.now + timedelta(days=9)])), "here", START)]
        for name in draw(some)
    }
    held = Holdings(
        catalog, pins, in_use=dict.fromkeys(draw(some), "somebody"), broken=dict.fromkeys(draw(some), "a part is lost"),
        being_taken=draw(st.booleans()),
    )  # fmt: skip
    return World(held, grown.now + timedelta(hours=draw(st.integers(0, 30))))


policies = st.builds(
    Policy,
    last=st.one_of(st.none(), st.integers(1, 4)),
    window=st.one_of(st.none(), st.integers(1, 400).map(lambda hours: timedelta(hours=hours))),
    daily=st.integers(0, 3), weekly=st.integers(0, 2), monthly=st.integers(0, 1), yearly=st.integers(0, 1),
)  # fmt: skip


def after(held: Holdings, decision: Decision) -> Holdings:
    """What is known once all that goes is gone."""
    catalog, needs = held.catalog, decision.wal

    def left(runs_of: dict[int, Runs]) -> dict[int, Runs]:
        found = {t: Runs.of(n for n in runs if needs.needs(t, n)) for t, runs in runs_of.items()}
        return {t: runs for t, runs in found.items() if runs}

    tails = {t: {n: reach for n, reach in some.items() if needs.needs(t, n)} for t, some in catalog.tails.items()}
    gone = {backup.name for backup in decision.going}
    return replace(
        held,
        catalog=replace(
            catalog,
            backups=tuple(b for b in catalog.backups if b.name not in gone),
            segments=left(catalog.segments),
            partials=left(catalog.partials),
            tails={t: some for t, some in tails.items() if some},
        ),
    )
