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
    """A stage that takes so long for each piece, by a clock of its own."""

    def __init__(self, seconds: float, clock: list[float]) -> None:
        self._seconds = seconds
        self._clock = clock

    def describe(self, header: Header) -> Header:
        return header

    def forward(self, _header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        for piece in pieces:
            self._clock[0] += self._seconds
            yield piece

    def backward(self, _header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        yield from pieces


def test_each_stage_is_timed_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]  # a real one measures a busy machine as well
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    told: dict[str, float] = {}
    first = TimedStage(Slow(0.02, clock), "first", told.__setitem__)
    second = TimedStage(Slow(0.05, clock), "second", told.__setitem__)
    for _ in second.forward(HEADER, first.forward(HEADER, [b"a", b"b", b"c"])):
        clock[0] += 0.03
    assert told == {"first": pytest.approx(0.06), "second": pytest.approx(0.15)}


def test_bytes_are_those_of_the_stage_itself() -> None:
    pieces = [b"some", b"thing"]
    timed = TimedStage(Checksum(), "checksum", lambda _name, _seconds: None)
    header = timed.describe(HEADER)
    stored = [bytes(piece) for piece in timed.forward(header, pieces)]
    assert stored == [bytes(piece) for piece in Checksum().forward(header, pieces)]
    assert b"".join(timed.backward(header, [b"".join(stored)])) == b"something"
