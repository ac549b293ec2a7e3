"""What is typed as a recovery target."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.targets import Action, Target, TargetKind
from pipeline.wal import Lsn


def test_each_kind() -> None:
    assert Target.parse().kind is TargetKind.LATEST
    assert Target.parse(latest=True, timeline=3).timeline == 3
    assert Target.parse(immediate=True).kind is TargetKind.IMMEDIATE
    assert Target.parse(lsn="0/3000060", exclusive=True) == Target(TargetKind.LSN, lsn=Lsn(0x3000060), inclusive=False)
    assert Target.parse(name="before").name == "before"
    # The epoch is not compared by PostgreSQL.
    assert Target.parse(xid=str((1 << 32) + 777), action="pause") == Target(
        TargetKind.XID, xid=777, action=Action.PAUSE
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"time": "yesterday"}, "is not a time"),
        ({"time": "2026-01-14", "lsn": "0/1"}, "--to-time and --to-lsn contradict"),
        ({"lsn": "17"}, "is not an LSN"),
        ({"xid": "0x17"}, "is not a transaction id"),
        ({"xid": "2"}, "is not the id of a transaction"),
        ({"name": ""}, "1 to 63 bytes"),
        ({"exclusive": True}, "--exclusive needs"),
        ({"timeline": 0}, "is not a timeline"),
        ({"action": "stop"}, "is unknown"),
    ],
)
def test_what_makes_no_sense_is_named(words: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Target.parse(**words)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["\udcff", "a\nb"])
def test_a_name_that_cannot_be_written_down_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--to-name"):
        Target.parse(name=name)
