"""A base backup in words: what the server streams, and the record that makes a set of parts a backup.

``backup_info`` is the plaintext of the object written last. It holds the digests of everything else, so that a backup
is authenticated as a whole: a part of another backup, or an older part of the same name, is noticed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, TypeAlias

from pipeline.errors import IntegrityError
from pipeline.objects import check_members, strict_json
from pipeline.wal import SEGMENT_SIZES, Lsn


@dataclass(frozen=True, slots=True)
class Tablespace:
    """A tablespace beside the default one."""

    oid: int
    #: Path on the server at the time of the backup.
    location: str


@dataclass(frozen=True, slots=True)
class BackupStarted:
    """First message of a backup stream."""

    start_lsn: Lsn
    timeline: int
    tablespaces: tuple[Tablespace, ...]
    #: The server's estimate of all archives in bytes, 0 if unknown.
    estimate: int = 0
    #: When it began, if that was not just now.
    at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ArchiveBegan:
    """A tar stream begins: ``base``, or a tablespace's oid as digits.

    One that is made by several workers comes as several: ``base.1``, ``base.2`` …; only these may be mixed.
    """

    archive: str


@dataclass(frozen=True, slots=True)
class ArchiveData:
    """The next bytes of an archive."""

    data: bytes | memoryview
    #: Empty: the one that began last.
    archive: str = ""
    #: To be called once ``data`` is not needed any more, if it is there: the sender waits for the room.
    free: Callable[[], None] | None = None
    #: Whether the archive ends with it.
    last: bool = False


@dataclass(frozen=True, slots=True)
class ArchiveEnded:
    """No more of it. Need not be said of one that is followed by another one, or by the manifest."""

    archive: str


@dataclass(frozen=True, slots=True)
class ManifestData:
    """The next bytes of PostgreSQL's backup_manifest. It comes after all archives."""

    data: bytes


@dataclass(frozen=True, slots=True)
class BackupStopped:
    """Last message: the WAL up to here is needed to make the backup consistent."""

    stop_lsn: Lsn
    timeline: int
    #: When it ended, if that was not just now. Never earlier than it did: a recovery target between the two would
    #: choose a backup that does not reach back to it.
    at: datetime | None = None


#: What a base backup stream yields, in this order: started, (archive began, data …) …, manifest data …, stopped.
BackupMessage: TypeAlias = BackupStarted | ArchiveBegan | ArchiveData | ArchiveEnded | ManifestData | BackupStopped


@dataclass(frozen=True, slots=True)
class ArchiveInfo:
    """One tar stream as it is stored."""

    name: str
    #: Bytes of the tar stream.
    size: int
    #: SHA-256 trailer of each part as hex, in order.
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BackupInfo:
    """All that a restore has to know of a base backup before it reads a single part."""

    #: Folder of the backup: ``base_20260114_120000``.
    name: str
    #: Random, also in the header of every part; 32 hex digits.
    id: str
    #: ``full`` or ``incremental``
    kind: str
    system_id: str
    #: As ``server_version_num`` says it: 170011.
    server_version: int
    #: Bytes.
    segment_size: int
    timeline: int
    start_lsn: Lsn
    stop_lsn: Lsn
    started: datetime
    stopped: datetime
    tablespaces: tuple[Tablespace, ...]
    archives: tuple[ArchiveInfo, ...]
    #: SHA-256 trailers of the index objects and of the manifest, as hex; the manifest's is empty if there is none.
    index: tuple[str, ...]
    manifest: str
    #: Bytes as stored, all objects but this one.
    stored_size: int
    #: What the server wrote into backup_label, for people.
    label: str = ""
    #: Name and id of the backup that an incremental one builds on; both empty for a full one.
    parent: str = ""
    parent_id: str = ""

    @property
    def size(self) -> int:
        """Bytes of plaintext in all archives."""
        return sum(archive.size for archive in self.archives)

    @property
    def major(self) -> int:
        """Major version of the server."""
        return self.server_version // 10000

    def encode(self) -> bytes:
        """The plaintext of the ``backup_info`` object."""
        members = asdict(self)
        if not self.parent:
            del members["parent"], members["parent_id"]
        for lsn in ("start_lsn", "stop_lsn"):
            members[lsn] = str(members[lsn])
        for moment in ("started", "stopped"):
            members[moment] = members[moment].isoformat()
        return json.dumps(members, indent=1).encode()

    @classmethod
    def decode(cls, name: str, content: bytes | bytearray) -> BackupInfo:
        """The opposite of ``encode``. ``name`` is for messages. Raises IntegrityError for what ``encode`` cannot write.

        Everything is checked that others rely on without a second look: whoever may write to the store of a repository
        that is not encrypted can write this.
        """
        try:
            found = strict_json(bytes(content))
            incremental = isinstance(found, dict) and found.get("kind") == "incremental"
            members = check_members(found, _INFO | _PARENT if incremental else _INFO)
            members |= {moment: _moment(moment, members[moment]) for moment in ("started", "stopped")}
            members |= {lsn: Lsn.parse(members[lsn]) for lsn in ("start_lsn", "stop_lsn")}
            members["tablespaces"] = tuple(Tablespace(**check_members(t, _TABLESPACE)) for t in members["tablespaces"])
            members["archives"] = tuple(_archive(archive) for archive in members["archives"])
            members["index"] = _digests("index", members["index"])
            info = cls(**members)
            _check(info)
        except ValueError as error:
            raise IntegrityError(f"{name} is no backup_info that this walship can read: {error}") from None
        return info


