"""Cron expressions where clocks change, and those that mean nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from infra.cron import Cron, zone
from infra.settings import load
from pipeline.errors import ConfigError

#: Clocks go from 02:00 to 03:00 on 29 March 2026, and from 03:00 back to 02:00 on 25 October.
BERLIN = zone("Europe/Berlin")


def runs(cron: Cron, after: datetime, count: int) -> list[str]:
    """In local time, with the offset."""
    found: list[str] = []
    moment: datetime | None = after
    for _ in range(count):
        assert moment is not None
        moment = cron.after(moment)
        assert moment is not None
        found.append(f"{moment.astimezone(BERLIN):%d %H:%M %z}")
    return found


def test_a_time_that_does_not_exist_is_moved_to_the_first_that_does() -> None:
    spring = datetime(2026, 3, 28, 12, tzinfo=UTC)
    assert runs(Cron("30 2 * * *", BERLIN), spring, 2) == ["29 03:00 +0200", "30 02:30 +0200"]
    assert runs(Cron("15,45 2 * * *", BERLIN), spring, 2) == ["29 03:00 +0200", "30 02:15 +0200"]  # once, not twice


def test_a_time_that_happens_twice_counts_once() -> None:
    autumn = datetime(2026, 10, 24, 12, tzinfo=UTC)
    cron = Cron("30 2 * * *", BERLIN)
    assert runs(cron, autumn, 2) == ["25 02:30 +0200", "26 02:30 +0100"]
    # Asked within the second 02:10, it does not tell the first 02:30, which is over.
    assert runs(cron, datetime(2026, 10, 25, 1, 10, tzinfo=UTC), 1) == ["26 02:30 +0100"]


def test_what_runs_every_so_often_goes_by_the_time_that_passes() -> None:
    half_hours = Cron("*/30 * * * *", BERLIN)
    assert runs(half_hours, datetime(2026, 10, 25, 0, 15, tzinfo=UTC), 4) == [
        "25 02:30 +0200", "25 02:00 +0100", "25 02:30 +0100", "25 03:00 +0100",
    ]  # fmt: skip
    assert runs(half_hours, datetime(2026, 3, 29, 0, 15, tzinfo=UTC), 2) == ["29 01:30 +0100", "29 03:00 +0200"]


def test_the_next_run_is_always_later_and_a_year_has_as_many_as_days() -> None:
    cron, moment, count = Cron("30 2 * * *", BERLIN), datetime(2026, 1, 1, tzinfo=UTC), 0
    while (found := cron.after(moment)) is not None and found.year == 2026:
        assert found > moment
        moment, count = found, count + 1
    assert count == 365


@pytest.mark.parametrize("expression", ["0 0 30 2 *", "0 0 31 4,6 *", "0 0 0 31 FEB *"])
def test_what_never_runs_is_refused(expression: str) -> None:
    with pytest.raises(ConfigError, match="never runs"):
        Cron(expression)


@pytest.mark.parametrize(
    ("expression", "fact"),
    [
        ("", "wrong number of fields"),
        ("@daily", "wrong number of fields"),
        ("61 * * * *", "its minute is wrong"),
        ("0 25 * * *", "its hour is wrong"),
        ("0 0 * 13 *", "its month is wrong"),
        ("0 0 30 13 *", "is wrong"),
        ("0 0 * * MOON", "its day-of-week is wrong"),
    ],
)
def test_what_means_nothing_is_refused_with_what_is_wrong(expression: str, fact: str) -> None:
    with pytest.raises(ConfigError, match=fact) as caught:
        Cron(expression)
    assert "minute hour day-of-month month day-of-week" in caught.value.hint


def test_rare_days_are_found() -> None:
    leap = Cron("0 0 29 2 *").after(datetime(2026, 1, 1, tzinfo=UTC))
    assert leap == datetime(2028, 2, 29, tzinfo=UTC)
    assert Cron("0 0 L * *").after(leap + timedelta(hours=1)) == datetime(2028, 3, 31, tzinfo=UTC)


@pytest.mark.parametrize(
    ("name", "hint"), [("Europe/Berln", "did you mean Europe/Berlin?"), ("../../etc/passwd", "for example")]
)
def test_an_unknown_time_zone_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="there is no time zone") as caught:
        zone(name)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("name", "value", "fact"),
    [
        ("WALSHIP_SCHEDULE_DRILL", "0 0 30 2 *", "WALSHIP_SCHEDULE_DRILL: '0 0 30 2 *' never runs"),
        ("WALSHIP_SCHEDULE_FULL", "often", "WALSHIP_SCHEDULE_FULL: 'often' is no cron expression"),
        ("WALSHIP_TIME_ZONE", "Moon", "WALSHIP_TIME_ZONE: there is no time zone Moon"),
    ],
)
def test_settings_name_what_is_wrong(monkeypatch: pytest.MonkeyPatch, name: str, value: str, fact: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load()
    assert caught.value.fact.startswith(fact)
