"""What lies in the target already: which files are as the backup has them, and everything else removed. Blocking.

A file is kept only if its size and its checksum are those of the backup's own manifest. It is never written to: what
differs is removed and made anew, so that a link somebody made to it, hard or symbolic, leads to the old bytes still.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from crc32c import crc32c

from handlers.target_dir import MARKER, Targets
from handlers.target_walk import walk
from pipeline.manifest import FileLine

#: Files that are read at once.
_THREADS = 4
#: Bytes that are read at a time.
_PIECE = 256 << 10
#: What the restore makes itself, or takes from no backup.
_OURS = frozenset({
    "global/pg_control", "tablespace_map", "backup_manifest", "postmaster.pid", "postmaster.opts", "recovery.signal",
    "standby.signal",
})  # fmt: skip
#: Debian keeps them below /etc, so that the backup has none; whoever started what was restored had to put his there.
_CONFIGURATION = frozenset({"postgresql.conf", "pg_hba.conf", "pg_ident.conf"})
#: Where the marker lies, and what serves WAL to a restored server.
_FOLDER = MARKER.partition("/")[0] + "/"
_SHA = {"SHA224": "sha224", "SHA256": "sha256", "SHA384": "sha384", "SHA512": "sha512"}


@dataclass(slots=True)
class Present:
    """What was found in the target."""

    #: Name in the manifest → size, of files that are as the backup has them.
    kept: dict[str, int] = field(default_factory=dict)
    #: Configuration that is not in the backup, and stays (``Targets.spare``).
    spared: set[str] = field(default_factory=set)
    #: Names of other files, but those that a restore makes itself.
    others: set[str] = field(default_factory=set)


class Comparison:
    """Compares the folders of a restore with the files of a manifest. ``stop`` ends it soon, from another thread."""

    def __init__(self, targets: Targets, wanted: Mapping[str, FileLine], progress: Callable[[int], None]) -> None:
        self._targets = targets
        self._wanted = wanted
        self._progress = progress
        self._local = threading.local()
        self.stop = threading.Event()
        self.found = Present()

    def run(self) -> None:
        """Fills ``found``. ``progress`` is told the bytes of each file that is kept, in one thread. Raises OSError."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="compare") as pool:
            for _, files in _walk(self._targets):
                for (name, entry), size in zip(files, pool.map(self._same, files), strict=True):
                    if self.stop.is_set():
                        return
                    if size is None:
                        if self._is_spared(name, entry):
                            self.found.spared.add(name)
                        elif not _is_ours(name):
                            self.found.others.add(name)
                    else:
                        self.found.kept[name] = size
                        self._progress(size)

    def _is_spared(self, name: str, entry: os.DirEntry[str]) -> bool:
        """Without a manifest nobody knows what the backup has."""
        unknown = bool(self._wanted) and name in _CONFIGURATION and name not in self._wanted
        return self._targets.spare and unknown and entry.is_file(follow_symlinks=False)

    def _same(self, file: tuple[str, os.DirEntry[str]]) -> int | None:
        """Size of the file, if it may stay."""
        name, entry = file
        line = self._wanted.get(name)
        if line is None or name in _OURS or self.stop.is_set() or not entry.is_file(follow_symlinks=False):
            return None
        try:
            handle = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                return None  # not ours to read: it is replaced
            raise
        try:
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1 or about.st_size != line.size:
                return None
            return line.size if self._digest(handle, line.algorithm) == line.checksum.lower() else None
        finally:
            os.close(handle)

    def _digest(self, handle: int, algorithm: str) -> str:
        """Hex, or nothing for an algorithm that is unknown."""
        view: memoryview = getattr(self._local, "view", memoryview(b""))
        if not view:
            view = self._local.view = memoryview(bytearray(_PIECE))
        crc = 0
        sha = hashlib.new(_SHA[algorithm]) if algorithm in _SHA else None
        if sha is None and algorithm != "CRC32C":
            return ""
        while (size := os.readv(handle, [view])) and not self.stop.is_set():
            if sha is None:
                crc = crc32c(view[:size], crc)
            else:
                sha.update(view[:size])
        return sha.hexdigest() if sha else crc.to_bytes(4, "little").hex()


def _is_ours(name: str) -> bool:
    """Whether a restore makes it itself; links to tablespaces too."""
    return name in _OURS or name.startswith(_FOLDER) or re.fullmatch("pg_tblspc/[0-9]+", name) is not None


def remove_others(targets: Targets, kept: Container[str]) -> None:
    """Remove all that is not kept: other files, every link, and folders that are empty then. pg_control is gone before.

    Folders that the backup has come back with its archives. Raises OSError.
    """
    emptied = []
    for path, files in _walk(targets):
        for name, entry in files:
            if name not in kept:
                os.unlink(entry.path)  # noqa: PTH108 - a million files
        emptied.append(path)
    roots = {folder for _, folder in targets.roots}  # these stay: they may be mount points
    for path in reversed(emptied):
        if path not in roots:
            try:
                path.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):  # busy: a mount point
                    raise


def repair(targets: Targets, kept: Mapping[str, int], mode: int) -> None:
    """Give kept files the owner that the others have, and no more permissions than ``mode``, which is pg_control's.

    PostgreSQL makes all files with the same permissions; a few that people add, a TLS key for one, must have less.
    """
    for _, files in _walk(targets):
        for name, entry in files:
            if name in kept:
                path, about = Path(entry.path), entry.stat(follow_symlinks=False)
                if (right := about.st_mode & mode & 0o777 | 0o600) != stat.S_IMODE(about.st_mode):
                    path.chmod(right)
                if targets.owner is not None and targets.owner != (about.st_uid, about.st_gid):
                    os.chown(path, *targets.owner, follow_symlinks=False)


def _walk(targets: Targets) -> Iterator[tuple[Path, list[tuple[str, os.DirEntry[str]]]]]:
    """Each folder, before those in it, and what is in it and is no folder: (name in the manifest, entry).

    The markers are left out, and so is what belongs to a file system.
    """
    for prefix, root in targets.roots:
        for relative, entries in walk(root):
            before = prefix + (relative and relative + "/")
            found = [(before + entry.name, entry) for entry in entries]
            yield root / relative, [(name, entry) for name, entry in found if name != prefix + MARKER]
