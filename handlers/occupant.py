"""What lies in a folder that a restore is about to write over, told to whoever is asked to agree. Blocking."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from handlers.target_walk import read_file

#: ``system_identifier`` is the first member of ``ControlFileData`` (``catalog/pg_control.h``), in the machine's order.
_SYSTEM_ID = 8
#: Bytes of a PG_VERSION, at most.
_VERSION = 16


@dataclass(frozen=True, slots=True)
class Occupant:
    """A folder that is not empty."""

    folder: Path
    files: int
    #: Bytes that its files take on the disk.
    size: int
    #: What PG_VERSION says, and the system identifier in pg_control; empty if that is not there or cannot be read.
    version: str
    system_id: str

    def __str__(self) -> str:
        server = f"a cluster of PostgreSQL {self.version}, " if self.version else ""
        identifier = f"system identifier {self.system_id}, " if self.system_id else ""
        return f"{server}{identifier}{self.files} {'file' if self.files == 1 else 'files'}"


def occupant(folder: Path) -> Occupant:
    """Look at it; changes nothing. What cannot be read is left out."""
    files = size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(path, name)).st_blocks * 512  # noqa: PTH118 - a million files
            except FileNotFoundError:
                continue
            files += 1
    return Occupant(
        folder, files, size, _read(folder / "PG_VERSION", _VERSION).decode("ascii", "replace").strip(), _id(folder)
    )


def _id(folder: Path) -> str:
    content = b"" if (folder / "global").is_symlink() else _read(folder / "global/pg_control", _SYSTEM_ID)
    return str(int.from_bytes(content, sys.byteorder)) if len(content) == _SYSTEM_ID else ""


def _read(path: Path, most: int) -> bytes:
    try:
        return read_file(path, most) or b""
    except OSError:
        return b""
