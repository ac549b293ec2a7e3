"""How things stand, as one record; and the one judgement on it, which the terminal, the page and ``/readyz`` tell.

The record is made by whoever looks: ``infra.status`` once, for a command; ``infra.lookout`` all the time, in the
service. ``judge`` says whether it is safe, and is the only place that does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from infra.recoverable import Recoverable
from infra.sources.spool import SpoolState
from infra.whereabouts import Exposed
from pipeline.moments import show

#: Waiting longer than this in the spool is no longer a passing queue.
SLOW = timedelta(minutes=2)
#: Most characters of what a server, a store or a stored object has said. Nobody reads more, and whoever can write there
#: decides how much it is.
_MOST_SAID = 500

#: What to do first about each kind of trouble.
_CHECK = "walship check tries it, and says what is wrong and what to do"
_START_SERVER = "start the server, or find out why it cannot be reached: walship check"
_START = "start the service: walship run"
_LATE = "if it does not catch up by itself: the service's log tells what it was refused, walship check tries all of it"
_ANOTHER = (
    "connect walship to the node that was promoted. If there is none, a clone has shipped here by mistake:"
    ' docs/procedures.md, "A clone has shipped into the repository"'
)
_FILLED = "`walship run` copies it there in the background, checked; what it cannot copy its log names"
_REFUSED = "the log says why (refused, not_shipped); remove them once that is understood"
_VERIFY = "walship verify names all that is damaged, at each destination"
_HOLE = "take a base backup now, from then on the present can be restored again: walship backup"
_HEAL = "`walship verify --heal` brings it from {}"
_NO_WAL = "end the open segment, and see whether it arrives: walship switch"
_BACK_UP = "take one: walship backup"

State = Literal["safe", "lagging", "at_risk", "unsafe", "unknown"]


def brief(said: str) -> str:
    """The words of somebody outside, as far as they are shown: on one line, and nothing that commands a terminal."""
    shown = "".join(each if each.isprintable() else " " for each in said[:_MOST_SAID])
    return shown if len(said) <= _MOST_SAID else f"{shown}…"


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that keeps it from being well."""

    text: str
    #: It concerns that destination alone; empty: all.
    destination: str = ""
    #: What is missing is on its way, later than it should be.
    late: bool = False
    #: WAL does not get where it has to because of it.
    stops: bool = True
    #: What to do first.
    hint: str = ""


@dataclass(frozen=True, slots=True)
class DestinationStatus:
    """One destination."""

    name: str
    required: bool
    #: Empty if it answered, and is a repository.
    error: str = ""
    #: What to do about that; empty: ``check`` tells.
    hint: str = ""
    #: The timeline that the positions are of: the server's, or the newest there if there is nothing of that.
    timeline: int = 1
    #: The newest finished segment there, on the server's timeline.
    last_segment: str = ""
    #: Up to here the WAL is there without a hole, from the newest backup on (or from the first segment, if there is no
    #: backup), by finished segments and, as far as their names tell, by tails; None if there is no WAL.
    durable_lsn: str | None = None
    #: So many bytes of that are in tails alone.
    tail_bytes: int = 0
    #: The first segment that is missing there although later ones are stored; empty if none is.
    missing: str = ""
    #: Bytes written by the server and not yet there; None if the server or the destination does not answer.
    lag_bytes: int | None = None
    #: Age of the oldest of them, 0 if there are none; None if it is not known, as it never is to a command.
    lag_seconds: float | None = None
    #: What should be there by now and is not, in a sentence; empty if nothing.
    late: str = ""
    #: What other destinations have and is not there, in a sentence; empty if nothing: it is copied in the background.
    lacks: str = ""
    #: Segments missing between stored ones.
    holes: int = 0
    last_backup: str = ""
    #: Complete base backups.
    backups: int = 0
    #: What could not be read there, one sentence each.
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """The stream, as the server tells of it."""

    slot: str
    #: Empty if walship streams from the slot; else what is in the way.
    problem: str
    #: reserved, extended, unreserved, lost; empty if there is no slot, or it keeps nothing.
    wal_status: str
    #: Bytes of WAL that the server keeps for the slot.
    retained_bytes: int
    #: Bytes that may be written before the slot is in danger; None without a limit.
    safe_wal_size: int | None
    #: async, potential, sync or quorum; empty if walship does not stream.
    sync_state: str
    #: What commits wait for, by the server's settings.
    commits: str
    #: Whether no commit returns now before we have confirmed it.
    waited_for: bool
    #: What ``check`` calls an error, and ``problem`` does not tell.
    errors: tuple[str, ...]
    #: Up to here the server has WAL that it sends: what it has written and not flushed, no stream can have.
    flushed_lsn: str


@dataclass(frozen=True, slots=True)
class Planned:
    """One job of the schedule."""

    #: full, incremental, expire, verify, drill.
    job: str
    #: When it runs, or should have run by now; None: never.
    next: datetime | None
    #: It is at work now, as far as is known.
    running: bool = False


