"""Plans and refusals: which backup, which timeline, and what happens to targets that PostgreSQL would never reach."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.backup import BackupInfo
from pipeline.catalog import Catalog
from pipeline.errors import RecoveryError
from pipeline.recovery import Ending, candidates, check_start, choose, remarks, settle, timeline_setting
from pipeline.runs import Runs
from pipeline.targets import Action, Target, TargetKind
from pipeline.wal import Fork, Lsn

SIZE = 1 << 20
NOON = datetime(2026, 1, 14, 12, tzinfo=UTC)


def minutes(count: float) -> datetime:
    return NOON + timedelta(minutes=count)


def backup(name: str, start: int, *, timeline: int = 1, ended: float = 0) -> BackupInfo:
    """A backup whose WAL begins with segment ``start`` and ends in the middle of the next one."""
    return BackupInfo(
        name, "id", "full", "7", 170000, SIZE, timeline, Lsn(start * SIZE + 40), Lsn(start * SIZE + SIZE * 3 // 2),
        minutes(ended - 1), minutes(ended), (), (), (), "", 0,
    )  # fmt: skip


CATALOG = Catalog(
    "7",
    SIZE,
    (backup("first", 2, ended=10), backup("second", 20, ended=20), backup("third", 40, timeline=2, ended=30)),
    {1: Runs(((2, 36),)), 2: Runs(((30, 51),))},
    histories={2: (Fork(1, Lsn(30 * SIZE + 512)),)},
)
ENDING = Ending(Lsn(50 * SIZE + 800), Lsn(50 * SIZE + 1000), minutes(60))


def chosen(target: Target, name: str | None = None, catalog: Catalog = CATALOG) -> BackupInfo:
    _, able = candidates(catalog, target, name)
    return choose(able, target, name)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (Target(), "third"),
        (Target().to_time(minutes(30)), "third"),
        (Target().to_time(minutes(29.9)), "second"),
        (Target().to_time(minutes(10)), "first"),
        (Target().to_lsn(Lsn(22 * SIZE)), "second"),
        (Target().to_lsn(Lsn(21 * SIZE)), "first"),
        (Target(timeline=1), "second"),
        (Target(TargetKind.IMMEDIATE), "third"),
    ],
)
def test_the_newest_backup_that_ended_before_the_target(target: Target, name: str) -> None:
    assert chosen(target).name == name


def test_by_time_and_not_by_timeline() -> None:
    catalog = replace(CATALOG, backups=(backup("old", 3, timeline=2), backup("new", 5, timeline=1, ended=5)))
    catalog = replace(catalog, histories={2: (Fork(1, Lsn(30 * SIZE)),)})
    assert chosen(Target(), catalog=catalog).name == "new"


def test_a_backup_that_ended_behind_the_fork_is_of_no_use_for_the_new_timeline() -> None:
    late = backup("late", 32, ended=25)
    catalog = replace(CATALOG, backups=(*CATALOG.backups[:2], late))
    assert chosen(Target(), catalog=catalog).name == "second"
    assert chosen(Target(timeline=1), catalog=catalog).name == "late"
    with pytest.raises(RecoveryError, match="late is not on the way to timeline 2") as caught:
        candidates(catalog, Target(), "late")
    assert "--timeline with one of: 1" in caught.value.hint


def test_before_the_first_backup() -> None:
    with pytest.raises(RecoveryError, match=r"lies before the end of the first backup \(first\)") as caught:
        chosen(Target().to_time(minutes(9)))
    assert "2026-01-14 12:10:00 UTC or LSN 0/380000" in caught.value.hint
    with pytest.raises(RecoveryError, match="before the end of backup second") as caught:
        chosen(Target().to_time(minutes(15)), "second")
    assert "leave --backup out" in caught.value.hint


def test_no_backup_at_all() -> None:
    with pytest.raises(RecoveryError, match="no complete base backup"):
        candidates(Catalog("7", SIZE), Target(), None)
    with pytest.raises(RecoveryError, match="there is no backup nope") as caught:
        candidates(CATALOG, Target(), "nope")
    assert "first, second, third" in caught.value.hint


def settled(target: Target, catalog: Catalog = CATALOG, ending: Ending = ENDING) -> tuple[Target, str]:
    lineage, able = candidates(catalog, target, None)
    base = choose(able, target, None)
    path = catalog.wal_path(lineage, base.start_lsn)
    check_start(base, path)
    return settle(target, base, path, ending, minutes(90))


def test_a_time_that_a_later_transaction_proves() -> None:
    target = Target().to_time(minutes(59))
    assert settled(target) == (target, "")
    exact = replace(Target().to_time(minutes(60)), inclusive=False)
    assert settled(exact) == (exact, "")


@pytest.mark.parametrize("count", [60, 61, 90])
def test_a_time_between_the_last_transaction_and_now_is_all_that_is_stored_and_no_more(count: int) -> None:
    """Not "latest": what is shipped while the restore runs may hold the accident."""
    stop, notice = settled(Target().to_time(minutes(count)))
    assert (stop.kind, stop.lsn, stop.inclusive) == (TargetKind.LSN, ENDING.last_record, True)
    assert "the last transaction that is stored ended at 2026-01-14 13:00:00 UTC" in notice


def test_to_pause_or_shut_down_at_the_latest_there_must_be_a_record_to_stop_at() -> None:
    for target in (Target(action=Action.PAUSE), Target(action=Action.SHUTDOWN).to_time(minutes(70))):
        stop, _ = settled(target)
        assert (stop.lsn, stop.inclusive, stop.action) == (ENDING.last_record, True, target.action)


@pytest.mark.parametrize("last", [None, Lsn(41 * SIZE + SIZE // 4)])
def test_where_nothing_is_stored_behind_the_backup_its_end_is_where_to_stop(last: Lsn | None) -> None:
    """PostgreSQL knows no pause without a target, and would promote; and would replay what is shipped meanwhile."""
    ending = Ending(last, Lsn(41 * SIZE + SIZE // 2), None)
    for action in (Action.PAUSE, Action.SHUTDOWN):
        stop, _ = settled(Target(action=action), ending=ending)
        assert (stop.kind, stop.action) == (TargetKind.IMMEDIATE, action)
    for target in (Target().to_time(minutes(70)), Target().to_lsn(ending.end)):
        stop, notice = settled(target, ending=ending)
        assert stop.kind is TargetKind.IMMEDIATE
        assert "restoring to that, and no further" in notice
    assert settled(Target(), ending=ending)[0].kind is TargetKind.LATEST


def test_a_time_in_the_future_is_refused() -> None:
    with pytest.raises(RecoveryError, match=r"in the future; the last .* ended at 2026-01-14 13:00:00 UTC") as caught:
        settled(Target().to_time(minutes(91)))
    assert "from 2026-01-14 12:30:00 UTC (LSN 0/2980000) to 2026-01-14 13:00:00 UTC" in caught.value.hint


def test_an_lsn_at_the_end_of_the_last_record_is_the_latest_and_one_behind_it_is_refused() -> None:
    assert ENDING.last_record is not None
    exact = Target().to_lsn(ENDING.last_record)
    assert settled(exact) == (exact, "")
    stop, notice = settled(Target().to_lsn(ENDING.end))
    assert (stop.kind, stop.lsn, stop.inclusive) == (TargetKind.LSN, ENDING.last_record, True)
    assert "ends at LSN 0/32003E8" in notice
    with pytest.raises(RecoveryError, match=r"lies behind the stored WAL of timeline 2, which ends at LSN 0/32003E8"):
        settled(Target().to_lsn(ENDING.end + 1))


def test_a_hole() -> None:
    holed = replace(CATALOG, segments={1: CATALOG.segments[1], 2: Runs(((30, 45), (47, 51)))})
    ending = Ending(Lsn(45 * SIZE - 100), Lsn(45 * SIZE - 8), minutes(40))
    for target in (Target(), Target().to_time(minutes(50)), Target().to_lsn(Lsn(48 * SIZE))):
        with pytest.raises(RecoveryError, match="segment 00000002000000000000002D is missing") as caught:
            settled(target, holed, ending)
        assert "2026-01-14 12:40:00 UTC, LSN 0/2CFFFF8 (--to-lsn 0/2CFFF9C)" in caught.value.hint
    before = Target().to_time(minutes(35))
    assert settled(before, holed, ending) == (before, "")
    stop, notice = settled(Target().to_lsn(ending.end), holed, ending)
    assert stop.lsn == ending.last_record
    assert "in front of the missing segment" in notice


def test_a_backup_whose_own_wal_is_missing() -> None:
    holed = replace(CATALOG, segments={1: CATALOG.segments[1], 2: Runs(((30, 41), (42, 51)))})
    with pytest.raises(RecoveryError, match="000000020000000000000029 is missing, and backup third cannot"):
        settled(Target(), holed)


def test_a_history_without_its_first_segment_is_a_hole_and_no_bytes_behind_the_fork() -> None:
    early = replace(CATALOG, backups=CATALOG.backups[:2], segments={1: CATALOG.segments[1]})
    lineage, able = candidates(early, Target(timeline=2), None)
    path = early.wal_path(lineage, able[0].start_lsn)
    assert path.end == Lsn(30 * SIZE + 512)
    assert path.missing is None, "all that timeline 2 is known to have, up to the fork, is there"
    assert any("--timeline 1 brings them back" in remark for remark in remarks(early, lineage))
    gone = replace(early, segments={1: Runs(((2, 30),))})
    path = gone.wal_path(lineage, able[0].start_lsn)
    assert str(path.missing) == "00000002000000000000001E"


def test_a_timeline_of_which_only_the_history_is_stored_is_not_followed() -> None:
    """PostgreSQL archives the history first: what timeline 1 has behind the fork must not be lost for nothing."""
    fork = 30 * SIZE + 512
    early = replace(CATALOG, backups=CATALOG.backups[:2], segments={1: CATALOG.segments[1]})
    for tails in ({}, {2: {30: 0}}, {2: {30: 400}}, {2: {30: 512}}):
        catalog = replace(early, tails=tails)
        lineage, _ = candidates(catalog, Target(), None)
        assert lineage.timeline == catalog.newest_timeline == 1
        said = remarks(catalog, lineage)
        assert said == (f"timeline 2 began at LSN {Lsn(fork)}, nothing of it is stored: it is not followed",)
        assert [w.timeline for w in catalog.windows()] == [1, 1]
    begun = replace(early, tails={2: {30: 513}})
    lineage, able = candidates(begun, Target(), None)
    assert lineage.timeline == 2
    assert begun.wal_path(lineage, able[0].start_lsn).end == Lsn(fork + 1)
    assert any("--timeline 1 brings them back" in remark for remark in remarks(begun, lineage))


def test_tails_of_a_timeline_without_its_history_do_not_hide_the_old_one() -> None:
    """The first bytes of a timeline are shipped before its history, and a kill may come in between."""
    early = replace(CATALOG, backups=CATALOG.backups[:2], segments={1: CATALOG.segments[1]}, histories={})
    for tails in ({2: {30: 900}}, {2: {30: SIZE, 31: 900}}):
        catalog = replace(early, tails=tails)
        lineage, able = candidates(catalog, Target(), None)
        assert (lineage.timeline, catalog.newest_timeline, able[0].name) == (1, 1, "second")
        assert [w.timeline for w in catalog.windows()] == [1, 1]
        (said,) = remarks(catalog, lineage)
        assert said.startswith("timeline 2 has begun, and only tails of it are stored, up to LSN 0/1")
        assert said.endswith("so it is not followed")
        with pytest.raises(
            RecoveryError, match=r"the history of timeline 2, 00000002\.history, is not stored"
        ) as caught:
            candidates(catalog, Target(timeline=2), None)
        assert "`walship run` with it ships it" in caught.value.hint
        assert caught.value.hint.endswith("else --timeline with one of: 1")
    # With a finished segment, a backup or the history there is more to lose: it is followed, or refused.
    with pytest.raises(RecoveryError, match="no backup is on the way to timeline 2"):
        candidates(
            replace(early, tails={2: {31: 900}}, segments={**early.segments, 2: Runs(((30, 31),))}), Target(), None
        )
    own = replace(early, tails={2: {40: SIZE, 41: 900}}, backups=CATALOG.backups)
    assert (own.newest_timeline, chosen(Target(), catalog=own).name) == (2, "third")
    assert replace(early, tails={2: {30: 900}}, unreadable={2: "damaged"}).newest_timeline == 2
    # A cluster whose first timeline is the only one needs no history.
    assert replace(early, segments={}, tails={1: {30: 900}}).begun(1)


def test_what_is_left_behind_on_the_old_timeline_is_told_though_it_is_only_in_a_tail() -> None:
    catalog = replace(CATALOG, backups=CATALOG.backups[:2], segments={1: Runs(((2, 30),)), 2: Runs(((30, 51),))})
    lineage = catalog.lineage(2)
    assert remarks(replace(catalog, tails={1: {30: 512}}), lineage) == ()
    left = replace(catalog, tails={1: {30: 600}}, segments={**catalog.segments, 3: Runs(((52, 53),))})
    first = remarks(left, lineage)[0]
    assert len(remarks(left, lineage)) > 1, "it is said before all else"
    assert "timeline 1 has WAL behind LSN 0/1E00200, where the restored history left it, up to LSN 0/1E00258:" in first
    assert left.wal_path(left.lineage(1), Lsn(20 * SIZE)).end == Lsn(30 * SIZE + 600)


def test_a_backup_that_the_stored_wal_does_not_reach_the_end_of() -> None:
    """Nothing is missing between: the WAL just ends, in the middle of a segment."""
    last = backup("last", 36, ended=40)
    catalog = Catalog("7", SIZE, (last,), {1: Runs(((36, 37),))}, tails={1: {37: SIZE // 2 - 8}})
    path = catalog.wal_path(catalog.lineage(1), last.start_lsn)
    with pytest.raises(RecoveryError, match=r"the stored WAL ends at LSN 0/257FFF8, and backup last cannot"):
        check_start(last, path)
    enough = replace(catalog, tails={1: {37: SIZE // 2}})
    check_start(last, enough.wal_path(catalog.lineage(1), last.start_lsn))
    (window,) = enough.windows()
    assert (window.end, window.tail) == (last.stop_lsn, SIZE // 2)


def test_the_timeline_is_a_number_unless_postgresql_could_not_know_it() -> None:
    lineage = CATALOG.lineage(2)
    assert timeline_setting(CATALOG, lineage) == "2"
    unknown = replace(CATALOG, histories={})
    assert timeline_setting(unknown, unknown.lineage(2)) == "current"
    assert chosen(Target(), catalog=unknown).name == "third"
    assert timeline_setting(unknown, unknown.lineage(1)) == "1"


def test_windows_tell_what_each_backup_reaches() -> None:
    windows = {(w.backup.name, w.timeline): w for w in CATALOG.windows()}
    assert set(windows) == {("first", 1), ("first", 2), ("second", 1), ("second", 2), ("third", 2)}
    assert windows["first", 1].end == Lsn(36 * SIZE)
    assert windows["first", 2].end == Lsn(51 * SIZE)
