"""One restore at a time in a folder: a lock that the kernel takes back when the process ends. Blocking.

The lock is ``flock`` on the folder itself, so nothing is written for it, and what lies there may all be removed. All of
this machine see it, in containers too; on a network file system other machines may not.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.errors import RecoveryError

#: What file systems answer that have no such lock.
_NO_LOCKS = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EBADF})


class Hold:
    """Keeps other restores out of these folders for as long as the block lasts.

    Folders that are not there are made, mode 0700; those that are still empty when the block ends with an error go
    again. Without ``make`` they are passed over. Programs that are started meanwhile do not get the lock. ``lock``: as
    ``fcntl.flock``.

    Raises RecoveryError if another restore holds one of them; then nothing was touched.
    """

    def __init__(
        self, folders: Sequence[Path], *, make: bool = True, lock: Callable[[int, int], None] = fcntl.flock
    ) -> None:
        self._folders = folders
        self._make = make
        self._lock = lock
        self._handles: list[int] = []
        self._made: list[Path] = []
        #: Sentences about what could not be locked.
        self.remarks: list[str] = []

    def __enter__(self) -> Self:
        try:
            for folder in self._folders:
                self._take(folder)
        except BaseException:
            self._let_go(undo=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go(undo=kind is not None)

    def _take(self, folder: Path) -> None:
        try:
            while not self._taken(folder):
                pass  # whoever held it was refused elsewhere, and has just removed it
        except (FileExistsError, NotADirectoryError):
            raise RecoveryError(f"{folder} is not a folder") from None
        except OSError as error:
            raise RecoveryError(
                f"{error.filename or folder} cannot be made or opened: {error.strerror}",
                hint="choose another folder, or make it for the user that runs this: install -d -o USER -m 700 ...",
            ) from None

    def _taken(self, folder: Path) -> bool:
        """Whether it is held, or need not be."""
        if self._make:
            for path in (*reversed(folder.parents), folder):
                if not path.exists():
                    # As any program makes those above it: another user's server has to get through them.
                    path.mkdir(mode=0o700 if path == folder else 0o777, exist_ok=True)
                    self._made.append(path)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return not self._make
        self._handles.append(handle)
        try:
            self._lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(folder, os.fstat(handle)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self.remarks.append(
                f"{folder} cannot be locked ({error.strerror}): let no other restore go there meanwhile"
            )
        with suppress(FileNotFoundError):
            return os.path.samestat(folder.stat(), os.fstat(handle))
        return False

    def _let_go(self, *, undo: bool) -> None:
        for folder in reversed(self._made if undo else []):
            with suppress(OSError):  # it holds something by now
                folder.rmdir()
        while self._handles:
            os.close(self._handles.pop())


def _refusal(folder: Path, about: os.stat_result) -> RecoveryError:
    pid = _holder(about)
    return RecoveryError(
        f"{f'process {pid}' if pid else 'another process'} restores into {folder}",
        hint="wait until it has ended, or end it, or restore into another folder; nothing was touched",
    )


def _holder(about: os.stat_result) -> int:
    """The process that holds the lock on this folder, or 0 if that cannot be told (``man 5 proc``, /proc/locks)."""
    wanted = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    with suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text("ascii").splitlines():
            # 1: FLOCK  ADVISORY  WRITE 3458 fe:00:260072 0 EOF
            fields = line.split()
            if fields[1:2] == ["FLOCK"] and fields[5:6] == [wanted]:
                return max(0, int(fields[4]))
    return 0
