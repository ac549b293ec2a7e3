"""A tar stream of a base backup → files in a folder. Whoever made the archive, nothing is written outside that folder.

``pipeline.tar`` refuses names that lead out. Here: a file is only ever created, never opened when something is there
already; no link of the archive is made (those of tablespaces are made by the restore itself, after all archives), so no
name can lead through one.

Parts of one archive may be unpacked side by side: what they hold of a file is written at its place. A file that reaches
over several parts is created by the part that comes first, and closed by the one that completes it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from handlers.target_dir import CONTROL
from pipeline.contracts import Buffer
from pipeline.errors import IntegrityError
from pipeline.tar import Content, Entry, EntryKind, TarReader

#: PostgreSQL's has 8 KiB.
_MOST_CONTROL = 64 << 10
#: Bytes of a file in one part from which on the kernel is asked to begin to write them out.
_WORTH_WRITING = 1 << 20
#: What is never taken from an archive: these would make the new server take itself for another one.
NEVER = frozenset({"postmaster.pid", "postmaster.opts", "recovery.signal", "standby.signal"})


@dataclass(slots=True, eq=False)
class _File:
    """A file of which bytes are still to come."""

    name: str
    #: Descriptor; -1 for one that is not written.
    handle: int
    #: Bytes of the whole file, and those that have not come yet.
    size: int
    left: int
    #: Whether its header has come by: a part further back may be earlier.
    begun: bool = False
    #: Bytes of it, for pg_control.
    content: bytearray | None = None


@dataclass(slots=True)
class _Run:
    """Bytes of one file that one part holds, one behind the other."""

    file: _File
    start: int = 0
    done: int = 0


@dataclass(slots=True)
class Unpacker:
    """Writes one archive into ``folder``, which must be there. Blocking; several threads may ``unpack`` at once.

    Raises IntegrityError and OSError.
    """

    #: Of the archive, for messages.
    name: str
    folder: Path
    #: Paths at which the archive may hold symbolic links, which are left out.
    links: frozenset[str] = frozenset()
    #: Paths that are not written.
    skip: frozenset[str] = frozenset()
    #: Paths, with ``prefix`` before them, that are there already and are left alone.
    kept: Collection[str] = frozenset()
    prefix: str = ""
    #: User and group id for all that is made, or None.
    owner: tuple[int, int] | None = None
    #: The content of pg_control and its mode, once it came by; it is not on disk yet.
    control: bytearray = field(default_factory=bytearray)
    control_mode: int = 0o600
    #: Files written.
    files: int = 0
    _open: dict[str, _File] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def unpack(self, reader: TarReader, pieces: Iterable[Buffer]) -> None:
        """The next bytes of the archive from where ``reader`` stands."""
        run: _Run | None = None
        if (inside := reader.inside) is not None:
            run = self._resume(inside.path, inside.size)
        for piece in pieces:
            for item in reader.feed(piece):
                if isinstance(item, Content):
                    assert run is not None
                    self._write(run, item)
                else:
                    self._end(run)
                    run = self._begin(item)
        self._end(run)

    def finish(self) -> None:
        """All parts that hold anything of the archive were unpacked."""
        if self._open:
            name, file = next(iter(self._open.items()))
            raise IntegrityError(f"the archive {self.name} lacks {file.left} bytes of {name!r}")

    def abandon(self) -> None:
        """Close what is open, after an error too. No thread may be unpacking any more. Idempotent."""
        while self._open:
            _, file = self._open.popitem()
            if file.handle >= 0:
                os.close(file.handle)

    def _resume(self, path: str, size: int) -> _Run:
        """A file goes on whose header was in a part before."""
        with self._lock:
            return _Run(self._open.get(path) or self._create(path, size))

    def _begin(self, entry: Entry) -> _Run | None:
        path = self.folder / entry.path
        if entry.kind is EntryKind.DIRECTORY:
            if entry.path not in self.links:  # a tablespace that the server could not resolve comes as an empty folder
                self._make_folder(path, entry.mode)
            return None
        if entry.kind is EntryKind.SYMLINK:
            if entry.path not in self.links:
                raise IntegrityError(f"the archive {self.name} holds a link {entry.path!r} that is no tablespace's")
            return None
        with self._lock:
            file = self._open.get(entry.path)
            if file is None:
                file = self._create(entry.path, entry.size)
            elif file.begun or file.size != entry.size:
                raise self._twice(entry.path)
            file.begun = True
        if file.content is not None:
            self.control_mode = entry.mode
        elif file.handle >= 0:
            os.fchmod(file.handle, entry.mode & 0o777)
        run = _Run(file)
        if not entry.size:
            self._end(run)
        return run

    def _create(self, name: str, size: int) -> _File:
        """Called with the lock held."""
        path = self.folder / name
        if any(name == link or name.startswith(f"{link}/") for link in self.links):
            raise IntegrityError(f"the archive {self.name} holds {name!r} in the place of a tablespace")
        if name == CONTROL:
            if size > _MOST_CONTROL or self.control:
                raise IntegrityError(f"the archive {self.name} holds a {CONTROL} that is none: {size} bytes")
            self._make_parents(path)
            self.control = bytearray(size)
            file = _File(name, -1, size, size, content=self.control)
        elif name in self.skip or name in NEVER or self.prefix + name in self.kept:
            return _File(name, -1, size, size)  # nobody waits for the rest of it, which may be in parts left out
        else:
            file = _File(name, self._open_new(name, path), size, size)
            self.files += 1
        self._open[name] = file
        return file

    def _open_new(self, name: str, path: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            try:
                handle = os.open(path, flags, 0o600)
            except FileNotFoundError:
                self._make_parents(path)
                handle = os.open(path, flags, 0o600)
        except (FileExistsError, NotADirectoryError):
            raise self._twice(name) from None
        if self.owner is not None:
            os.fchown(handle, *self.owner)
        return handle

    def _write(self, run: _Run, content: Content) -> None:
        file, at, data = run.file, content.offset, content.data
        if not run.done:
            run.start = at
        run.done += len(data)
        if file.content is not None:
            file.content[at : at + len(data)] = data
        elif file.handle >= 0:
            try:
                while data:
                    written = os.pwrite(file.handle, data, at)
                    data, at = data[written:], at + written
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.folder / file.name)) from None

    def _end(self, run: _Run | None) -> None:
        """A part has no more of a file."""
        if run is None:
            return
        file = run.file
        if file.handle >= 0 and run.done >= _WORTH_WRITING and hasattr(os, "posix_fadvise"):
            # The kernel begins to write it out. Left alone, that begins seconds later, and all of a cluster waits for
            # the fsyncs at the end. An fsync here would be a commit of the file system's journal for each file.
            with contextlib.suppress(OSError):  # advice: a file system may not take it
                os.posix_fadvise(file.handle, run.start, run.done, os.POSIX_FADV_DONTNEED)
        with self._lock:
            file.left -= run.done
            run.done = 0
            if file.left > 0 or not file.begun or self._open.get(file.name) is not file:
                return
            del self._open[file.name]
        if file.handle >= 0:
            os.close(file.handle)

    def _twice(self, name: str) -> IntegrityError:
        return IntegrityError(f"the archive {self.name} holds {name!r} twice")

    def _make_folder(self, path: Path, mode: int) -> None:
        try:
            path.mkdir(mode=0o700)
        except FileNotFoundError:
            self._make_parents(path)
            path.mkdir(mode=0o700, exist_ok=True)
        except FileExistsError:
            if path.is_symlink() or not path.is_dir():
                raise IntegrityError(f"the archive {self.name} holds a folder {path.name!r} where a file is") from None
        path.chmod(mode & 0o777)
        if self.owner is not None:
            os.chown(path, *self.owner)

    def _make_parents(self, path: Path) -> None:
        """PostgreSQL sends folders before what is in them; other tars may not, and parts are unpacked side by side."""
        missing = [p for p in path.parents if p.is_relative_to(self.folder) and not p.exists()]
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another part was faster, and may know the mode
                folder.mkdir(mode=0o700)
                if self.owner is not None:
                    os.chown(folder, *self.owner)
