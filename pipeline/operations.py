"""Records of operations: what a repository remembers of each backup, expire, verify, copy, restore, drill, key change.

The name of a record says verb, end and outcome, so that a listing alone tells when each verb last ended well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.contracts import Buffer
from pipeline.errors import IntegrityError
from pipeline.objects import strict_json

FOLDER = "log/"
#: What leaves a record.
RECORDED = ("backup", "expire", "verify", "copy", "restore", "drill", "key")
#: Most bytes of a record's plaintext.
MOST = 256 << 10
#: Records older than this go, beyond the newest so many.
KEPT_AGE, KEPT = timedelta(days=365), 1000

_NAME = re.compile(r"log/(\d{8}T\d{6}Z)-([a-z]{1,20})-(ok|failed)-([0-9a-f]{8})")
_TIME = "%Y%m%dT%H%M%SZ"


@dataclass(frozen=True, slots=True, order=True)
class RecordName:
    """``log/<end, UTC>-<verb>-<ok|failed>-<8 hex>``; they sort by when the operation ended."""

    #: When the operation ended, by the wall clock of its host; whole seconds, UTC.
    ended: datetime
    verb: str
    ok: bool
    #: 8 random hex digits: two may end in one second.
    salt: str

    @property
    def key(self) -> str:
        """The object's name."""
        outcome = "ok" if self.ok else "failed"
        return f"{FOLDER}{self.ended.astimezone(UTC):{_TIME}}-{self.verb}-{outcome}-{self.salt}"

    @classmethod
    def parse(cls, key: str) -> RecordName | None:
        """None for every other object, also those below ``log/`` that a later walship may keep there."""
        match = _NAME.fullmatch(key)
        if match is None:
            return None
        try:
            ended = datetime.strptime(match[1], _TIME).replace(tzinfo=UTC)
        except ValueError:  # a month 13
            return None
        return cls(ended, match[2], match[3] == "ok", match[4])


@dataclass(frozen=True, slots=True)
class Record:
    """The content of a record."""

    verb: str
    began: datetime
    ended: datetime
    #: Seconds that it took, by a clock that never jumps.
    seconds: float
    ok: bool
    host: str
    #: Of walship.
    version: str
    #: What was typed behind the verb; no secrets.
    arguments: tuple[str, ...] = ()
    #: What went wrong, and what to do about it; empty if nothing did.
    error: str = ""
    hint: str = ""
    #: It was told to end before it was done, and is still to be done.
    stopped: bool = False
    #: The verb's own.
    summary: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """One JSON document. A summary that is too large is left out: the rest is worth more."""
        text = self._json(self.summary)
        return text if len(text) <= MOST else self._json({"left_out": f"{len(text)} bytes"})

    def _json(self, summary: dict[str, Any]) -> bytes:
        members = {
            "verb": self.verb,
            "began": self.began.astimezone(UTC).isoformat(timespec="milliseconds"),
            "ended": self.ended.astimezone(UTC).isoformat(timespec="milliseconds"),
            "seconds": round(self.seconds, 3),
            "ok": self.ok,
            "host": self.host,
            "version": self.version,
            "arguments": list(self.arguments),
            "error": self.error,
            "hint": self.hint,
            "stopped": self.stopped,
            "summary": summary,
        }
        return json.dumps(members, default=str).encode()

    @classmethod
    def decode(cls, what: str, content: Buffer) -> Record:
        """What ``encode`` made; members that a later walship added are passed over. IntegrityError about ``what``."""
        try:
            members = strict_json(bytes(content))
            if not isinstance(members, dict):
                raise ValueError("it is not an object")  # noqa: TRY004  # what was read is wrong, not what was called
            for name, kind in _MEMBERS.items():
                if type(members.get(name)) not in kind:
                    raise ValueError(f"{name} is missing, or not what it should be")
            return cls(
                verb=members["verb"],
                began=_moment(members["began"]),
                ended=_moment(members["ended"]),
                seconds=float(members["seconds"]),
                ok=members["ok"],
                host=members["host"],
                version=members["version"],
                arguments=tuple(map(str, members["arguments"])),
                error=members["error"],
                hint=members["hint"],
                stopped=members["stopped"],
                summary=members["summary"],
            )
        except ValueError as error:
            raise IntegrityError(f"{what} cannot be read: {error}") from None


_MEMBERS: dict[str, tuple[type, ...]] = {
    "verb": (str,), "began": (str,), "ended": (str,), "seconds": (int, float), "ok": (bool,), "host": (str,),
    "version": (str,), "arguments": (list,), "error": (str,), "hint": (str,), "stopped": (bool,), "summary": (dict,),
}  # fmt: skip


def newest(names: Iterable[RecordName], verb: str, *, ok: bool | None = None) -> RecordName | None:
    """The last one of a verb; ``ok`` asks for one that ended so."""
    return max((name for name in names if name.verb == verb and ok in (None, name.ok)), default=None)


def outdated(names: Iterable[RecordName], now: datetime) -> list[RecordName]:
    """Those that may go, the oldest first: older than a year, not among the newest 1000, nor the last of their kind.

    The last one of each verb and outcome stays whatever its age: schedule and metrics go by it.
    """
    kinds: set[tuple[str, bool]] = set()
    found: list[RecordName] = []
    for number, name in enumerate(sorted(names, reverse=True)):
        kind = name.verb, name.ok
        if kind in kinds and number >= KEPT and name.ended < now - KEPT_AGE:
            found.append(name)
        kinds.add(kind)
    return found[::-1]


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text} has no time zone")
    return moment.astimezone(UTC)
