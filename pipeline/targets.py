"""What a person asks a restore for: the moment, on which timeline, and what the server does once it is there."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, tzinfo
from enum import Enum

from pipeline.errors import ConfigError
from pipeline.moments import parse_time, show
from pipeline.wal import Lsn


class TargetKind(Enum):
    """The ways to name a moment."""

    LATEST = "latest"
    TIME = "time"
    LSN = "lsn"
    XID = "xid"
    NAME = "name"
    IMMEDIATE = "immediate"


class Action(Enum):
    """What the server does at the target: PostgreSQL's ``recovery_target_action``."""

    PROMOTE = "promote"
    PAUSE = "pause"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class Target:
    """A recovery target. Exactly the value of its kind is set."""

    kind: TargetKind = TargetKind.LATEST
    time: datetime | None = None
    lsn: Lsn | None = None
    xid: int | None = None
    name: str = ""
    #: Stop just after the target; False: just before it.
    inclusive: bool = True
    #: None: the newest one stored (for immediate: that of the backup).
    timeline: int | None = None
    action: Action = Action.PROMOTE

    def __str__(self) -> str:
        before = "" if self.inclusive else "just before "
        if self.time is not None:
            return f"{before}time {show(self.time)}"
        if self.kind is TargetKind.LSN:
            return f"{before}LSN {self.lsn}"
        if self.kind is TargetKind.XID:
            return f"{before}transaction {self.xid}"
        if self.kind is TargetKind.NAME:
            return f"restore point {self.name!r}"
        return "latest" if self.kind is TargetKind.LATEST else "the end of the backup (immediate)"

    @classmethod
    def parse(
        cls,
        *,
        time: str | None = None,
        lsn: str | None = None,
        xid: str | None = None,
        name: str | None = None,
        immediate: bool = False,
        latest: bool = False,
        exclusive: bool = False,
        timeline: int | None = None,
        action: str = "promote",
        zone: tzinfo | None = None,
        now: datetime | None = None,
    ) -> Target:
        """What was typed → the target. ``zone`` is for times without one; None means this machine's; so with ``now``.

        Raises ConfigError that names the option.
        """
        given = {"--to-time": time, "--to-lsn": lsn, "--to-xid": xid, "--to-name": name}
        chosen = [option for option, value in given.items() if value is not None]
        chosen += ["--immediate"] * immediate + ["--latest"] * latest
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} contradict each other", hint="give one recovery target")
        if exclusive and not (time or lsn or xid):
            raise ConfigError("--exclusive needs --to-time, --to-lsn or --to-xid")
        if timeline is not None and not 1 <= timeline < 1 << 32:
            raise ConfigError(f"--timeline {timeline} is not a timeline; the first one is 1")
        if action not in {a.value for a in Action}:
            raise ConfigError(f"--action {action} is unknown", hint="promote, pause or shutdown")
        rest = cls(inclusive=not exclusive, timeline=timeline, action=Action(action))
        if time is not None:
            return rest.to_time(parse_time(time, zone, now=now))
        if lsn is not None:
            try:
                return rest.to_lsn(Lsn.parse(lsn))
            except ValueError as error:
                raise ConfigError(f"--to-lsn: {error}") from None
        if xid is not None:
            return rest.with_kind(TargetKind.XID, xid=_xid(xid))
        if name is not None:
            return rest.with_kind(TargetKind.NAME, name=_name(name))
        return rest.with_kind(TargetKind.IMMEDIATE if immediate else TargetKind.LATEST)

    def with_kind(
        self,
        kind: TargetKind,
        *,
        time: datetime | None = None,
        lsn: Lsn | None = None,
        xid: int | None = None,
        name: str = "",
    ) -> Target:
        """Another moment, the same timeline, action and side."""
        return Target(kind, time, lsn, xid, name, self.inclusive, self.timeline, self.action)

    def to_time(self, time: datetime) -> Target:
        return self.with_kind(TargetKind.TIME, time=time)

    def to_lsn(self, lsn: Lsn) -> Target:
        return self.with_kind(TargetKind.LSN, lsn=lsn)


def _name(text: str) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigError("--to-name: the name is not UTF-8 text") from None
    if not 0 < size < 64:
        raise ConfigError("--to-name: the name of a restore point has 1 to 63 bytes")
    if "\n" in text or "\0" in text:
        raise ConfigError("--to-name: a configuration file cannot hold a name with a line break")
    return text


def _xid(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"--to-xid {text!r} is not a transaction id", hint="pg_current_xact_id() gives one")
    value = int(text)
    if value >= 1 << 64 or value & 0xFFFFFFFF < 3:
        raise ConfigError(f"--to-xid {text} is not the id of a transaction", hint="the first one is 3")
    # PostgreSQL compares the low 32 bits; pg_current_xact_id() carries the epoch above them.
    return value & 0xFFFFFFFF
