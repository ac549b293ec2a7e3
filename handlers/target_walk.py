"""Looking at folders that others may have filled: no link is followed, and nothing hangs. Blocking."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

#: What a file system keeps for itself at its top; readable for root only.
LOST_AND_FOUND = "lost+found"
#: There is nothing, or a link in its place.
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


def walk(root: Path) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Each folder below ``root``, before those in it: its path relative to ``root`` (the first one: empty), and what is
    in it but folders. A link is never a folder.

    What file systems keep for themselves is left out, also at the top of one that is mounted inside. Raises OSError.
    """
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        path = os.path.join(root, relative)  # noqa: PTH118 - a million files
        found: list[os.DirEntry[str]] = []
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    found.append(entry)
                elif entry.name != LOST_AND_FOUND or not (relative == "" or os.path.ismount(path)):
                    waiting.append(os.path.join(relative, entry.name))  # noqa: PTH118
        yield relative, found


def read_file(path: Path, most: int) -> bytes | None:
    """At most so many first bytes of a regular file; None if there is none, or something else in its place.

    Only the last part of the path is looked at in that way. Raises OSError for what cannot be read.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise
    with os.fdopen(handle, "rb") as file:
        return file.read(most) if stat.S_ISREG(os.fstat(handle).st_mode) else None
