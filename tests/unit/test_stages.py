"""The time of each stage is its own: not that of the stages it pulls from, nor that of whoever pulls from it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import pytest

from handlers.checksum import Checksum
from infra.monitoring.stages import TimedStage
from pipeline.contracts import Buffer
from pipeline.objects import Header

HEADER = Header(name="wal/x", system_id="1", plain_size=3, fingerprint="", created="2026-01-14T12:00:00Z", backup="")


class Slow:
    """A stage that takes so long for each piece."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def describe(self, header: Header) -> Header:
        return header

    def forward(self, _header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        for piece in pieces:
            time.sleep(self._seconds)
            yield piece

    def backward(self, _header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        yield from pieces


def test_each_stage_is_timed_by_itself() -> None:
    told: dict[str, float] = {}
    first = TimedStage(Slow(0.02), "first", told.__setitem__)
    second = TimedStage(Slow(0.05), "second", told.__setitem__)
    for _ in second.forward(HEADER, first.forward(HEADER, [b"a", b"b", b"c"])):
        time.sleep(0.03)
    assert told["first"] == pytest.approx(0.06, abs=0.02)
    assert told["second"] == pytest.approx(0.15, abs=0.02)


def test_bytes_are_those_of_the_stage_itself() -> None:
    pieces = [b"some", b"thing"]
    timed = TimedStage(Checksum(), "checksum", lambda _name, _seconds: None)
    header = timed.describe(HEADER)
    stored = [bytes(piece) for piece in timed.forward(header, pieces)]
    assert stored == [bytes(piece) for piece in Checksum().forward(header, pieces)]
    assert b"".join(timed.backward(header, [b"".join(stored)])) == b"something"
