"""Small base backups with index and manifest, for tests of what lays them down. No server is needed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

from crc32c import crc32c

from pipeline.backup import ArchiveInfo, BackupInfo, Tablespace
from pipeline.catalog import index_key, manifest_key, part_key
from pipeline.index import slices
from pipeline.layout import prefix_of
from pipeline.tar import Entry, TarReader
from pipeline.wal import Lsn
from tests.parts import Shelf

MOMENT = datetime(2026, 1, 14, 12, tzinfo=UTC)
SYSTEM_ID = "7"
#: A whole number of blocks, as the real one is.
PART = 64 << 10
CONTROL = int(SYSTEM_ID).to_bytes(8, "little") + b"control" * 100
#: Of a tablespace.
VERSION = "PG_17_202406281"


def cluster() -> dict[str, bytes]:
    """The files of a small data directory; a name that ends in ``/`` is a folder. Another one at each call."""
    return {
        "PG_VERSION": b"17\n",
        "backup_label": b"START WAL LOCATION",
        "base/": b"",
        "base/1/": b"",
        "base/1/100": os.urandom(40_000),
        "base/1/101": os.urandom(5 * PART + 123),
        "base/1/102": b"",
        "base/1/103": os.urandom(3 * PART),
        "base/1/104": os.urandom(512),
        "base/5/": b"",
        "base/5/100": os.urandom(2 * PART + 1),
        "base/5/name\udcff": b"odd",
        "global/": b"",
        "pg_tblspc/": b"",
        "pg_wal/": b"",
        "pg_wal/archive_status/": b"",
        "postgresql.conf": b"# nothing\n",
        "global/pg_control": CONTROL,
    }


def tar(files: Mapping[str, bytes], *, mode: int = 0o600) -> bytes:
    """As PostgreSQL makes it."""
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.mode, info.size = (0o700 if name.endswith("/") else mode), len(content)
            archive.addfile(info, io.BytesIO(content))
        end = archive.offset
    return out.getvalue()[: end + 1024]


def manifest(archives: Mapping[str, Mapping[str, bytes]], algorithm: str = "CRC32C") -> bytes:
    """PostgreSQL's backup_manifest of these archives, in its own layout."""
    lines = []
    for archive, files in archives.items():
        for name, content in files.items():
            if name.endswith("/") or name.startswith("pg_wal/"):
                continue
            path = prefix_of(archive) + name
            first = f'"Path": {json.dumps(path)}'
            if any("\udc80" <= c <= "\udcff" for c in path):
                first = f'"Encoded-Path": "{path.encode("utf-8", "surrogateescape").hex()}"'
            digest = (
                ""
                if algorithm == "NONE"
                else (
                    crc32c(content).to_bytes(4, "little").hex()
                    if algorithm == "CRC32C"
                    else hashlib.new(algorithm.lower(), content).hexdigest()
                )
            )
            check = "" if algorithm == "NONE" else f', "Checksum-Algorithm": "{algorithm}", "Checksum": "{digest}"'
            lines.append(f'{{ {first}, "Size": {len(content)}, "Last-Modified": "2026-01-14 12:00:00 GMT"{check} }}')
    text = '{ "PostgreSQL-Backup-Manifest-Version": 1,\n"Files": [\n' + ",\n".join(lines)
    text += '\n],\n"WAL-Ranges": [\n{ "Timeline": 1, "Start-LSN": "0/28", "End-LSN": "0/50" }\n],\n'
    body = text.encode()
    return body + f'"Manifest-Checksum": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


async def store(
    shelf: Shelf,
    archives: Mapping[str, Mapping[str, bytes]],
    *,
    name: str = "b",
    spaces: tuple[Tablespace, ...] = (),
    algorithm: str | None = "CRC32C",
    mode: int = 0o600,
) -> BackupInfo:
    """Put a backup of these archives on the shelf. Without ``algorithm`` it has no manifest."""
    infos, lines, ident = [], b"", "b" * 32
    for archive, files in archives.items():
        data = tar(files, mode=mode)
        digests = []
        for number, start in enumerate(range(0, len(data), PART), 1):
            shipped = await shelf(part_key(name, archive, number), data[start : start + PART], backup=ident)
            digests.append(shipped.digest)
        for item in TarReader(archive).feed(data):
            if isinstance(item, Entry):
                lines += b"".join(line.encode() for line in slices(archive, item, PART))
        infos.append(ArchiveInfo(archive, len(data), tuple(digests)))
    index = (await shelf(index_key(name, 1), lines, backup=ident)).digest
    listed = ""
    if algorithm is not None:
        listed = (await shelf(manifest_key(name), manifest(archives, algorithm), backup=ident)).digest
    return BackupInfo(
        name, ident, "full", SYSTEM_ID, 170000, 1 << 20, 1, Lsn(40), Lsn(80), MOMENT, MOMENT, spaces, tuple(infos),
        (index,), listed, 0,
    )  # fmt: skip


def without_index(info: BackupInfo) -> BackupInfo:
    return replace(info, index=())
