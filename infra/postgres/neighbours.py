"""Tablespaces of servers that run here, and that the WAL of a restore would create again, at their very place.

A tablespace that was created behind the backup is in no map: replay of its CREATE TABLESPACE links to the path that it
had (PostgreSQL source, ``tblspc_redo``). Where the server that was backed up runs on the same machine, that is its own
folder, with the same names in it for databases and tables: the restored server would write into its files.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from handlers.running import servers
from handlers.serve_wal import WalServer
from pipeline.contracts import Fetch
from pipeline.errors import RecoveryError
from pipeline.recovery import RestorePlan

#: Of WAL pages, and what stands in front of each; in front of the first of a segment stands more.
_PAGE, _HEADER, _FIRST_HEADER = 8192, 24, 40


async def refuse_shared(plan: RestorePlan, fetch: Fetch) -> None:
    """Raises RecoveryError where replay would write into a tablespace of a server that can be seen from here.

    Reads the WAL of the plan only if such a server has a tablespace that the backup does not know.
    """
    beside = await asyncio.to_thread(_beside, {tablespace.oid for tablespace in plan.backup.tablespaces})
    if not beside:
        return
    wal, size = WalServer(fetch, plan.lineage), plan.lineage.segment_size
    longest = max(map(len, beside))
    before = b""
    for file in plan.path.files():
        if file.start(size) >= plan.goal:
            return
        content = memoryview(await wal.read(file.name) or b"")[: plan.goal - file.start(size)]
        joined = before + await asyncio.to_thread(_without_headers, content)
        for record, (location, pid) in beside.items():
            if record in joined:
                raise RecoveryError(
                    f"the WAL behind {plan.backup.name} creates the tablespace at {location}, which a server uses that"
                    f" runs here (process {pid}): replay would write into its files",
                    hint="a backup that has the tablespace can put it elsewhere: walship backup, and restore from that;"
                    " or restore on another machine",
                )
        before = joined[-longest:]


def _beside(known: set[int]) -> Mapping[bytes, tuple[str, int]]:
    """What the record of its creation holds → folder of the tablespace, and a process of its server."""
    found: dict[bytes, tuple[str, int]] = {}
    for pid, works_in in servers():
        with suppress(OSError), os.scandir(works_in / "pg_tblspc") as entries:
            for entry in entries:
                if not entry.name.isdecimal() or int(entry.name) in known or not entry.is_symlink():
                    continue
                location = os.readlink(entry.path)  # noqa: PTH115  as it is: a Path would be another text
                # struct xl_tblspc_create_rec: the oid, and the path with the zero that ends it.
                record = struct.pack("<I", int(entry.name)) + os.fsencode(location) + b"\0"
                if record not in found and _is_here(location, pid):
                    found[record] = location, pid
    return found


def _is_here(location: str, pid: int) -> bool:
    """Whether that path leads us where it leads the server, which may have other mounts."""
    try:
        return Path(location).samefile(f"/proc/{pid}/root{location}")
    except OSError:
        return Path(location).exists()


def _without_headers(content: memoryview) -> bytes:
    """The records of a segment as they follow one another, also over the ends of pages."""
    pages = (content[at + (_HEADER if at else _FIRST_HEADER) : at + _PAGE] for at in range(0, len(content), _PAGE))
    return b"".join(pages)
