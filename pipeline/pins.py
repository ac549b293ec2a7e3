"""Pins: what a person said shall be kept, whatever the policy says. ``pin/<backup>`` is an ordinary walship object."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime

from pipeline.contracts import Buffer
from pipeline.errors import IntegrityError
from pipeline.moments import show
from pipeline.objects import check_members, strict_json

FOLDER = "pin/"
#: Most bytes of a pin's plaintext.
MOST = 64 << 10

_KEY = re.compile(r"pin/([A-Za-z0-9_.-]{1,200})")
_MEMBERS: dict[str, type] = {"backup": str, "reason": str, "until": str, "by": str, "created": str}


@dataclass(frozen=True, slots=True)
class Pin:
    """One pin, as it is stored at a destination."""

    backup: str
    #: Why, for people; may be empty.
    reason: str
    #: None: until somebody removes it.
    until: datetime | None
    #: Host it was set on.
    by: str
    created: datetime

    def holds(self, now: datetime) -> bool:
        """Whether it still counts."""
        return self.until is None or self.until > now

    @property
    def words(self) -> str:
        """For people: ``pinned until 2027-01-01 00:00:00 UTC: before the migration``."""
        until = f" until {show(self.until)}" if self.until else ""
        return f"pinned{until}{f': {self.reason}' if self.reason else ''}"

    def encode(self) -> bytes:
        """The plaintext."""
        until = self.until.isoformat() if self.until else ""
        members = {"backup": self.backup, "reason": self.reason, "until": until, "by": self.by,
                   "created": self.created.isoformat()}  # fmt: skip
        return json.dumps(members, indent=1).encode()

    @classmethod
    def decode(cls, key: str, content: Buffer) -> Pin:
        """The opposite of ``encode``. Raises IntegrityError."""
        try:
            members = check_members(strict_json(bytes(content)), _MEMBERS)
            until = datetime.fromisoformat(members["until"]) if members["until"] else None
            created = datetime.fromisoformat(members["created"])
            if created.tzinfo is None or (until is not None and until.tzinfo is None):
                raise ValueError("a time in it has no zone")
        except ValueError as error:
            raise IntegrityError(f"{key} is no pin that this walship can read: {error}") from None
        if pin_key(members["backup"]) != key:
            raise IntegrityError(f"{key} is the pin of {members['backup']}")
        return cls(members["backup"], members["reason"], until, members["by"], created)


def pin_key(backup: str) -> str:
    """Where the pin of a backup is kept."""
    return f"{FOLDER}{backup}"


def pinned(key: str) -> str | None:
    """``pin/<backup>`` → the backup; None for every other key."""
    match = _KEY.fullmatch(key)
    return match[1] if match else None
