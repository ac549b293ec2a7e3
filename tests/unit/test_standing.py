"""The one judgement: safe or not, and why, for every kind of trouble."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.cli.status import _lines as status_lines
from infra.done import Done
from infra.recoverable import Backup, Recoverable, Stretch
from infra.sources.spool import SpoolState
from infra.standing import DestinationStatus, State, Status, StreamStatus, brief, judge, judge_absent, stopped_by
from infra.whereabouts import Exposed

NOON = datetime(2026, 1, 14, 12, tzinfo=UTC)
TRIES = "walship check tries it, and says what is wrong and what to do"
NEAR = DestinationStatus("file:///near", required=True, durable_lsn="0/9", lag_bytes=0, last_backup="base", backups=1)
FAR = replace(NEAR, name="s3://far")
OPTIONAL = replace(FAR, required=False)
STRETCH = Stretch(1, NOON, NOON, "0/1", "0/9", "open", "", 0, ("base",))
STORED = Recoverable(1, (Backup("base", "full", 1, NOON, NOON, 10, 5, ("file:///near",)),), (STRETCH,))
WELL = Status(
    system_id="7", now=NOON, server_error="", current_lsn="0/9", timeline=1, spool=SpoolState(0, 0, 0.0, 0, 1 << 30),
    spool_error="", service=1, service_words="", stream=None, destinations=(NEAR, FAR), recoverable=STORED,
)  # fmt: skip


def test_an_open_segment_that_nobody_ships_is_not_called_stored() -> None:
    """Without the stream it is no fault, and 14 MB of commits that only the server has are not 'all WAL' either."""
    far = replace(FAR, lag_bytes=14 << 20)
    state, sentence = judge(replace(WELL, destinations=(NEAR, far)))
    assert state == "safe"
    assert sentence.startswith("Safe: both destinations have all WAL but what the open segment holds, and any moment")


def test_the_cause_comes_before_what_follows_from_it() -> None:
    stream = StreamStatus("walship", "nothing streams", "reserved", 0, None, "", "commits wait", True, (), "")
    status = replace(WELL, service=None, stream=stream)
    assert judge(status)[1] == "Not safe: no service ships the spool (`walship run`) (and 1 more)."
    assert status.hints[0] == "start the service: walship run"


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("it is left alone for 60 s", f"it is left alone for 60 s; {TRIES}"),
        ("after walship init it is filled", "after walship init it is filled"),
        ("", TRIES),
    ],
)
def test_what_to_do_is_said_with_what_a_store_says_of_itself(said: str, hint: str) -> None:
    away = replace(NEAR, error="it is away", hint=said)
    assert replace(WELL, destinations=(away, FAR)).hints == (hint,)


def test_a_server_that_another_one_has_overtaken_is_not_safe() -> None:
    """A clone has shipped into its repository: what the server commits from now on, a restore would not bring back."""
    status = replace(WELL, timeline=2, recoverable=replace(STORED, newest_timeline=3))
    state, sentence = judge(status)
    assert (state, sentence) == ("unsafe", f"Not safe: {status.reasons[0]}.")
    assert sentence.endswith(
        "another one has gone over to timeline 3 in this repository: a restore of the latest state"
        " brings back that one."
    )
    assert "A clone has shipped into the repository" in status.hints[0]
    assert "A clone has shipped into the repository" in Path("docs/procedures.md").read_text("utf-8")
    assert stopped_by(status) == []
    for fine in (replace(status, timeline=3), replace(status, timeline=4), replace(status, timeline=None)):
        assert judge(fine)[0] == "safe"


@pytest.mark.parametrize("verb", ["verify", "drill"])
def test_what_failed_last_is_not_safe_until_it_goes_well(verb: str) -> None:
    status = replace(
        WELL, failed_verify=NOON if verb == "verify" else None, failed_drill=NOON if verb == "drill" else None
    )
    assert judge(status) == ("unsafe", f"Not safe: the last {verb} failed, at 2026-01-14 12:00:00 UTC.")
    assert f"walship history --verb {verb}" in status.hints[0]
    before = NOON - timedelta(hours=1)
    for done, failing in (
        (Done(success=before, failure=NOON), NOON),
        (Done(success=NOON, failure=before), None),
        (Done(failure=NOON), NOON),
        (Done(), None),
    ):
        assert done.failing == failing


def test_all_is_well() -> None:
    state, sentence = judge(WELL)
    assert state == "safe"
    assert sentence == (
        "Safe: both destinations have all WAL, and any moment since 2026-01-14 12:00 UTC can be restored."
    )
    assert (WELL.healthy, WELL.reasons, stopped_by(WELL)) == (True, (), [])
    lags = tuple(replace(place, lag_seconds=lag) for place, lag in zip(WELL.destinations, (0.2, 3.0), strict=True))
    assert "all WAL up to 3 s ago" in judge(replace(WELL, destinations=lags))[1]
    assert judge(replace(WELL, destinations=lags[:1]))[1].startswith("Safe: the destination has all WAL up to now")


@pytest.mark.parametrize(
    ("changed", "state", "word", "stops"),
    [
        ({"server_error": "it does not answer"}, "unsafe", "server: it does not answer", True),
        ({"archiving_fails_at": "0001"}, "unsafe", "archiving fails since 0001", True),
        ({"spool": None, "spool_error": "no such folder"}, "unsafe", "spool: no such folder", True),
        ({"service": None}, "unsafe", "no service ships the spool", True),
        ({"spool": SpoolState(3, 9, 500.0, 0, 1)}, "lagging", "3 files wait, the oldest for 500 s", True),
        ({"spool": SpoolState(0, 0, 0.0, 2, 1)}, "unsafe", "2 files were refused", False),
        ({"destinations": (NEAR, replace(FAR, error="503"))}, "at_risk", "s3://far: 503; file:///near has", True),
        ({"destinations": (NEAR, replace(OPTIONAL, error="503"))}, "at_risk", "s3://far: 503", False),
        ({"destinations": (replace(NEAR, error="gone"), replace(FAR, error="503"))}, "unsafe", "(and 1 more)", True),
        ({"destinations": (NEAR, replace(FAR, late="30 s late"))}, "lagging", "s3://far: 30 s late", True),
        ({"destinations": (replace(NEAR, late="8 s"), replace(FAR, late="9 s"))}, "lagging", "8 s (and 1 more)", True),
        ({"destinations": (NEAR, replace(FAR, lacks="9 objects"))}, "lagging", "s3://far: 9 objects", False),
        ({"destinations": (NEAR, replace(FAR, missing="0007"))}, "at_risk", "0007 is missing", False),
        ({"destinations": (replace(NEAR, missing="0007"),)}, "unsafe", "0007 is missing", False),
        ({"destinations": (replace(NEAR, last_backup=""), FAR)}, "at_risk", "no base backup", False),
        ({"destinations": (replace(NEAR, durable_lsn=None),)}, "unsafe", "no WAL yet", False),
        ({"destinations": (replace(NEAR, lag_bytes=9),), "most_on_the_way": 8}, "lagging", "9 bytes of WAL", True),
        ({"destinations": (replace(NEAR, lag_bytes=9),)}, "safe", "", False),
        ({"destinations": (replace(NEAR, problems=("damaged",)), FAR)}, "at_risk", "file:///near: damaged", False),
        ({"unknown": ("the end cannot be read",)}, "unknown", "Not known: the end cannot be read", False),
        ({"unknown": ("what",), "server_error": "gone"}, "unsafe", "server: gone", True),
    ],
)  # fmt: skip
def test_what_is_wrong_decides(changed: dict[str, object], state: State, word: str, *, stops: bool) -> None:
    status = replace(WELL, **changed)  # type: ignore[arg-type]  # each case names members of it
    found, sentence = judge(status)
    assert found == state
    assert word in sentence
    assert bool(stopped_by(status)) is stops
    assert status.healthy is (state == "safe")
    result = json.loads(json.dumps(status.result(), default=str))
    assert (result["state"], result["sentence"], result["healthy"]) == (state, sentence, status.healthy)
    assert result["reasons"] == list(status.reasons)


def test_what_may_be_lost_with_one_host_is_safe_with_a_reservation() -> None:
    """As ``check`` calls it not safe: the headline must not promise what a lost host would break. It is no fault."""
    status = replace(WELL, exposed=Exposed("this host", "no required destination is off this host", "add one"))
    state, sentence = judge(status)
    assert (state, status.healthy, status.reasons, status.hints, stopped_by(status)) == ("safe", True, (), (), [])
    assert sentence.startswith("Safe on this host only: both destinations have all WAL")
    assert status.result()["exposed"]["fact"] == "no required destination is off this host"
    assert "  note: no required destination is off this host" in status_lines(status)
    assert judge(replace(status, service=None))[1].startswith("Not safe: ")


def test_a_destination_is_named_once() -> None:
    status = replace(WELL, destinations=(replace(NEAR, error="file:///near has no repository.json"), FAR))
    assert status.reasons == ("file:///near has no repository.json",)


def test_words_from_outside_are_kept_short_and_on_one_line() -> None:
    assert brief("the store said:\n\x1b[2Jno") == "the store said:  [2Jno"
    assert brief("<b>x</b>" * 250_000) == f"{('<b>x</b>' * 63)[:500]}…"


def test_what_to_do_first_is_said_once() -> None:
    assert WELL.hints == ()
    holed = replace(WELL, destinations=(replace(NEAR, missing="A7"), replace(FAR, missing="A7", late="it lags")))
    hole, late = holed.hints
    assert hole.endswith("walship backup")
    assert "log" in late
    assert holed.result()["hints"] == [hole, late]


def test_what_another_destination_has_is_brought_from_there() -> None:
    """A base backup takes hours, and leaves the hole where it is."""
    holed = replace(NEAR, missing="A7", last_segment="A9")
    whole = replace(FAR, last_segment="A9")
    assert replace(WELL, destinations=(holed, whole)).hints == ("`walship verify --heal` brings it from s3://far",)
    for change in (
        {"missing": "A7"},  # it lacks it as well
        {"error": "503"},
        {"timeline": 2},
        {"last_segment": "A6"},  # it does not go as far
        {"last_backup": "later"},  # it may begin behind the hole
        {"last_backup": ""},
    ):
        less = replace(WELL, destinations=(holed, replace(whole, **change)))
        assert less.hints[0].endswith("walship backup"), change


def test_where_nothing_was_looked_at_nothing_is_safe() -> None:
    assert judge_absent("the store is away") == ("unsafe", "Not safe: nothing is shipped: the store is away.")
    assert judge_absent("")[0] == "unknown"


def test_the_members_of_the_result_are_documented() -> None:
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "status.md").read_text("utf-8")
    result = WELL.result()
    names = {*result, *result["destinations"][0], *result["recoverable"], *result["recoverable"]["stretches"][0]}
    assert {name for name in names if f"`{name}`" not in text} == set()
