"""Names and content of the records of operations."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from pipeline.errors import IntegrityError
from pipeline.operations import MOST, Record, RecordName, newest, outdated

NOON = datetime(2026, 1, 14, 12, tzinfo=UTC)


def name(verb: str = "backup", *, ok: bool = True, ended: datetime = NOON, salt: str = "0000000a") -> RecordName:
    return RecordName(ended, verb, ok, salt)


def test_a_name_says_when_what_and_how() -> None:
    assert name().key == "log/20260114T120000Z-backup-ok-0000000a"
    there = name("verify", ok=False, ended=datetime(2026, 1, 14, 13, tzinfo=timezone(timedelta(hours=1))))
    assert there.key == "log/20260114T120000Z-verify-failed-0000000a"
    assert RecordName.parse(there.key) == there


@pytest.mark.parametrize(
    "key",
    [
        "log/",
        "log/check-0123456789abcdef",
        "log/20261314T120000Z-backup-ok-0000000a",
        "log/20260114T120000Z-backup-maybe-0000000a",
        "log/20260114T120000Z-backup-ok-0000000A",
        "log/20260114T120000Z-backup-ok-0000000a/more",
        "wal/20260114T120000Z-backup-ok-0000000a",
    ],
)
def test_what_else_lies_there_is_no_record(key: str) -> None:
    assert RecordName.parse(key) is None


def test_the_newest_by_verb_and_outcome() -> None:
    later = NOON + timedelta(hours=1)
    names = [name(), name(ok=False, ended=later), name("drill", ended=later)]
    assert newest(names, "backup") == names[1]
    assert newest(names, "backup", ok=True) == names[0]
    assert newest(names, "copy") is None


def test_records_go_after_a_year_beyond_a_thousand_and_never_the_last_of_their_kind() -> None:
    now = NOON + timedelta(days=2000)
    drill = name("drill", ended=NOON - timedelta(days=9))
    daily = [name(ended=NOON + timedelta(days=day)) for day in range(2001)]
    gone = outdated([*reversed(daily), drill], now)
    assert gone == daily[:1001]
    assert not outdated(daily[-1001:-1], now)  # a thousand may be as old as they like
    assert not outdated([name(ended=now - timedelta(minutes=n)) for n in range(1500)], now)  # and new ones as many


def record(**changed: object) -> Record:
    members: dict[str, object] = {
        "verb": "backup", "began": NOON, "ended": NOON + timedelta(seconds=61), "seconds": 60.5, "ok": False,
        "host": "db1", "version": "0.1.0", "arguments": ("--incremental",), "error": "it broke", "hint": "mend it",
        "summary": {"name": "base_20260114_120000", "size": 5},
    }  # fmt: skip
    return Record(**{**members, **changed})  # type: ignore[arg-type]  # made of names on purpose


def test_content_comes_back() -> None:
    assert Record.decode("it", record().encode()) == record()


def test_a_summary_that_is_too_large_costs_only_itself() -> None:
    content = record(summary={"all": "x" * MOST}).encode()
    assert len(content) < MOST
    assert list(Record.decode("it", content).summary) == ["left_out"]


def test_a_later_walship_may_say_more() -> None:
    content = record().encode().replace(b'{"verb"', b'{"new": [1], "verb"', 1)
    assert Record.decode("it", content) == record()


@pytest.mark.parametrize(
    ("old", "new", "fact"),
    [
        (b'"ok": false', b'"ok": 0', "ok is missing, or not what it should be"),
        (b'"host"', b'"house"', "host is missing"),
        (b"+00:00", b"", "has no time zone"),
        (b'{"verb"', b'{"ok": true, "verb"', "doubled"),
        (b'{"verb"', b'["verb"', "cannot be read"),
    ],
)
def test_damage_is_named(old: bytes, new: bytes, fact: str) -> None:
    with pytest.raises(IntegrityError, match=fact):
        Record.decode("it", record().encode().replace(old, new))
