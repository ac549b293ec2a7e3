"""The look at the whole spool: what is new there, what was left over, and what nobody can explain.

Left-overs are removed by their exact name and age only; what we do not know is never touched.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.sources.judge import Identity, identity_of
from infra.sources.spool import LOCK, REFUSED, UNREADABLE
from pipeline.errors import SourceError
from pipeline.events import FileRefused
from pipeline.wal import WalFile, WalKind

MANIFEST = "backup_manifest"
#: What ``pg_basebackup -Ft`` makes: base, a tablespace's oid, or the WAL.
ARCHIVE = re.compile(r"(?:base|pg_wal|[0-9]+)\.tar(?:\.gz|\.lz4|\.zst)?")
#: basic_archive writes ``archtemp.<file>.<pid>.<ms>`` and renames it; a crash leaves it behind (``basic_archive.c``).
_ARCHTEMP = re.compile(r"archtemp\.(.+)\.[0-9]+\.[0-9]+")
#: A shipped backup on its way out.
_SHIPPED = ".walship-shipped-"

#: Folders of ours, and of the file system.
_NO_BACKUPS = (REFUSED, "lost+found")
#: Seconds until a temporary file or an unfinished backup is taken for abandoned.
_ABANDONED = 3600.0
#: Strangers that are told of one by one; a folder with more is somebody's home.
_MOST_STRANGERS = 100
#: What to do when something cannot be removed.
_CLOSED = "walship must be allowed to write to the spool, and to what is in it"


@dataclass(slots=True)
class Seen:
    """What one look has found."""

    #: Archived files and backup folders that are to be looked at, oldest WAL first.
    names: list[str] = field(default_factory=list)
    #: Whether there are more than that.
    more: bool = False
    notices: list[FileRefused] = field(default_factory=list)
    #: Which of the refused files are still there, unchanged.
    refused: set[str] = field(default_factory=set)


class Sweep:
    """Remembers what people were told of already."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told: set[str] = set()
        self._suspects: set[str] = set()

    def look(
        self, now: float, skip: Collection[str], refused: Mapping[str, Identity], *, most: int, at_once: bool
    ) -> Seen:
        """Look through the folder. ``now``: seconds since 1970. ``most``: how many names to give at most.

        An unknown file is told of when it is there at two looks (``at_once``: at the first): it may be on its way to
        its name. Raises SourceError if the folder cannot be read. Blocking.
        """
        seen = Seen()
        strangers: set[str] = set()
        try:
            with os.scandir(self._folder) as entries:
                names = self._names(entries, now, skip, refused, seen, strangers)
                found = heapq.nsmallest(most + 1, names, key=sort_key)
        except OSError as error:
            raise SourceError(f"the spool {self._folder} cannot be read: {error.strerror}", hint=UNREADABLE) from None
        seen.more = len(found) > most
        seen.names = found[:most]
        certain = strangers if at_once else strangers & self._suspects
        self._suspects = strangers
        for name in sorted(certain - self._told):
            if len(self._told) < _MOST_STRANGERS:
                self._told.add(name)
                seen.notices.append(self._stranger(name))
        return seen

    def _names(
        self, entries: Iterator[os.DirEntry[str]], now: float, skip: Collection[str], refused: Mapping[str, Identity],
        seen: Seen, strangers: set[str],
    ) -> Iterator[str]:  # fmt: skip
        for entry in entries:
            name = entry.name
            with contextlib.suppress(FileNotFoundError):  # it went while we looked
                if WalFile.parse(name):
                    if name in refused and identity_of(entry.stat(follow_symlinks=False)) == refused[name]:
                        seen.refused.add(name)
                    elif name not in skip:
                        yield name
                elif entry.is_dir(follow_symlinks=False):
                    if name.startswith(_SHIPPED):
                        _empty(self._folder / name)
                    elif name not in _NO_BACKUPS and name not in skip and self._is_backup(name, now, strangers):
                        yield name
                elif name != LOCK and not self._is_left_over(entry, now):
                    strangers.add(name)

    def _is_left_over(self, entry: os.DirEntry[str], now: float) -> bool:
        """Whether it is a temporary file of basic_archive; an abandoned one is removed."""
        match = _ARCHTEMP.fullmatch(entry.name)
        if match is None or WalFile.parse(match[1]) is None:
            return False
        if now - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED:
            Path(entry.path).unlink(missing_ok=True)
        return True

    def _is_backup(self, name: str, now: float, strangers: set[str]) -> bool:
        """Whether the folder holds a whole backup in tar format: its manifest is written last."""
        try:
            files = {entry.name: entry.stat().st_mtime for entry in os.scandir(self._folder / name)}
        except PermissionError:
            strangers.add(name)
            return False
        if MANIFEST in files and any(file.startswith("base.tar") for file in files):
            return True
        if MANIFEST in files or now - max(files.values(), default=now) > _ABANDONED:
            strangers.add(name)
        return False

    def _stranger(self, name: str) -> FileRefused:
        path = self._folder / name
        if path.is_dir():
            return FileRefused(
                str(path),
                f"{path} is no base backup that can be shipped",
                "it needs base.tar and backup_manifest, as pg_basebackup -Ft writes them; if it broke off, remove it",
            )
        return FileRefused(
            str(path), f"{path} is no file that PostgreSQL archives", "it is left alone; move it to where it belongs"
        )


def sort_key(name: str) -> str:
    """History files first, then segments and what is named after them in WAL order, base backups last."""
    file = WalFile.parse(name)
    if file is None:
        return f"2{name}"
    return f"{'0' if file.kind is WalKind.HISTORY else '1'}{name}"


def move_aside(folder: Path, name: str) -> Path:
    """Move a file of the spool into ``refused/`` below it, under a name that is free. Blocking, but short."""
    aside = folder / REFUSED
    aside.mkdir(mode=0o700, exist_ok=True)
    target = aside / name
    number = 0
    while target.exists():
        number += 1
        target = aside / f"{name}.{number}"
    (folder / name).rename(target)
    return target


def remove_file(path: Path, identity: Identity) -> bool:
    """Remove the file if it still is the one of that identity; False if another one has taken its place. Blocking."""
    try:
        if identity_of(path.lstat()) != identity:
            return False
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise SourceError(
            f"{path} is shipped but cannot be removed: {error.strerror}",
            hint=_CLOSED,
        ) from None
    return True


def remove_backup(folder: Path) -> None:
    """Remove a shipped backup: first as a whole out of sight, in one step, then file by file. Idempotent. Blocking.

    What is not of the backup stays, in a folder of the old name.
    """
    hidden = folder.with_name(_SHIPPED + folder.name)
    try:
        if folder.exists():
            if hidden.exists():
                _empty(hidden)
            folder.rename(hidden)
        if hidden.exists():
            _empty(hidden)
    except OSError as error:
        raise SourceError(f"{folder} is shipped but cannot be removed: {error.strerror}", hint=_CLOSED) from None


def _empty(hidden: Path) -> None:
    for file in hidden.iterdir():
        if file.name == MANIFEST or ARCHIVE.fullmatch(file.name):
            file.unlink()
    if any(hidden.iterdir()):
        hidden.rename(hidden.with_name(hidden.name.removeprefix(_SHIPPED)))
    else:
        hidden.rmdir()
