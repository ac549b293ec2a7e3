"""The folders that a restore writes into: what may be there, whose they are, whether there is room. Blocking.

Everything is looked at before anything is changed. A data directory is emptied only when asked to, only when it can be
told to be one, and never when a server may be running on it. What an interrupted restore left behind is recognised by
its marker, and the next one goes on with it.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from handlers.running import check_not_running
from pipeline.backup import BackupInfo, Tablespace, area_of
from pipeline.errors import ConfigError, RecoveryError

#: There while a restore is not complete; names the tablespace folders that belong to it.
MARKER = "pgsql_tmp.walship/incomplete.json"
#: Without it PostgreSQL refuses to start: removed first, and written last of all.
CONTROL = "global/pg_control"
#: Written by the restore where tablespaces move; a few lines.
MAP = "tablespace_map"
#: The folder that a server version makes in a tablespace: PG_17_202406281.
_VERSION_FOLDER = re.compile(r"PG_\d+(\.\d+)?_\d+")


@dataclass(frozen=True, slots=True)
class Targets:
    """Where a backup is laid down. Made by ``look``."""

    directory: Path
    #: Each tablespace and the folder it goes to; in-place tablespaces lie below the directory.
    tablespaces: tuple[tuple[Tablespace, Path], ...]
    #: User and group id that all files get, or None to leave them ours.
    owner: tuple[int, int] | None
    #: Folders that hold something, which is removed; with ``delta``, what of it is not as in the backup.
    full: tuple[Path, ...]
    #: There is something that may be kept: an old data directory, or what an interrupted restore has left.
    delta: bool = False
    notices: tuple[str, ...] = ()

    @property
    def moved(self) -> bool:
        """Whether any tablespace goes somewhere else than it was."""
        return any(str(path) != tablespace.location for tablespace, path in self.tablespaces)


def look(
    backup: BackupInfo,
    directory: Path,
    mapping: Mapping[str, str],
    *,
    force: bool,
    delta: bool = False,
    wal_margin: int,
    before: Sequence[BackupInfo] = (),
) -> Targets:
    """Check everything that can be checked; changes nothing. ``mapping``: old tablespace location → new one.

    ``force``: a data directory may be emptied. ``delta``: it may be changed into the one of the backup, if it is the
    same cluster's (with ``force``, any). What an interrupted restore has left needs neither. ``wal_margin``: bytes that
    replay may need beside the data. ``before``: what an incremental backup builds on. Raises RecoveryError and
    ConfigError.
    """
    try:
        directory = Path(os.path.abspath(directory))  # noqa: PTH100 - resolve() would follow a link that is meant
    except FileNotFoundError:
        raise ConfigError(f"{directory} is relative to a folder that is gone", hint="give an absolute path") from None
    try:
        return _look(backup, directory, mapping, force=force, delta=delta, wal_margin=wal_margin, before=before)
    except OSError as error:  # a name that is too long, links in a circle
        raise RecoveryError(f"{error.filename or directory} cannot be looked at: {error.strerror}") from None


def _look(
    backup: BackupInfo, directory: Path, mapping: Mapping[str, str], *, force: bool, delta: bool, wal_margin: int,
    before: Sequence[BackupInfo],
) -> Targets:  # fmt: skip
    tablespaces = _tablespaces(backup, directory, mapping)
    for folder in (directory, *(path for _, path in tablespaces if not path.is_relative_to(directory))):
        _check_in_no_other(folder)
    ours = _leftover(directory)
    full = []
    if _holds_something(directory):
        check_not_running(directory, ours=ours is not None)
        if ours is None:
            _check_may_empty(directory, force=force or delta)
            if delta and not force:
                _check_same_cluster(backup, directory)
        full.append(directory)
    old = {Path(p) for p in ours or ()} | (_linked(directory) if force or delta else set())
    for tablespace, path in tablespaces:
        if path.is_relative_to(directory):
            continue
        if _holds_something(path):
            if path not in old or not _only_versions(path):
                raise RecoveryError(
                    f"the location of tablespace {tablespace.oid}, {path}, is not empty",
                    hint=f"--tablespace-map {tablespace.location}=/another/folder puts it elsewhere",
                )
            full.append(path)
    _check_room((*before, backup), directory, tablespaces, full, wal_margin)
    owner, notices = _owner(directory)
    keeps = bool(full) and (delta or ours is not None)
    if full and ours is not None:
        notices = (
            *notices,
            f"{directory} holds what an interrupted restore has left: what of it is as in the backup is kept",
        )
    return Targets(directory, tablespaces, owner, tuple(full), keeps, notices)


def disarm(targets: Targets) -> None:
    """Remove pg_control, durably, before anything else is changed: what is half restored cannot be started."""
    control = targets.directory / CONTROL
    if control.parent.is_symlink():  # where it leads is not ours to change
        control.parent.unlink()
        sync(targets.directory)
        return
    try:
        control.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return
    sync(control.parent)


def clear(targets: Targets) -> None:
    """Empty what ``look`` found to be full, after ``disarm``; the folders themselves stay: they may be mount points.

    The marker stays, so that what is half removed is recognised.
    """
    marker = targets.directory / MARKER
    for folder in targets.full:
        for entry in (*folder.iterdir(), *marker.parent.iterdir()):
            if entry in (marker, marker.parent) or entry.name == "lost+found":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def prepare(targets: Targets, backup: BackupInfo) -> None:
    """Make the folders, mode 0700, and put the marker into the data directory, durably; before ``disarm``."""
    for folder in (targets.directory, *(path for _, path in targets.tablespaces)):
        if folder != targets.directory and folder.is_relative_to(targets.directory):
            continue  # an in-place tablespace: the archive brings its folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        give(folder, targets.owner)
    marker = targets.directory / MARKER
    marker.parent.mkdir(mode=0o700, exist_ok=True)
    give(marker.parent, targets.owner)
    places = [str(path) for _, path in targets.tablespaces if not path.is_relative_to(targets.directory)]
    marker.write_text(json.dumps({"backup": backup.name, "tablespaces": places}), "utf-8")
    give(marker, targets.owner)
    for path in (marker, marker.parent, targets.directory):
        sync(path)


def give(path: Path, owner: tuple[int, int] | None) -> None:
    """Make a file or folder the owner's, if there is one to give it to."""
    if owner is not None:
        os.chown(path, *owner, follow_symlinks=False)


