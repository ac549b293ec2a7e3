"""What shall be kept: the settings ``WALSHIP_KEEP_*`` as one value. Which backups that means, ``retention`` decides."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, timedelta, tzinfo

from pipeline.errors import ConfigError

#: More is a slip of the keyboard, and no calendar counts so far.
_LONGEST = timedelta(days=36525)
_MOST = 10000
#: Minutes are ``min``: with ``m`` somebody may mean months.
_SPAN = re.compile(r"\s*(\d{1,9})\s*(s|seconds?|min|minutes?|h|hours?|d|days?|w|weeks?)\s*", re.IGNORECASE)
_UNITS = {
    "s": timedelta(seconds=1), "m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}  # fmt: skip

#: The generations, the shortest first: member of the policy and setting.
GENERATIONS = ("daily", "weekly", "monthly", "yearly")


@dataclass(frozen=True, slots=True)
class Policy:
    """What shall be kept. A backup that any of the rules keeps is kept."""

    #: The newest so many backups; None: no such rule.
    last: int | None = None
    #: So much of the past can be restored to any moment; None: no such rule.
    window: timedelta | None = None
    #: The newest backup of each of so many days, weeks, months and years that have one; 0: no such rule.
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    #: In which days begin and end.
    zone: tzinfo = UTC

    @property
    def words(self) -> str:
        """For people: ``the last 3, a window of 14 days, 12 monthly``."""
        parts = [f"the last {self.last}"] if self.last else []
        parts += [f"a window of {span_words(self.window)}"] if self.window else []
        parts += [f"{count} {name}" for name in GENERATIONS if (count := getattr(self, name))]
        return ", ".join(parts)


def make_policy(*, last: str, window: str, generations: dict[str, str], zone: tzinfo) -> Policy | None:
    """The policy that the settings mean, each as it was typed; None if none of them is set.

    ``generations``: member of ``GENERATIONS`` → text. Raises ConfigError for what contradicts itself.
    """
    counts = {name: _count(f"WALSHIP_KEEP_{name.upper()}", text) for name, text in generations.items()}
    newest = _count("WALSHIP_KEEP_LAST", last)
    if newest == 0:
        raise ConfigError(
            "WALSHIP_KEEP_LAST is 0: it would keep no backup at all",
            hint="leave it empty to have no such rule, or set it to 1 or more",
        )
    span = parse_window(window) if window.strip() else None
    if newest is None and span is None and not any(counts.values()):
        if any(count == 0 for count in counts.values()):
            named = ", ".join(f"WALSHIP_KEEP_{name.upper()}" for name, count in counts.items() if count == 0)
            raise ConfigError(
                f"{named} is 0, and there is no other rule: no backup at all would be kept",
                hint="set WALSHIP_KEEP_WINDOW or WALSHIP_KEEP_LAST, or leave all empty: then nothing is deleted",
            )
        return None
    return Policy(newest, span, **{name: count or 0 for name, count in counts.items()}, zone=zone)


def parse_window(text: str, setting: str = "WALSHIP_KEEP_WINDOW") -> timedelta:
    """``14d``, ``36h``, ``2w``, ``14 days`` → how long that is. Raises ConfigError that names the setting."""
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{setting} is {text!r}, which is no span of time",
            hint="it is a whole number of weeks, days, hours, min or s: 2w, 14d, 36h; of months, count the days",
        )
    span = int(match[1]) * _UNITS[match[2][0].lower()]
    if not span:
        raise ConfigError(
            f"{setting} is 0: a window without length promises nothing",
            hint="leave it empty to have no such rule, or set it to a span like 14d",
        )
    if span > _LONGEST:
        raise ConfigError(f"{setting} is {text}, more than a hundred years", hint="did you mean less?")
    return span


def span_words(span: timedelta) -> str:
    """``14 days``, ``36 hours``, ``90 seconds``."""
    seconds = int(span.total_seconds())
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second")):
        if seconds % size == 0:
            count = seconds // size
            return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
    raise AssertionError


def _count(name: str, text: str) -> int | None:
    if not text.strip():
        return None
    if re.fullmatch(r"\s*-\s*\d+\s*", text):
        raise ConfigError(
            f"{name} is {text.strip()}: nobody can keep less than nothing", hint="a whole number, or empty"
        )
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        raise ConfigError(f"{name} is {text.strip()!r}, which is no whole number", hint="for example 7, or empty")
    if int(text) > _MOST:
        raise ConfigError(f"{name} is {text.strip()}; there are at most {_MOST}", hint="did you mean less?")
    return int(text)
