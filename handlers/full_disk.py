"""Room: whether there is enough before a restore begins, and what to say when it cannot write. Blocking."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from handlers.target_walk import walk
from pipeline.errors import RecoveryError

#: What a full disk and a used-up quota answer.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def check_room(needs: Iterable[tuple[Path, int]], full: Sequence[Path]) -> None:
    """``needs``: folders, which need not be there yet, and the bytes that go there. What is in ``full`` is removed.

    Raises RecoveryError.
    """
    need: dict[int, int] = {}
    where: dict[int, Path] = {}
    for path, size in needs:
        existing = next(p for p in (path, *path.parents) if p.exists())
        device = existing.stat().st_dev
        need[device] = need.get(device, 0) + size
        where.setdefault(device, existing)
    for device, size in need.items():
        free = _free(where[device])
        if size > free:
            free += sum(_used(folder) for folder in full if folder.stat().st_dev == device)
        if size > free:
            raise RecoveryError(
                f"{where[device]} has {free / 1e6:.0f} MB of room, and the restore needs about {size / 1e6:.0f} MB",
                hint=f"make room for {(size - free) / 1e6:.0f} MB more on the file system at {mount_of(where[device])},"
                " or restore to a larger disk",
            )


def mount_of(path: Path) -> Path:
    """The mount point of a path, which need not be there."""
    place = next(p for p in (path, *path.parents) if p.exists()).resolve()
    return next(p for p in (place, *place.parents) if p.is_mount())


def _used(folder: Path) -> int:
    return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for _, files in walk(folder) for entry in files)


def cannot_write(error: OSError, directory: Path, unwritten: Sequence[tuple[Path, int]]) -> RecoveryError:
    """The error to raise for what the operating system said.

    ``unwritten``: folders, and the bytes that are still to be written there.
    """
    where = Path(os.fsdecode(error.filename)) if error.filename else directory
    fact = f"{where} cannot be written: {error.strerror}"
    again = "then run the same restore again as it is: it goes on with what is there"
    if error.errno == errno.EBUSY:
        return RecoveryError(fact, hint=f"a file or folder is mounted there: unmount it, {again}")
    if error.errno == errno.EPERM:
        return RecoveryError(
            fact, hint=f"it may be made immutable (lsattr shows an i, chattr -i takes that away): mend that, {again}"
        )
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