@dataclass(frozen=True, slots=True)
class Status:
    """All of it."""

    system_id: str
    now: datetime
    #: Empty if the server answered.
    server_error: str
    current_lsn: str | None
    #: The server's; None likewise.
    timeline: int | None
    #: None if there is no spool, or it cannot be read.
    spool: SpoolState | None
    #: Empty if the spool could be read.
    spool_error: str
    #: Process id of the service that ships the spool; None if there is none.
    service: int | None
    #: The same for people, where no spool tells it; else empty.
    service_words: str
    #: None if WALSHIP_SOURCES is without stream, or the server does not answer.
    stream: StreamStatus | None
    destinations: tuple[DestinationStatus, ...]
    #: So many bytes may be on their way without being late; None: somebody else looks at that.
    most_on_the_way: int | None = None
    #: The file at which PostgreSQL fails to archive; empty if it does not, or nobody watches the spool.
    archiving_fails_at: str = ""
    #: False for a host that can only write: what can be restored, one that reads has to tell.
    reads: bool = True
    #: What can be restored; None if it was not looked at.
    recoverable: Recoverable | None = None
    #: What could not be found out, one sentence each: nothing is safe by that.
    unknown: tuple[str, ...] = ()
    #: When a drill and a verification last went well, by their records; None: never, as far as is known.
    last_drill: datetime | None = None
    last_verify: datetime | None = None
    #: When one failed, if none has gone well since.
    failed_drill: datetime | None = None
    failed_verify: datetime | None = None
    #: What the service does by itself, in the order in which it would.
    schedule: tuple[Planned, ...] = ()
    #: What is safe now may be lost with one host, by choice: said with every "safe", and nothing that is wrong. None: a
    #: required destination is elsewhere, or that was not looked at.
    exposed: Exposed | None = None

    @property
    def found(self) -> tuple[Reason, ...]:
        """What keeps it from being well, the gravest first."""
        return tuple(_reasons(self))

    @property
    def reasons(self) -> tuple[str, ...]:
        """The same for people, one sentence each."""
        return tuple(r.text if r.destination in r.text else f"{r.destination}: {r.text}" for r in self.found)

    @property
    def hints(self) -> tuple[str, ...]:
        """What to do first, each once, in the order of the reasons."""
        return tuple(dict.fromkeys(reason.hint for reason in self.found if reason.hint))

    @property
    def healthy(self) -> bool:
        return not self.found and not self.unknown

    def result(self) -> dict[str, Any]:
        """For ``--json``, and for ``/api/status``. Moments are datetimes."""
        state, sentence = judge(self)
        plain = replace(self, most_on_the_way=None)
        members = {**asdict(plain), "reasons": list(self.reasons), "hints": list(self.hints)}
        del members["most_on_the_way"]
        if self.recoverable is not None:
            members["recoverable"] |= {"first": self.recoverable.first, "last": self.recoverable.last}
        return {"healthy": self.healthy, "state": state, "sentence": sentence, **members}


def judge(status: Status) -> tuple[State, str]:
    """Whether it is safe, and why, in one sentence.

    - ``safe``: nothing is wrong; the sentence says so where losing one host may lose all of it;
    - ``lagging``: something is on its way to a destination, later than it should be, and nothing else is wrong;
    - ``at_risk``: something is wrong at a destination, and another one has everything;
    - ``unsafe``: no destination has everything, or nobody knows whether it has;
    - ``unknown``: what would tell could not be read.
    """
    found = status.found
    if not found:
        if status.unknown:
            return "unknown", f"Not known: {status.unknown[0]}."
        on = f" on {status.exposed.where} only" if status.exposed else ""
        return "safe", f"Safe{on}: {_safe_words(status)}."
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    first = f"{status.reasons[0]}{more}"
    if all(reason.late for reason in found):
        return "lagging", f"Lagging: {first}."
    touched = {reason.destination for reason in found}
    whole = [place.name for place in status.destinations if place.name not in touched]
    if "" not in touched and whole:
        return "at_risk", f"At risk: {first}; {' and '.join(whole)} {'has' if len(whole) == 1 else 'have'} everything."
    return "unsafe", f"Not safe: {first}."


def judge_absent(why: str) -> tuple[State, str]:
    """Where there is nothing to judge: the service cannot ship (``why``), or nothing was looked at yet."""
    if why:
        return "unsafe", f"Not safe: nothing is shipped: {why}."
    return "unknown", "Not known: the destinations are being looked at for the first time."


def stopped_by(status: Status) -> list[str]:
    """Why WAL does not get where it has to; empty if it does. What is not required stops nothing."""
    optional = {place.name for place in status.destinations if not place.required}
    pairs = zip(status.found, status.reasons, strict=True)
    return [said for reason, said in pairs if reason.stops and reason.destination not in optional]


