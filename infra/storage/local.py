"""A store in a local folder: one file per object, its key the path.

An object appears whole or not at all, and is on the disk when ``put`` returns. That holds on any file system that keeps
what fsync and rename promise; on one without hard links (FAT, some network shares) "create only if absent" is a look
followed by a rename, and ``probe`` says so. A key and a key below it ("a" and "a/b") cannot both be objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import threading
import time
import uuid
from collections.abc import AsyncIterator, Collection, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from handlers.body import FileBody
from infra.storage.naming import TEMPORARY, check_key
from pipeline.contracts import Abilities, Body, ObjectInfo, Span
from pipeline.errors import ObjectConflict, ObjectMissing, StoreError
from pipeline.objects import MemoryBody

#: Seconds after which an unfinished file is taken for one that a crash has left: no upload takes that long.
_STALE = 24 * 3600.0
#: Objects up to this size are read into memory at once, larger ones while they are used.
_READ_WHOLE = 16 << 20
#: Entries of a listing that are fetched in one hop to a thread.
_BATCH = 1000
#: What link(2) answers on file systems that have no hard links.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


class LocalStore:
    """See ``pipeline.contracts.Store``. The folder must be there: an absent one may be a disk that is not mounted."""

    def __init__(self, root: Path) -> None:
        self._root = Path(root)
        self._lock = threading.Lock()
        #: Folders whose own entry is known to be on the disk, so that it is fsynced once and not for each object.
        self._settled: set[Path] = set()
        #: Device and inode of the root when it was probed; None before.
        self._identity: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return f"file://{self._root}"

    async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
        if keep_until is not None:
            raise StoreError(
                f"{self.name} has no object lock, so {key} cannot be kept until {keep_until.isoformat()}",
                hint="object lock is a property of S3 buckets",
            )
        await asyncio.to_thread(self._put, key, body, replace)

    async def get(self, key: str, span: Span | None = None) -> Body:
        return await asyncio.to_thread(self._get, key, span)

    async def head(self, key: str) -> ObjectInfo:
        return await asyncio.to_thread(self._head, key)

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        infos = self._walk(self._root, "", prefix, after, shallow)
        while batch := await asyncio.to_thread(self._batch, prefix, infos):
            for info in batch:
                yield info

    async def delete(self, keys: Collection[str]) -> None:
        await asyncio.to_thread(self._delete, tuple(keys))

    async def probe(self, key: str, body: Body) -> Abilities:
        self._identity = None
        with contextlib.suppress(ObjectConflict):
            await self.put(key, body)
        self._identity = await asyncio.to_thread(_identity, self._root)
        if await asyncio.to_thread(self._can_link, self._path(key)):
            return Abilities(conditional_put=True, remark="objects are created by a hard link, in one step")
        return Abilities(
            conditional_put=False,
            remark="this file system has no hard links: of two who write one name at the same moment the last one wins",
        )

    async def close(self) -> None:
        """Nothing is held open."""

    # What follows runs in threads.

    def _put(self, key: str, body: Body, replace: bool) -> None:  # noqa: FBT001 - positional for to_thread
        path = self._path(key)
        temporary = path.parent / f".walship-{uuid.uuid4().hex}.tmp"
        with self._explained(key, body.size):
            self._check_identity()
            try:
                # Looked at first only to save the writing; what decides is the link below.
                if not replace and path.exists():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
                file = self._create(temporary)
                try:
                    for chunk in body.chunks():
                        _write(file, chunk)
                    # Before the file gets its name: a name must never lead to bytes that a power cut can still take.
                    os.fsync(file)
                finally:
                    os.close(file)
                if replace:
                    # In one step, so that readers see the old object or the new one.
                    temporary.replace(path)
                else:
                    # A link fails if the name is taken, so of several writers exactly one creates the object.
                    _name_if_absent(temporary, path)
            except FileExistsError:
                if path.is_dir():
                    raise
                self._make_durable(path)
                raise ObjectConflict(f"{self.name} has an object {key} already") from None
            finally:
                # After a rename it is gone already; after a link it is a second name of the same file.
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    temporary.unlink()
            self._fsync_name(path)
            self._check_identity()

    def _check_identity(self) -> None:
        """Nothing may be written to what was put in the root's place: the mount point below a disk, most of all.

        What is stored there counts as safe, and is gone from sight as soon as the disk is mounted again.
        """
        if self._identity is not None and self._identity != _identity(self._root):
            raise StoreError(
                f"the folder {self._root} of {self.name} is not the one that it was: its disk was unmounted, or it was"
                " made anew",
                hint="mount the disk again; only a destination that shall begin anew needs `walship init`",
            )

    def _make_durable(self, path: Path) -> None:
        """For an object that was there already: whoever gave it its name may have failed, or died, before the fsync.

        Who is told of a conflict compares, and may take the object for stored: it has to be.
        """
        self._settle(path.parent)
        _fsync(path)
        self._fsync_name(path)

    def _fsync_name(self, path: Path) -> None:
        """The name itself is an entry of the folder, and durable only with it."""
        try:
            _fsync(path.parent)
        except OSError:
            self._unsettle()  # a disk that fails here may have lost more than it says: the next put begins at the root
            raise

    def _create(self, temporary: Path) -> int:
        """Open the new file, and make its folder if needed. A parallel delete may remove a folder that is empty."""
        for _ in range(10):
            with contextlib.suppress(FileNotFoundError):
                self._settle(temporary.parent)
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                self._give(handle)
                return handle
            self._unsettle()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def _settle(self, folder: Path) -> None:
        """Make the folder and those above it, each entry durable; whoever made it, it is fsynced once by us."""
        if folder == self._root or folder in self._settled:
            return
        self._settle(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            self._give(folder)
        _fsync(folder.parent)
        _remove_stale(folder)
        with self._lock:
            self._settled.add(folder)

    def _give(self, made: int | Path) -> None:
        """As root: to whom the root belongs. Else a command that root has typed leaves what the service cannot read."""
        if os.geteuid() == 0 and (root := self._root.stat()).st_uid != 0:
            with contextlib.suppress(PermissionError):  # a network share that lets root give nothing away
                os.chown(made, root.st_uid, root.st_gid)

    def _unsettle(self) -> None:
        """A folder was removed, or an fsync has failed: look at all of them again."""
        with self._lock:
            self._settled.clear()

    def _get(self, key: str, span: Span | None) -> Body:
        with self._explained(key), self._missing(key):
            file = self._path(key).open("rb", buffering=0)
            size = os.fstat(file.fileno()).st_size
            start, end = (0, size) if span is None else (min(span[0], size), min(span[1], size))
            # The open file keeps its bytes, whatever is put or deleted under its name meanwhile.
            body = FileBody(file, start, max(0, end - start))
            if body.size > _READ_WHOLE:
                return body
            with contextlib.closing(body):
                return MemoryBody(body.chunks())

    def _head(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with self._explained(key), self._missing(key):
            if path.is_dir():
                raise IsADirectoryError
            return _info(key, path.stat())

    def _walk(self, folder: Path, path: str, prefix: str, after: str, shallow: bool) -> Iterator[ObjectInfo]:  # noqa: FBT001
        """Objects below the folder in the order of their keys; ``path`` is the folder's key, with ``/`` at its end."""
        try:
            with os.scandir(folder) as entries:
                found = sorted((path + entry.name + "/" * entry.is_dir(), entry) for entry in entries)
        except FileNotFoundError:
            if folder == self._root:
                raise
            return  # removed while we looked
        for key, entry in found:
            if key.endswith("/"):
                if shallow and key.startswith(prefix) and key != prefix:
                    if key > after:
                        yield ObjectInfo(key, 0)
                elif (key.startswith(prefix) or prefix.startswith(key)) and (key > after or after.startswith(key)):
                    yield from self._walk(folder / entry.name, key, prefix, after, shallow)
            elif key.startswith(prefix) and key > after and not TEMPORARY.fullmatch(entry.name):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue  # deleted while we looked
                yield _info(key, status)

    def _batch(self, prefix: str, infos: Iterator[ObjectInfo]) -> tuple[ObjectInfo, ...]:
        with self._explained(prefix):
            return tuple(islice(infos, _BATCH))

    def _delete(self, keys: tuple[str, ...]) -> None:
        folders: set[Path] = set()
        for key in keys:
            path = self._path(key)
            with self._explained(key):
                try:
                    path.unlink()
                except (NotADirectoryError, IsADirectoryError):
                    continue  # no object of that name
                except FileNotFoundError:
                    if not self._is_there():
                        raise
                    continue
                folders.add(path.parent)
        # Not fsynced: an object that a power cut brings back is deleted again next time. Empty folders go.
        for folder in folders:
            self._prune(folder)

    def _prune(self, folder: Path) -> None:
        with contextlib.suppress(OSError):  # not empty: that is what ends it
            _remove_stale(folder)
            while folder != self._root:
                folder.rmdir()
                self._unsettle()
                folder = folder.parent

    def _can_link(self, path: Path) -> bool:
        temporary = path.parent / f".walship-{uuid.uuid4().hex}.tmp"
        try:
            temporary.hardlink_to(path)
        except OSError:
            return False
        temporary.unlink()
        return True

    def _path(self, key: str) -> Path:
        check_key(self.name, key)
        return self._root / key

    def _is_there(self) -> bool:
        """Whether the store's folder exists. An error of another kind has its own message."""
        try:
            self._root.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True
        return True

    @contextlib.contextmanager
    def _missing(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            if not self._is_there():
                raise  # "missing" means that the store has answered
            raise ObjectMissing(f"{key} is missing from {self.name}") from None

    @contextlib.contextmanager
    def _explained(self, key: str, size: int | None = None) -> Iterator[None]:
        """Turn what the operating system says into a StoreError that says what to do. ``size``: bytes to be written."""
        try:
            yield
        except OSError as error:
            if not self._is_there():
                raise StoreError(
                    f"the folder {self._root} of {self.name} is not there",
                    hint="create it, or mount the disk that it is on; the first time, `walship init` makes it",
                ) from None
            hint, passing = _ADVICE.get(error.errno or 0, ("", False))
            reason = os.strerror(error.errno) if error.errno else type(error).__name__
            what = key if size is None else f"{key} ({size} bytes)"
            if error.errno == errno.ENOSPC:
                reason += f"; {shutil.disk_usage(self._root).free} bytes are free"
            raise StoreError(f"{self.name}: {what}: {reason}", hint=hint, passing=passing) from error


#: What to do about an error of the operating system, and whether it may pass by itself.
_ADVICE = {
    errno.ENOSPC: ("the disk is full: make room, or expire backups; nothing that was stored is lost", True),
    errno.EDQUOT: ("the quota is used up: make room, or expire backups; nothing that was stored is lost", True),
    errno.EFBIG: ("the file system or a limit (ulimit -f) allows no file of that size", False),
    errno.EACCES: ("give the user that runs walship the right to read and write there", False),
    errno.EPERM: ("give the user that runs walship the right to read and write there", False),
    errno.EROFS: ("the file system is mounted read-only; after a disk error the kernel does that by itself", False),
    errno.ENOENT: ("somebody else removes folders there", True),
    errno.ENOTDIR: ("there is a file where a folder is needed; somebody else writes there", False),
    errno.EISDIR: ("there is a folder of that name; somebody else writes there", False),
    errno.EEXIST: ("there is a folder of that name; somebody else writes there", False),
    errno.ENAMETOOLONG: ("this file system allows no name that long", False),
    errno.EIO: ("the disk reports a damage: see the kernel's log, and verify what is stored there", True),
    errno.ESTALE: ("the network share was exchanged: mount it again", True),
    errno.EMFILE: ("too many files are open: raise ulimit -n", True),
}


def _write(file: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:  # write(2) may take only a part
        rest = rest[os.write(file, rest) :]


def _name_if_absent(temporary: Path, path: Path) -> None:
    """Raises FileExistsError if the name is taken."""
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # No hard links here: look, then rename. What that means, ``probe`` says.
        if path.exists():
            raise FileExistsError from None
        temporary.replace(path)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _fsync(path: Path) -> None:
    """A file, or a folder: the names in it."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove_stale(folder: Path) -> None:
    """Remove what a crash has left, by exact name and age: a fresh one may be another process's, not finished yet."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if TEMPORARY.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE:
                        Path(entry.path).unlink()


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))
