"""The layout of a repository, and what a listing of it means.

Object names are keys below ``<destination>/<system identifier>/``. Nothing is ever inferred from a folder.
"""

from __future__ import annotations

from pipeline.wal import WalFile, WalKind

#: For people and a first look; not a walship object.
REPOSITORY = "repository.json"

#: Plaintext bytes of one part of a base backup.
PART_SIZE = 16 << 20


def wal_key(file: WalFile) -> str:
    """Where an archived file is kept. Segments lie in a folder per timeline and log: listings can be narrow."""
    if file.kind is WalKind.HISTORY:
        return f"wal/{file.name}"
    return f"wal/{file.name[:16]}/{file.name}"


def part_key(backup: str, archive: str, number: int) -> str:
    """A range of a tar stream; ``archive`` is ``base`` or a tablespace's oid, numbers count from 1."""
    return f"base/{backup}/data/{archive}/{number:08d}"


def index_key(backup: str, number: int) -> str:
    """JSON lines that tell which file lies where in which part; numbers count from 1."""
    return f"base/{backup}/index/{number:08d}"


def manifest_key(backup: str) -> str:
    """PostgreSQL's own backup_manifest."""
    return f"base/{backup}/backup_manifest"


def info_key(backup: str) -> str:
    """Written last: without it there is no backup."""
    return f"base/{backup}/backup_info"


def kind_of(name: str) -> str:
    """What an object of that name is kept for: ``wal`` or ``base`` (a tail is WAL)."""
    return "base" if name.startswith("base/") else "wal"
