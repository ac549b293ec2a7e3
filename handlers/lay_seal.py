"""What makes a restored directory one that a server may start on: links, manifest, fsync of all files, pg_control.

Without global/pg_control no PostgreSQL starts, so a directory that is half restored cannot be started by accident: it
is the last file to appear, after all others are durable.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from handlers.target_dir import CONTROL, MAP, MARKER, Targets, give, sync

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
        _create(directory / "backup_manifest", manifest, 0o600, targets)
    _link(targets, mapped=b'"tablespace_map"' in manifest)
    complete(directory)
    # Everything that was there before pg_control, too: what an interrupted restore has left may never have been synced.
    _sync_all([directory, *(path for _, path in targets.tablespaces if not path.is_relative_to(directory))])
    _create(directory / CONTROL, control, control_mode & 0o777, targets)
    sync(directory / CONTROL)
    sync((directory / CONTROL).parent)
    # From here on it is a cluster: only now the mark goes that says it is none.
    (directory / MARKER).unlink()
    sync((directory / MARKER).parent)


def _link(targets: Targets, *, mapped: bool) -> None:
    """pg_tblspc/OID → its folder, and a tablespace_map that agrees: the server makes its links from that.

    ``mapped``: the manifest lists a map, as BASE_BACKUP sends one where there are no tablespaces either.
    """
    lines = []
    for tablespace, path in targets.tablespaces:
        if path.is_relative_to(targets.directory):
            continue
        link = targets.directory / "pg_tblspc" / str(tablespace.oid)
        link.symlink_to(path)
        give(link, targets.owner)
        escaped = "".join(f"\\{c}" if c in "\\\n\r" else c for c in str(path))
        lines.append(f"{tablespace.oid} {escaped}\n")
    if lines or mapped:
        _create(targets.directory / MAP, os.fsencode("".join(lines)), 0o600, targets)


def _create(path: Path, content: bytes | bytearray, mode: int, targets: Targets) -> None:
    with path.open("xb") as out:
        out.write(content)
    path.chmod(mode)
    give(path, targets.owner)


def _sync_all(folders: list[Path]) -> None:
    """Fsync each file and folder once, after all are written: the disk has had time to write most of it by then."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="fsync") as pool:
        for folder in folders:
            for path, names, files in os.walk(folder):
                # exhausted at once: errors are raised, and a million futures are never held
                for _ in pool.map(_sync_file, [os.path.join(path, name) for name in files]):  # noqa: PTH118
                    pass
                sync(Path(path))
                names.sort()


def _sync_file(path: str) -> None:
    if not os.path.islink(path):  # noqa: PTH114 - a million files
        sync(Path(path))
