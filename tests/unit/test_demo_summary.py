"""The demo's claims: one that does not hold is noticed, whatever it is about."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from infra.demo.lag import SpoolLag
from infra.demo.load import Books, Table
from infra.demo.summary import Summary

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
        time.sleep(0.2)  # the lag that is to be measured
        segment.unlink()
        other.unlink()
        deadline = time.monotonic() + 10
        while not lag.waited and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        lag.stop()
    assert len(lag.waited) == 1
    assert 0.1 < lag.worst < 5
    assert lag.mean == lag.worst