def sync(path: Path) -> None:
    """Fsync one file or folder."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tablespaces(
    backup: BackupInfo, directory: Path, mapping: Mapping[str, str]
) -> tuple[tuple[Tablespace, Path], ...]:
    known = {tablespace.location for tablespace in backup.tablespaces}
    if unknown := sorted(set(mapping) - known):
        raise ConfigError(
            f"--tablespace-map: backup {backup.name} has no tablespace at {unknown[0]}",
            hint=f"its tablespaces: {', '.join(sorted(known)) or 'none'}",
        )
    found: list[tuple[Tablespace, Path]] = []
    for tablespace in backup.tablespaces:
        place = mapping.get(tablespace.location, tablespace.location)
        path = Path(place)
        if not path.is_absolute():
            if tablespace.location != f"pg_tblspc/{tablespace.oid}" or place != tablespace.location:
                raise ConfigError(f"--tablespace-map: {place} is not an absolute path")
            path = directory / place  # made with allow_in_place_tablespaces
        elif path.is_relative_to(directory) or directory.is_relative_to(path):
            raise ConfigError(f"tablespace {tablespace.oid} and the data directory cannot share {path}")
        if any(path == other or path.is_relative_to(other) or other.is_relative_to(path) for _, other in found):
            raise ConfigError(f"two tablespaces cannot share {path}")
        found.append((tablespace, path))
    return tuple(found)


def _check_in_no_other(folder: Path) -> None:
    """Refuse what lies in a data directory: its server and its base backups would take the files for theirs."""
    for parent in Path(os.path.realpath(folder)).parents:
        if (parent / "PG_VERSION").is_file() and (parent / "global").is_dir():
            raise RecoveryError(f"{folder} lies inside the data directory {parent}", hint="choose a folder elsewhere")


def _leftover(directory: Path) -> list[str] | None:
    """The tablespace folders of an interrupted restore into this directory; None if there was none."""
    try:
        content = json.loads((directory / MARKER).read_text("utf-8"))
        return [str(place) for place in content["tablespaces"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _holds_something(folder: Path) -> bool:
    try:
        return any(entry.name != "lost+found" for entry in folder.iterdir())
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        raise RecoveryError(f"{folder} is not a folder") from None
    except PermissionError as error:
        raise RecoveryError(f"{folder} cannot be looked at: {error.strerror}") from None


def _check_may_empty(directory: Path, *, force: bool) -> None:
    recognised = (directory / "PG_VERSION").is_file() and (directory / "global").is_dir()
    if force and recognised:
        return
    hint = "choose an empty folder"
    if recognised:
        hint += ", or --force to replace the data directory that is there; --delta keeps what of it is as in the backup"
    elif force:
        hint += ": --force empties only what can be told to be a PostgreSQL data directory"
    raise RecoveryError(f"{directory} is not empty", hint=hint)


def _check_same_cluster(backup: BackupInfo, directory: Path) -> None:
    """Whose data directory it is, its pg_control says in the first eight bytes (``pg_control.h``)."""
    try:
        with (directory / CONTROL).open("rb") as control:
            found = str(int.from_bytes(control.read(8), sys.byteorder))
    except FileNotFoundError:
        raise RecoveryError(
            f"{directory} has no {CONTROL}, so it cannot be told which cluster it is of",
            hint="choose an empty folder, or --force to overwrite it all the same",
        ) from None
    if found != backup.system_id:
        raise RecoveryError(
            f"{directory} is the data directory of the cluster {found}, and backup {backup.name} is of the cluster"
            f" {backup.system_id}",
            hint="choose another folder, or --force to overwrite that cluster with this one",
        )


def _linked(directory: Path) -> set[Path]:
    """Where the tablespaces of the data directory that is there lie."""
    folder = directory / "pg_tblspc"
    if not folder.is_dir():
        return set()
    return {entry.readlink() for entry in folder.iterdir() if entry.is_symlink()}


def _only_versions(folder: Path) -> bool:
    ours = ("lost+found", MARKER.partition("/")[0])  # what a restore of a chain has left
    return all(_VERSION_FOLDER.fullmatch(entry.name) or entry.name in ours for entry in folder.iterdir())


def _check_room(
    chain: Sequence[BackupInfo],
    directory: Path,
    tablespaces: Sequence[tuple[Tablespace, Path]],
    full: Sequence[Path],
    wal_margin: int,
) -> None:
    places = {str(tablespace.oid): path for tablespace, path in tablespaces}
    need: dict[int, int] = {}
    where: dict[int, Path] = {}
    for path, size in [
        (directory, wal_margin),
        *((places.get(area_of(a.name), directory), a.size) for backup in chain for a in backup.archives),
    ]:
        existing = next(p for p in (path, *path.parents) if p.exists())
        device = existing.stat().st_dev
        need[device] = need.get(device, 0) + size
        where.setdefault(device, existing)
    for device, size in need.items():
        stat = os.statvfs(where[device])
        free = stat.f_bavail * stat.f_frsize
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
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            total += os.lstat(os.path.join(path, name)).st_blocks * 512  # noqa: PTH118 - a million files
    return total


def _owner(directory: Path) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """As root: whose the files shall be, since servers refuse root."""
    if os.geteuid() != 0:
        return None, ()
    if directory.exists() and (stat := directory.stat()).st_uid != 0:
        return (stat.st_uid, stat.st_gid), ()
    try:
        # The name that PostgreSQL writes into every header of its tar streams.
        entry = pwd.getpwnam("postgres")
    except KeyError:
        remark = (
            f"the files in {directory} belong to root, because there is no user postgres:"
            " give them to the server's user with chown -R before the start"
        )
        return None, (remark,)
    return (entry.pw_uid, entry.pw_gid), (f"the files in {directory} belong to the user postgres",)
