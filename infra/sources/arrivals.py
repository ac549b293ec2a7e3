"""Who has just come into a folder: watchdog's threads on one side, asyncio on the other.

Only names cross over, and only a bounded number: when too many gather, the answer is "look at the whole folder", which
is always right. So nothing depends on inotify (its queue overflows, NFS has none); it only makes things quick.
"""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

#: Names that may gather between two looks; 10,000 segments are 160 GB.
_MOST = 10_000

_WATCHED: list[type[FileSystemEvent]] = [
    FileClosedEvent,  # cp has finished
    FileMovedEvent,  # basic_archive renames its temporary file
    FileCreatedEvent,  # a hard link, or moved in from outside; also the beginning of a cp
    DirCreatedEvent,
    DirMovedEvent,
]


class Arrivals(FileSystemEventHandler):
    """Names of what was created, closed after writing, or moved in since the last ``take``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._names: dict[str, bool] = {}
        self._lost = False
        self._observer: BaseObserver | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()

    def start(self) -> None:
        """Begin to watch; call on the event loop. Raises OSError where the system does not let us (inotify limits)."""
        self._loop = asyncio.get_running_loop()
        observer = Observer()
        observer.schedule(self, str(self._folder), recursive=False, event_filter=_WATCHED)
        observer.start()
        self._observer = observer

    def stop(self) -> None:
        """Stop watching and wait for the threads; idempotent. Blocks shortly."""
        self._loop = None
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None

    @property
    def alive(self) -> bool:
        """Whether anything can be expected from watching."""
        observer = self._observer
        return observer is not None and observer.is_alive() and all(emitter.is_alive() for emitter in observer.emitters)

    def take(self) -> dict[str, bool] | None:
        """Names since the last call, and whether the writer was seen to close the file. None: look at everything."""
        self._wake.clear()  # before the look: what comes from now on wakes again
        with self._lock:
            names, self._names = self._names, {}
            lost, self._lost = self._lost, False
        return None if lost else names

    async def wait(self) -> None:
        """Until something has come since the last ``take``."""
        await self._wake.wait()

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Called by watchdog, in its own thread."""
        finished = isinstance(event, (FileClosedEvent, FileMovedEvent))
        path = Path(os.fsdecode(event.dest_path or event.src_path))
        if path.parent != self._folder:
            return
        with self._lock:
            if len(self._names) < _MOST:
                self._names[path.name] = finished or self._names.get(path.name, False)
            else:
                self._lost = True
        loop = self._loop
        if loop is not None and not self._wake.is_set():
            try:
                loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:  # the loop has just been closed; nobody waits any more
                self._loop = None
