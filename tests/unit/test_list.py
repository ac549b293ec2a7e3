"""What ``walship list`` says of the end of a window."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from infra.cli.list import _tail_words, _until, _until_words
from pipeline.moments import show
from pipeline.runs import Window
from pipeline.wal import Lsn
from tests.unit.test_recovery import backup

BACKUP = backup("base_20260114_120000", 0x1000000)
WINDOW = Window(BACKUP, 1, BACKUP.stop_lsn, Lsn(0x5000000), None)
KEY = WINDOW.timeline, WINDOW.end
NO_LATER = "the backup's end (no transaction is stored after it)"


def test_a_transaction_after_the_backup_is_the_end() -> None:
    later = BACKUP.stopped + timedelta(seconds=1)
    assert _until(WINDOW, {KEY: later}) == later
    assert _until_words(WINDOW, {KEY: later}) == show(later)


def test_no_window_ends_before_it_begins() -> None:
    for moment in (BACKUP.stopped - timedelta(seconds=1), None):
        assert _until(WINDOW, {KEY: moment}) == BACKUP.stopped
        assert _until_words(WINDOW, {KEY: moment}) == NO_LATER


def test_what_comes_from_tails_is_told() -> None:
    assert _tail_words(WINDOW) == ""
    assert _tail_words(replace(WINDOW, tail=2048)) == ", the last 2.0 KB of it in tails of the open segment"


def test_what_cannot_be_read_is_unknown() -> None:
    assert _until(WINDOW, {}) is None
    assert "cannot be read" in _until_words(WINDOW, {})
