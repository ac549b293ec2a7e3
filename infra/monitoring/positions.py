"""How far the server's WAL is, how far each destination has it, and how old the oldest byte is that one lacks.

Whoever knows best is believed. With the stream, that is the stream, which tells at each step. Without it, the server
tells over SQL where it is, each stored segment and each listing of a repository where a destination is, and the age is
counted from when the server was last seen in front of the first byte that is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.contracts import Clock
from pipeline.events import StreamLost, StreamStarted, WalMoved
from pipeline.wal import Lsn, WalFile

#: So many positions of the server are remembered with their times; beyond, every other one is dropped.
_MOST_SEEN = 4096
#: Seconds without a word from the server over SQL, after which nobody knows where it is.
_SILENT = 60.0
#: Seconds that PostgreSQL may be late with ending a segment after archive_timeout.
_SLACK = 60.0


@dataclass(slots=True)
class _Place:
    """One destination."""

    durable: Lsn | None = None
    #: Age in seconds of the oldest byte that it lacked when the stream last told, and when that was.
    age: float = 0.0
    told: float = 0.0
    #: Segments, by number, that are stored there behind one that is missing.
    ahead: set[int] = field(default_factory=set)


class Positions:
    """Kept by ``Metrics``; nothing here waits or fails. LSNs are positions in the WAL, whatever the timeline."""

    def __init__(self, destinations: Iterable[str], *, streams: bool, clock: Clock) -> None:
        """``streams``: whether WAL is to be streamed; else it comes as finished segments only."""
        self._places = {name: _Place() for name in destinations}
        self._streams = streams
        self._clock = clock
        self._began = clock.monotonic()
        #: PostgreSQL's default, until the repository is open.
        self.segment_size = 16 << 20
        #: WAL is streamed now.
        self.connected = False
        #: The stream was lost, and has not told since where the server is.
        self._in_the_dark = False
        #: When the stream last told that, in monotonic seconds.
        self._heard = self._began
        self.current: Lsn | None = None
        #: Positions of the server with the time at which each was first and last seen.
        self._seen: list[tuple[Lsn, float, float]] = []
        self._archive_timeout = 0.0
        self._spool_age = 0.0

    def follow(self, notice: WalMoved | StreamStarted | StreamLost) -> None:
        """What the stream tells."""
        if isinstance(notice, WalMoved):
            self._move(notice)
        else:
            self.connected = isinstance(notice, StreamStarted)
            self._in_the_dark = self._in_the_dark or not self.connected

    def _move(self, notice: WalMoved) -> None:
        """Told every second, connected or not: uploads go on. Where the server is, only a connection knows."""
        now = self._clock.monotonic()
        if self.connected:
            self._in_the_dark, self._heard = False, now
        self.current = notice.current
        for name, durable in notice.durable.items():
            place = self._of(name)
            place.durable = durable
            place.age, place.told = notice.age.get(name, 0.0), now

    def closed(self) -> None:
        """Nobody streams until the repository is opened again."""
        self.connected = False
        self._in_the_dark = True

    def server_at(self, lsn: Lsn, *, archive_timeout: float) -> None:
        """What the server says over SQL. ``archive_timeout`` in seconds, 0 is off."""
        if self._streams:
            return
        now = self._clock.monotonic()
        self.current, self._archive_timeout = lsn, archive_timeout
        if self._seen and lsn < self._seen[-1][0]:
            self._seen.clear()  # another server, or one that went back
        if self._seen and self._seen[-1][0] == lsn:
            self._seen[-1] = (lsn, self._seen[-1][1], now)
        else:
            self._seen.append((lsn, now, now))
        if len(self._seen) > _MOST_SEEN:
            del self._seen[1:-1:2]

    def spool_waits(self, seconds: float) -> None:
        """Age of the oldest file in the spool; 0 if none waits."""
        self._spool_age = seconds

    def stored(self, destination: str, file: WalFile) -> None:
        """A finished segment is stored there."""
        if self._streams:
            return
        place, size = self._of(destination), self.segment_size
        place.ahead.add(file.start(size) // size)
        self._advance(place)

    def reached(self, destination: str, lsn: Lsn) -> None:
        """The destination was listed: it has everything up to there."""
        if self._streams:
            return
        place = self._of(destination)
        place.durable = lsn
        self._advance(place)

    def _advance(self, place: _Place) -> None:
        size = self.segment_size
        if place.durable is None:
            return
        number = place.durable // size
        while number in place.ahead:
            number += 1
            place.durable = Lsn(number * size)
        place.ahead = {other for other in place.ahead if other >= number}

    def _of(self, name: str) -> _Place:
        return self._places.setdefault(name, _Place())

    def end(self) -> float:
        """Of the server's WAL."""
        return math.nan if self.current is None else self.current

    def durable(self, name: str) -> float:
        durable = self._of(name).durable
        return math.nan if durable is None else durable

    def lag_bytes(self, name: str) -> float:
        durable = self._of(name).durable
        return math.nan if self.current is None or durable is None else max(0, self.current - durable)

    def pending(self, name: str) -> float:
        """Segments that the server has finished and the destination lacks."""
        durable, size = self._of(name).durable, self.segment_size
        return math.nan if self.current is None or durable is None else max(0, self.current // size - durable // size)

    def lag_seconds(self, name: str) -> float:
        """0 only while it is known that nothing is outstanding; else it grows until that is told again."""
        place, now = self._of(name), self._clock.monotonic()
        if not self._streams:
            return self._lag_of_files(place, now)
        if self.current is None or place.durable is None:
            return now - self._began
        late = place.age > 0 or place.durable < self.current
        outstanding = place.age + now - place.told if late else 0.0
        return max(outstanding, now - self._heard) if self._in_the_dark else outstanding

    def _lag_of_files(self, place: _Place, now: float) -> float:
        """While only finished segments are shipped: the bytes of the open one count as well."""
        if place.durable is None:
            return max(now - self._began, self._spool_age)
        if not self._seen:
            return self._spool_age  # the server may be none of our business: what it has handed over is known
        if now - self._seen[-1][2] > _SILENT:
            return max(now - self._seen[-1][2], self._spool_age)
        lsn, size = self._seen[-1][0], self.segment_size
        if lsn <= place.durable:
            self._forget()
            return 0.0
        age = now - self._first_behind(place.durable)
        if lsn // size > place.durable // size:
            return max(age, self._spool_age)
        # PostgreSQL ends a segment after archive_timeout, unless there is nothing in it that matters: an idle database.
        idle = self._archive_timeout > 0 and age > 2 * self._archive_timeout + _SLACK
        return 0.0 if idle else age

    def _first_behind(self, durable: Lsn) -> float:
        """When the first byte behind ``durable`` was written, at the earliest."""
        last = self._seen[0][1]
        for lsn, _, until in self._seen:
            if lsn > durable:
                break
            last = until
        return last

    def _forget(self) -> None:
        """What every destination has, but for the last of it: since then something may be missing."""
        slowest = min(Lsn(0) if place.durable is None else place.durable for place in self._places.values())
        passed = sum(lsn <= slowest for lsn, _, _ in self._seen)
        del self._seen[: max(0, passed - 1)]
