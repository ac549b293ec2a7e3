"""The spool as a folder: who ships it, what waits in it, whether it can be worked with.

The folder is the queue: PostgreSQL puts finished files in, a file leaves only when it is acknowledged. One process at a
time ships it, which a lock on ``.walship.lock`` sees to; the kernel frees it however that process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline.contracts import Clock
from pipeline.errors import SourceError
from pipeline.wal import WalFile, WalKind

LOCK = ".walship.lock"
#: Where files go that are not what their names say, and block PostgreSQL under that name.
REFUSED = "refused"
#: ``holder`` takes the lock for a moment to look at it: so many seconds, in such steps, until a lock counts as taken.
_PATIENCE, _STEP = 1.0, 0.05
#: What to do about a spool, or a file in it, that we cannot read.
UNREADABLE = "it must be there, and walship must run as the user that PostgreSQL runs as"


class SpoolTakenError(SourceError):
    """Another process ships this spool; it may end: a backup or a switch that found no service gives it back."""


@dataclass(frozen=True, slots=True)
class SpoolState:
    """One look at the spool."""

    #: Archived files that wait, and their bytes.
    files: int
    bytes: int
    #: Age of the oldest of them in seconds; 0 if none waits.
    oldest_seconds: float
    #: Files that were moved aside.
    refused: int
    #: Bytes that are free on the file system.
    free_bytes: int


def look_at_spool(folder: Path, now: datetime) -> SpoolState:
    """What waits there. Raises SourceError if the folder cannot be read. Blocking."""
    try:
        entries = [entry for entry in os.scandir(folder) if WalFile.parse(entry.name)]
        stats = []
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # shipped between the look at the folder and at the file
                stats.append(entry.stat())
        room = os.statvfs(folder)
        refused = folder / REFUSED
        aside = len(list(refused.iterdir())) if refused.is_dir() else 0
    except OSError as error:
        raise SourceError(f"the spool {folder} cannot be read: {error.strerror}", hint=UNREADABLE) from None
    oldest = min((stat.st_mtime for stat in stats), default=None)
    age = max(0.0, now.astimezone(UTC).timestamp() - oldest) if oldest is not None else 0.0
    return SpoolState(len(stats), sum(s.st_size for s in stats), age, aside, room.f_bavail * room.f_frsize)


def segments_up_to(folder: Path, last: WalFile) -> list[WalFile]:
    """Segments that wait there, up to that one and with it, in order. Raises SourceError. Blocking."""
    try:
        files = [WalFile.parse(path.name) for path in folder.iterdir()]
    except OSError as error:
        raise SourceError(f"the spool {folder} cannot be read: {error.strerror}", hint=UNREADABLE) from None
    return sorted(file for file in files if file is not None and file.kind is WalKind.SEGMENT and file <= last)


def check_spool(folder: Path) -> None:
    """Whether we can read the folder and remove files from it. Raises SourceError. Blocking."""
    if not folder.is_dir():
        raise SourceError(
            f"the spool {folder} is no folder",
            hint="create it, owned by the user that PostgreSQL runs as, and let PostgreSQL archive into it",
        )
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise SourceError(
            f"the spool {folder} cannot be read and emptied by user {os.geteuid()}",
            hint="run walship as the user that PostgreSQL runs as: its archived files are readable by no other",
        )


@contextlib.asynccontextmanager
async def locked(folder: Path, clock: Clock) -> AsyncIterator[None]:
    """Be the one that ships this spool. SpoolTakenError that names the other one if there is one, after a second."""
    check_spool(folder)
    try:
        handle = _open_lock(folder)
    except OSError as error:
        raise SourceError(
            f"{folder / LOCK} cannot be opened: {error.strerror}",
            hint="run walship as the user that PostgreSQL runs as, always; if another user made the file, remove it",
        ) from None
    try:
        deadline = clock.monotonic() + _PATIENCE
        while not _taken(handle):
            if clock.monotonic() >= deadline:
                other = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise SpoolTakenError(
                    f"the spool {folder} is shipped by process {other} already",
                    hint="one service ships one spool: stop the other one, or leave it to its work",
                )
            await clock.sleep(_STEP)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)  # frees the lock


def _open_lock(folder: Path) -> int:
    """As root it is given to the spool's owner: a command that root has typed must not keep the service out."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    if os.geteuid() == 0:
        owner = folder.stat()
        with contextlib.suppress(PermissionError):  # a network share that lets root give nothing away
            os.fchown(handle, owner.st_uid, owner.st_gid)
    return handle


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(folder: Path) -> int | None:
    """Process id of whoever ships the spool; None if nobody does. Takes the lock for a moment: see ``locked``."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else 0
    else:
        return None
    finally:
        os.close(handle)
