"""A base backup in words: what the server streams, and the record that makes a set of parts a backup.

``backup_info`` is the plaintext of the object written last. It holds the digests of everything else, so that a backup
is authenticated as a whole: a part of another backup, or an older part of the same name, is noticed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, TypeAlias

from pipeline.errors import IntegrityError
from pipeline.objects import strict_json
from pipeline.wal import Lsn


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


@dataclass(frozen=True, slots=True)
class ArchiveBegan:
    """A tar stream begins: ``base``, or a tablespace's oid as digits. Archives follow one another, never mixed."""

    archive: str


@dataclass(frozen=True, slots=True)
class ArchiveData:
    """The next bytes of the archive that began last."""

    data: bytes


@dataclass(frozen=True, slots=True)
class ManifestData:
    """The next bytes of PostgreSQL's backup_manifest. It comes after all archives."""

    data: bytes


@dataclass(frozen=True, slots=True)
class BackupStopped:
    """Last message: the WAL up to here is needed to make the backup consistent."""

    stop_lsn: Lsn
    timeline: int


#: What a base backup stream yields, in this order: started, (archive began, data …) …, manifest data …, stopped.
BackupMessage: TypeAlias = BackupStarted | ArchiveBegan | ArchiveData | ManifestData | BackupStopped


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
    #: ``full``
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
        for lsn in ("start_lsn", "stop_lsn"):
            members[lsn] = str(members[lsn])
        for moment in ("started", "stopped"):
            members[moment] = members[moment].isoformat()
        return json.dumps(members, indent=1).encode()

    @classmethod
    def decode(cls, name: str, content: bytes | bytearray) -> BackupInfo:
        """The opposite of ``encode``. ``name`` is for messages. Raises IntegrityError."""
        try:
            members: dict[str, Any] = strict_json(bytes(content))
            return cls(
                **{
                    **members,
                    "start_lsn": Lsn.parse(members["start_lsn"]),
                    "stop_lsn": Lsn.parse(members["stop_lsn"]),
                    "started": datetime.fromisoformat(members["started"]),
                    "stopped": datetime.fromisoformat(members["stopped"]),
                    "tablespaces": tuple(Tablespace(**t) for t in members["tablespaces"]),
                    "archives": tuple(
                        ArchiveInfo(a["name"], a["size"], tuple(a["parts"])) for a in members["archives"]
                    ),
                    "index": tuple(members["index"]),
                }
            )
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError(f"{name} is no backup_info that this walship can read: {error}") from None
