"""What makes a restored directory one that a server may start on: links, manifest, fsync of all files, pg_control.

Without global/pg_control no PostgreSQL starts, so a directory that is half restored cannot be started by accident: it
is the last file to appear, after all others are durable.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from handlers.target_dir import CONTROL, MAP, Targets, create, finish, give, sync
from handlers.target_walk import walk

#: Fsyncs at once: the file system makes one commit of its journal for all that wait.
_THREADS = 8


def seal(
    targets: Targets,
    manifest: bytes | bytearray,
    complete: Callable[[Path], None],
    control: bytes | bytearray,
    control_mode: int,
) -> None:
    """``complete`` writes what makes the directory recover. ``manifest`` is empty if the backup has none.

    Blocking. Raises OSError, and whatever ``complete`` raises.
    """
    directory = targets.directory
    if manifest:
        create(directory / "backup_manifest", manifest, 0o600, targets.owner)
    _link(targets, mapped=b'"tablespace_map"' in manifest)
    complete(directory)
    # Everything that was there before pg_control, too: what an interrupted restore has left may never have been synced.
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="fsync") as pool:
        for _, folder in targets.roots:
            _sync_all(folder, pool)
    create(directory / CONTROL, control, control_mode & 0o777, targets.owner)
    sync((directory / CONTROL).parent)
    # From here on it is a cluster: only now the marks go that say it is none.
    finish(targets)


def _link(targets: Targets, *, mapped: bool) -> None:
    """pg_tblspc/OID → its folder, and a tablespace_map that agrees: the server makes its links from that.

    ``mapped``: the manifest lists a map, as BASE_BACKUP sends one where there are no tablespaces either.
    """
    lines = []
    for tablespace, path in targets.outside:
        name = targets.names.get(tablespace.oid, str(path))
        link = targets.directory / "pg_tblspc" / str(tablespace.oid)
        link.symlink_to(name)
        give(link, targets.owner)
        escaped = "".join(f"\\{c}" if c in "\\\n\r" else c for c in name)
        lines.append(f"{tablespace.oid} {escaped}\n")
    if lines or mapped:
        create(targets.directory / MAP, os.fsencode("".join(lines)), 0o600, targets.owner)


def _sync_all(root: Path, pool: ThreadPoolExecutor) -> None:
    """Fsync each file and folder once, after all are written: the disk has had time to write most of it by then."""
    for relative, entries in walk(root):
        # exhausted at once: errors are raised, and a million futures are never held
        for _ in pool.map(_sync_file, [entry.path for entry in entries if entry.is_file(follow_symlinks=False)]):
            pass
        sync(root / relative)


def _sync_file(path: str) -> None:
    sync(Path(path))
