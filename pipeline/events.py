"""What has happened, in the past tense. Events are plain facts; ``infra/wiring.py`` decides who reacts to them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from pipeline.wal import WalFile


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
class WatchingHampered:
    """A source still notices everything, but later than it should."""

    #: Name of the source.
    source: str
    fact: str
    hint: str


#: What listeners (log, metrics) are told.
Notice: TypeAlias = (
    ObjectStored
    | DestinationFailed
    | DestinationCaughtUp
    | DestinationHampered
    | Acknowledged
    | EventFailed
    | FileRefused
    | WatchingHampered
)
