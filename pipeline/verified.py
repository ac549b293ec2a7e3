"""What was verified, and when: remembered at each destination, ten bytes an object.

An object is remembered as 64 bits of a digest of what a listing says of it: name, size, time. So one that was replaced,
or changed in size or time, is not known and is read again, and no name has to be kept. Each belongs to a run: when that
began, and whether it decoded what it read or looked at stored bytes alone.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pipeline.contracts import Buffer, ObjectInfo
from pipeline.errors import IntegrityError
from pipeline.objects import check_members, strict_json

FOLDER = "verified/"
#: For a hundred million objects. Most bytes of the plaintext.
MOST = 1 << 30

_VERSION = 1
_MEMBERS: dict[str, type] = {
    "walship_verified": int, "destination": str, "system_id": str, "count": int, "runs": list, "keys": dict,
}  # fmt: skip
#: More cannot be numbered in two bytes; the oldest go.
_MOST_RUNS = 0xFFFF
_LITTLE = array("H", [1]).tobytes()[0] == 1
#: What became of an entry in this run.
_UNSEEN, _SEEN, _DROPPED = range(3)


@dataclass(frozen=True, slots=True)
class Run:
    """A verification that entries go back to."""

    #: When it began, by the clock of its host.
    began: datetime
    #: Whether it decoded what it read; else it looked at stored bytes alone.
    decoded: bool


def memory_key(destination: str) -> str:
    """Where what is remembered of a destination is kept, at that destination itself."""
    return f"{FOLDER}{hashlib.sha256(destination.encode()).hexdigest()[:16]}"


def mark_of(info: ObjectInfo) -> int:
    """64 bits that stand for an object as a listing shows it."""
    modified = f"{info.modified.timestamp():.6f}" if info.modified else ""
    told = f"{info.key}\0{info.size}\0{modified}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big")


class Memory:
    """What is remembered of one destination, and what is added in this run.

    An entry counts for ``interval`` from when its run began, and not if that lies in the future: that clock was wrong.
    Where the clock was set back, age counts from the latest time that is known. Nothing counts without an interval.
    """

    def __init__(
        self, destination: str, system_id: str, *, now: datetime, interval: timedelta | None, trust: bool = True
    ) -> None:
        """Without ``trust`` all is read again, and what was known stays known until it was."""
        self.destination = destination
        self.system_id = system_id
        #: Ids of the data keys that objects there name, each with one that does.
        self.keys: dict[str, str] = {}
        #: Whether all that is there was listed in this run: what was not seen is gone then.
        self.complete = False
        self._now = now
        self._trust = trust
        self._interval = interval
        self._runs: list[Run] = []
        self._fresh: list[bool] = []
        self._marks, self._owners = array("Q"), array("H")
        self._states = bytearray()
        self._new, self._new_decoded = array("Q"), bytearray()
        #: Runs that began later than now.
        self.future = 0

    @property
    def added(self) -> int:
        """Objects that were read in this run, and are good."""
        return len(self._new)

    @property
    def changed(self) -> bool:
        """Whether it is worth being stored again."""
        dropped = self._states.count(_DROPPED)
        gone = self._states.count(_UNSEEN) if self.complete else 0
        return bool(self._new) or bool(dropped) or 4 * gone > len(self._marks)

    def knows(self, info: ObjectInfo, *, decoded: bool) -> bool:
        """Whether it was verified so lately that it need not be read. ``decoded``: stored bytes are not enough."""
        at = self._find(mark_of(info)) if self._trust else None
        if at is None or self._states[at] == _DROPPED:
            return False
        owner = self._owners[at]
        if not self._fresh[owner] or (decoded and not self._runs[owner].decoded):
            return False
        self._states[at] = _SEEN
        return True

    def add(self, info: ObjectInfo, *, decoded: bool) -> None:
        """It was read in this run, and is good."""
        self._new.append(mark_of(info))
        self._new_decoded.append(decoded)

    def drop(self, info: ObjectInfo) -> None:
        """It was read in this run, and is not good: whatever was known of it does not count any more."""
        at = self._find(mark_of(info))
        if at is not None:
            self._states[at] = _DROPPED

    def _find(self, mark: int) -> int | None:
        at = bisect_left(self._marks, mark)
        return at if at < len(self._marks) and self._marks[at] == mark else None

    def encode(self) -> bytes:
        """The plaintext to store: what was known and still is, and what this run has added."""
        runs = [*self._runs, Run(self._now, decoded=False), Run(self._now, decoded=True)]
        stored, decoded = len(runs) - 2, len(runs) - 1
        # New ones sort before known ones of the same mark.
        entries = [
            self._marks[at] << 17 | 1 << 16 | self._owners[at]
            for at, state in enumerate(self._states)
            if state == _SEEN or (state == _UNSEEN and not self.complete and self._fresh[self._owners[at]])
        ]
        known = len(entries)
        entries += [
            mark << 17 | (decoded if deep else stored) for mark, deep in zip(self._new, self._new_decoded, strict=True)
        ]
        if known < len(entries):
            entries.sort()
        marks, owners, last = array("Q"), array("H"), -1
        for entry in entries:
            if entry >> 17 != last:
                last = entry >> 17
                marks.append(last)
                owners.append(entry & 0xFFFF)
        used = sorted(set(owners))
        numbers = {old: new for new, old in enumerate(used)}
        owners = array("H", map(numbers.__getitem__, owners))
        front = {
            "walship_verified": _VERSION,
            "destination": self.destination,
            "system_id": self.system_id,
            "count": len(marks),
            "runs": [[runs[n].began.astimezone(UTC).isoformat(), runs[n].decoded] for n in used],
            "keys": self.keys,
        }
        return json.dumps(front).encode() + b"\n" + _bytes(marks) + _bytes(owners)

    def load(self, content: Buffer) -> None:
        """What ``encode`` made in an earlier run. Raises IntegrityError; then nothing is remembered."""
        what = f"what was verified at {self.destination}"
        head, _, rest = bytes(content).partition(b"\n")
        try:
            members = check_members(strict_json(head), _MEMBERS)
            if members["walship_verified"] != _VERSION:
                raise ValueError(f"it is of version {members['walship_verified']}")
            if (members["destination"], members["system_id"]) != (self.destination, self.system_id):
                raise ValueError(f"it tells of {members['destination']} and the cluster {members['system_id']}")
            if len(rest) != 10 * members["count"]:
                raise ValueError(f"it has {len(rest)} bytes for {members['count']} objects")
            runs = [_run(run) for run in members["runs"]]
            if len(runs) > _MOST_RUNS - 2:
                raise ValueError(f"it has {len(runs)} runs")
            marks, owners = _array("Q", rest[: 8 * members["count"]]), _array("H", rest[8 * members["count"] :])
            if owners and max(owners) >= len(runs):
                raise ValueError("it names a run that is not there")
            keys = {str(key): str(name) for key, name in members["keys"].items()}
        except ValueError as error:
            raise IntegrityError(f"{what} cannot be read: {error}") from None
        self.keys = keys | self.keys
        self._runs, self._marks, self._owners = runs, marks, owners
        self._states = bytearray(len(marks))
        self._judge()

    def _judge(self) -> None:
        """Which runs count."""
        latest = max([self._now, *(run.began for run in self._runs)])
        self._fresh = [
            self._interval is not None and run.began <= self._now and latest - run.began <= self._interval
            for run in self._runs
        ]
        self.future = sum(run.began > self._now for run in self._runs)


def _run(found: object) -> Run:
    """Raises ValueError."""
    if not (isinstance(found, list) and len(found) == 2 and isinstance(found[0], str) and type(found[1]) is bool):
        raise ValueError("a run is not what it should be")
    began = datetime.fromisoformat(found[0])
    if began.tzinfo is None:
        raise ValueError("a run has no time zone")
    return Run(began, found[1])


def _bytes(numbers: array[int]) -> bytes:
    """Big-endian."""
    if _LITTLE:
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()


def _array(kind: str, content: bytes) -> array[int]:
    numbers: array[int] = array("Q") if kind == "Q" else array("H")
    numbers.frombytes(content)
    if _LITTLE:
        numbers.byteswap()
    return numbers


def pseudo(name: str, content: Sequence[str]) -> ObjectInfo:
    """Something that was verified and is no object of its own: what ``content`` says, under a name no object has."""
    digest = hashlib.sha256("\0".join(content).encode()).hexdigest()
    return ObjectInfo(f"{name}#{digest}", 0)
