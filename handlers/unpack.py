"""A tar stream of a base backup → files in a folder. Whoever made the archive, nothing is written outside that folder.

``pipeline.tar`` refuses names that lead out. Here: a file is only ever created, never opened when something is there
already; no link of the archive is made (those of tablespaces are made by the restore itself, after all archives), so no
name can lead through one.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pipeline.contracts import Buffer
from pipeline.errors import IntegrityError
from pipeline.tar import Content, Entry, EntryKind, TarReader

#: Without it PostgreSQL refuses to start: written last of all.
CONTROL = "global/pg_control"
#: PostgreSQL's has 8 KiB.
_MOST_CONTROL = 64 << 10
#: Written by the restore where tablespaces move; a few lines.
MAP = "tablespace_map"
#: Files that are written, and wait to be closed.
_MOST_OPEN = 64
#: What is never taken from an archive: these would make the new server take itself for another one.
_NEVER = frozenset({"postmaster.pid", "postmaster.opts", "recovery.signal", "standby.signal"})


class Unpacker:
    """Writes one archive into ``folder``, which must be there. Blocking; feed it from a thread.

    ``links``: paths at which the archive may hold symbolic links, which are left out. ``owner``: user and group id for
    all that is made, or None. ``skip``: paths that are not written. Raises IntegrityError and OSError.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        links: frozenset[str] = frozenset(),
        skip: frozenset[str] = frozenset(),
        owner: tuple[int, int] | None = None,
    ) -> None:
        self._name = name
        self._folder = folder
        self._links = links
        self._skip = skip | _NEVER
        self._owner = owner
        self._reader = TarReader(name)
        self._handle = -1
        #: They start the writing out of files while the next ones are unpacked: see ``_close_behind``.
        self._closers = ThreadPoolExecutor(2, thread_name_prefix="close")
        self._closing: deque[Future[None]] = deque()
        self._left = 0
        self._sink: bytearray | None = None
        #: The content of pg_control and its mode, once it came by; it is not on disk yet.
        self.control = bytearray()
        self.control_mode = 0o600
        #: Files written.
        self.files = 0

    @property
    def size(self) -> int:
        """Bytes of the archive so far."""
        return self._reader.size

    def feed(self, data: Buffer) -> None:
        """The next bytes of the archive."""
        for item in self._reader.feed(data):
            if isinstance(item, Content):
                self._write(item)
            else:
                self._close()
                self._begin(item)

    def finish(self) -> None:
        """The archive has ended."""
        self._reader.finish()
        self._close()
        self._wait(0)

    def abandon(self) -> None:
        """Close what is open, after an error too. Idempotent."""
        self._closers.shutdown()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _begin(self, entry: Entry) -> None:
        self._sink = None
        path = self._folder / entry.path
        if entry.kind is EntryKind.DIRECTORY:
            if entry.path in self._links:
                return  # a tablespace that the server could not resolve comes as an empty folder
            self._make_folder(path, entry.mode)
        elif entry.kind is EntryKind.SYMLINK:
            if entry.path not in self._links:
                raise IntegrityError(f"the archive {self._name} holds a link {entry.path!r} that is no tablespace's")
        elif entry.path == CONTROL:
            if entry.size > _MOST_CONTROL or self.control:
                raise IntegrityError(f"the archive {self._name} holds a {CONTROL} that is none: {entry.size} bytes")
            self._make_parents(path)
            self.control_mode = entry.mode
            self._sink = self.control
        elif entry.path in self._skip:
            self._sink = bytearray()
        else:
            self._create(path, entry)

    def _create(self, path: Path, entry: Entry) -> None:
        if any(entry.path == link or entry.path.startswith(f"{link}/") for link in self._links):
            raise IntegrityError(f"the archive {self._name} holds {entry.path!r} in the place of a tablespace")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            try:
                self._handle = os.open(path, flags, 0o600)
            except FileNotFoundError:
                self._make_parents(path)
                self._handle = os.open(path, flags, 0o600)
        except (FileExistsError, NotADirectoryError):
            raise IntegrityError(f"the archive {self._name} holds {entry.path!r} twice") from None
        os.fchmod(self._handle, entry.mode & 0o777)
        if self._owner is not None:
            os.fchown(self._handle, *self._owner)
        self.files += 1

    def _write(self, content: Content) -> None:
        if self._sink is not None:
            if self._sink is self.control:
                self._sink += content.data
            return
        data = content.data
        while data:
            data = data[os.write(self._handle, data) :]

    def _close(self) -> None:
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            self._closing.append(self._closers.submit(_close_behind, handle))
        self._wait(_MOST_OPEN)

    def _wait(self, left: int) -> None:
        """Until so many files at most are still to be closed. Raises what closing one of them raised."""
        while len(self._closing) > left:
            self._closing.popleft().result()

    def _make_folder(self, path: Path, mode: int) -> None:
        try:
            path.mkdir(mode=0o700)
        except FileNotFoundError:
            self._make_parents(path)
            path.mkdir(mode=0o700)
        except FileExistsError:
            if path.is_symlink() or not path.is_dir():
                raise IntegrityError(f"the archive {self._name} holds a folder {path.name!r} where a file is") from None
        path.chmod(mode & 0o777)
        if self._owner is not None:
            os.chown(path, *self._owner)

    def _make_parents(self, path: Path) -> None:
        """PostgreSQL sends folders before what is in them; other tars may not."""
        missing = [p for p in path.parents if p.is_relative_to(self._folder) and not p.exists()]
        for folder in reversed(missing):
            self._make_folder(folder, 0o700)


def _close_behind(handle: int) -> None:
    """Close a file, and have the kernel begin to write it out.

    Left alone, that begins seconds later, and all of a cluster waits for the fsyncs at the end. An fsync here would be
    a commit of the file system's journal for each file; those at the end share one. The call takes a while itself, so
    it is made beside the unpacking.
    """
    try:
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # advice: a file system may not take it
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