_STRINGS = ("name", "id", "kind", "system_id", "start_lsn", "stop_lsn", "started", "stopped", "manifest", "label")
_NUMBERS = ("server_version", "segment_size", "timeline", "stored_size")
_INFO: dict[str, type] = {
    **dict.fromkeys(_STRINGS, str),
    **dict.fromkeys(_NUMBERS, int),
    **dict.fromkeys(("tablespaces", "archives", "index"), list),
}
_PARENT: dict[str, type] = {"parent": str, "parent_id": str}
_TABLESPACE: dict[str, type] = {"oid": int, "location": str}
_ARCHIVE: dict[str, type] = {"name": str, "size": int, "parts": list}
#: ``base.2``: what the second worker made of ``base``.
_WORKER = re.compile(r"(base|[1-9][0-9]{0,9})\.[1-9][0-9]?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{32}")
_SYSTEM_ID = re.compile(r"[0-9]{1,20}")
#: What an oid and a timeline are in PostgreSQL: 32 bits, and never 0.
_UNSIGNED = range(1, 1 << 32)


def area_of(archive: str) -> str:
    """What an archive holds files of: ``base``, or a tablespace's oid. ``base.2`` → ``base``."""
    match = _WORKER.fullmatch(archive)
    return match[1] if match else archive


def _archive(found: Any) -> ArchiveInfo:
    members = check_members(found, _ARCHIVE)
    return ArchiveInfo(members["name"], members["size"], _digests(f"archive {members['name']}", members["parts"]))


def _digests(what: str, found: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in found):
        raise ValueError(f"{what} lists what is no SHA-256")
    return tuple(found)


def _moment(member: str, text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{member} has no time zone")
    return moment


def _check(info: BackupInfo) -> None:
    """Raises ValueError for values that no backup has."""
    oids = [tablespace.oid for tablespace in info.tablespaces]
    archives = [archive.name for archive in info.archives]
    for wrong, fact in (
        (info.kind not in ("full", "incremental"), f"it is of the kind {info.kind!r}"),
        (info.kind == "incremental" and not (info.parent and _ID.fullmatch(info.parent_id)), "it names no parent"),
        (info.parent == info.name, "it builds on itself"),
        (not _ID.fullmatch(info.id), f"the id is {info.id!r}"),
        (not _SYSTEM_ID.fullmatch(info.system_id), f"the system identifier is {info.system_id!r}"),
        (info.server_version < 1, f"the server is of version {info.server_version}"),
        (info.segment_size not in SEGMENT_SIZES, f"a segment of {info.segment_size} bytes does not exist"),
        (info.timeline not in _UNSIGNED, f"timeline {info.timeline} does not exist"),
        (info.stop_lsn < info.start_lsn, f"it ends at {info.stop_lsn}, before its start at {info.start_lsn}"),
        (info.stored_size < 0 or any(a.size < 0 for a in info.archives), "a size is negative"),
        (info.manifest and not _DIGEST.fullmatch(info.manifest), "the manifest's digest is no SHA-256"),
        (not all(oid in _UNSIGNED for oid in oids), "the oid of a tablespace does not exist"),
        (len(set(oids)) < len(oids), "a tablespace is listed twice"),
        (len(set(archives)) < len(archives), "an archive is listed twice"),
        # Names of archives become parts of paths.
        (
            not {"base", *map(str, oids)}.issuperset(map(area_of, archives)),
            "an archive is neither base nor a tablespace's",
        ),
    ):
        if wrong:
            raise ValueError(fact)
