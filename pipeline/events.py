"""What has happened, in the past tense. Events are plain facts; ``infra/wiring.py`` decides who reacts to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import TypeAlias

from pipeline.wal import Lsn, WalFile


class Priority(IntEnum):
    """What goes first when several things wait: the fresher the data it saves, the sooner."""

    TAIL = 0
    HISTORY = 1
    WAL = 2
    PART = 3


@dataclass(frozen=True, slots=True)
class SegmentReady:
    """A finished WAL segment can be read at its source."""

    #: Name of the source that has it.
    source: str
    file: WalFile
    #: Bytes of plaintext.
    size: int


@dataclass(frozen=True, slots=True)
class HistoryReady:
    """A timeline history file can be read at its source."""

    source: str
    file: WalFile
    size: int


@dataclass(frozen=True, slots=True)
class SideFileReady:
    """A ``.partial`` segment or a ``.backup`` label that PostgreSQL archived beside the segments."""

    source: str
    file: WalFile
    size: int


@dataclass(frozen=True, slots=True)
class BackupReady:
    """A complete base backup (tar files and backup_manifest) lies in a folder of the spool."""

    source: str
    #: Folder, as a path.
    folder: str


#: What a source can announce and the dispatcher can carry.
Event: TypeAlias = SegmentReady | HistoryReady | SideFileReady | BackupReady


@dataclass(frozen=True, slots=True)
class ObjectStored:
    """A destination has confirmed an object as durable."""

    destination: str
    name: str
    #: Bytes as stored.
    size: int
    #: Seconds from the first attempt to the confirmation.
    seconds: float


@dataclass(frozen=True, slots=True)
class DestinationFailed:
    """A destination refused or did not answer after all retries; what it lacks is owed to it."""

    destination: str
    name: str
    fact: str
    hint: str


@dataclass(frozen=True, slots=True)
class DestinationCaughtUp:
    """A destination that had failed holds all that was owed to it."""

    destination: str


@dataclass(frozen=True, slots=True)
class DestinationFilling:
    """Others have what a destination lacks: it is copied there. Told when listings were compared, and now and then."""

    destination: str
    #: So many objects, and bytes as stored, are left; what stays in the end could not be copied. 0: nothing is.
    objects: int
    size: int


@dataclass(frozen=True, slots=True)
class DestinationHampered:
    """A destination works, but cannot do something that others can."""

    destination: str
    fact: str


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """Everything required is durable, and the source was told to forget the event."""

    event: Event


@dataclass(frozen=True, slots=True)
class EventFailed:
    """An attempt to bring an event to safety failed; it is still at its source."""

    event: Event
    fact: str
    hint: str


@dataclass(frozen=True, slots=True)
class FileRefused:
    """Something in the spool is not what its name says; it stays where it is, and people have to look."""

    path: str
    fact: str
    hint: str


@dataclass(frozen=True, slots=True)
class FileSetAside:
    """A history, ``.partial`` or label whose name is taken by other bytes was stored under a name of its own."""

    file: WalFile
    #: Name of the object that holds it now.
    name: str
    #: What is stored where it belongs, and the fingerprints of both.
    fact: str
    hint: str


@dataclass(frozen=True, slots=True)
class WatchingHampered:
    """A source still notices everything, but later than it should."""

    #: Name of the source.
    source: str
    fact: str
    hint: str


@dataclass(frozen=True, slots=True)
class TailsRemoved:
    """Tails that are no longer needed at a destination are gone from there."""

    destination: str
    count: int


@dataclass(frozen=True, slots=True)
class DeleteRefused:
    """A destination does not let go of what is no longer needed (object lock, a missing right)."""

    destination: str
    fact: str
    hint: str


@dataclass(frozen=True, slots=True)
class GapOpened:
    """WAL that the server no longer has was never stored: nothing can be restored across it."""

    timeline: int
    #: The first and the last segment that are missing.
    first: WalFile
    last: WalFile
    hint: str


@dataclass(frozen=True, slots=True)
class GapClosed:
    """A segment that was missing is stored after all, from another source."""

    file: WalFile


@dataclass(frozen=True, slots=True)
class SourcesDiffer:
    """What one source has, the other lacks or has with other bytes."""

    fact: str
    hint: str


@dataclass(frozen=True, slots=True)
class StreamStarted:
    """WAL comes from a server."""

    #: ``host:port``.
    server: str
    timeline: int
    lsn: Lsn
    #: Whether commits wait for us there.
    synchronous: bool
    #: It came all along, and only that is new.
    changed: bool = False


@dataclass(frozen=True, slots=True)
class StreamLost:
    """No WAL comes; it is tried again in so many seconds."""

    fact: str
    hint: str
    retry_in: float


@dataclass(frozen=True, slots=True)
class WalMoved:
    """How far the server is, and what was reported to it. At most about once a second."""

    timeline: int
    #: End of the server's WAL, as far as it has told.
    current: Lsn
    #: End of what has arrived here.
    received: Lsn
    #: What is durable at every required destination.
    flush: Lsn
    #: destination → up to where it has everything.
    durable: Mapping[str, Lsn]
    #: destination → age in seconds of the oldest byte that it lacks; 0 if none.
    age: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TimelineLeft:
    """The server has gone over to another timeline, and what lies behind the fork on the old one stays behind."""

    timeline: int
    #: First byte of the next timeline.
    fork: Lsn
    #: Stored end of the old one; behind ``fork`` if commits were left there.
    stored: Lsn


@dataclass(frozen=True, slots=True)
class SyncDegraded:
    """Commits no longer wait for a required destination, because it has not answered for too long."""

    destination: str
    fact: str


@dataclass(frozen=True, slots=True)
class SyncRestored:
    """Commits wait for the destination again."""

    destination: str


@dataclass(frozen=True, slots=True)
class OperationEnded:
    """A scheduled backup, expire, verify or drill is over."""

    verb: str
    #: Empty if it went well.
    error: str
    hint: str
    #: When it runs next; None: never.
    next: datetime | None


#: What listeners (log, metrics) are told.
Notice: TypeAlias = (
    ObjectStored
    | DestinationFailed
    | DestinationCaughtUp
    | DestinationFilling
    | DestinationHampered
    | Acknowledged
    | EventFailed
    | FileRefused
    | FileSetAside
    | WatchingHampered
    | TailsRemoved
    | DeleteRefused
    | GapOpened
    | GapClosed
    | SourcesDiffer
    | StreamStarted
    | StreamLost
    | WalMoved
    | TimelineLeft
    | SyncDegraded
    | SyncRestored
    | OperationEnded
)
