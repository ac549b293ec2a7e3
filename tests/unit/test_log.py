"""What happened in the stream, as lines for whoever is on duty."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
import structlog
from structlog.testing import capture_logs

from infra.monitoring.log import log_notice
from pipeline import events
from pipeline.wal import Lsn, WalFile

FIRST, LAST = WalFile.segment(1, 0, 1 << 20), WalFile.segment(1, 5 << 20, 1 << 20)

#: Notice → level and event of its line, and a word that must be in it; None for those of which there are too many.
LINES: list[tuple[events.Notice, tuple[str, str, str] | None]] = [
    (events.ObjectStored("s3://b", "wal/x", 1, 0.1), None),
    (events.DestinationFailed("s3://b", "wal/x", "503", "wait"), ("error", "destination_failed", "wal/x")),
    (events.DestinationCaughtUp("s3://b"), ("info", "destination_caught_up", "s3://b")),
    (events.DestinationFilling("s3://b", 12, 3456), ("info", "destination_filling", "s3://b")),
    (events.DestinationHampered("s3://b", "no conditions"), ("warning", "destination_hampered", "no conditions")),
    (events.Acknowledged(events.BackupReady("watch", "/spool/b")), ("info", "shipped", "/spool/b")),
    (events.Acknowledged(events.SegmentReady("stream", FIRST, 1)), ("info", "shipped", "stream")),
    (events.Acknowledged(events.SegmentReady("watch", FIRST, 1)), ("info", "shipped", "watch")),
    (events.EventFailed(events.SegmentReady("watch", FIRST, 1), "no", ""), ("error", "not_shipped", FIRST.name)),
    (events.FileRefused("/spool/x", "no segment", "look"), ("error", "refused", "/spool/x")),
    (events.FileSetAside(FIRST, "conflict/x", "other bytes", "find out"), ("error", "set_aside", "conflict/x")),
    (events.WatchingHampered("watch", "no inotify", ""), ("warning", "watching_hampered", "no inotify")),
    (events.TailsRemoved("s3://b", 7), ("debug", "tails_removed", "7")),
    (events.DeleteRefused("s3://b", "locked", "lifecycle"), ("warning", "delete_refused", "lifecycle")),
    (events.GapOpened(1, FIRST, LAST, "take a backup"), ("error", "gap_opened", LAST.name)),
    (events.GapClosed(FIRST), ("info", "gap_closed", FIRST.name)),
    (events.SourcesDiffer("other bytes", "a clone"), ("error", "sources_differ", "a clone")),
    (events.StreamStarted("h:5432", 1, Lsn(0x16B374D848), synchronous=True), ("info", "stream_started", "16/B374D848")),
    (events.StreamStarted("h:5432", 1, Lsn(1), synchronous=True, changed=True), ("info", "commits_wait", "h:5432")),
    (events.StreamLost("gone", "start it", 2.0), ("warning", "stream_lost", "2.0")),
    (events.WalMoved(1, Lsn(1), Lsn(1), Lsn(1), {}, {}), None),
    (events.TimelineLeft(1, Lsn(512), Lsn(512)), ("info", "timeline_left", "0/200")),
    (events.TimelineLeft(1, Lsn(512), Lsn(768)), ("warning", "timeline_left", "256 bytes of timeline 1")),
    (events.SyncDegraded("s3://b", "silent"), ("error", "sync_degraded", "silent")),
    (events.SyncRestored("s3://b"), ("info", "sync_restored", "s3://b")),
    (events.OperationEnded("drill", "", "", None), ("info", "scheduled_done", "drill")),
    (events.OperationEnded("backup", "full", "buy", None), ("error", "scheduled_failed", "buy")),
]


@pytest.fixture(autouse=True)
def everything_is_logged() -> Iterator[None]:
    """Debug lines too, whatever an earlier test has set up."""
    before = structlog.get_config()
    structlog.reset_defaults()
    yield
    structlog.configure(**before)


@pytest.mark.parametrize(("notice", "line"), LINES, ids=lambda value: type(value).__name__)
def test_each_notice_has_its_line(notice: events.Notice, line: tuple[str, str, str] | None) -> None:
    with capture_logs() as lines:
        log_notice(notice)
    if line is None:
        assert lines == []
        return
    (logged,) = lines
    level, event, word = line
    assert (logged.pop("log_level"), logged.pop("event")) == (level, event)
    assert any(word in str(value) for value in logged.values())


def test_no_notice_is_left_out_above() -> None:
    assert {type(notice) for notice, _ in LINES} == set(get_args(events.Notice))
