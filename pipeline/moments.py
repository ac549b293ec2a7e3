"""Times as people type them, with and without a zone, and as seen from now; and as we print them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, time, timedelta, timezone, tzinfo

from pipeline.errors import ConfigError

_UNITS = {
    "s": "seconds", "sec": "seconds", "second": "seconds",
    "m": "minutes", "min": "minutes", "minute": "minutes",
    "h": "hours", "hr": "hours", "hour": "hours",
    "d": "days", "day": "days",
    "w": "weeks", "week": "weeks",
}  # fmt: skip
#: ``10 minutes``, ``2h``, ``90 s``, ``an hour``; several of them may follow one another: ``1 h 30 min``.
_SPAN = re.compile(r"\s*(\d{1,9}(?:\.\d{1,6})?|an?(?=\s))\s*([a-z]+)")
_DAYS = {"today": 0, "yesterday": 1}

_HINT = (
    "like 2026-01-14 12:00:00 (this machine's zone), 2026-01-14T12:00:00+01:00, 2026-01-14 11:00:00 UTC, now,"
    " today 14:30, yesterday 14:30, 10 minutes ago, 2 h ago, 90s ago"
)


def parse_time(
    text: str, zone: tzinfo | None = None, *, now: datetime | None = None, option: str = "--to-time"
) -> datetime:
    """``2026-01-14 12:00:00+01`` or ``10 minutes ago`` → the moment in UTC.

    Accepts what PostgreSQL prints, RFC 3339, ``now``, a span of time with ``ago``, and ``today`` and ``yesterday`` with
    a time of day. Without a zone it is ``zone``, or this machine's. ``now`` is the clock's; None asks this machine's.
    Raises ConfigError, which names the option.
    """
    try:
        moment = _relative(text.strip().lower(), zone, now or datetime.now(UTC))
        return moment.astimezone(UTC) if moment is not None else _absolute(text.strip(), zone)
    except (ValueError, OverflowError):
        raise ConfigError(f"{option} {text!r} is not a time", hint=_HINT) from None


def _absolute(words: str, zone: tzinfo | None) -> datetime:
    for name in (" UTC", " GMT", "Z"):
        words = words.removesuffix(name) + "+00:00" if words.endswith(name) else words
    moment = datetime.fromisoformat(words)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=zone) if zone else moment.astimezone()
    return moment.astimezone(UTC)


def _relative(words: str, zone: tzinfo | None, now: datetime) -> datetime | None:
    """A moment that is named as seen from now; None if the words are of another kind."""
    if words == "now":
        return now
    if words.endswith(" ago"):
        return now - _span(words.removesuffix(" ago"))
    day, _, clock = words.partition(" ")
    if day in _DAYS and clock:
        date = now.astimezone(zone).date() - timedelta(days=_DAYS[day])
        at = time.fromisoformat(clock.strip())
        if at.tzinfo is not None:
            raise ValueError(words)  # whose day it is would be anybody's guess
        moment = datetime.combine(date, at)
        return moment.replace(tzinfo=zone) if zone else moment.astimezone()
    return None


def _span(words: str) -> timedelta:
    """``1 h 30 min`` → how long that is. Raises ValueError."""
    total, at = timedelta(), 0
    while at < len(words):
        match = _SPAN.match(words, at)
        if match is None:
            raise ValueError(words)
        unit = match[2] if match[2] in _UNITS else match[2].removesuffix("s")
        if unit not in _UNITS:
            raise ValueError(words)
        total += timedelta(**{_UNITS[unit]: 1.0 if match[1].startswith("a") else float(match[1])})
        at = match.end()
    return total


def time_remark(text: str, moment: datetime, zone: tzinfo | None = None) -> str:
    """A sentence for people about how ``text`` was understood as ``moment``; empty if it named date and zone itself."""
    words = text.strip()
    local = moment.astimezone(zone)
    taken = f"{local.tzname()}: {local.isoformat(sep=' ')}"
    if words.lower() == "now" or words.lower().endswith("ago"):
        return f"{words} was taken by the clock of this machine, {taken}"
    if words.lower().startswith(tuple(_DAYS)):
        return f"{words} was taken in this machine's time zone, {taken}"
    if parse_time(text, UTC) == moment == parse_time(text, _FAR):
        return ""
    return f"{words} has no time zone; it was taken as {taken}"


def show(moment: datetime) -> str:
    """As messages print a time: UTC, with microseconds where there are any."""
    return moment.astimezone(UTC).isoformat(sep=" ").replace("+00:00", " UTC")


def in_json(value: object) -> str:
    """For ``json.dumps(default=...)``: a time as ISO 8601, in UTC, ``2026-01-14T12:00:00+00:00``; all else as text."""
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else str(value)


def moment_in(text: str) -> datetime | None:
    """What somebody else wrote in some spelling of ISO 8601, as PostgreSQL does, in UTC; None if it is no time with a
    zone, or one that UTC has no year for.
    """
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None


#: Some zone in which no wall clock shows what it does in UTC.
_FAR = timezone(timedelta(hours=11))
