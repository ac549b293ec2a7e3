"""Times as people type them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.moments import in_json, moment_in, parse_time, show, time_remark

EAST = timezone(timedelta(hours=2), "EET")
#: 01:30 on the 15th in the east.
NOW = datetime(2026, 1, 14, 23, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-14 12:00:00+02",
        "2026-01-14T10:00:00Z",
        "2026-01-14 10:00:00 UTC",
        "2026-01-14 10:00:00.000000+00",
        "2026-01-14 12:00:00",
        " 2026-01-14T12:00 ",
    ],
)
def test_times_with_and_without_a_zone(text: str) -> None:
    assert parse_time(text, EAST) == datetime(2026, 1, 14, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("now", timedelta()),
        (" Now ", timedelta()),
        ("10 minutes ago", timedelta(minutes=10)),
        ("2 h ago", timedelta(hours=2)),
        ("90s ago", timedelta(seconds=90)),
        ("1.5 days ago", timedelta(hours=36)),
        ("an hour ago", timedelta(hours=1)),
        ("a week ago", timedelta(days=7)),
        ("1 h 30 min ago", timedelta(minutes=90)),
        ("1h30m ago", timedelta(minutes=90)),
        ("today 01:00", timedelta(minutes=30)),
        ("Yesterday 14:30", timedelta(hours=11)),
    ],
)
def test_as_seen_from_now(text: str, before: timedelta) -> None:
    assert parse_time(text, EAST, now=NOW) == NOW - before


@pytest.mark.parametrize(
    "text",
    [
        "", "yesterday", "today", "tomorrow 12:00", "ago", " ago", "10 ago", "ten minutes ago", "10 months ago",
        "-5 minutes ago", "10 minutes", "5 minutes minutes ago", "today 14:30+01", "today 25:00", "14:30",
        "2026-13-01", "99999999 weeks ago", "999999999 weeks ago", "2026-01-14 12:00:00 CET", "0001-01-01 00:00+14",
    ],
)  # fmt: skip
def test_what_is_no_time_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a time") as caught:
        parse_time(text, EAST, now=NOW)
    assert "10 minutes ago" in caught.value.hint
    assert "2026-01-14T12:00:00+01:00" in caught.value.hint


@given(st.datetimes(timezones=st.just(UTC), min_value=datetime(1971, 1, 1), max_value=datetime(2200, 1, 1)))  # noqa: DTZ001  hypothesis wants naive bounds
def test_what_is_shown_is_understood(moment: datetime) -> None:
    assert parse_time(show(moment), EAST) == moment
    assert parse_time(moment.astimezone(EAST).isoformat()) == moment
    assert parse_time(moment.astimezone(EAST).replace(tzinfo=None).isoformat(" "), EAST) == moment
    assert time_remark(show(moment), moment) == ""


@given(st.integers(0, 10**6), st.sampled_from(["s", "second", "m", "minutes", "h", "hrs", "d", "days", "weeks"]))
def test_a_span_is_as_long_as_its_parts(count: int, unit: str) -> None:
    one = NOW - parse_time(f"1 {unit} ago", now=NOW)
    try:
        many = NOW - parse_time(f"{count}{unit} ago", now=NOW)
    except ConfigError:
        assert one * count > timedelta(days=365 * 2000), "only a moment before the year 1 is refused"
    else:
        assert many == one * count


def test_how_it_was_taken_is_told() -> None:
    text = "2026-01-14 12:00:00"
    assert "EET: 2026-01-14 12:00:00+02:00" in time_remark(text, parse_time(text, EAST), EAST)
    assert time_remark(f"{text}+02:00", parse_time(f"{text}+02:00"), EAST) == ""
    for words in ("now", "10 minutes ago"):
        said = time_remark(words, parse_time(words, EAST, now=NOW), EAST)
        assert said.startswith(f"{words} was taken by the clock of this machine, EET: 2026-01-15 01:")
    said = time_remark("yesterday 14:30", parse_time("yesterday 14:30", EAST, now=NOW), EAST)
    assert said.endswith("in this machine's time zone, EET: 2026-01-14 14:30:00+02:00")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2026-01-14T12:00:00Z", "2026-01-14T12:00:00+00:00"),  # a key ring
        ("2026-01-14 17:30:00.12+05:30", "2026-01-14T12:00:00.120000+00:00"),  # PostgreSQL's log
        ("2026-01-14 12:00:00", None),
        ("of old", None),
        ("0001-01-01T00:00:00+01:00", None),  # nobody has authenticated the front of a ring
        ("9999-12-31T23:59:59-01:00", None),
    ],
)
def test_times_in_json_have_one_spelling(text: str, said: str | None) -> None:
    moment = moment_in(text)
    assert (in_json(moment) if moment else None) == said
    assert json.loads(json.dumps({"at": moment, "in": Path("/a")}, default=in_json)) == {"at": said, "in": "/a"}
