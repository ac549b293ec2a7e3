"""The watch source: files that PostgreSQL has put into the spool, announced when they are complete and valid.

The spool is the queue. A file stays until ``done``; what was announced and not done is found again by the next start,
so killing us loses nothing. inotify makes us quick, the look at the whole folder (at the start, every minute, every two
seconds while inotify is out of order) makes us right.

A file is announced when everything agrees (``judge``) and it has settled: its writer was seen to close it, the kernel
says that nobody has it open for writing, or it was not touched for two seconds. Until then it holds back what lies
behind it on its timeline. What becomes of a file that is not what its name says is decided in
``docs/decisions/0007-refused-files.md``: cut files that nobody writes are moved to ``refused/`` after a minute, because
they block basic_archive for ever; anything else stays, and people are told.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from infra.clock import sleep_or
from infra.sources.arrivals import Arrivals
from infra.sources.judge import NOTHING, Identity, Judge, Look, Verdict
from infra.sources.spool import check_spool, locked
from infra.sources.sweep import Sweep, move_aside, remove_backup, remove_file, sort_key
from pipeline.contracts import Buffer, Clock
from pipeline.events import (
    BackupReady,
    Event,
    FileRefused,
    HistoryReady,
    Notice,
    SegmentReady,
    SideFileReady,
    WatchingHampered,
)
from pipeline.wal import WalFile, WalKind

#: Seconds between two looks at the whole folder, and while inotify is out of order.
RESCAN, RESCAN_BLIND = 60.0, 2.0
#: A file is settled when it was not touched for so many seconds.
SETTLE = 2.0
#: A cut file that did not grow for so many seconds is moved aside.
STALL = 60.0
#: Names that are kept in memory; a longer queue is read from the folder in pieces of this size, oldest first.
_MOST = 100_000


@dataclass(slots=True)
class _Unsettled:
    """A file that is not to be announced yet."""

    identity: Identity
    #: Since when it has been so, by the monotonic clock.
    since: float
    #: When to look again.
    due: float


class SpoolWatcher:
    """A ``Source`` of what lies in the spool. One ``events()`` at a time.

    ``system_id``: decimal digits. ``once``: announce what is there and end. Raises SourceError from ``events()`` when
    the spool is missing, closed to us or shipped by somebody else.
    """

    name = "watch"

    def __init__(
        self, folder: Path, *, system_id: str, segment_size: int, clock: Clock, notify: Callable[[Notice], None],
        once: bool = False,
    ) -> None:  # fmt: skip
        self._folder = folder
        self._clock = clock
        self._notify = notify
        self._once = once
        self._judge = Judge(folder, system_id=int(system_id), segment_size=segment_size)
        self._sweep = Sweep(folder)
        self._arrivals = Arrivals(folder)
        #: Names to look at, as a heap: history files first, then in WAL order.
        self._queue: list[str] = []
        self._queued: set[str] = set()
        #: Whether the folder holds more than the queue may.
        self._more = False
        self._closed: set[str] = set()
        self._unsettled: dict[str, _Unsettled] = {}
        #: Announced and not done: what it was when it was judged, or last read.
        self._taken: dict[str, Identity] = {}
        self._refused: dict[str, Identity] = {}
        self._blind = False

    @property
    def waiting(self) -> int:
        """Files known to wait: announced or not, refused ones left out."""
        return len(self._taken) + len(self._queued | self._unsettled.keys())

    @property
    def refused(self) -> list[str]:
        """Paths of what was refused and still lies in the spool."""
        return [str(self._folder / name) for name in self._refused]

    # -- the Source contract

    async def events(self) -> AsyncIterator[Event]:
        """See ``Source``. Announces what is complete; ends only with ``once``."""
        async with self._at_work():
            self._queue, self._queued, self._unsettled = [], set(), {}
            next_scan = self._clock.monotonic()
            while True:
                if self._clock.monotonic() >= next_scan or (self._more and not self._queue):
                    await self._scan()
                    next_scan = self._clock.monotonic() + (RESCAN_BLIND if self._blind else RESCAN)
                async for event in self._ready():
                    yield event
                if self._more and not self._queue:
                    continue
                if self._once and not self._unsettled:
                    return
                await self._pause(next_scan)

    def read(self, event: Event) -> Buffer:
        """See ``Source``. SourceError while the file is not what it was announced as: it may be being written again."""
        if isinstance(event, BackupReady):
            raise TypeError("a base backup is read from its folder, not as one piece")
        content, identity = self._judge.read(event.file)
        if event.file.name in self._taken:
            self._taken[event.file.name] = identity
        return content

    async def done(self, event: Event) -> None:
        """See ``Source``. The file goes, unless something else was put under its name since it was read.

        The folder is not fsynced: a power cut may bring the file back, and then it is shipped again and found stored.
        """
        if isinstance(event, BackupReady):
            await asyncio.to_thread(remove_backup, Path(event.folder))
            self._taken.pop(Path(event.folder).name, None)
            return
        name = event.file.name
        if (identity := self._taken.get(name)) is None:
            return
        removed = await asyncio.to_thread(remove_file, self._folder / name, identity)
        # Not before: when the removal has failed, the next call is to try it again.
        self._taken.pop(name, None)
        if not removed:
            self._enqueue(name)

    # -- what is there

    @asynccontextmanager
    async def _at_work(self) -> AsyncIterator[None]:
        async with locked(self._folder, self._clock):
            try:
                self._arrivals.start()
            except OSError as error:
                self._say_blind(f"inotify cannot be used: {error.strerror or error}")
            try:
                yield
            finally:
                await asyncio.to_thread(self._arrivals.stop)

    def _say_blind(self, fact: str) -> None:
        if not self._blind and not self._once:
            self._notify(
                WatchingHampered(
                    self.name,
                    f"{fact}; {self._folder} is read every {RESCAN_BLIND:g} s instead",
                    "raise fs.inotify.max_user_instances and fs.inotify.max_user_watches, then restart",
                )
            )
        self._blind = True

    async def _scan(self) -> None:
        """Look at the whole folder: new names into the queue, left-overs away, backups and strangers noticed."""
        await asyncio.to_thread(check_spool, self._folder)
        if not self._blind and not self._arrivals.alive:
            self._say_blind("the observer of the spool has ended")
        self._gather()
        skip = {*self._taken, *self._queued}
        now = self._clock.now().timestamp()
        seen = await asyncio.to_thread(self._sweep.look, now, skip, self._refused, most=_MOST, at_once=self._once)
        self._more = seen.more
        for name in seen.names:
            self._enqueue(name)
        for notice in seen.notices:
            self._notify(notice)
        self._refused = {name: kept for name, kept in self._refused.items() if name in seen.refused}

    def _enqueue(self, name: str) -> None:
        if name not in self._queued and name not in self._taken:
            self._queued.add(name)
            heapq.heappush(self._queue, sort_key(name))

    def _gather(self) -> None:
        """Names that watchdog has told of since."""
        names = self._arrivals.take()
        if names is None or (names and self._more):
            self._more = True  # the folder knows better which come first
            return
        for name, closed in names.items():
            if WalFile.parse(name) and name not in self._taken:
                if closed:
                    self._closed.add(name)
                self._enqueue(name)

    async def _ready(self) -> AsyncIterator[Event]:
        """Announce, in order, what is in the queue."""
        #: Timelines on which a file is not settled, and what waits behind it.
        held: dict[int, list[str]] = {}
        for name in self._unsettled:
            self._enqueue(name)
        while True:
            self._gather()
            if not self._queue:
                break
            name = heapq.heappop(self._queue)[1:]
            file = WalFile.parse(name)
            if file and file.timeline in held and name not in self._unsettled and file.kind is WalKind.SEGMENT:
                held[file.timeline].append(name)
                continue
            self._queued.discard(name)
            if file is None:
                self._taken[name] = NOTHING
                yield BackupReady(self.name, str(self._folder / name))
                continue
            look = await asyncio.to_thread(self._judge.look, file)
            ready = self._is_ready(name, look)
            if name in self._unsettled:
                if file.kind is WalKind.SEGMENT:
                    held.setdefault(file.timeline, [])
                continue
            for waiting in held.pop(file.timeline, ()) if file.kind is WalKind.SEGMENT else ():
                heapq.heappush(self._queue, sort_key(waiting))
            if ready:
                self._taken[name] = look.identity
                yield _ready_event(self.name, file, look.size)
        for waiting in (waiting for names in held.values() for waiting in names):
            heapq.heappush(self._queue, sort_key(waiting))

    async def _pause(self, next_scan: float) -> None:
        """Until something arrives, a file may have settled, or the next look at the whole folder is due."""
        due = min([next_scan, *(unsettled.due for unsettled in self._unsettled.values())])
        await sleep_or(self._clock, max(0.0, due - self._clock.monotonic()), self._arrivals.wait())

    # -- what to make of a file

    def _is_ready(self, name: str, look: Look) -> bool:
        """Whether to announce the file. If not: it is unsettled, refused or gone."""
        closed = name in self._closed
        self._closed.discard(name)
        if look.verdict is Verdict.GONE or self._refused.get(name) == look.identity:
            self._unsettled.pop(name, None)
            return False
        now = self._clock.monotonic()
        before = self._unsettled.pop(name, None)
        since = before.since if before and before.identity == look.identity else now
        settled = closed or now - since >= SETTLE or self._clock.now().timestamp() - look.changed >= SETTLE
        if look.verdict is Verdict.GOOD and (settled or look.writer is False):
            self._refused.pop(name, None)
            return True
        if look.verdict is not Verdict.GOOD and self._is_hopeless(look, settled=settled, unchanged=now - since):
            self._refuse(name, look)
        else:
            self._unsettled[name] = _Unsettled(look.identity, since, now + SETTLE)
        return False

    def _is_hopeless(self, look: Look, *, settled: bool, unchanged: float) -> bool:
        """Whether a file that is not good can be expected to stay so."""
        if self._once:
            return unchanged >= SETTLE or (settled and look.writer is False)
        if look.writer:
            return False
        if look.verdict is Verdict.WRONG and look.writer is False:
            return settled
        return unchanged >= STALL

    def _refuse(self, name: str, look: Look) -> None:
        """Tell people; and move a cut file aside, if it is certain that nobody writes it."""
        path = str(self._folder / name)
        if look.verdict is Verdict.SHORT and look.writer is False and not self._once:
            path = str(move_aside(self._folder, name))
            hint = "it is aside so that PostgreSQL can archive it again; if it does not, take a new base backup"
        else:
            self._refused[name] = look.identity
            hint = look.hint or "it is left where it is and not shipped; find out who wrote it, then remove it"
        self._notify(FileRefused(path, look.fact, hint))


def _ready_event(source: str, file: WalFile, size: int) -> Event:
    match file.kind:
        case WalKind.SEGMENT:
            return SegmentReady(source, file, size)
        case WalKind.HISTORY:
            return HistoryReady(source, file, size)
        case WalKind.PARTIAL | WalKind.LABEL:
            return SideFileReady(source, file, size)
