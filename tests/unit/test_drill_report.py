"""The report of a drill: what it concludes, and how it is told."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from handlers.drill import Outcome, Reading, Report, State
from infra.cli.drill import write_report
from infra.drill import judge
from infra.postgres.preloaded import acting, without_workers
from pipeline.backup import ArchiveInfo, BackupInfo
from pipeline.errors import IntegrityError, RecoveryError, SourceError
from pipeline.lineage import Leg, Lineage, WalPath
from pipeline.recovery import RestorePlan
from pipeline.targets import Target
from pipeline.wal import Lsn
from tests.clock import FastClock
from tests.drills import new_report

BEGAN = datetime(2026, 1, 14, 12, 0, tzinfo=UTC)


def outcome(name: str = "rows", state: State = State.PASSED, *, waived: bool = False) -> Outcome:
    return Outcome(name, state, "> 0", "7 | <b>\nnext", 0.25, "shop", waived=waived)


def restored(*outcomes: Outcome, target: str = "latest") -> Report:
    """Of a cluster that came back."""
    report = new_report(target)
    report.began, report.rto, report.newest_commit = BEGAN, 12.34, BEGAN - timedelta(seconds=4.2)
    report.outcomes += outcomes
    return report


def test_all_is_well() -> None:
    report = restored(outcome(), outcome("books"))
    assert (report.verdict, judge(report)) == ("passed", None)
    assert report.conclusion == (
        "The cluster came back to latest in 12.3 s, its newest commit 4.2 s old, and all 2 checks passed."
    )
    assert report.summary()["rpo_seconds"] == 4.2
    assert report.summary()["rto_seconds"] == 12.34


def test_a_check_that_failed_counts_more_than_one_that_was_not_run() -> None:
    report = restored(outcome("amcheck", State.NOT_RUN), outcome("books", State.FAILED), outcome())
    error = judge(report)
    assert isinstance(error, IntegrityError)
    assert error.fact.startswith("1 of 3 checks failed; books: expected > 0, found 7")
    assert report.verdict == "failed"
    assert "but 1 of 3 checks FAILED: books." in report.conclusion


def test_what_was_not_run_is_no_pass() -> None:
    report = restored(outcome("amcheck", State.NOT_RUN), outcome())
    assert report.verdict == "incomplete"
    assert isinstance(judge(report), SourceError)
    assert report.conclusion.endswith("; 1 check passed, NOT RUN: amcheck.")


def test_what_somebody_left_out_is_told_and_no_fault() -> None:
    report = restored(outcome("amcheck", State.NOT_RUN, waived=True), outcome())
    assert (report.verdict, judge(report)) == ("passed", None)
    assert "NOT RUN: amcheck" in report.conclusion


def test_a_restore_that_failed() -> None:
    report = new_report()
    report.failure = RecoveryError("segment 7 is missing", hint="take another backup")
    assert report.verdict == "failed"
    assert report.conclusion == "The cluster could NOT be brought back to latest: segment 7 is missing."
    assert "What to do: take another backup" in report.markdown()
    assert report.summary()["error"] == {"fact": "segment 7 is missing", "hint": "take another backup"}


def test_a_drill_that_has_not_come_to_its_end_is_no_success() -> None:
    assert new_report().verdict == "failed"


def test_without_a_commit_there_is_no_rpo_and_it_says_so() -> None:
    report = restored(outcome())
    report.newest_commit = None
    assert report.summary()["rpo_seconds"] is None
    assert "no commit in the replayed WAL" in report.markdown()
    assert report.conclusion == "The cluster came back to latest in 12.3 s, and 1 check passed."


def test_a_commit_since_the_drill_began_is_not_younger_than_new() -> None:
    report = restored()
    report.newest_commit = BEGAN + timedelta(seconds=1)
    assert report.rpo == 0


@pytest.mark.parametrize(
    ("setting", "kept", "left_out"),
    [
        ("", "", ()),
        ("pg_stat_statements", '"pg_stat_statements"', ()),
        ('auto_explain, "pg_cron",$libdir/pglogical.so', '"auto_explain"', ("pg_cron", "$libdir/pglogical.so")),
    ],
)
def test_libraries_that_are_nothing_but_workers_are_left_out(
    setting: str, kept: str, left_out: tuple[str, ...]
) -> None:
    assert without_workers(setting) == (kept, left_out)
    assert acting(setting) == left_out


def test_a_library_that_nobody_knows_counts_as_one_that_acts() -> None:
    """A drill loads it, for its tables may need it, and lets it start no worker."""
    setting = "timescaledb, citus,pg_stat_statements,their_own"
    assert acting(setting) == ("timescaledb", "citus", "their_own")
    assert without_workers(setting) == ('"timescaledb", "citus", "pg_stat_statements", "their_own"', ())


def test_a_time_is_measured_against_that_time() -> None:
    target = Target.parse(time="2026-01-14 11:00:00+00")
    report = restored(outcome(), target=str(target))
    report.newest_commit = BEGAN - timedelta(hours=1, seconds=3)
    report.plan = plan(target)
    assert "its newest commit 3.0 s before that time" in report.conclusion
    assert report.summary()["newest_commit_before_target_seconds"] == 3.0


def test_the_markdown_is_one_whatever_is_in_the_values() -> None:
    report = restored(outcome("a|b"))
    report.plan, report.server, report.buffers, report.log = plan(Target()), "18.6", "128MB", "LOG:  last\nwords"
    report.readings.append(Reading("s3://bank"))
    report.readings[0].served(1536)
    clock = FastClock(BEGAN)
    with pytest.raises(RecoveryError), report.step("replay", clock):
        raise RecoveryError("it broke")
    text = report.markdown()
    assert "| a\\|b | passed | shop | > 0 | 7 \\| &lt;b> next | 0.25 |" in text
    assert "| s3://bank: 1 object, 1.5 KB |" in text
    assert "| base backup | base_20260114_100000, ended 2026-01-14 10:00:05 UTC, 40.0 MB |" in text
    assert "    LOG:  last\n    words\n" in text
    assert "| replay | 0.00 |" in text
    widths = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| ")}
    assert widths == {3, 7}


def plan(target: Target) -> RestorePlan:
    start, stop = Lsn(0x2000028), Lsn(0x2000100)
    backup = BackupInfo(
        name="base_20260114_100000", id="0" * 32, kind="full", system_id="7", server_version=180006,
        segment_size=16 << 20, timeline=1, start_lsn=start, stop_lsn=stop, started=BEGAN - timedelta(hours=2),
        stopped=BEGAN - timedelta(hours=2, seconds=-5), tablespaces=(), archives=(ArchiveInfo("base", 40 << 20, ()),),
        index=(), manifest="", stored_size=1,
    )  # fmt: skip
    lineage = Lineage((Leg(1, Lsn(0), None),), 16 << 20)
    path = WalPath((), start, Lsn(0x4000000), None, 16 << 20)
    return RestorePlan(backup, target, target, lineage, "1", path, None)


def test_drills_of_the_same_second_take_no_report_from_each_other(tmp_path: Path) -> None:
    """Those of two clusters, begun by cron at the full hour."""
    reports = [new_report(target) for target in ("latest", "immediate", "2026-01-14 12:00:00+00")]
    for report in reports:
        report.began = reports[0].began
        write_report(report, tmp_path)
    stem = f"drill_{reports[0].began:%Y%m%d_%H%M%S}"
    for name, report in zip((stem, f"{stem}_2", f"{stem}_3"), reports, strict=True):
        assert json.loads((tmp_path / f"{name}.json").read_text())["target"] == report.target
        assert report.target in (tmp_path / f"{name}.md").read_text()
    assert len(list(tmp_path.iterdir())) == 6, "and no temporary files"
