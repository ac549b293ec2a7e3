"""The judge of the kill test is judged: it must see what is lost, and call nothing lost that is allowed to be."""

from __future__ import annotations

import pytest

from tests.killtest.load import Commit
from tests.killtest.plan import Plan
from tests.killtest.round import longest_put
from tests.killtest.verdict import Outcome, table
from tests.proxy import Request

_KILL = 100.0
_COMMITS = [Commit(0, n, acknowledged) for n, acknowledged in enumerate((90.0, 98.5, 98.99, 99.2, 100.001), 1)]


def _judged(lost: set[int], *, synchronous: bool, put: float = 0.1) -> Outcome:
    outcome = Outcome(Plan.draw(1, 1, synchronous=synchronous), put=put)
    outcome.judge(_COMMITS, {(c.client, c.n) for c in _COMMITS if c.n not in lost}, _KILL)
    return outcome


@pytest.mark.parametrize("lost", [{1}, {5}, {2, 3}])
def test_in_synchronous_mode_nothing_may_be_missing(lost: set[int]) -> None:
    assert len(_judged(lost, synchronous=True).violations) == 1
    assert not _judged(set(), synchronous=True).violations


@pytest.mark.parametrize(("lost", "fine"), [({5}, True), ({3, 4, 5}, True), ({2, 3}, False), ({1}, False)])
def test_in_asynchronous_mode_the_interval_and_one_put_may_be_missing(lost: set[int], fine: bool) -> None:
    assert (not _judged(lost, synchronous=False).violations) is fine


def test_a_round_without_commits_proves_nothing() -> None:
    outcome = Outcome(Plan.draw(1, 1, synchronous=True))
    outcome.judge([], set(), _KILL)
    assert outcome.violations


def test_one_put_is_the_longest_that_was_answered_lately_or_was_cut_by_the_kill() -> None:
    def put(began: float, ended: float | None, path: str = "/b/1/tail/x/y", **more: bool) -> Request:
        return Request("PUT", path, began, ended, **more)

    assert longest_put([], _KILL) == 0
    assert longest_put([put(97, 97.25), put(98, 98.5), put(80, 90)], _KILL) == pytest.approx(0.5)
    assert longest_put([put(99.25, None)], _KILL) == pytest.approx(0.75)
    assert longest_put([put(99.25, 100.01, failed=True)], _KILL) == pytest.approx(0.75)
    # Not the ones that failed before, nor those of a base backup, nor what came after the kill.
    others = [put(96, 99, failed=True), put(90, 99, "/b/1/base/x"), put(100.1, 105)]
    assert longest_put(others, _KILL) == 0


def test_a_round_can_be_drawn_again_and_the_next_one_is_another() -> None:
    plan = Plan.draw(7, 3, synchronous=True)
    assert plan == Plan.draw(7, 3, synchronous=True)
    assert len({str(Plan.draw(7, number, synchronous=True)) for number in range(20)}) > 15


def test_the_table_has_a_line_for_each_mode() -> None:
    outcomes = [_judged({1}, synchronous=True), _judged({4}, synchronous=False), _judged(set(), synchronous=False)]
    head, _, sync, mode = table(outcomes).splitlines()
    assert head.startswith("| mode | rounds |")
    assert sync.startswith("| synchronous | 1 | 5 | 1 | 10.000 s |")
    assert mode.startswith("| asynchronous, 1 s | 2 | 10 | 1 | 0.800 s | 0.300 s |")
