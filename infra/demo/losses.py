"""The machine is lost, twice, while tickets are sold up to the moment of the kill; S3 alone brings it back.

The first time commits do not wait for S3: what was acknowledged longer than the interval and one PUT before the kill
must come back. The restored server takes over, with commits that wait: what was acknowledged at all must come back.
"""

from __future__ import annotations

import time

from infra.demo.load import Books, look
from infra.demo.premises import INTERVAL, Premises
from infra.demo.summary import Summary
from infra.demo.telling import Teller
from infra.demo.tickets import Loss, Tills, look_at_tickets

#: Seconds between two tickets of a till: without, they would fill segments, and this is about the open one.
_PAUSE = 0.01
#: Seconds of sales beyond those that may be lost.
_MORE = 1.0
#: Tickets without which a loss would show nothing.
_FEW = 20
_FIRST = "after losing everything"
_AGAIN = "after losing everything again"


class Losses:
    """``sell``, ``lose``, ``lose_again``; ``close`` in any case."""

    def __init__(self, here: Premises, teller: Teller, summary: Summary, *, seconds: float) -> None:
        """``seconds`` of sales before the second loss."""
        self._here = here
        self._teller = teller
        self._summary = summary
        self._seconds = seconds
        self._tills: Tills | None = None
        #: Seconds before the kill within which an acknowledged ticket may be lost.
        self._allowed = 0.0
        #: What came back after the first loss.
        self._back: dict[tuple[int, int], str] = {}

    def sell(self) -> None:
        """Tickets, for longer than what may be lost; it goes on until the machine is lost."""
        with self._teller.chapter("selling tickets, one commit each, into the open segment") as chapter:
            segment = self._open_segment()
            tills = self._open_tills(1)
            began = time.monotonic()
            while time.monotonic() < began + self._allowed + _MORE:
                time.sleep(0.1)
                self._allowed = INTERVAL + self._longest_put(segment)
            chapter.result = f"{tills.sold:,} so far, and it goes on"

    def lose(self, books: Books) -> None:
        """With asynchronous commits, after ``sell``. ``books``: what the bank was left with."""
        loss = self._lose_all("reborn", _FIRST, books)
        self._back, allowed = loss.found, self._allowed
        safe = loss.older(allowed)
        lost = len(set(safe) & set(loss.missing))
        self._summary.claim(
            f"{_FIRST}: {len(safe) - lost:,} of {len(safe):,} tickets are back that were acknowledged more than"
            f" {allowed:g} s before the kill",
            holds=bool(safe) and not lost,
        )
        self._claim_unbroken(_FIRST, loss)
        self._summary.facts["may be lost"] = (
            f"what was acknowledged within {allowed:g} s: the interval of {INTERVAL:g} s, and a PUT, of which none took"
            f" longer than {allowed - INTERVAL:g} s"
        )
        self._summary.facts["first loss"] = (
            f"asynchronous: {len(loss.acknowledged):,} tickets acknowledged, {len(loss.missing):,} of them lost;"
            f" measured RPO: {_recovery_point(loss)}"
        )
        self._summary.facts["restored"] = _restored(loss)

    def lose_again(self, books: Books) -> None:
        """With synchronous commits, on the server that came back."""
        with self._teller.chapter("synchronous_standby_names = 'walship' on the restored server, walship run"):
            self._here.live.query("ALTER SYSTEM SET synchronous_standby_names = 'walship'")
            self._here.live.query("SELECT pg_reload_conf()")
            self._here.start_service()
            self._here.wait_until_synchronous()
        with self._teller.chapter("selling tickets, each safe in S3 before it is acknowledged") as chapter:
            tills = self._open_tills(11, 12, 13, 14)
            began = time.monotonic()
            while time.monotonic() < began + self._seconds or (tills.sold < _FEW and tills.selling):
                time.sleep(0.05)
            chapter.result = f"{tills.sold:,} so far, and it goes on"
        loss = self._lose_all("reborn-again", _AGAIN, books)
        self._summary.claim(
            f"{_AGAIN}: {len(loss.acknowledged) - len(loss.missing):,} of {len(loss.acknowledged):,} tickets are back"
            " that were acknowledged until the kill",
            holds=bool(loss.acknowledged) and not loss.missing,
        )
        self._claim_unbroken(_AGAIN, loss)
        self._summary.facts["second loss"] = (
            f"synchronous: {len(loss.acknowledged):,} tickets acknowledged, each after {loss.typical * 1000:.0f} ms"
            f" (median), {f'{len(loss.missing):,}' if loss.missing else 'none'} of them lost; measured RPO:"
            f" {_recovery_point(loss)}"
        )
        self._summary.facts["restored again"] = _restored(loss)

    def close(self) -> None:
        """End the clients. Idempotent."""
        if self._tills is not None:
            self._tills.close()

    def _open_segment(self) -> str:
        return str(self._here.live.query("SELECT pg_walfile_name(pg_current_wal_lsn())")[0][0])

    def _longest_put(self, segment: str) -> float:
        """Of what carries the tickets: tails, and if the segment was filled meanwhile, that as a whole."""
        kinds = ["tail"] if self._open_segment() == segment else ["tail", "wal"]
        return max(map(self._here.longest_put, kinds))

    def _open_tills(self, *numbers: int) -> Tills:
        self._tills = Tills(self._here.live.dsn(), numbers, pause=_PAUSE)
        self._tills.start()
        return self._tills

    def _lose_all(self, folder: str, when: str, books: Books) -> Loss:
        """Kill, restore into that folder, compare the bank. The restored server is the live one then."""
        with self._teller.chapter("kill -9 of service and server, removing all but the bucket") as chapter:
            assert self._tills is not None
            kill = self._here.destroy()
            acknowledged = self._tills.after(kill)
            chapter.result = f"{len(acknowledged):,} tickets were acknowledged until then"
        with self._teller.chapter("walship restore --latest, from S3 alone") as chapter:
            copy = self._here.restore(folder, "--latest")
            seconds = chapter.seconds
        with self._teller.chapter("comparing"):
            self._summary.compare(when, books, look(copy.dsn()))
            self._here.move_to(copy)
            return Loss(kill, acknowledged, look_at_tickets(copy.dsn()), seconds, copy.tail_bytes)

    def _claim_unbroken(self, when: str, loss: Loss) -> None:
        self._summary.claim(
            f"{when}: {len(loss.found):,} tickets are there, without a hole, with the content that was written"
            f" (SHA-256 {loss.digest[:12]}…)",
            holds=loss.unbroken and self._back.items() <= loss.found.items(),
        )


def _recovery_point(loss: Loss) -> str:
    age = loss.recovery_point
    return "none came back" if age is None else f"the newest that came back was {age * 1000:.0f} ms old at the kill"


def _restored(loss: Loss) -> str:
    return f"{loss.seconds:.1f} s until the server was up; {loss.tail_bytes / 1024:,.0f} KB of its WAL came from tails"
