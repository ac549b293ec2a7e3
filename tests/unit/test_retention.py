"""Retention as a pure function: whatever the repository and the policy, what is promised stays restorable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backup import BackupInfo
from pipeline.catalog import Catalog
from pipeline.errors import ConfigError, RecoveryError
from pipeline.lineage import Lineage
from pipeline.pins import Pin
from pipeline.policy import Policy, make_policy
from pipeline.recovery import candidates, choose
from pipeline.retention import Decision, Holdings, decide
from pipeline.runs import Runs
from pipeline.targets import Target
from pipeline.wal import Fork, Lsn
from tests.retaining import QUARTER, SIZE, START, World, after, backup_at, policies, worlds

few = settings(max_examples=60)


def lineages(catalog: Catalog) -> Iterator[Lineage]:
    for timeline in catalog.timelines:
        try:
            yield catalog.lineage(timeline)
        except RecoveryError:
            continue


def names(backups: Iterable[BackupInfo]) -> set[str]:
    return {backup.name for backup in backups}


def kept(decision: Decision) -> set[str]:
    return {each.backup.name for each in decision.kept}


def reach(catalog: Catalog, lineage: Lineage, moment: datetime, broken: Iterable[str]) -> Lsn:
    """How far the best restore to that moment gets: any good backup on the lineage that had ended by then."""
    able = [
        catalog.wal_path(lineage, b.start_lsn).end
        for b in catalog.backups
        if b.name not in broken and b.stopped <= moment and lineage.holds(b.timeline, b.stop_lsn)
    ]
    return max(able, default=Lsn(0))


@few
@given(worlds(), policies)
def test_what_stays_loses_nothing(world: World, policy: Policy) -> None:
    decision = decide(world.held, policy, world.now)
    before, later = world.held.catalog, after(world.held, decision).catalog
    assert names(before.backups) == kept(decision) | names(decision.going)
    for each in decision.kept:
        backup = each.backup
        assert each.reasons
        # Its chain is whole,
        assert not backup.parent or backup.parent in kept(decision) or backup.parent not in names(before.backups)
        # and it gets as far as before, on every timeline.
        for lineage in lineages(before):
            if lineage.holds(backup.timeline, backup.stop_lsn):
                assert later.wal_path(lineage, backup.start_lsn) == before.wal_path(lineage, backup.start_lsn)
    for pinned in [name for name, pins in world.held.pins.items() if pins[0].until is None]:
        assert pinned in kept(decision)
    assert set(world.held.in_use) <= kept(decision)
    assert later.histories == before.histories


@few
@given(worlds(), policies)
def test_every_moment_of_the_window_stays_restorable(world: World, policy: Policy) -> None:
    decision = decide(world.held, policy, world.now)
    before, later = world.held.catalog, after(world.held, decision).catalog
    good = [b for b in before.backups if b.name not in decision.broken]
    if not good:
        assert not decision.going
        return
    newest = max(b.stopped for b in good)
    # The last good one of the timeline that is followed stays; without a window that is all that is promised by time.
    moments = [world.now]
    if policy.window is not None:
        edge = min(world.now, newest) - policy.window
        moments += [edge, *(b.stopped for b in before.backups if b.stopped >= edge)]
    try:
        lineage = before.lineage(before.newest_timeline)
    except RecoveryError:
        return
    for moment in moments:
        promised = reach(before, lineage, moment, decision.broken)
        assert reach(later, lineage, moment, decision.broken) == promised
        if promised and not decision.broken:
            # As a restore plans it.
            target = Target(timeline=lineage.timeline).to_time(moment)
            backup = choose(candidates(later, target, None)[1], target, None)
            assert later.wal_path(lineage, backup.start_lsn).end == promised


@few
@given(worlds(), policies)
def test_twice_is_once(world: World, policy: Policy) -> None:
    decision = decide(world.held, policy, world.now)
    again = decide(after(world.held, decision), policy, world.now)
    assert not again.going
    assert kept(again) == kept(decision)
    left = after(world.held, decision)
    assert after(left, again).catalog == left.catalog


@few
@given(worlds(), policies, st.integers(1, 500))
def test_more_that_is_promised_keeps_no_less(world: World, policy: Policy, hours: int) -> None:
    short, longer = decide(world.held, policy, world.now), timedelta(hours=hours)
    more = [
        replace(policy, window=(policy.window or timedelta()) + longer),
        replace(policy, last=(policy.last or 0) + 1),
    ]
    more += [replace(policy, daily=policy.daily + 1), replace(policy, monthly=policy.monthly + 1)]
    for policy_of_more in more:
        long = decide(world.held, policy_of_more, world.now)
        assert kept(short) <= kept(long)
        # Where no backup leads that stays, all WAL may stay for one that is to come; with more, one may lead there.
        for timeline in [timeline for timeline, spans in short.wal.spans.items() if spans]:
            runs = world.held.catalog.segments.get(timeline, Runs())
            assert all(long.wal.needs(timeline, n) for n in runs if short.wal.needs(timeline, n))


@few
@given(worlds(), policies, st.sampled_from([1, 2, 30, 24 * 400]))
def test_a_clock_that_is_wrong_costs_nothing(world: World, policy: Policy, hours: int) -> None:
    right = decide(world.held, policy, world.now)
    assert kept(decide(world.held, policy, world.now + timedelta(hours=hours))) == kept(right)
    assert kept(decide(world.held, policy, world.now - timedelta(hours=hours))) >= kept(right)


@few
@given(worlds(lost_histories=False), policies)
def test_without_riddles_what_nobody_needs_does_go(world: World, policy: Policy) -> None:
    held = replace(world.held, being_taken=False, unreadable=())
    decision = decide(held, policy, world.now)
    later = after(held, decision).catalog
    if not decision.kept:
        return
    first = min(each.backup.start_lsn for each in decision.kept)
    newest = max(each.backup.timeline for each in decision.kept)
    for timeline, runs in later.segments.items():
        assert timeline >= newest or all(number >= first // SIZE for number in runs)


def day(number: float, begin: int, *, timeline: int = 1, parent: BackupInfo | None = None) -> BackupInfo:
    """A backup of that day (from 1 on) that begins with segment ``begin``."""
    return backup_at(
        int(number * 10), START + timedelta(days=number - 1), begin * 4, begin * 4 + 2, timeline=timeline, parent=parent
    )


def holdings(*backups: BackupInfo, end: int = 400, **more: object) -> Holdings:
    catalog = Catalog("7", SIZE, backups, {1: Runs(((0, end),))})
    return Holdings(catalog, **more)  # type: ignore[arg-type]  # passed on as they are


def going(held: Holdings, policy: Policy, now: datetime | None = None) -> list[str]:
    now = now or max(b.stopped for b in held.catalog.backups) + timedelta(hours=1)
    return [b.name for b in decide(held, policy, now).going]


WEEK = [day(number, number * 10) for number in range(1, 11)]


def test_the_window_keeps_the_backup_before_its_edge_and_all_wal_since() -> None:
    held = holdings(*WEEK)
    decision = decide(held, Policy(window=timedelta(days=3, hours=6)), WEEK[-1].stopped)
    assert [each.backup for each in decision.kept] == WEEK[5:]
    assert "ended before the window, at 2026-01-06 18:00:00 UTC" in decision.kept[0].reasons[0]
    assert decision.wal.needs(1, 60)
    assert not decision.wal.needs(1, 59)


@pytest.mark.parametrize("days_without", [0, 5, 400])
def test_while_no_new_backups_come_nothing_goes(days_without: int) -> None:
    held, now = holdings(*WEEK[:4]), WEEK[3].stopped + timedelta(days=days_without)
    assert going(held, Policy(window=timedelta(days=3)), now) == []


def test_generations_are_days_of_the_zone() -> None:
    late = [replace(day(1, 10), stopped=datetime(2026, 1, 1, 22, 30, tzinfo=UTC)),
            replace(day(2, 20), stopped=datetime(2026, 1, 1, 23, 30, tzinfo=UTC)),
            day(3, 30)]  # fmt: skip
    held = holdings(*late)
    assert going(held, Policy(daily=3)) == [late[0].name]
    assert going(held, Policy(daily=3, zone=ZoneInfo("Europe/Berlin"))) == []
    months = [replace(day(n + 1, n * 10 + 10), stopped=datetime(2026, 1 + n, 28, tzinfo=UTC)) for n in range(5)]
    decision = decide(holdings(*months), Policy(monthly=2, yearly=1), months[-1].stopped)
    assert [each.backup for each in decision.kept] == months[3:]
    assert decision.kept[1].reasons[-2:] == ("the newest of 2026-05 (monthly)", "the newest of 2026 (yearly)")


def test_a_kept_increment_keeps_its_chain_and_goes_before_it() -> None:
    full, one = day(1, 10), day(2, 20, parent=day(1, 10))
    two, other = day(3, 30, parent=one), day(4, 40)
    held = holdings(full, one, two, other)
    assert going(held, Policy(last=2)) == []
    reasons = decide(held, Policy(last=2), other.stopped).kept[0].reasons
    assert f"{one.name} builds on it" in reasons
    assert going(held, Policy(last=1)) == [two.name, one.name, full.name]


def test_a_broken_one_displaces_no_good_one() -> None:
    held = holdings(*WEEK[:4], broken={WEEK[3].name: "a part is lost"})
    decision = decide(held, Policy(last=1), WEEK[3].stopped)
    assert [each.backup for each in decision.kept] == WEEK[2:4]
    assert "a part is lost" in decision.notes[0]
    # A hole in its own WAL does it as well.
    catalog = replace(held.catalog, segments={1: Runs(((0, 40), (41, 400)))})
    assert going(Holdings(catalog), Policy(last=1)) == names_of(WEEK[:2])
    assert going(Holdings(replace(catalog, segments={})), Policy(last=1)) == []


def names_of(backups: Iterable[BackupInfo]) -> list[str]:
    return [backup.name for backup in backups]


def test_what_says_to_be_from_the_future_stays_and_does_not_count() -> None:
    ahead = replace(WEEK[2], stopped=WEEK[2].stopped + timedelta(days=365))
    held = holdings(WEEK[0], WEEK[1], ahead, WEEK[3])
    now = WEEK[3].stopped + timedelta(hours=1)
    decision = decide(held, Policy(last=2), now)
    assert names(decision.going) == {WEEK[0].name}
    assert "yet to come" in " ".join(decision.kept[-1].reasons)
    assert "one of the two clocks was wrong" in decision.notes[0]
    # By an hour, and that hour is over: the order is that of the WAL.
    ahead = replace(WEEK[2], stopped=WEEK[3].stopped + timedelta(minutes=30))
    assert going(holdings(WEEK[0], WEEK[1], ahead, WEEK[3]), Policy(last=1), now) == names_of([WEEK[0], WEEK[1], ahead])
    # And it is not taken for one that ended before the edge, nor does one before it in the WAL go that may be needed.
    edge = Policy(window=now - WEEK[3].stopped + timedelta(minutes=10))
    assert WEEK[1].name not in going(holdings(WEEK[0], WEEK[1], ahead, WEEK[3]), edge, now)


def test_after_going_back_in_time_the_way_to_the_present_stays() -> None:
    """Restored to before the newest backups, and promoted: those are newer, and lead nowhere that anybody is."""
    catalog = Catalog(
        "7", SIZE, tuple(WEEK[:4]), {1: Runs(((0, 60),)), 2: Runs(((25, 90),))},
        histories={2: (Fork(1, Lsn(25 * SIZE + QUARTER)),)},
    )  # fmt: skip
    decision = decide(Holdings(catalog), Policy(last=1), WEEK[3].stopped)
    assert [each.backup for each in decision.kept] == [WEEK[1], WEEK[3]]
    assert decision.kept[0].reasons == ("the newest good one that leads to timeline 2",)
    assert all(decision.wal.needs(2, n) for n in range(25, 90))
    # With a backup of its own on the new timeline, the old one has had its day.
    catalog = replace(catalog, backups=(*WEEK[:4], day(5, 80, timeline=2)))
    decision = decide(Holdings(catalog), Policy(last=1), WEEK[4].stopped)
    assert [each.backup.timeline for each in decision.kept] == [2]
    assert not decision.wal.needs(1, 59)
    assert not decision.wal.needs(2, 79)
    assert decision.wal.needs(2, 80)


def test_wal_of_a_timeline_that_no_backup_leads_to_stays_while_one_may_come() -> None:
    catalog = Catalog(
        "7", SIZE, tuple(WEEK[:2]), {1: Runs(((0, 60),)), 2: Runs(((5, 90),))},
        histories={2: (Fork(1, Lsn(5 * SIZE)),)},
    )  # fmt: skip
    decision = decide(Holdings(catalog), Policy(last=1), WEEK[1].stopped)
    assert decision.wal.needs(2, 5)
    assert not decision.wal.needs(1, 5)


def test_an_unknown_descent_keeps_what_it_may_build_on() -> None:
    catalog = Catalog(
        "7", SIZE, tuple(WEEK[:4]), {1: Runs(((0, 60),)), 2: Runs(((50, 90),))}, unreadable={2: "damaged"}
    )
    decision = decide(Holdings(catalog), Policy(last=1), WEEK[3].stopped)
    assert not decision.going
    assert decision.wal.needs(1, 0)
    assert "timeline 2 descends from is not known" in decision.notes[-1]


def test_a_backup_that_cannot_be_read_keeps_the_wal_before_it() -> None:
    lost = WEEK[2].name
    held = holdings(WEEK[0], WEEK[1], *WEEK[3:6], unreadable=(lost,))
    decision = decide(held, Policy(last=1), WEEK[5].stopped)
    assert [each.backup for each in decision.kept] == [WEEK[1], WEEK[5]]
    assert lost in decision.kept[0].reasons[0]
    decision = decide(holdings(*WEEK[3:6], unreadable=(lost,)), Policy(last=1), WEEK[5].stopped)
    assert not decision.going
    assert decision.wal.needs(1, 0)


def test_a_pin_ends_with_a_backup_behind_its_end_and_not_by_the_clock_alone() -> None:
    until = WEEK[4].stopped + timedelta(hours=1)
    pins = {WEEK[0].name: [Pin(WEEK[0].name, "", until, "db1", START)]}
    assert WEEK[0].name not in going(holdings(*WEEK[:5], pins=pins), Policy(last=1), until + timedelta(days=30))
    assert WEEK[0].name in going(holdings(*WEEK[:6], pins=pins), Policy(last=1))
    assert WEEK[1].name not in going(holdings(*WEEK[:6], unreadable_pins=[WEEK[1].name]), Policy(last=1))


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"last": "0"}, "keep no backup at all"),
        ({"last": "-1"}, "less than nothing"),
        ({"last": "three"}, "no whole number"),
        ({"window": "0d"}, "without length"),
        ({"window": "a fortnight"}, "no span of time"),
        ({"window": "-3d"}, "no span of time"),
        ({"window": "999999w"}, "hundred years"),
        ({"daily": "0"}, "no backup at all would be kept"),
        ({"weekly": "-7"}, "less than nothing"),
        ({"yearly": "123456789"}, "at most"),
    ],
)
def test_policies_that_contradict_themselves_are_refused(given_: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        policy_of(**given_)


def policy_of(last: str = "", window: str = "", **generations: str) -> Policy | None:
    return make_policy(last=last, window=window, generations=generations, zone=UTC)


def test_policies_are_read_as_they_are_typed() -> None:
    assert policy_of() is None
    policy = policy_of(last="3", window="14 days", daily="0", monthly="12")
    assert policy == Policy(3, timedelta(days=14), monthly=12)
    assert policy.words == "the last 3, a window of 14 days, 12 monthly"
    assert [policy_of(window=text) for text in ("36h", "2w")] == [
        Policy(window=timedelta(hours=36)),
        Policy(window=timedelta(days=14)),
    ]
