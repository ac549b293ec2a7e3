"""Where the stream goes on, from what is stored and the server's lineage."""

from __future__ import annotations

import pytest

from pipeline.lineage import Leg, Lineage
from pipeline.resume import GoOn, go_on
from pipeline.runs import Runs
from pipeline.wal import Lsn

MB = 1 << 20
ONE = Lineage((Leg(1, Lsn(0), None),), MB)


def at(number: float) -> Lsn:
    return Lsn(int(number * MB))


def forked(fork: float) -> Lineage:
    return Lineage((Leg(1, Lsn(0), at(fork)), Leg(2, at(fork), None)), MB)


def runs(*numbers: int) -> dict[int, Runs]:
    return {1: Runs.of(numbers)}


def test_an_empty_repository_says_nothing() -> None:
    assert go_on(ONE, {}, begin=None) is None
    assert go_on(ONE, {1: Runs()}, begin=at(3)) is None


def test_behind_the_last_segment() -> None:
    assert go_on(ONE, runs(3, 4, 5), begin=at(3)) == GoOn(1, at(6))


def test_a_hole_behind_the_newest_backup_comes_first() -> None:
    assert go_on(ONE, runs(3, 4, 7, 8), begin=at(3.5)) == GoOn(1, at(5), at(7))


def test_a_hole_before_the_newest_backup_harms_nobody() -> None:
    assert go_on(ONE, runs(3, 4, 7, 8), begin=at(7.2)) == GoOn(1, at(9))


def test_without_a_backup_only_the_last_run_counts() -> None:
    assert go_on(ONE, runs(3, 4, 7, 8), begin=None) == GoOn(1, at(9))


def test_what_the_server_no_longer_has_is_passed_over() -> None:
    assert go_on(ONE, runs(3, 4, 7, 8), begin=at(3), after=at(7)) == GoOn(1, at(9))
    assert go_on(ONE, runs(3, 4), begin=at(3), after=at(20)) == GoOn(1, at(20))


@pytest.mark.parametrize(("fork", "timeline", "segment"), [(6.5, 1, 6), (6, 2, 6), (7, 1, 6), (5.2, 1, 5), (8, 1, 6)])
def test_the_end_of_the_old_timeline_comes_first(fork: float, timeline: int, segment: int) -> None:
    """Segments 3 to 5 of timeline 1 are stored, and of timeline 2 nothing, not even its copy of the fork's segment."""
    assert go_on(forked(fork), runs(3, 4, 5), begin=at(3)) == GoOn(timeline, at(segment))


def test_the_new_timeline_goes_on_behind_its_own_segments() -> None:
    stored = {1: Runs.of([3, 4, 5]), 2: Runs.of([5, 6])}
    assert go_on(forked(5.2), stored, begin=at(3)) == GoOn(2, at(7))


def test_what_an_old_primary_wrote_behind_the_fork_is_not_counted() -> None:
    stored = {1: Runs.of(range(3, 10))}
    assert go_on(forked(5.2), stored, begin=at(3)) == GoOn(1, at(5))
