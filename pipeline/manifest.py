"""What PostgreSQL's backup_manifest says of the backup it belongs to, checked cheaply: without parsing all its files.

Source: PostgreSQL documentation, "Backup Manifest Format". The manifest ends in a SHA-256 of all lines before the last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import IntegrityError
from pipeline.objects import check_members, strict_json
from pipeline.wal import Lsn

_VERSION = re.compile(rb'"PostgreSQL-Backup-Manifest-Version":\s*(\d{1,9})\b')
_SYSTEM = re.compile(rb'"System-Identifier":\s*(\d{1,20})\b')
#: The last two members stand at the end, behind a list of files that may have a million lines.
_END = re.compile(rb'"WAL-Ranges":\s*(\[.*?\]),\s*"Manifest-Checksum":\s*"([0-9a-f]{64})"\}\s*$', re.DOTALL)
_TAIL = 64 * 1024
_MODIFIED = re.compile(rb'"Last-Modified": "(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) GMT"')
#: A line of the list of files, without the comma behind it.
_FILE = re.compile(rb"^\{ ?\"(?:Path|Encoded-Path)\":.*?\}(?=,?\s*$)", re.MULTILINE)
#: Up to the first slash; all of one that is no UTF-8, which stands in hex.
_TOP = re.compile(rb'"(Encoded-)?Path": ?"((?:[^"\\/]|\\.)*)')
_RANGE: dict[str, type] = {"Timeline": int, "Start-LSN": str, "End-LSN": str}


@dataclass(frozen=True, slots=True)
class WalRange:
    """WAL of one timeline that is needed."""

    timeline: int
    start: Lsn
    end: Lsn


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a whole manifest says of its backup."""

    #: Decimal digits; empty in version 1 (before PostgreSQL 17), which does not tell the cluster.
    system_id: str
    #: One for each timeline that the backup saw; never empty.
    ranges: tuple[WalRange, ...]

    @property
    def first(self) -> WalRange:
        """The range that the backup began in."""
        return min(self.ranges, key=lambda r: r.start)

    @property
    def last(self) -> WalRange:
        """The range that the backup ended in."""
        return max(self.ranges, key=lambda r: r.end)


def read_manifest(content: bytes | bytearray) -> Manifest:
    """The manifest, if it is whole: it ends in order and matches its own checksum. Raises IntegrityError."""
    front = bytes(content[:512])
    version = _VERSION.search(front)
    end = _END.search(bytes(content[-_TAIL:]))
    if version is None or end is None:
        raise IntegrityError(f"the backup_manifest of {len(content)} bytes is cut, or none")
    last_line = content.rstrip().rfind(b"\n") + 1
    if hashlib.sha256(memoryview(content)[:last_line]).hexdigest() != end[2].decode():
        raise IntegrityError("the backup_manifest does not match its own checksum")
    system = _SYSTEM.search(front)
    if int(version[1]) >= 2 and system is None:
        raise IntegrityError(f"the backup_manifest is of version {int(version[1])} and does not tell its cluster")
    try:
        ranges = tuple(_range(found) for found in strict_json(end[1]))
        if not ranges:
            raise ValueError("there is none")
    except ValueError as error:
        raise IntegrityError(f"the WAL-Ranges of the backup_manifest cannot be read: {error}") from None
    return Manifest(system[1].decode() if system else "", ranges)


def _range(found: Any) -> WalRange:
    """Raises ValueError."""
    entry = check_members(found, _RANGE)
    start, end = Lsn.parse(entry["Start-LSN"]), Lsn.parse(entry["End-LSN"])
    if not 0 < entry["Timeline"] < 1 << 32:
        raise ValueError(f"timeline {entry['Timeline']} does not exist")
    if end < start:
        raise ValueError(f"{start} to {end} ends before it begins")
    return WalRange(entry["Timeline"], start, end)


def check_manifest(content: bytes | bytearray, *, system_id: str, start: Lsn, stop: Lsn, timeline: int) -> None:
    """The manifest is whole, and belongs to this cluster and this backup. Raises IntegrityError.

    ``timeline`` is that of the stop position.
    """
    manifest = read_manifest(content)
    if manifest.system_id not in ("", system_id):
        raise IntegrityError(f"the backup_manifest belongs to {manifest.system_id}, the backup to {system_id}")
    if not any(r.timeline == timeline and r.end == stop for r in manifest.ranges):
        raise IntegrityError(f"the backup_manifest does not end at {stop} of timeline {timeline}, where the backup did")
    if not any(r.start == start for r in manifest.ranges):
        raise IntegrityError(f"the backup_manifest does not begin at {start}, where the backup did")


def last_modified(content: bytes | bytearray) -> datetime | None:
    """When the youngest file of the backup was changed, by the server's clock; None if no file tells."""
    newest = max(
        (match[1] for match in _MODIFIED.finditer(content)), default=None
    )  # written so that text sorts as time
    return datetime.fromisoformat(newest.decode()).replace(tzinfo=UTC) if newest else None


@dataclass(frozen=True, slots=True)
class FileLine:
    """A file as the manifest lists it."""

    #: Below the data directory; files of tablespaces as ``pg_tblspc/OID/…``.
    path: str
    size: int
    #: ``CRC32C`` (its bytes in the server's order: the lowest first, as a rule), ``SHA224`` to ``SHA512``, or others.
    algorithm: str
    #: Hex.
    checksum: str


def files_of(content: bytes | bytearray) -> Iterator[FileLine]:
    """The files that a manifest lists with a checksum. The server writes one a line; a line that is none is left out.

    So a file may be missing from the answer, never wrong in it, provided that the manifest as a whole was checked.
    """
    for found in _FILE.finditer(content):
        try:
            members = json.loads(found[0])
            path = members.get("Path")
            if path is None:
                path = bytes.fromhex(members["Encoded-Path"]).decode("utf-8", "surrogateescape")
            line = FileLine(path, members["Size"], members["Checksum-Algorithm"], members["Checksum"])
        except (ValueError, KeyError, TypeError):
            continue
        if all(isinstance(text, str) for text in (line.path, line.algorithm, line.checksum)):
            yield line


def top_names(content: bytes | bytearray) -> set[str]:
    """First parts of the paths that a manifest lists, as ``files_of`` would give them; folders without files have none.

    Without reading each of a million lines as JSON.
    """
    found: set[str] = set()
    for encoded, name in {(match[1], match[2]) for match in _TOP.finditer(content)}:
        with contextlib.suppress(ValueError):
            path = bytes.fromhex(name.decode()).decode("utf-8", "surrogateescape") if encoded else ""
            found.add(path.partition("/")[0] if encoded else json.loads(b'"' + name + b'"'))
    return found
