"""Which backups may go, and why each of the others stays. Pure.

Backups are compared with each other, not with the clock: their order on one timeline is that of the WAL, and the window
ends with the newest backup, not with now. So a clock that is wrong, here or when a backup was taken, makes more stay
and never less; and while no new backups come, nothing goes.

A backup that cannot be restored (a hole in its WAL, a lost part) displaces no good one: the rules are asked twice, once
about the good ones alone and once about all, and what either keeps stays. So does what says to be from the future.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from pipeline.backup import BackupInfo
from pipeline.backup_chain import chain_of
from pipeline.catalog import Catalog
from pipeline.errors import RecoveryError
from pipeline.moments import show
from pipeline.pins import Pin
from pipeline.policy import GENERATIONS, Policy, span_words
from pipeline.wal_needs import Lines, WalNeeds, lines_of, wal_needs

#: How a generation tells two periods apart, by a local time; they sort as they follow one another.
_PERIODS: dict[str, Callable[[datetime], tuple[int, ...]]] = {
    "daily": lambda at: (at.year, at.month, at.day),
    "weekly": lambda at: (at.isocalendar().year, at.isocalendar().week),
    "monthly": lambda at: (at.year, at.month),
    "yearly": lambda at: (at.year,),
}
_FORMATS = {"daily": "%Y-%m-%d", "weekly": "week %V of %G", "monthly": "%Y-%m", "yearly": "%Y"}

#: What a store says to have stored further ahead than this is not compared with the times of backups.
_AHEAD = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What is known of the repository when it is decided."""

    #: With *all* backups whose description could be read, also those whose chain is broken.
    catalog: Catalog
    #: Backup → the pins on it that could be read, of all destinations.
    pins: Mapping[str, Sequence[Pin]] = field(default_factory=dict)
    #: Pinned, by a pin that cannot be read.
    unreadable_pins: Collection[str] = ()
    #: Backup → who uses it, in words.
    in_use: Mapping[str, str] = field(default_factory=dict)
    #: Backup → why it is known not to be restorable, beyond what the catalog tells.
    broken: Mapping[str, str] = field(default_factory=dict)
    #: Backups that have a backup_info which cannot be read.
    unreadable: Collection[str] = ()
    #: Somebody takes a backup right now.
    being_taken: bool = False
    #: Names of those that are being taken, or copied here. A name tells when a backup began.
    taking: Collection[str] = ()
    #: Timeline → when its newest WAL was stored, by the clock of the store, as far as that is known.
    stored: Mapping[int, datetime] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kept:
    """A backup that stays."""

    backup: BackupInfo
    #: Every reason, one phrase each; never empty.
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What stays and what goes."""

    #: By time, the oldest in front.
    kept: tuple[Kept, ...]
    #: In the order in which they have to be deleted: nothing before what builds on it.
    going: tuple[BackupInfo, ...]
    wal: WalNeeds
    #: Backup → why it cannot be restored.
    broken: Mapping[str, str]
    #: What stands in for all that goes, good as far as the catalog tells: worth a closer look before anything goes.
    vital: frozenset[str]
    #: Sentences for people.
    notes: tuple[str, ...]


def decide(held: Holdings, policy: Policy, now: datetime) -> Decision:
    """What the policy keeps of it. See the head of this file for what the clock has to say."""
    known = {backup.name: backup for backup in held.catalog.backups}
    broken = _broken(held, known)
    future = {name: backup for name, backup in known.items() if backup.stopped > now}
    good = [backup for name, backup in known.items() if name not in broken and name not in future]
    lines = lines_of(held.catalog)
    stored = {timeline: at for timeline, at in held.stored.items() if at <= now + _AHEAD}
    rules = _Rules(held.catalog, lines, policy, stored)
    reasons = {name: [*said] for name, said in rules.of(good, now).items()}
    for name, said in _Rules(held.catalog, lines, policy, stored).of([*known.values()], now).items():
        reasons.setdefault(name, said)
    # A pin ends when there is a backup behind its end: the clock alone ends none.
    reference = min(now, max((backup.stopped for backup in good), default=now))
    for name, reason in _beyond_the_policy(held, known, lines, reference):
        _say(reasons, name, reason)
    for name, backup in future.items():
        _say(reasons, name, f"it ended at {show(backup.stopped)}, which is yet to come by this machine's clock")
    if not good:
        for name in known:
            _say(reasons, name, "no backup is known to be good")
    _whole_chains(known, reasons)
    kept = [Kept(backup, tuple(reasons[name])) for name, backup in known.items() if name in reasons]
    going = [backup for name, backup in known.items() if name not in reasons]
    return Decision(
        tuple(sorted(kept, key=lambda each: _order(each.backup))),
        deletion_order(going),
        needed_by(held, [each.backup for each in kept]),
        broken,
        frozenset(rules.vital) if going else frozenset(),
        tuple(_notes(held, broken, future, now, lines)),
    )


def _say(reasons: dict[str, list[str]], name: str, reason: str) -> None:
    said = reasons.setdefault(name, [])
    if not any(reason.startswith(other) for other in said):  # the newest of all need not be that of a timeline as well
        said.append(reason)


def _beyond_the_policy(
    held: Holdings, known: Mapping[str, BackupInfo], lines: Lines, reference: datetime
) -> Iterator[tuple[str, str]]:
    """Backups that stay whatever the policy says, and why."""
    for name, pins in held.pins.items():
        yield from ((name, pin.words) for pin in pins if name in known and pin.holds(reference))
    for name in held.unreadable_pins:
        if name in known:
            yield name, "pinned, by a pin that cannot be read"
    for name, user in held.in_use.items():
        if name in known:
            yield name, f"in use by {user}"
    for name, backup in known.items():
        if backup.timeline <= lines.untouched:
            yield name, f"timeline {lines.untouched} may build on it: what that descends from is not known"
    for name in held.unreadable:
        before = max((other for other in known if other < name), default="")
        for other in [before] if before else known:
            yield other, f"its WAL may be that of {name}, whose backup_info cannot be read"


def needed_by(held: Holdings, staying: Collection[BackupInfo]) -> WalNeeds:
    """The WAL that has to stay if these backups do."""
    first = min((backup.name for backup in held.catalog.backups), default="")
    if any(name < first for name in held.unreadable):
        return WalNeeds({})  # nobody knows where that one begins, and no other begins before it
    newest = max((backup.name for backup in staying), default="")
    if any(name < newest for name in held.taking):
        return WalNeeds({})  # it began before one that stays, so it may need WAL that no other needs
    return wal_needs(held.catalog, staying, being_taken=held.being_taken)


def deletion_order(backups: Collection[BackupInfo]) -> tuple[BackupInfo, ...]:
    """The oldest first, but none before what builds on it."""
    known = {backup.name: backup for backup in backups}

    def depth(backup: BackupInfo) -> int:
        count = 0
        while backup.parent in known and count < len(known):
            backup, count = known[backup.parent], count + 1
        return count

    def root(backup: BackupInfo) -> BackupInfo:
        for _ in known:
            backup = known.get(backup.parent, backup)
        return backup

    return tuple(sorted(backups, key=lambda b: (_order(root(b)), -depth(b), _order(b))))


def _order(backup: BackupInfo) -> tuple[datetime, int, str]:
    return backup.stopped, backup.stop_lsn, backup.name


def _whole_chains(known: Mapping[str, BackupInfo], reasons: dict[str, list[str]]) -> None:
    """What stays keeps what it builds on."""
    for name in [*reasons]:
        backup = known[name]
        for _ in known:
            parent = known.get(backup.parent)
            if parent is None:
                break
            _say(reasons, parent.name, f"{backup.name} builds on it")
            backup = parent


def _broken(held: Holdings, known: Mapping[str, BackupInfo]) -> dict[str, str]:
    """Backup → why it cannot be restored."""
    catalog, found = held.catalog, {name: fact for name, fact in held.broken.items() if name in known}
    for name, backup in known.items():
        if name in found:
            continue
        try:
            chain = chain_of(backup, known)
            path = catalog.wal_path(catalog.lineage(backup.timeline), backup.start_lsn, backup.stop_lsn)
        except RecoveryError as error:
            found[name] = error.fact
            continue
        if path.end < backup.stop_lsn:
            found[name] = f"the WAL that makes it consistent is not complete: it ends at LSN {path.end}"
        elif lost := next((each.name for each in chain if each.name in held.broken), ""):
            found[name] = f"it builds on {lost}, which cannot be restored"
    return found


def _notes(
    held: Holdings, broken: Mapping[str, str], future: Mapping[str, BackupInfo], now: datetime, lines: Lines
) -> Iterator[str]:
    for name, fact in sorted(broken.items()):
        yield f"{name} cannot be restored, and does not count: {fact}"
    for name, backup in sorted(future.items()):
        yield (
            f"{name} says that it ended at {show(backup.stopped)}, and it is {show(now)} here: one of the two clocks"
            " was wrong; it stays, and does not count"
        )
    for name in sorted(held.unreadable):
        yield f"the backup_info of {name} cannot be read: it stays, and so does the WAL that it may need"
    if lines.unsure:
        named = ", ".join(map(str, lines.unsure))
        yield (
            f"what timeline {named} descends from is not known (its history is missing or cannot be read): nothing of"
            f" timelines up to {lines.untouched} goes"
        )


class _Rules:
    """The rules of a policy, asked about some of the backups."""

    def __init__(self, catalog: Catalog, lines: Lines, policy: Policy, stored: Mapping[int, datetime]) -> None:
        self._catalog = catalog
        self._lines = lines
        self._policy = policy
        self._stored = stored
        #: Those on which rests what can be restored at all.
        self.vital: set[str] = set()

    def of(self, pool: Sequence[BackupInfo], now: datetime) -> dict[str, list[str]]:
        """Those that a rule keeps, with what each rule says."""
        found: dict[str, list[str]] = {}
        if not pool:
            return found

        def keep(backup: BackupInfo, reason: str) -> None:
            _say(found, backup.name, reason)

        policy, ordered = self._policy, sorted(pool, key=lambda b: (_early(b, pool), b.stop_lsn, b.name))
        keep(ordered[-1], "the newest good one")
        self.vital.add(ordered[-1].name)
        for backup in ordered[-policy.last :] if policy.last else []:
            keep(backup, f"one of the last {policy.last}")
        edge = None
        if policy.window is not None:
            edge = min(now, max(b.stopped for b in pool)) - policy.window
            for backup in ordered:
                if backup.stopped > edge:
                    keep(backup, f"it ended within the window of {span_words(policy.window)}")
        for timeline, reason, backups in self._lineages(pool, edge):
            for backup in backups:
                keep(backup, reason.format(timeline=timeline))
        for name in GENERATIONS:
            for backup, period in _generation(ordered, name, policy):
                keep(backup, f"the newest of {period} ({name})")
        return found

    def _lineages(
        self, pool: Sequence[BackupInfo], edge: datetime | None
    ) -> list[tuple[int, str, Sequence[BackupInfo]]]:
        """Timeline, reason, backups: what each timeline needs, unless a newer one has taken its place."""
        found: list[tuple[int, str, Sequence[BackupInfo]]] = []
        newest = self._catalog.newest_timeline
        cover = self._base(newest, pool, edge)
        for timeline in self._lines.known:
            able = self._able(timeline, pool)
            if not able or (timeline != newest and self._is_over(timeline, pool, cover)):
                continue
            found.append((timeline, "the newest good one that leads to timeline {timeline}", able[-1:]))
            self.vital.add(able[-1].name)
            if edge is None:
                continue
            base = self._base(timeline, pool, edge)
            at = able.index(base) if base else 0
            if base:
                self.vital.add(base.name)
                words = f"the newest that leads to timeline {{timeline}} and ended before the window, at {show(edge)}"
                found.append((timeline, words, [base]))
            # By the order of the WAL, whatever their clocks said.
            found.append((timeline, "it lies within the window on timeline {timeline}", able[at + bool(base) :]))
        return found

    def _able(self, timeline: int, pool: Sequence[BackupInfo]) -> list[BackupInfo]:
        """Those that lead to the timeline, in the order of the WAL."""
        return sorted(
            (b for b in pool if self._lines.holds(timeline, b)), key=lambda b: (b.stop_lsn, b.stopped, b.name)
        )

    def _base(self, timeline: int, pool: Sequence[BackupInfo], edge: datetime | None) -> BackupInfo | None:
        """The newest that leads to the timeline and had ended by the edge for certain; without an edge the newest."""
        able = [b for b in self._able(timeline, pool) if edge is None or _late(b, pool) <= edge]
        return able[-1] if able else None

    def _is_over(self, timeline: int, pool: Sequence[BackupInfo], cover: BackupInfo | None) -> bool:
        """Whether the newest timeline covers all that is promised with a backup newer than each of this one's own.

        And newer than its WAL: a clone that archived by mistake, and was backed up, takes no living server's place.
        """
        if cover is None or self._lines.holds(timeline, cover):
            return False
        if (last := self._stored.get(timeline)) is not None and last > cover.stopped:
            return False
        return all(backup.stopped <= cover.stopped for backup in pool if backup.timeline == timeline)


def _early(backup: BackupInfo, pool: Sequence[BackupInfo]) -> datetime:
    """The earliest that it can have ended: not behind one that lies behind it in the WAL of its timeline."""
    behind = (b.stopped for b in pool if b.timeline == backup.timeline and b.stop_lsn >= backup.stop_lsn)
    return min(behind, default=backup.stopped)


def _late(backup: BackupInfo, pool: Sequence[BackupInfo]) -> datetime:
    """The latest: not before one that lies before it."""
    before = (b.stopped for b in pool if b.timeline == backup.timeline and b.stop_lsn <= backup.stop_lsn)
    return max(before, default=backup.stopped)


def _generation(ordered: Sequence[BackupInfo], name: str, policy: Policy) -> list[tuple[BackupInfo, str]]:
    """The newest backup of each of the newest periods that have one, and the period in words."""
    newest: dict[tuple[int, ...], BackupInfo] = {}
    for backup in ordered:
        newest[_PERIODS[name](backup.stopped.astimezone(policy.zone))] = backup
    periods = sorted(newest.items(), key=lambda item: item[0], reverse=True)[: getattr(policy, name)]
    return [(backup, backup.stopped.astimezone(policy.zone).strftime(_FORMATS[name])) for _, backup in periods]
