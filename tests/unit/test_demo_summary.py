"""The demo's claims: one that does not hold is noticed, whatever it is about."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from infra.demo.lag import SpoolLag, longest_put
from infra.demo.load import Books, Table
from infra.demo.summary import Summary
from infra.demo.tickets import Loss, Ticket, memo
from infra.monitoring.metrics import Metrics
from pipeline.events import ObjectStored
from tests.clock import FastClock

_BOOKS = Books({"accounts": Table(1000, "a" * 64), "payments": Table(5000, "b" * 64)}, imbalance=0)


def test_the_same_content_holds() -> None:
    summary = Summary()
    summary.compare("after", _BOOKS, _BOOKS)
    assert not summary.broken
    assert summary.result()["ok"]
    assert "5,000 rows of payments, the same content (SHA-256 bbbbbbbbbbbb…)" in summary.claims[1].text


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (replace(_BOOKS, imbalance=-7), "the books are off by -7"),
        (replace(_BOOKS, tables={"accounts": _BOOKS.tables["accounts"]}), "payments with its 5,000 rows is not there"),
        (replace(_BOOKS, tables={**_BOOKS.tables, "payments": Table(4999, "b" * 64)}), "has 4,999 rows"),
        (replace(_BOOKS, tables={**_BOOKS.tables, "payments": Table(5000, "c" * 64)}), "SHA-256 cccccccccccc"),
    ],
    ids=["imbalance", "table", "rows", "content"],
)
def test_a_difference_breaks_a_claim(found: Books, words: str) -> None:
    summary = Summary()
    summary.compare("after", _BOOKS, found)
    (broken,) = summary.broken
    assert words in broken.text
    assert not summary.result()["ok"]


def test_a_story_without_claims_has_proved_nothing() -> None:
    assert not Summary().result()["ok"]


def test_a_broken_claim_can_be_seen(capsys: pytest.CaptureFixture[str]) -> None:
    summary = Summary({"base backup": "30 MB"})
    summary.claim("all came back", holds=True)
    summary.claim("nothing was lost", holds=False)
    summary.show()
    shown = capsys.readouterr().out
    assert "base backup" in shown
    assert "✓ all came back" in shown
    assert "✗ nothing was lost" in shown


def test_lag_is_how_long_a_segment_lies_in_the_spool(tmp_path: Path) -> None:
    lag = SpoolLag(tmp_path)
    lag.start()
    try:
        segment, other = tmp_path / f"{1:08X}{0:08X}{1:08X}", tmp_path / "archtemp.1.2.3"
        segment.touch()
        other.touch()
        deadline = time.monotonic() + 60
        while segment.name not in lag._arrived:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)  # the lag that is to be measured
        segment.unlink()
        other.unlink()
        while not lag.waited and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        lag.stop()
    assert len(lag.waited) == 1
    assert 0.1 < lag.worst < 5
    assert lag.mean == lag.worst


#: Killed at 100; one acknowledged every tenth of a second, the last one just before.
_SOLD = [Ticket(1, number, 95 + number / 10, 0.01) for number in range(1, 51)]
_ROWS = {(1, number): memo(1, number) for number in range(1, 51)}


def _loss(rows: dict[tuple[int, int], str]) -> Loss:
    return Loss(100.0, _SOLD, rows)


def test_what_came_back_whole_lost_nothing() -> None:
    loss = _loss(_ROWS)
    assert not loss.missing
    assert loss.unbroken
    assert loss.recovery_point == pytest.approx(0)


def test_a_ticket_whose_answer_was_still_on_its_way_may_be_there() -> None:
    loss = _loss({**_ROWS, (1, 51): memo(1, 51)})
    assert not loss.missing
    assert loss.unbroken


def test_what_is_lost_is_known_by_its_age() -> None:
    loss = _loss({key: text for key, text in _ROWS.items() if key[1] <= 43})
    assert [ticket.number for ticket in loss.missing] == [*range(44, 51)]
    assert loss.recovery_point == pytest.approx(0.7)
    assert loss.unbroken
    assert not set(loss.missing) & set(loss.older(0.65))
    assert set(loss.missing) & set(loss.older(0.55))


@pytest.mark.parametrize(
    "rows",
    [
        {key: text for key, text in _ROWS.items() if key[1] != 7},
        {**_ROWS, (1, 7): memo(1, 8)},
        {**_ROWS, (1, 52): memo(1, 52)},
        {**_ROWS, (2, 2): memo(2, 2)},
    ],
    ids=["hole", "content", "from nowhere", "another till"],
)
def test_a_hole_or_other_content_breaks_the_tickets(rows: dict[tuple[int, int], str]) -> None:
    loss = _loss(rows)
    assert not loss.unbroken
    assert loss.digest != _loss(_ROWS).digest


def test_nothing_that_came_back_has_no_recovery_point() -> None:
    loss = _loss({})
    assert loss.recovery_point is None
    assert loss.missing == _SOLD


def test_the_longest_put_is_read_from_the_metrics() -> None:
    metrics = Metrics({"file:///copy": True, "s3://bucket/bank": True}, put_price=0.005, clock=FastClock())
    assert longest_put(metrics.page()[0].decode(), "s3:", "tail") == 0
    for destination, name, seconds in (
        ("s3://bucket/bank", "tail/a", 0.03),
        ("s3://bucket/bank", "tail/b", 0.15),
        ("s3://bucket/bank", "wal/c", 3.0),
        ("file:///copy", "tail/a", 4.0),
    ):
        metrics.notify(ObjectStored(destination, name, 1000, seconds))
    page = metrics.page()[0].decode()
    assert longest_put(page, "s3:", "tail") == 0.2
    assert longest_put(page, "s3:", "wal") == 5.0
