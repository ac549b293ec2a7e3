"""Cron expressions in a time zone. What is due when is decided by ``pipeline.schedule``; this only tells times.

The rules where clocks change are those of Debian's cron, which the library follows. Where minute and hour are given, a
time that does not exist is moved to the first one that does, and one that happens twice counts once. Where either
begins with ``*``, what counts is the time that really passes.
"""

from __future__ import annotations

import difflib
import re
from datetime import UTC, datetime, tzinfo
from functools import cache

from pipeline.errors import ConfigError

_FORM = "an expression is: minute hour day-of-month month day-of-week; 30 2 * * 0 is 02:30 on Sundays"


@cache
def zone(name: str) -> tzinfo:
    """The time zone of that name. Raises ConfigError."""
    if name == "UTC":
        return UTC
    from zoneinfo import ZoneInfo, available_timezones

    try:
        return ZoneInfo(name)
    except (KeyError, OSError, ValueError):  # not there, a folder, or a name that leads out of the zones' folder
        pass
    close = difflib.get_close_matches(name, available_timezones(), n=1)
    hint = f"did you mean {close[0]}?" if close else "for example UTC, Europe/Berlin, America/New_York"
    raise ConfigError(f"there is no time zone {name}", hint=hint)


class Cron:
    """An expression that was understood, and runs now and then. Raises ConfigError for any other."""

    def __init__(self, expression: str, time_zone: tzinfo = UTC) -> None:
        self.expression = " ".join(expression.split())
        self._zone = time_zone
        from cronsim import CronSimError

        try:
            runs = self.after(datetime.now(UTC)) is not None
        except CronSimError as error:
            if not self._exists_in_other_months():
                fact = re.sub("^bad (.*)", r"its \1 is wrong", str(error).lower())
                raise ConfigError(f"{self.expression!r} is no cron expression: {fact}", hint=_FORM) from None
            runs = False
        if not runs:
            raise ConfigError(
                f"{self.expression!r} never runs: no month that it names has such a day",
                hint="the fields are minute, hour, day-of-month, month and day-of-week; L is a month's last day",
            )

    def after(self, moment: datetime) -> datetime | None:
        """The first time behind that moment, in UTC; None if there is none for fifty years."""
        from cronsim import CronSim

        for found in CronSim(self.expression, moment.astimezone(self._zone)):
            # In an hour that happens twice, the library tells the first of both also when that is over.
            if (there := found.astimezone(UTC)) > moment:
                return there
        return None

    def _exists_in_other_months(self) -> bool:
        from cronsim import CronSim, CronSimError

        fields = self.expression.split()
        if len(fields) not in (5, 6):
            return False
        month = fields[-2]
        fields[-2] = "*"
        try:
            CronSim(" ".join(fields), datetime.now(UTC))
            CronSim(f"0 0 1 {month} *", datetime.now(UTC))
        except CronSimError:
            return False
        return True
