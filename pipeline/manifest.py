"""What PostgreSQL's backup_manifest says of the backup it belongs to, checked cheaply: without parsing all its files.

Source: PostgreSQL documentation, "Backup Manifest Format". The manifest ends in a SHA-256 of all lines before the last.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from pipeline.errors import IntegrityError
from pipeline.wal import Lsn

_VERSION = re.compile(rb'"PostgreSQL-Backup-Manifest-Version":\s*(\d+)')
_SYSTEM = re.compile(rb'"System-Identifier":\s*(\d+)')
#: The last two members stand at the end, behind a list of files that may have a million lines.
_END = re.compile(rb'"WAL-Ranges":\s*(\[.*?\]),\s*"Manifest-Checksum":\s*"([0-9a-f]{64})"\}\s*$', re.DOTALL)
_TAIL = 64 * 1024


def check_manifest(content: bytes | bytearray, *, system_id: str, start: Lsn, stop: Lsn, timeline: int) -> None:
    """The manifest is whole, and belongs to this cluster and this backup. Raises IntegrityError.

    ``timeline`` is that of the stop position. Version 1 (before PostgreSQL 17) does not tell the cluster.
    """
    front = bytes(content[:512])
    version = _VERSION.search(front)
    end = _END.search(bytes(content[-_TAIL:]))
    if version is None or end is None:
        raise IntegrityError(f"the backup_manifest of {len(content)} bytes is cut, or none")
    last_line = content.rstrip().rfind(b"\n") + 1
    if hashlib.sha256(memoryview(content)[:last_line]).hexdigest() != end[2].decode():
        raise IntegrityError("the backup_manifest does not match its own checksum")
    system = _SYSTEM.search(front)
    if int(version[1]) >= 2 and (system is None or system[1].decode() != system_id):
        found = system[1].decode() if system else "no cluster"
        raise IntegrityError(f"the backup_manifest belongs to {found}, the backup to {system_id}")
    ranges: list[dict[str, Any]] = json.loads(end[1])
    if not any(entry.get("Timeline") == timeline and _lsn(entry, "End-LSN") == stop for entry in ranges):
        raise IntegrityError(f"the backup_manifest does not end at {stop} of timeline {timeline}, where the backup did")
    if not any(_lsn(entry, "Start-LSN") == start for entry in ranges):
        raise IntegrityError(f"the backup_manifest does not begin at {start}, where the backup did")


def _lsn(entry: dict[str, Any], member: str) -> Lsn | None:
    try:
        return Lsn.parse(str(entry.get(member)))
    except ValueError:
        return None
