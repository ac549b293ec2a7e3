"""An incremental backup laid over the one before it, in place. Blocking.

PostgreSQL sends of a relation file that changed a little only the blocks that did, as ``INCREMENTAL.<name>``: a header
with their numbers, and the blocks. Here they are written into the file that the earlier backup left, so nothing is
copied twice, no room for a second cluster is needed, and no program of PostgreSQL's. (pg_combinebackup does the same
from folders to a new folder; the tests compare.) All other files of the backup take the place of what was there, and
what it does not have is removed: an incremental backup names every file there is.

Source of the form: PostgreSQL's ``src/include/backup/basebackup_incremental.h`` and
``src/bin/pg_combinebackup/reconstruct.c``.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from handlers.target_dir import give
from pipeline.errors import IntegrityError

PREFIX = "INCREMENTAL."
_MAGIC = 0xD3AE1F0D
_BLOCK = 8192
#: Blocks that are copied at a time, if their numbers follow one another.
_TOGETHER = 128


def plain_path(path: str) -> str:
    """Path of the file that an incremental one is laid over; of all others, the same again.

    ``path``: below the data directory, with tablespaces as ``pg_tblspc/OID/…``. Relations lie in these folders alone:
    anywhere else a file of that name is somebody's own (and so for pg_combinebackup).
    """
    folder, _, name = path.rpartition("/")
    if name.startswith(PREFIX) and (folder == "global" or folder.startswith(("base/", "pg_tblspc/"))):
        return f"{folder}/{name.removeprefix(PREFIX)}"
    return path


def apply(
    stage: Path, target: Path, owner: tuple[int, int] | None, *, spare: frozenset[str],
    leave: frozenset[str] = frozenset(), prefix: str = "",
) -> set[str]:  # fmt: skip
    """Move everything from ``stage`` to ``target``, on the same file system, and remove what ``stage`` has not.

    ``spare``: folders in ``target`` itself that are not looked at; ``leave``: files there that stay, unless ``stage``
    has them. ``prefix``: of a tablespace, ``pg_tblspc/OID/``. Returns the paths, below ``target``, of the files that
    were put together. Raises IntegrityError and OSError; then ``target`` is neither of the two backups.
    """
    patched: set[str] = set()
    wanted: set[str] = set()
    folders: set[str] = {"."}
    for path, _, files in os.walk(stage):
        here = Path(path).relative_to(stage)
        folders.add(str(here))
        place = target / here
        if not place.is_dir():
            place.unlink(missing_ok=True)
            place.mkdir(mode=0o700)
            give(place, owner)
        place.chmod(Path(path).stat().st_mode & 0o777)
        for name in files:
            plain = plain_path(prefix + (here / name).as_posix()).rpartition("/")[2]
            wanted.add(str(here / plain))
            if plain != name:
                patch(Path(path, name), place / plain)
                patched.add(str(here / plain))
            else:
                Path(path, name).replace(place / name)
    if _made_startable(target / "backup_label"):
        patched.add("backup_label")
    _remove_others(target, wanted | leave, folders, spare)
    shutil.rmtree(stage)
    return patched


def _made_startable(label: Path) -> bool:
    """A server refuses a label that says what an incremental backup was taken from: it is whole now."""
    lines = label.read_bytes().splitlines(keepends=True) if label.exists() else []
    kept = [line for line in lines if not line.startswith(b"INCREMENTAL FROM ")]
    if kept != lines:
        label.write_bytes(b"".join(kept))
    return kept != lines


def patch(increment: Path, file: Path) -> None:
    """Bring ``file`` to the state that ``increment`` was made of. Raises IntegrityError."""
    with increment.open("rb") as source:
        size = os.fstat(source.fileno()).st_size
        magic, count, shortest = _read(source.read(12), "<III", increment)
        front = size - count * _BLOCK
        least = 12 + 4 * count
        if magic != _MAGIC or front not in (least, least + -least % _BLOCK):
            raise IntegrityError(f"{increment.name} of {size} bytes is no incremental file of PostgreSQL's")
        numbers = _read(source.read(4 * count), f"<{count}I", increment)
        try:
            handle = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise IntegrityError(
                f"{file.name} has changed blocks in an incremental backup, and the backup before has no such file"
            ) from None
        try:
            length = max(shortest, max(numbers, default=-1) + 1) * _BLOCK
            # What lies behind the shortest length it had meanwhile is either among the blocks, or zeros.
            if os.fstat(handle).st_size > shortest * _BLOCK:
                os.ftruncate(handle, shortest * _BLOCK)
            os.ftruncate(handle, length)
            source.seek(front)
            for first, many in _runs(numbers):
                data = source.read(many * _BLOCK)
                if len(data) < many * _BLOCK:
                    raise IntegrityError(f"{increment.name} is cut")
                view, at = memoryview(data), first * _BLOCK
                while view:
                    written = os.pwrite(handle, view, at)
                    view, at = view[written:], at + written
        finally:
            os.close(handle)


def _read(data: bytes, form: str, increment: Path) -> tuple[int, ...]:
    if len(data) != struct.calcsize(form):
        raise IntegrityError(f"{increment.name} is cut")
    return struct.unpack(form, data)


def _runs(numbers: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First number and count of those that follow one another, in the order in which their blocks lie in the file."""
    first, many = -1, 0
    for number in numbers:
        if many and number == first + many and many < _TOGETHER:
            many += 1
            continue
        if many:
            yield first, many
        first, many = number, 1
    if many:
        yield first, many


def _remove_others(target: Path, wanted: set[str], folders: set[str], spare: frozenset[str]) -> None:
    for path, names, files in os.walk(target, topdown=False):
        here = Path(path).relative_to(target)
        if here.parts[:1] and here.parts[0] in spare:
            continue
        for name in files:
            if str(here / name) not in wanted:
                Path(path, name).unlink()
        for name in names:
            folder = Path(path, name)
            if (here == Path() and name in spare) or str(here / name) in folders:
                continue
            if folder.is_symlink():
                folder.unlink()
            else:
                folder.rmdir()
