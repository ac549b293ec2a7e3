"""For tests of the watch source: a watcher on a real folder, WAL made by hand, and a clock that the test moves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from infra.clock import SystemClock
from infra.sources.watcher import SpoolWatcher
from pipeline.events import BackupReady, Event, FileRefused, Notice
from tests.clock import FastClock
from tests.waldata import SEGMENT_SIZE, SYSTEM_ID, switched

HISTORY = b"1\t0/300000\tno recovery target specified\n"
LABEL = b"START WAL LOCATION: 0/200028 (file 000000010000000000000002)\nSTOP WAL LOCATION: 0/200100\nLABEL: x\n"


def name_of(number: int, timeline: int = 1) -> str:
    return f"{timeline:08X}00000000{number:08X}"


class Watch:
    """A watcher on a folder, and what it has told."""

    def __init__(self, folder: Path, *, once: bool = False, clock: FastClock | SystemClock | None = None) -> None:
        self.folder = folder
        self.notices: list[Notice] = []
        self.clock = clock or FastClock()
        self.watcher = SpoolWatcher(
            folder, system_id=str(SYSTEM_ID), segment_size=SEGMENT_SIZE, clock=self.clock,
            notify=self.notices.append, once=once,
        )  # fmt: skip

    def put(self, name: str, content: bytes | None = None, *, age: float = 60.0) -> Path:
        """A file that nobody has touched for a minute (by the watcher's clock)."""
        path = self.folder / name
        path.write_bytes(switched(name) if content is None else content)
        moment = self.clock.now().timestamp() - age
        os.utime(path, (moment, moment))
        return path

    async def all(self) -> list[str]:
        """Everything that ``once`` announces."""
        return [label(event) async for event in self.watcher.events()]

    @property
    def refusals(self) -> list[FileRefused]:
        return [notice for notice in self.notices if isinstance(notice, FileRefused)]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def label(event: Event) -> str:
    return Path(event.folder).name if isinstance(event, BackupReady) else event.file.name


@asynccontextmanager
async def events_of(watch: Watch) -> AsyncIterator[AsyncIterator[Event]]:
    events = watch.watcher.events()
    try:
        yield events
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # it is an async generator


async def following(events: AsyncIterator[Event]) -> Event:
    return await asyncio.wait_for(anext(events), 20)
