"""Whether a file in the spool is what its name says: the one place that looks before anything is shipped.

``archive_command = 'cp %p …'`` writes in place, so a file that is short or not valid yet is at first merely unfinished.
Whether anyone still writes it is asked from the kernel (a read lease is granted only while no process has the file
open for writing), because a file that is moved away under a writer would be lost: the writer goes on, exits 0, and
PostgreSQL believes that its segment is archived.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeAlias

from infra.mounts import is_ours_alone
from infra.sources.spool import UNREADABLE
from pipeline.errors import IntegrityError, SourceError
from pipeline.wal import WalFile, WalKind, parse_history
from pipeline.walpages import check_segment, check_segment_by

#: Device, inode, size and time of the last change in ns: when these are the same, the content is.
Identity: TypeAlias = tuple[int, int, int, int]

#: The identity of what is not there.
NOTHING: Identity = (0, 0, 0, 0)

#: History files and backup labels are a few lines.
_MOST_TEXT = 1 << 20


class Verdict(Enum):
    """What a look at a file has found."""

    #: Everything agrees.
    GOOD = "good"
    #: Shorter than it must be: being written, or cut.
    SHORT = "short"
    #: Long enough, but not what its name says.
    WRONG = "wrong"
    #: It is not there any more.
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Look:
    """One look at one file."""

    verdict: Verdict
    identity: Identity = NOTHING
    fact: str = ""
    hint: str = ""
    #: Whether some process has it open for writing; None if that cannot be told (another host may, on NFS).
    writer: bool | None = None

    @property
    def size(self) -> int:
        return self.identity[2]

    @property
    def changed(self) -> float:
        """When it was last written, in seconds since 1970 by the clock of the file system."""
        return self.identity[3] / 1e9


class Judge:
    """Looks at archived files of one cluster. All methods block."""

    def __init__(self, folder: Path, *, system_id: int, segment_size: int) -> None:
        self._folder = folder
        self._system_id = system_id
        self._segment_size = segment_size
        #: A file system in user space grants leases, and knows nothing of writers on other hosts.
        self._leases = is_ours_alone(folder) and hasattr(fcntl, "F_SETLEASE")

    def look(self, file: WalFile) -> Look:
        """Judge by a few pages, without reading all of it."""
        path = self._folder / file.name
        try:
            # O_NONBLOCK: a FIFO of that name must not hold us up.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return Look(Verdict.GONE)
        except OSError as error:
            return self._closed_to_us(path, error)
        try:
            info = os.fstat(handle)
            if not stat.S_ISREG(info.st_mode):
                return Look(Verdict.WRONG, identity_of(info), f"{path} is not a regular file", writer=False)
            try:
                self._check(file, handle, info.st_size)
            except IntegrityError as error:
                writer = self._writer(handle)
                short = self._is_short(file, handle, info.st_size)
                return Look(
                    Verdict.SHORT if short else Verdict.WRONG, identity_of(info), error.fact, error.hint, writer=writer
                )
            return Look(Verdict.GOOD, identity_of(info), writer=self._writer(handle))
        finally:
            os.close(handle)

    def read(self, file: WalFile) -> tuple[bytes, Identity]:
        """All bytes, checked again as they were read. SourceError if they are not (any more) what the name says."""
        path = self._folder / file.name
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise SourceError(
                f"{path} has vanished before it was shipped",
                hint="somebody has removed it from the spool; put it back, or restart walship to go on without it",
            ) from None
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}", hint=UNREADABLE) from None
        try:
            before = os.fstat(handle)
            content = _read_all(handle, before.st_size)
            after = os.fstat(handle)
            # Page cache counts as memory of a container, and nobody reads this file again.
            if hasattr(os, "posix_fadvise"):
                with contextlib.suppress(OSError):
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
        try:
            if identity_of(before) != identity_of(after):
                raise IntegrityError(f"{path} was written to while it was read")
            if file.kind in (WalKind.SEGMENT, WalKind.PARTIAL):
                check_segment(file, content, system_id=self._system_id, segment_size=self._segment_size)
            else:
                _check_text(file, content)
        except IntegrityError as error:
            raise SourceError(
                error.fact, hint="PostgreSQL may be archiving it again; it is looked at again soon"
            ) from None
        return content, identity_of(after)

    def _check(self, file: WalFile, handle: int, size: int) -> None:
        if file.kind in (WalKind.SEGMENT, WalKind.PARTIAL):
            check_segment_by(
                file,
                size,
                lambda at, length: os.pread(handle, length, at),
                system_id=self._system_id,
                segment_size=self._segment_size,
            )
        elif size > _MOST_TEXT:
            raise IntegrityError(f"{file} is {size} bytes; PostgreSQL writes a few lines into such a file")
        else:
            _check_text(file, os.pread(handle, _MOST_TEXT, 0))

    def _is_short(self, file: WalFile, handle: int, size: int) -> bool:
        if file.kind in (WalKind.SEGMENT, WalKind.PARTIAL):
            return size < self._segment_size
        return size == 0 or os.pread(handle, 1, size - 1) != b"\n"

    def _writer(self, handle: int) -> bool | None:
        """See ``Look.writer``."""
        return _has_writer(handle) if self._leases else None

    def _closed_to_us(self, path: Path, error: OSError) -> Look:
        hint = ""
        if isinstance(error, PermissionError):
            hint = "PostgreSQL makes its files readable by its own user only: run walship as that user"
        try:
            identity = identity_of(os.lstat(path))
        except FileNotFoundError:
            return Look(Verdict.GONE)
        return Look(Verdict.WRONG, identity, f"{path} cannot be read: {error.strerror}", hint, writer=False)


def identity_of(info: os.stat_result) -> Identity:
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


def _check_text(file: WalFile, content: bytes) -> None:
    """A history file or a backup label, whole to its last line."""
    if not content.endswith(b"\n"):
        raise IntegrityError(f"{file} is {len(content)} bytes and does not end in a whole line")
    if file.kind is WalKind.HISTORY:
        forks = parse_history(file.name, content)
        if not forks or forks[-1].timeline >= file.timeline:
            raise IntegrityError(f"{file} does not tell where its timeline {file.timeline} came from")
    elif not content.startswith(b"START WAL LOCATION: ") or b"\nSTOP WAL LOCATION: " not in content:
        raise IntegrityError(f"{file} is not the label of a finished base backup")


def _read_all(handle: int, size: int) -> bytes:
    """``size`` bytes in one go; a single read() stops at 2 GiB, and segments are 1 GiB at most."""
    content = os.pread(handle, size, 0)
    while len(content) < size:
        more = os.pread(handle, size - len(content), len(content))
        if not more:
            break
        content += more
    return content


def _has_writer(handle: int) -> bool | None:
    """Whether a process of this host has the file open for writing; None if the file system cannot tell."""
    try:
        # Somebody who opens the file for writing in this very moment makes the kernel signal us: not by SIGIO, which
        # would end the process, but by one that is ignored by default. The open waits until the lease is given back.
        fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:
        return None
    fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
