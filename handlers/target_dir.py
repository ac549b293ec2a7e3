"""The folders that a restore writes into: what may be there, whose they are, whether there is room. Blocking.

Everything is looked at before anything is changed. A data directory is emptied only when asked to, only when it can be
told to be one, and never when a server may be running on it. What an interrupted restore left behind is recognised by
its marker and may be replaced.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pipeline.backup import BackupInfo, Tablespace
from pipeline.errors import ConfigError, RecoveryError

#: There while a restore is not complete; names the tablespace folders that belong to it.
MARKER = "pgsql_tmp.walship/incomplete.json"
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
    #: Folders that hold something, which ``clear`` removes.
    full: tuple[Path, ...]
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
    wal_margin: int,
) -> Targets:
    """Check everything that can be checked; changes nothing. ``mapping``: old tablespace location → new one.

    ``wal_margin``: bytes that replay may need beside the data. Raises RecoveryError and ConfigError.
    """
    try:
        directory = Path(os.path.abspath(directory))  # noqa: PTH100 - resolve() would follow a link that is meant
    except FileNotFoundError:
        raise ConfigError(f"{directory} is relative to a folder that is gone", hint="give an absolute path") from None
    try:
        return _look(backup, directory, mapping, force=force, wal_margin=wal_margin)
    except OSError as error:  # a name that is too long, links in a circle
        raise RecoveryError(f"{error.filename or directory} cannot be looked at: {error.strerror}") from None


def _look(backup: BackupInfo, directory: Path, mapping: Mapping[str, str], *, force: bool, wal_margin: int) -> Targets:
    tablespaces = _tablespaces(backup, directory, mapping)
    for folder in (directory, *(path for _, path in tablespaces if not path.is_relative_to(directory))):
        _check_in_no_other(folder)
    ours = _leftover(directory)
    full = []
    if _holds_something(directory):
        _check_not_running(directory, ours=ours is not None)
        if ours is None:
            _check_may_empty(directory, force=force)
        full.append(directory)
    old = {Path(p) for p in ours or ()} | (_linked(directory) if force else set())
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
    _check_room(backup, directory, tablespaces, full, wal_margin)
    owner, notices = _owner(directory)
    return Targets(directory, tablespaces, owner, tuple(full), notices)


def clear(targets: Targets) -> None:
    """Empty what ``look`` found to be full; the folders themselves stay, for they may be mount points.

    The control file goes first: what is half removed can no longer be started. The marker stays, so that it is
    recognised then.
    """
    marker = targets.directory / MARKER
    for folder in targets.full:
        (folder / "global/pg_control").unlink(missing_ok=True)
        for entry in (*folder.iterdir(), *marker.parent.iterdir()):
            if entry in (marker, marker.parent) or entry.name == "lost+found":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def prepare(targets: Targets, backup: BackupInfo) -> None:
    """Make the folders, mode 0700, and put the marker into the data directory, durably; before ``clear``."""
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


class _Owner(Enum):
    """What is known of the server that a postmaster.pid speaks of."""

    RUNS = "runs"
    DEAD = "dead"
    UNKNOWN = "unknown"


def _check_not_running(directory: Path, *, ours: bool) -> None:
    """Refuse a directory whose server runs, or whose server is not proven dead.

    A process number proves no death: the server may run in another container, or on another machine that shares the
    mount, and then its number is nobody here, or somebody else, or (1, in a container) ourselves. What proves it is
    what PostgreSQL itself goes by: the small System V shared memory segment that every server keeps attached, and that
    outlives a killed one. If the very segment that postmaster.pid names is here, made by the process it names, and
    nobody is attached to it, the server ran here and is dead. After a reboot the segment is gone: a person has to say
    so then. Only where an interrupted restore of ours left its marker no server can have been started.
    """
    try:
        lines = (directory / "postmaster.pid").read_text("latin-1").split("\n")
    except FileNotFoundError:
        return
    pid = abs(int(lines[0])) if lines[0].strip().lstrip("-").isdecimal() else 0
    owner = _attached(pid, lines)
    if owner is _Owner.UNKNOWN and pid and _is_server(pid):
        owner = _Owner.RUNS
    if owner is _Owner.RUNS:
        raise RecoveryError(
            f"{directory} belongs to a running server, process {pid}",
            hint="stop it first, or restore into another folder",
        )
    if owner is _Owner.UNKNOWN and not ours:
        raise RecoveryError(
            f"{directory} has a postmaster.pid, and the server that it names (process {pid}) may be running elsewhere",
            hint="in another container, or on another machine that shares the folder; if it is certain that no server"
            f" runs on it, remove {directory}/postmaster.pid",
        )


def _attached(pid: int, lines: Sequence[str]) -> _Owner:
    """Whether anyone holds the shared memory segment that line 7 of postmaster.pid names by key and id."""
    try:
        key, number = (int(word) & 0xFFFFFFFF for word in lines[6].split())
        table = Path("/proc/sysvipc/shm").read_text("ascii").splitlines()[1:]
    except (OSError, ValueError, IndexError):
        return _Owner.UNKNOWN
    for line in table:
        # key shmid perms size cpid lpid nattch …
        fields = [int(word) for word in line.split()]
        if (fields[0] & 0xFFFFFFFF, fields[1]) == (key, number):
            if fields[6]:
                return _Owner.RUNS
            return _Owner.DEAD if fields[4] == pid else _Owner.UNKNOWN
    return _Owner.UNKNOWN


def _is_server(pid: int) -> bool:
    """Whether that process lives, and is not known to be something else. False proves nothing."""
    if pid in {os.getpid(), os.getppid()}:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, and is another user's
    try:
        return "post" in Path(f"/proc/{pid}/comm").read_text("latin-1")
    except OSError:
        return True


def _check_may_empty(directory: Path, *, force: bool) -> None:
    recognised = (directory / "PG_VERSION").is_file() and (directory / "global").is_dir()
    if force and recognised:
        return
    hint = "choose an empty folder"
    if recognised:
        hint += ", or --force to replace the data directory that is there"
    elif force:
        hint += ": --force empties only what can be told to be a PostgreSQL data directory"
    raise RecoveryError(f"{directory} is not empty", hint=hint)


def _linked(directory: Path) -> set[Path]:
    """Where the tablespaces of the data directory that is there lie."""
    folder = directory / "pg_tblspc"
    if not folder.is_dir():
        return set()
    return {entry.readlink() for entry in folder.iterdir() if entry.is_symlink()}


def _only_versions(folder: Path) -> bool:
    return all(_VERSION_FOLDER.fullmatch(entry.name) or entry.name == "lost+found" for entry in folder.iterdir())


def _check_room(
    backup: BackupInfo,
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
        *((places.get(archive.name, directory), archive.size) for archive in backup.archives),
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
                hint="make room, or restore to a larger disk",
            )


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
