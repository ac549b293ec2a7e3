"""What is durable where, and what of it PostgreSQL is told: never ahead of the stores that count, never back."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from pipeline.durable import Durable
from pipeline.events import Notice, SyncDegraded, SyncRestored
from pipeline.wal import Lsn

START = Lsn(1000)


def make(
    notices: list[Notice] | None = None,
    *,
    patience: float | None = None,
    behind: dict[str, Lsn] | None = None,
    **destinations: bool,
) -> Durable:
    told = [] if notices is None else notices
    required = destinations or {"a": True, "b": True}
    return Durable(required, START, notify=told.append, patience=patience, behind=behind)


def test_the_slowest_required_destination_is_what_is_reported() -> None:
    durable = make(a=True, b=True, c=False)
    assert durable.flush(Lsn(2000), 0) == START
    assert durable.stored("a", 1000, 1500)
    assert durable.stored("c", 1000, 1800)
    assert durable.flush(Lsn(2000), 0) == START
    assert durable.stored("b", 1000, 1200)
    assert durable.flush(Lsn(2000), 0) == Lsn(1200)
    assert durable.reached() == {"a": 1500, "b": 1200, "c": 1800}


def test_what_lies_behind_a_hole_counts_once_the_hole_is_filled() -> None:
    durable = make(a=True)
    assert not durable.stored("a", 1200, 1300)
    assert not durable.stored("a", 1100, 1150)
    assert durable.flush(Lsn(2000), 0) == START
    assert durable.stored("a", 1000, 1100)
    assert durable.flush(Lsn(2000), 0) == Lsn(1150)
    assert durable.stored("a", 1150, 1200)
    assert durable.flush(Lsn(2000), 0) == Lsn(1300)
    assert not durable.stored("a", 1000, 1300), "said twice"


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=40))
def test_any_order_of_ranges_counts_what_is_there_without_a_hole(ranges: list[tuple[int, int]]) -> None:
    durable, there = make(a=True), set[int]()
    for start, length in ranges:
        before = durable.reached()["a"]
        moved = durable.stored("a", START + start, START + start + length)
        there.update(range(START + start, START + start + length))
        expected = next(at for at in range(START, START + 200) if at not in there)
        assert durable.reached()["a"] == expected
        assert moved == (expected > before)


def test_a_destination_that_catches_up_for_long_costs_no_memory_for_each_tail() -> None:
    durable = make(a=True)
    starts = list(range(5000, 25_000, 10))
    random.Random(1).shuffle(starts)
    for start in starts:
        durable.stored("a", start, start + 10)
    assert durable._ahead["a"] == [(5000, 25_000)]
    assert durable.stored("a", 1000, 5000)
    assert durable.reached()["a"] == 25_000


def test_one_that_begins_behind_the_origin_holds_the_position_back() -> None:
    durable = make(behind={"b": Lsn(400)}, a=True, b=True)
    assert durable.flush(Lsn(1000), 0) == Lsn(400)
    durable.stored("b", 1000, 1100)
    durable.stored("a", 1000, 1100)
    assert durable.flush(Lsn(1100), 0) == Lsn(400)
    durable.stored("b", 0, 1000)
    assert durable.flush(Lsn(1100), 0) == Lsn(1100)


def test_a_gap_is_skipped_and_what_lies_ahead_of_it_counts() -> None:
    durable = make(a=True)
    durable.stored("a", 1500, 1600)
    durable.skip(1000, 1500)
    assert durable.flush(Lsn(2000), 0) == Lsn(1600)
    durable.skip(1100, 1200)
    assert durable.flush(Lsn(2000), 0) == Lsn(1600), "nothing goes back"


def test_behind_a_gap_only_what_is_really_stored_counts() -> None:
    durable = make(behind={"a": Lsn(200)}, a=True, b=True)
    durable.skip(1000, 1200)
    assert durable.reached() == {"a": 200, "b": 1200}, "a was being copied to, and lacks what lies before the gap"
    durable.stored("b", 1200, 1500)
    assert durable.flush(Lsn(1500), 0) == Lsn(200)
    durable.stored("a", 200, 1000)
    assert durable.flush(Lsn(1500), 0) == Lsn(1200), "and what lies behind it"
    durable.stored("a", 1200, 1500)
    assert durable.flush(Lsn(1500), 0) == Lsn(1500)


def test_without_patience_commits_wait_for_ever() -> None:
    notices: list[Notice] = []
    durable = make(notices)
    durable.stored("a", 1000, 1500)
    assert durable.flush(Lsn(1500), 0) == START
    assert durable.flush(Lsn(1500), 1e9) == START
    assert notices == []


def test_one_that_stays_behind_no_longer_counts_until_it_has_caught_up() -> None:
    notices: list[Notice] = []
    durable = make(notices, patience=10)
    durable.stored("a", 1000, 1500)
    assert durable.flush(Lsn(1500), 100) == START
    assert durable.flush(Lsn(1500), 110) == START, "not longer than the patience"
    assert durable.flush(Lsn(1500), 110.1) == Lsn(1500)
    assert durable.degraded == {"b"}
    (told,) = notices
    assert isinstance(told, SyncDegraded)
    assert told.destination == "b"
    durable.stored("b", 1000, 1400)
    assert durable.flush(Lsn(1500), 111) == Lsn(1500)
    assert durable.degraded == {"b"}, "it still lacks what was reported"
    durable.stored("b", 1400, 1500)
    assert durable.flush(Lsn(1500), 112) == Lsn(1500)
    assert notices[1:] == [SyncRestored("b")]
    durable.stored("a", 1500, 1600)
    assert durable.flush(Lsn(1600), 113) == Lsn(1500), "and is waited for again"


def test_headway_however_slow_is_not_given_up() -> None:
    durable = make(patience=10)
    durable.stored("a", 1000, 2000)
    for step in range(20):
        durable.flush(Lsn(2000), 9.0 * step)
        durable.stored("b", 1000 + step, 1001 + step)
    assert durable.degraded == frozenset()
    assert durable.flush(Lsn(2000), 180) == Lsn(1020)


def test_the_last_copy_is_always_waited_for() -> None:
    notices: list[Notice] = []
    durable = make(notices, patience=10)
    durable.flush(Lsn(1500), 0)
    assert durable.flush(Lsn(1500), 1000) == START
    assert durable.degraded == frozenset(), "both are away: commits wait"
    durable.stored("a", 1000, 1500)
    assert durable.flush(Lsn(1500), 1001) == Lsn(1500)
    assert durable.degraded == {"b"}, "one is back, and the other one is late"
    assert durable.flush(Lsn(1700), 1002) == Lsn(1500)
    assert durable.flush(Lsn(1700), 2000) == Lsn(1500), "now the one that counts is away"
    assert durable.degraded == {"b"}
    durable.stored("b", 1000, 1700)
    assert durable.flush(Lsn(1700), 2001) == Lsn(1700), "the other one has caught up, and a is late"
    assert durable.degraded == {"a"}


def test_an_idle_server_makes_nobody_late() -> None:
    durable = make(patience=10)
    for name in ("a", "b"):
        durable.stored(name, 1000, 1500)
    durable.flush(Lsn(1500), 0)
    durable.flush(Lsn(1500), 1000)
    assert durable.degraded == frozenset()
    durable.flush(Lsn(1501), 1001)
    assert durable.degraded == frozenset(), "late from when something was there to store"


def test_behind_a_fork_nothing_counts_before_the_history() -> None:
    durable = make(a=True, b=True)
    for name in ("a", "b"):
        durable.stored(name, 1000, 1300)
    durable.leave(Lsn(1200))
    durable.hold(Lsn(1200))
    assert durable.flush(Lsn(1200), 0) == Lsn(1200)
    begun = [durable.begun]
    for name in ("a", "b"):
        durable.stored(name, 1100, 1250)
        begun.append(durable.begun)
    assert begun == [False, True, True]
    assert durable.flush(Lsn(1250), 0) == Lsn(1200)
    durable.release("a")
    assert durable.flush(Lsn(1250), 0) == Lsn(1200)
    durable.release("b")
    assert durable.flush(Lsn(1250), 0) == Lsn(1250)


def test_what_the_old_primary_wrote_behind_the_fork_is_not_of_the_new_lineage() -> None:
    durable = make(a=True, b=True)
    durable.stored("a", 1000, 1400)
    durable.stored("b", 1100, 1250)
    durable.stored("b", 1300, 1400)
    durable.leave(Lsn(1200))
    assert durable.reached() == {"a": 1200, "b": 1000}
    durable.stored("b", 1000, 1100)
    assert durable.reached()["b"] == 1200
    durable.stored("a", 1200, 1210)
    durable.stored("b", 1200, 1205)
    assert durable.flush(Lsn(1210), 0) == Lsn(1205)


def test_one_that_does_not_take_the_history_is_late_too() -> None:
    durable = make(patience=10)
    durable.hold(Lsn(1000))
    for name in ("a", "b"):
        durable.stored(name, 1000, 1100)
    assert durable.flush(Lsn(1100), 0) == START
    durable.release("a")
    assert durable.flush(Lsn(1100), 11) == Lsn(1100), "commits wait, so nothing else will ever make b late"
    assert durable.degraded == {"b"}
    durable.release("b")
    durable.flush(Lsn(1100), 12)
    assert durable.degraded == frozenset()


def test_after_a_switch_what_was_stored_ahead_before_the_fork_still_counts() -> None:
    durable = make(a=True)
    durable.stored("a", 1100, 1200)
    durable.stored("a", 1300, 1500)
    durable.leave(Lsn(1350))
    durable.stored("a", 1000, 1100)
    assert durable.reached()["a"] == 1200
    durable.stored("a", 1200, 1300)
    assert durable.reached()["a"] == 1350


def test_one_destination_with_the_first_bytes_is_enough_for_a_history_and_not_for_commits() -> None:
    durable = make(behind={"b": Lsn(100)}, a=True, b=True)
    durable.leave(Lsn(1000))
    durable.hold(Lsn(1000))
    begun = [durable.begun]
    durable.stored("b", 900, 1001)
    begun.append(durable.begun)
    assert begun == [False, True], "a is away, and b lacks older WAL that a could give it"
    durable.release("b")
    assert durable.flush(Lsn(1001), 0) == Lsn(100)
    durable.stored("b", 100, 900)
    assert durable.flush(Lsn(1001), 0) == Lsn(1000)


def test_a_second_promotion_does_not_let_go_what_the_first_holds_back() -> None:
    durable = make(a=True, b=True)
    durable.hold(Lsn(1100))
    for name in ("a", "b"):
        durable.stored(name, 1000, 1300)
    durable.release("a")
    durable.hold(Lsn(1200))
    assert durable.begun
    assert durable.flush(Lsn(1300), 0) == Lsn(1100), "neither history is at b"
    durable.release("b")
    assert durable.flush(Lsn(1300), 0) == Lsn(1200)
    durable.release("a")
    assert durable.flush(Lsn(1300), 0) == Lsn(1300)


def test_nobody_is_late_with_what_is_not_due_yet() -> None:
    """Tails a minute apart, patience of ten seconds, and two destinations that take turns."""
    durable = make(patience=10)
    for second in range(600):
        for name, phase in (("a", 0), ("b", 30)):
            if second % 60 == phase:
                durable.stored(name, 1000, 1000 + second)
        durable.flush(Lsn(1001 + second), float(second), leisure=60.0)
    assert durable.degraded == frozenset()
    durable.stored("a", 1000, 1700)
    durable.flush(Lsn(1700), 700.0, leisure=60.0)
    assert durable.degraded == {"b"}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 50), st.integers(1, 20)), max_size=40))
def test_the_reported_position_is_durable_somewhere_and_never_goes_back(steps: list[tuple[str, int, int]]) -> None:
    durable, said = make(patience=3), START
    there: dict[str, set[int]] = {"a": set(), "b": set()}
    for now, (name, start, length) in enumerate(steps):
        durable.stored(name, START + start, START + start + length)
        there[name].update(range(START + start, START + start + length))
        flush = durable.flush(Lsn(START + 100), float(now))
        assert flush >= said
        assert any(all(at in held for at in range(START, flush)) for held in there.values())
        said = flush
