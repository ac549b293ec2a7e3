"""A backup_manifest as PostgreSQL writes it, for backups whose files we read ourselves.

Source: PostgreSQL documentation, "Backup Manifest Format"; ``src/backend/backup/backup_manifest.c``. Version 2, with
the system identifier, from PostgreSQL 17 on. pg_verifybackup and pg_combinebackup read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime

from pipeline.manifest import WalRange

#: The last second that the form of a time can tell; nobody reads it but people.
_LAST = int(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp())


class ManifestMaker:
    """Add the files in any order, then ``finish``. Holds the manifest: about 150 bytes a file."""

    def __init__(self, system_id: str, major: int) -> None:
        version = '{ "PostgreSQL-Backup-Manifest-Version": 1,\n'
        if major >= 17:
            version = f'{{ "PostgreSQL-Backup-Manifest-Version": 2,\n"System-Identifier": {system_id},\n'
        self._content = bytearray(f'{version}"Files": ['.encode())
        self._first = True

    def add(self, path: bytes, size: int, mtime: int, crc: int) -> None:
        """One file. ``path``: as below the data directory, tablespaces as ``pg_tblspc/OID/…``; ``crc``: its CRC-32C."""
        self._content += b"\n" if self._first else b",\n"
        self._first = False
        try:
            name = f'"Path": {json.dumps(path.decode("utf-8"), ensure_ascii=False)}'
        except UnicodeDecodeError:
            name = f'"Encoded-Path": "{path.hex()}"'
        modified = datetime.fromtimestamp(min(max(mtime, 0), _LAST), UTC).strftime("%Y-%m-%d %H:%M:%S GMT")
        # The bytes of the sum as they lie in memory, on the machines that PostgreSQL is made for: the lowest first.
        self._content += (
            f'{{ {name}, "Size": {size}, "Last-Modified": "{modified}", "Checksum-Algorithm": "CRC32C",'
            f' "Checksum": "{crc.to_bytes(4, "little").hex()}" }}'
        ).encode()

    def finish(self, ranges: Sequence[WalRange]) -> bytearray:
        """The whole manifest; the maker is of no further use."""
        lines = ",\n".join(
            f'{{ "Timeline": {r.timeline}, "Start-LSN": "{r.start}", "End-LSN": "{r.end}" }}' for r in ranges
        )
        self._content += f'\n],\n"WAL-Ranges": [\n{lines}\n],\n'.encode()
        digest = hashlib.sha256(self._content).hexdigest()
        self._content += f'"Manifest-Checksum": "{digest}"}}\n'.encode()
        return self._content