def _safe_words(status: Status) -> str:
    places = len(status.destinations)
    where = {1: "the destination has", 2: "both destinations have"}.get(places, f"all {places} destinations have")
    lags = [place.lag_seconds for place in status.destinations]
    oldest = max((lag for lag in lags if lag is not None), default=None)
    behind = ""
    if oldest is not None and None not in lags:
        behind = " up to now" if oldest < 1 else f" up to {_span(oldest)} ago"
    elif status.stream is None and any(place.lag_bytes for place in status.destinations):
        behind = " but what the open segment holds"
    words = f"{where} all WAL{behind}"
    if status.recoverable is not None and (newest := status.recoverable.newest) is not None:
        words += f", and any moment since {newest.begins.astimezone(UTC):%Y-%m-%d %H:%M} UTC can be restored"
    if not status.reads:
        words += "; this host only writes: what can be restored, `walship list` tells where a key is at hand"
    return words


def _reasons(status: Status) -> Iterator[Reason]:
    if status.server_error:
        yield Reason(f"server: {status.server_error}", hint=_START_SERVER)
    yield from _overtaken(status)
    if status.archiving_fails_at:
        yield Reason(f"server: archiving fails since {status.archiving_fails_at}", hint=_CHECK)
    if status.spool is not None and status.service is None:  # the cause, where the stream stands still as well
        yield Reason("no service ships the spool (`walship run`)", hint=_START)
    if status.stream is not None:
        if status.stream.problem:
            yield Reason(f"stream: {status.stream.problem}", hint=_CHECK)
        for error in status.stream.errors:
            yield Reason(error, stops=False, hint=_CHECK)
    if status.spool_error:
        yield Reason(f"spool: {status.spool_error}", hint=_CHECK)
    if status.spool is not None:
        yield from _spool_reasons(status.spool)
    for place in status.destinations:
        yield from _place_reasons(place, status.most_on_the_way, status.destinations)
    yield from _record_reasons(status)


def _overtaken(status: Status) -> Iterator[Reason]:
    stored = status.recoverable.newest_timeline if status.recoverable else 0
    if status.timeline is not None and status.timeline < stored:
        yield Reason(
            f"the server is on timeline {status.timeline}, and another one has gone over to timeline {stored} in this"
            " repository: a restore of the latest state brings back that one",
            stops=False,
            hint=_ANOTHER,
        )


def _record_reasons(status: Status) -> Iterator[Reason]:
    for verb, failed in (("verify", status.failed_verify), ("drill", status.failed_drill)):
        if failed is not None:
            hint = f"walship history --verb {verb} tells what it has found; once one goes well, this is gone"
            yield Reason(f"the last {verb} failed, at {show(failed)}", stops=False, hint=hint)


def _spool_reasons(spool: SpoolState) -> Iterator[Reason]:
    if spool.oldest_seconds > SLOW.total_seconds():
        yield Reason(
            f"spool: {spool.files} files wait, the oldest for {spool.oldest_seconds:.0f} s", late=True, hint=_LATE
        )
    if spool.refused:
        yield Reason(f"spool: {spool.refused} files were refused and moved aside", stops=False, hint=_REFUSED)


def _place_reasons(
    place: DestinationStatus, most: int | None, places: tuple[DestinationStatus, ...]
) -> Iterator[Reason]:
    """``most`` bytes may be on their way; None: somebody else looks at that. ``places``: all destinations."""
    name = place.name
    if place.error:
        # What a store says of itself is seldom what to do: that it is slow, or left alone for a minute.
        hint = place.hint if "walship " in place.hint else "; ".join(filter(None, (place.hint, _CHECK)))
        yield Reason(place.error, name, hint=hint)
        return
    for problem in place.problems:
        yield Reason(problem, name, stops=False, hint="" if "`walship " in problem else _VERIFY)
    if place.missing:
        fact = f"{place.missing} is missing: what lies behind it cannot be reached"
        whole = next((other.name for other in places if _has(other, place)), "")
        yield Reason(fact, name, stops=False, hint=_HEAL.format(whole) if whole else _HOLE)
    # Before the newest backup they harm nobody who wants to go back to a moment behind it; ``recoverable`` shows them.
    if place.holes and not place.last_backup:
        yield Reason(f"{place.holes} segments are missing between stored ones", name, stops=False, hint=_HOLE)
    if place.durable_lsn is None:
        yield Reason("no WAL yet", name, stops=False, hint=_NO_WAL)
    elif most is not None and place.lag_bytes is not None and place.lag_bytes > most:
        yield Reason(f"{place.lag_bytes} bytes of WAL are not there yet", name, late=True, hint=_LATE)
    if not place.last_backup:
        yield Reason("no base backup", name, stops=False, hint=_BACK_UP)
    if place.late:
        yield Reason(place.late, name, late=True, hint=_LATE)
    if place.lacks:
        yield Reason(place.lacks, name, late=True, stops=False, hint=_FILLED)


def _has(other: DestinationStatus, place: DestinationStatus) -> bool:
    """Whether it is known to have the segment that is missing at ``place``: unbroken from a backup as old, or older."""
    return (
        not (other.error or other.missing)
        and other.timeline == place.timeline
        and "" < other.last_backup <= place.last_backup
        and other.last_segment > place.missing
    )


def _span(seconds: float) -> str:
    """``7200`` → ``2 h``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
