"""What a lease says: who holds it, and that its holder is at work. And whether a holder on this machine has ended.

A heartbeat is a small JSON object, for people and for the next writer. Anybody who may write to the store may have
written it: what is read is bounded, and never more than advice.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from pipeline.objects import MemoryBody, check_members, strict_json

#: Bytes of a heartbeat that are looked at; ours has five hundred.
MOST = 4096
#: In the place of a position: more may have been confirmed than anybody has written down.
UNKNOWN = "unknown"
#: Characters of a name from a heartbeat that are shown to people.
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lease, as it describes itself."""

    host: str
    pid: int
    #: When it took the lease, RFC 3339.
    started: str
    #: The running kernel and the pid namespace that ``pid`` is a number of; empty where that cannot be told.
    machine: str
    #: When the process began, in the kernel's ticks since it started (proc_pid_stat(5), field 22): who has the number
    #: ``pid`` later has another one. 0 where that cannot be told.
    birth: int
    #: Random: tells two leases of one process apart.
    instance: str
    #: What it ships, for people: its spool, its slot.
    server: str

    @classmethod
    def here(cls, now: datetime, server: str = "") -> Self:
        """This process."""
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            pid=pid,
            started=_moment(now),
            machine=_machine(),
            birth=_birth(pid) or 0,
            instance=secrets.token_hex(16),
            server=server,
        )

    @property
    def words(self) -> str:
        """For messages: ``process 4711 on db1 (spool /spool), since 2026-01-14T12:00:00Z``."""
        shipped = f" ({_shown(self.server)})" if self.server else ""
        return f"process {self.pid} on {_shown(self.host)}{shipped}, since {_shown(self.started)}"

    def ended(self) -> bool:
        """Whether it is certain that this process is no more: it ran here, and it is not here.

        "Here" is one kernel since it started *and* one pid namespace: in two containers, process 1 always lives. A
        number that is in use again is told by when its process began. Blocks for some microseconds.
        """
        if not self.machine or self.machine != _machine() or self.pid < 1:
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            pass  # it is somebody else's, so it is
        birth = _birth(self.pid)
        return birth is not None and self.birth not in (0, birth)


_HOLDER = {f.name: int if f.name in ("pid", "birth") else str for f in fields(Holder)}
_MEMBERS: dict[str, type] = {**_HOLDER, "counter": int, "written": str, "released": bool, "confirmed": str}


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The content of a lease."""

    holder: Holder
    #: Grows with each heartbeat, so that each is unlike the one before whatever the wall clock does.
    counter: int
    #: For people only, RFC 3339: clocks jump.
    written: str
    #: The holder is done: nobody need wait.
    released: bool
    #: Up to where WAL was said to be safe, as ``pipeline.confirmed`` writes it; empty if nothing was, or ``UNKNOWN``.
    confirmed: str = ""

    @classmethod
    def of(cls, holder: Holder, counter: int, now: datetime, *, released: bool = False, confirmed: str = "") -> Self:
        return cls(holder, counter, _moment(now), released, confirmed)

    def encode(self) -> MemoryBody:
        members = asdict(self.holder) | {
            "counter": self.counter,
            "written": self.written,
            "released": self.released,
            "confirmed": self.confirmed,
        }
        return MemoryBody((json.dumps(members, indent=1).encode() + b"\n",))

    @property
    def words(self) -> str:
        """For people, whether the holder is at work, as far as one look tells."""
        if self.released or self.holder.ended():
            return f"not running; the last was {self.holder.words}"
        return f"{self.holder.words}; its last sign of life was at {_shown(self.written)}"

    @classmethod
    def decode(cls, content: bytes) -> Self | None:
        """What ``encode`` made, or None: damaged, cut, or of a walship that says more."""
        try:
            found = strict_json(content)
            # Written before there was such a member: nobody knows what its holder has confirmed.
            members = check_members(found | {"confirmed": UNKNOWN} if _is_older(found) else found, _MEMBERS)
        except ValueError:
            return None
        holder = Holder(**{name: members[name] for name in _HOLDER})
        return cls(holder, members["counter"], members["written"], members["released"], members["confirmed"])


def _is_older(found: object) -> bool:
    return isinstance(found, dict) and "confirmed" not in found


def _moment(now: datetime) -> str:
    return now.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _shown(text: str) -> str:
    """Without what could play tricks on a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_SHOWN])


def _machine() -> str:
    """Names the kernel since it started, and the namespaces that its process numbers and start times are counted in."""
    try:
        if str(Path("/proc/self").readlink()) != str(os.getpid()):
            return ""  # this /proc shows the processes of another namespace
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except (OSError, ValueError):
        return ""
    try:
        times = str(Path("/proc/self/ns/time").readlink())
    except OSError:
        times = "time"  # before Linux 5.6 there is one for all
    return f"{boot} {numbers} {times}" if boot else ""


def _birth(pid: int) -> int | None:
    """When a living process began, in ticks; 0 if it has ended and waits to be noticed; None if it cannot be told."""
    try:
        # The name of the program, in brackets, may hold anything, also brackets.
        stat = Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()
        return 0 if stat[0] in "ZX" else int(stat[19])
    except (OSError, ValueError, IndexError):
        return None
