"""The words of the domain: LSN, timeline, and the names of the files that PostgreSQL archives.

Sources: PostgreSQL documentation, "WAL Internals" and "Continuous Archiving"; ``xlog_internal.h`` for the names.
What is inside a segment is in ``walpages``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from pipeline.errors import IntegrityError

#: Sizes of a segment that initdb allows: powers of two from 1 MB to 1 GB.
SEGMENT_SIZES = tuple(1 << n for n in range(20, 31))

_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")
_WAL_NAME = re.compile(
    r"(?P<tli>[0-9A-F]{8})"
    r"(?:(?P<log>[0-9A-F]{8})(?P<seg>[0-9A-F]{8})(?P<suffix>\.partial|\.[0-9A-F]{8}\.backup)?|\.history)"
)


class Lsn(int):
    """A position in the WAL, in bytes since the cluster was made. Prints as PostgreSQL does: ``16/B374D848``."""

    @classmethod
    def parse(cls, text: str) -> Lsn:
        """``"16/B374D848"`` → Lsn. Raises ValueError for anything else."""
        match = _LSN.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not an LSN; one looks like 16/B374D848")
        return cls(int(match[1], 16) << 32 | int(match[2], 16))

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"Lsn({str(self)!r})"

    def __add__(self, other: int) -> Lsn:
        return Lsn(int(self) + other)


class WalKind(Enum):
    """What a file in the archive is."""

    SEGMENT = "segment"
    PARTIAL = "partial"
    LABEL = "backup"
    HISTORY = "history"


@dataclass(frozen=True, slots=True, order=True)
class WalFile:
    """A file that PostgreSQL archives, known by its name.

    ``log`` and ``seg`` are the middle and last 8 hex digits (0 for a history file): which bytes they cover depends on
    the segment size of the cluster.
    """

    timeline: int
    log: int
    seg: int
    kind: WalKind
    name: str

    @classmethod
    def parse(cls, name: str) -> WalFile | None:
        """The file of that name, or None if PostgreSQL would not name an archived file so."""
        match = _WAL_NAME.fullmatch(name)
        if match is None:
            return None
        timeline = int(match["tli"], 16)
        if match["log"] is None:
            return cls(timeline, 0, 0, WalKind.HISTORY, name)
        suffix = match["suffix"] or ""
        kind = WalKind.SEGMENT
        if suffix:
            kind = WalKind.PARTIAL if suffix == ".partial" else WalKind.LABEL
        return cls(timeline, int(match["log"], 16), int(match["seg"], 16), kind, name)

    @classmethod
    def segment(cls, timeline: int, lsn: int, segment_size: int) -> WalFile:
        """The segment that holds the byte at ``lsn``."""
        log, seg = divmod(lsn // segment_size, segments_per_log(segment_size))
        return cls(timeline, log, seg, WalKind.SEGMENT, f"{timeline:08X}{log:08X}{seg:08X}")

    @classmethod
    def history(cls, timeline: int) -> WalFile:
        """The history file of that timeline."""
        return cls(timeline, 0, 0, WalKind.HISTORY, history_name(timeline))

    def start(self, segment_size: int) -> Lsn:
        """Position of the segment's first byte."""
        return Lsn((self.log * segments_per_log(segment_size) + self.seg) * segment_size)

    def end(self, segment_size: int) -> Lsn:
        """Position of the first byte behind the segment."""
        return self.start(segment_size) + segment_size

    def next(self, segment_size: int) -> WalFile:
        """The segment that follows on the same timeline."""
        return WalFile.segment(self.timeline, self.end(segment_size), segment_size)

    def __str__(self) -> str:
        return self.name


def segments_per_log(segment_size: int) -> int:
    """How many segments share the middle 8 digits of their names."""
    return (1 << 32) // segment_size


def history_name(timeline: int) -> str:
    """``2`` → ``00000002.history``."""
    return f"{timeline:08X}.history"


@dataclass(frozen=True, slots=True)
class Fork:
    """Where a timeline ended and the next one began: one line of a history file."""

    #: The timeline that ended here.
    timeline: int
    #: First byte that belongs to the next timeline.
    lsn: Lsn
    reason: str = ""


def parse_history(name: str, content: bytes) -> tuple[Fork, ...]:
    """The forks of a timeline history file, oldest first. Raises IntegrityError for what PostgreSQL would refuse."""
    forks: list[Fork] = []
    for line in content.decode("utf-8", "replace").splitlines():
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        fields = text.split(None, 2)
        try:
            fork = Fork(int(fields[0]), Lsn.parse(fields[1]), fields[2] if len(fields) > 2 else "")
        except (IndexError, ValueError):
            raise IntegrityError(f"timeline history {name} has a line that is none: {line[:80]!r}") from None
        if forks and fork.timeline <= forks[-1].timeline:
            raise IntegrityError(
                f"timeline history {name} goes from timeline {forks[-1].timeline} back to {fork.timeline}"
            )
        forks.append(fork)
    return tuple(forks)
