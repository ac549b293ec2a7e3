"""What to say when a restore cannot write: on a full disk, how much is missing, and where."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from handlers.target_dir import mount_of
from pipeline.errors import RecoveryError

#: What a full disk and a used-up quota answer.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def cannot_write(error: OSError, directory: Path, unwritten: Sequence[tuple[Path, int]]) -> RecoveryError:
    """The error to raise for what the operating system said.

    ``unwritten``: folders, and the bytes that are still to be written there.
    """
    where = Path(os.fsdecode(error.filename)) if error.filename else directory
    fact = f"{where} cannot be written: {error.strerror}"
    again = "then run the same restore again as it is: it goes on with what is there"
    if error.errno == errno.EFBIG:
        return RecoveryError(
            fact, hint=f"a limit (ulimit -f) or the file system allows no file of that size: raise it, {again}"
        )
    if error.errno not in _FULL:
        return RecoveryError(fact, hint=f"mend that, {again}")
    mount, free = mount_of(where), _free(where)
    left = sum(size for folder, size in unwritten if mount_of(folder) == mount)
    missing = max(0, left - free)
    if missing:
        fact += f"; the file system at {mount} has {free} bytes free, and {left} bytes are still to be written"
        return RecoveryError(fact, hint=f"make room for at least {missing} bytes more there, {again}")
    fact += f"; {left} bytes are still to be written, and the file system at {mount} says that {free} bytes are free"
    return RecoveryError(fact, hint=f"a quota may be used up, or somebody else needs the room: mend that, {again}")


def _free(path: Path) -> int:
    stat = os.statvfs(next(p for p in (path, *path.parents) if p.exists()))
    return stat.f_bavail * stat.f_frsize
