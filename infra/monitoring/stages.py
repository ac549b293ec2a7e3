"""How long each stage works on an object: a Stage around a Stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from pipeline.contracts import Buffer, Stage
from pipeline.objects import Header

#: Told the stage's name and the seconds that one object took in it. Called from worker threads.
Observe = Callable[[str, float], None]

#: In the order in which they work.
STAGES = ("compress", "encrypt", "checksum")


class TimedStage:
    """The same stage; what it spends on the way forward is told once per object. See ``pipeline.contracts.Stage``."""

    def __init__(self, stage: Stage, name: str, observe: Observe) -> None:
        self._stage = stage
        self._name = name
        self._observe = observe

    def describe(self, header: Header) -> Header:
        return self._stage.describe(header)

    def forward(self, header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        """Stages pull from each other: what it waits for the one before is not its own time."""
        before = _Watched(pieces)
        own = _Watched(self._stage.forward(header, before))
        yield from own
        self._observe(self._name, max(0.0, own.seconds - before.seconds))

    def backward(self, header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        return self._stage.backward(header, pieces)


class _Watched:
    """An iterator that knows how long its next() has taken in all."""

    def __init__(self, pieces: Iterable[Buffer]) -> None:
        self._pieces = iter(pieces)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Buffer]:
        return self

    def __next__(self) -> Buffer:
        began = time.perf_counter()
        try:
            return next(self._pieces)
        finally:
            self.seconds += time.perf_counter() - began
