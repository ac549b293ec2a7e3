"""Numbered tickets, one commit each, and when each was acknowledged: after a loss, what may be missing is known.

Sold by clients until their server is killed under them. Till and number say what a ticket holds, so that every row that
comes back can be checked, also one whose acknowledgement was still on its way.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import psycopg

from pipeline.errors import SourceError

_SCHEMA = "CREATE TABLE tickets (till int, number int, memo text NOT NULL, PRIMARY KEY (till, number))"


@dataclass(frozen=True, slots=True)
class Ticket:
    """One whose commit the server has acknowledged."""

    till: int
    #: Counts the till's tickets from 1.
    number: int
    #: Just after the answer, in monotonic seconds.
    acknowledged: float
    #: Seconds that the commit took, as its client saw it.
    took: float


def memo(till: int, number: int) -> str:
    """What that ticket holds."""
    return hashlib.sha256(f"{till}/{number}".encode()).hexdigest()


def open_tickets(dsn: str) -> None:
    """Make the table."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(_SCHEMA)


def look_at_tickets(dsn: str) -> dict[tuple[int, int], str]:
    """Till and number of every ticket in the table → its memo."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        return {(till, number): text for till, number, text in connection.execute("SELECT * FROM tickets").fetchall()}


class Tills:
    """Clients that sell, each in a thread, from ``start`` until their server is killed."""

    def __init__(self, dsn: str, numbers: Sequence[int], *, pause: float) -> None:
        """``numbers`` of the tills; ``pause``: seconds between two tickets of a till."""
        self._dsn = dsn
        self._pause = pause
        self._sold: dict[int, list[Ticket]] = {number: [] for number in numbers}
        self._threads = [threading.Thread(target=self._sell, args=(number,), daemon=True) for number in numbers]
        self._stop = threading.Event()
        #: Monotonic seconds and error of each till that came to its end without being told to.
        self._ended: list[tuple[float, psycopg.Error]] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def sold(self) -> int:
        """Tickets so far."""
        return sum(map(len, self._sold.values()))

    @property
    def selling(self) -> bool:
        """Whether no till has come to its end."""
        return not self._ended

    def close(self) -> None:
        """End without a word; idempotent. A commit that waits for a service that is gone ends with its server."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(1)

    def after(self, kill: float) -> list[Ticket]:
        """What was acknowledged, once the server has been killed at ``kill`` in monotonic seconds.

        Raises SourceError if a client had come to its end before that.
        """
        for thread in self._threads:
            thread.join(60)
        for ended, error in self._ended:
            if ended < kill:
                raise SourceError(f"selling tickets failed {kill - ended:.1f} s before the kill: {error}")
        return [ticket for sold in self._sold.values() for ticket in sold]

    def _sell(self, till: int) -> None:
        sold = self._sold[till]
        try:
            with psycopg.connect(self._dsn, autocommit=True) as connection:
                while not self._stop.is_set():
                    number = len(sold) + 1
                    began = time.monotonic()
                    connection.execute("INSERT INTO tickets VALUES (%s, %s, %s)", (till, number, memo(till, number)))
                    now = time.monotonic()
                    sold.append(Ticket(till, number, now, now - began))
                    time.sleep(self._pause)
        except psycopg.Error as error:
            self._ended.append((time.monotonic(), error))


@dataclass(frozen=True, slots=True)
class Loss:
    """The machine was lost at one moment, and brought back."""

    #: When the kill came, in monotonic seconds: before the first signal.
    kill: float
    acknowledged: Sequence[Ticket]
    #: All tickets of the restored server.
    found: dict[tuple[int, int], str]
    #: That the restore took.
    seconds: float = 0.0
    #: Of its WAL that came from tails.
    tail_bytes: int = 0

    @property
    def missing(self) -> list[Ticket]:
        """Those that were acknowledged and did not come back as they were."""
        return [t for t in self.acknowledged if self.found.get((t.till, t.number)) != memo(t.till, t.number)]

    def older(self, seconds: float) -> list[Ticket]:
        """Those that were acknowledged longer than so many seconds before the kill."""
        return [ticket for ticket in self.acknowledged if self.kill - ticket.acknowledged > seconds]

    @property
    def recovery_point(self) -> float | None:
        """Age in seconds, at the kill, of the newest acknowledged ticket that came back; None if none did.

        A ticket that was acknowledged while the signals were sent has the age 0.
        """
        ages = [self.kill - t.acknowledged for t in self.acknowledged if (t.till, t.number) in self.found]
        return max(0.0, min(ages)) if ages else None

    @property
    def typical(self) -> float:
        """Seconds that a commit took, the median."""
        return median([ticket.took for ticket in self.acknowledged] or [0.0])

    @property
    def unbroken(self) -> bool:
        """Whether each till's tickets in the table are 1 to its last, and every one holds what was written."""
        last: dict[int, int] = {}
        for till, number in sorted(self.found):
            if number != last.get(till, 0) + 1 or self.found[till, number] != memo(till, number):
                return False
            last[till] = number
        return True

    @property
    def digest(self) -> str:
        """SHA-256 of all that came back, in order."""
        lines = "\n".join(f"{till} {number} {self.found[till, number]}" for till, number in sorted(self.found))
        return hashlib.sha256(lines.encode()).hexdigest()
