"""The alert rules: promtool reads them, each fires when it should and not before, and each leads to its runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests import alerting
from tests.alerting import DEPLOY, RULES, RUNBOOK, Sample, rules, unknown_series
from tests.integration.alert_cases import CASES, FAR, FILLED, STALLED, WELL, Case


def _promtool(*words: str) -> None:
    done = subprocess.run(
        [alerting.programs() / "promtool", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _expected(case: Case) -> dict[str, Any]:
    (rule,) = (rule for rule in rules() if rule["alert"] == case.alert)
    own = {} if case.alert == "WalshipMetricsAbsent" else {"job": "walship", "instance": "db:9432"}
    return {
        "exp_labels": {**rule["labels"], **own, **case.labels},
        "exp_annotations": {**rule["annotations"], "summary": case.summary},
    }


def _test(case: Case, *others: Case) -> dict[str, Any]:
    """In the midst of everything that is well: nothing fires before, and this alone (and ``others``) then."""
    series = {**WELL, **case.series}
    fired = {each.alert: _expected(each) for each in (case, *others)}
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {
                "eval_time": f"{minute}m",
                "alertname": rule["alert"],
                "exp_alerts": [fired[rule["alert"]]] if minute == case.fires and rule["alert"] in fired else [],
            }
            for minute in (case.quiet, case.fires)
            for rule in rules()
        ],
    }


def test_prometheus_and_alertmanager_take_the_files(tmp_path: Path) -> None:
    _promtool("check", "rules", str(RULES))
    _promtool("check", "config", str(DEPLOY / "prometheus.yml"))
    # As docker-compose.yml mounts it: the rules lie beside it.
    for file in (RULES, DEPLOY.parent / "compose" / "prometheus.yml"):
        shutil.copy(file, tmp_path)
    _promtool("check", "config", str(tmp_path / "prometheus.yml"))
    checked = subprocess.run(
        [alerting.programs() / "amtool", "check-config", DEPLOY / "alertmanager.yml"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr


def test_each_alert_fires_when_it_should_and_alone(tmp_path: Path) -> None:
    assert {case.alert for case in (*CASES, STALLED)} == {rule["alert"] for rule in rules()}, "each is tested"
    lacks = f"{FAR} lacks the WAL of the last 13m 0s"
    lagging = Case("WalshipArchiveLagHigh", {}, 0, 0, lacks, STALLED.labels)
    well = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in WELL.items()],
        "alert_rule_test": [
            {"eval_time": f"{minute}m", "alertname": rule["alert"], "exp_alerts": []}
            for minute in (0, 1, 30, 240)
            for rule in rules()
        ],
    }
    filled = {
        **well,
        "input_series": [{"series": name, "values": values} for name, values in {**WELL, **FILLED}.items()],
    }
    file = tmp_path / "test.yml"
    tests = [well, filled, *map(_test, CASES), _test(STALLED, lagging)]
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": tests}), "utf-8")
    _promtool("test", "rules", str(file))


def test_each_alert_says_how_grave_it_is_what_to_do_and_where_to_read_on() -> None:
    sections = re.findall(r"^## (\w+)$", RUNBOOK.read_text("utf-8"), re.MULTILINE)
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "action", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["alert"] in sections
    assert [section for section in sections if section.startswith("Walship")] == [rule["alert"] for rule in rules()]


def test_a_series_that_does_not_exist_is_found() -> None:
    live = [Sample("walship_full_seconds", {"kind": "slot"}, 1.0), Sample("walship_wal_gaps", {"destination": "d"}, 0)]
    right = ('walship_full_seconds{kind="slot"} < 3600', 'up{job="walship"} == 0', "walship_wal_gaps > 0")
    assert unknown_series(right, live) == []
    for wrong in (
        "walship_wal_gap > 0",
        'walship_full_seconds{kind="disk"} < 1',
        'walship_wal_gaps{kind="slot"} > 0',
        'walship_full_seconds{kind=~"spool|wal"} < 1',
    ):
        assert unknown_series([wrong], live) == [wrong.partition(" ")[0]]
