"""The folders that a restore writes into: what may be there, whose they are, whether there is room. Blocking.

Everything is looked at before anything is changed. A data directory is emptied only when asked to, only when it can be
told to be one, and never when a server may be running on it. What an interrupted restore left behind is recognised by
its marker, and the next one goes on with it; but where pg_control is, a server can start and may have, so a marker
beside it counts for nothing.
"""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from handlers.full_disk import check_room
from handlers.running import check_not_running
from handlers.tablespaces import OURS, VERSION_FOLDER, check_may_overwrite, linked, locate
from handlers.target_walk import LOST_AND_FOUND, read_file, walk
from pipeline.backup import BackupInfo, Tablespace, area_of
from pipeline.errors import ConfigError, RecoveryError
from pipeline.layout import prefix_of

#: There while a restore is not complete; one in each tablespace that lies outside, with the same token in it.
MARKER = f"{OURS}/incomplete.json"
#: Without it PostgreSQL refuses to start: removed first, and written last of all.
CONTROL = "global/pg_control"
#: Written by the restore where tablespaces move; a few lines.
MAP = "tablespace_map"
#: Bytes of a marker that is ours.
_MOST = 1 << 20
#: What a restore, and PostgreSQL with it, puts into any data directory; folders that may be empty need no mention.
_USUAL = frozenset({
    OURS, LOST_AND_FOUND, "PG_VERSION", "base", "global", "pg_wal", "pg_tblspc", "pg_xact", "pg_multixact",
    "pg_subtrans", "pg_logical", "pg_stat", "pg_replslot", "postgresql.conf", "postgresql.auto.conf", "pg_hba.conf",
    "pg_ident.conf", "backup_label", "backup_manifest", MAP, "recovery.signal", "standby.signal", "current_logfiles",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Targets:
    """Where a backup is laid down. Made by ``look``. Links in the paths are resolved."""

    directory: Path
    #: Each tablespace and the folder it goes to; in-place tablespaces lie below the directory.
    tablespaces: tuple[tuple[Tablespace, Path], ...]
    #: User and group id that all files get, or None to leave them ours.
    owner: tuple[int, int] | None
    #: Folders that hold something, which is removed; with ``delta``, what of it is not as in the backup.
    full: tuple[Path, ...]
    #: There is something that may be kept: an old data directory, or what an interrupted restore has left.
    delta: bool = False
    #: Configuration that the backup has none of stays: people have put it there.
    spare: bool = False
    notices: tuple[str, ...] = ()
    #: Oid → the name that people gave the folder, which the tablespace's link leads to.
    names: Mapping[int, str] = field(default_factory=dict)
    #: Tells this restore, with all of its runs until it is through, from any other.
    token: str = ""

    @property
    def outside(self) -> tuple[tuple[Tablespace, Path], ...]:
        """The tablespaces that have folders of their own."""
        return tuple((space, path) for space, path in self.tablespaces if not path.is_relative_to(self.directory))

    @property
    def roots(self) -> tuple[tuple[str, Path], ...]:
        """All folders, none within another: what comes before names of files there in the manifest, and the folder."""
        return ("", self.directory), *((prefix_of(str(space.oid)), path) for space, path in self.outside)

    def folder(self, area: str) -> Path | None:
        """Where what the backup's archives have of ``base`` or a tablespace goes; None if it has no such area."""
        if area == "base":
            return self.directory
        return next((path for space, path in self.tablespaces if str(space.oid) == area), None)


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
    directory = resolved(directory)
    try:
        return _look(backup, directory, mapping, force=force, delta=delta, wal_margin=wal_margin, before=before)
    except OSError as error:  # a name that is too long, links in a circle
        raise RecoveryError(f"{error.filename or directory} cannot be looked at: {error.strerror}") from None


def resolved(directory: Path) -> Path:
    """A folder that was typed, which may be a link: as an absolute path without links. Raises ConfigError."""
    try:
        return Path(os.path.realpath(directory))
    except FileNotFoundError:
        raise ConfigError(f"{directory} is relative to a folder that is gone", hint="give an absolute path") from None


def folders(backup: BackupInfo, directory: Path, mapping: Mapping[str, str]) -> tuple[Path, ...]:
    """All that a restore has to have for itself while it goes on (``target_lock``). Raises as ``look`` does."""
    directory = resolved(directory)
    try:
        places = locate(backup, directory, mapping)
    except OSError as error:
        raise RecoveryError(f"{error.filename or directory} cannot be looked at: {error.strerror}") from None
    return directory, *(place.path for place in places if not place.path.is_relative_to(directory))


def _look(
    backup: BackupInfo, directory: Path, mapping: Mapping[str, str], *, force: bool, delta: bool, wal_margin: int,
    before: Sequence[BackupInfo],
) -> Targets:  # fmt: skip
    places = locate(backup, directory, mapping)
    outside = [place for place in places if not place.path.is_relative_to(directory)]
    for folder in (directory, *(place.path for place in outside)):
        _check_in_no_other(folder)
        _check_may_write(folder)
    token = _token(directory) if not (directory / CONTROL).is_file() else ""
    full = []
    notices: list[str] = []
    if _holds_something(directory):
        notices += _links(directory)
        check_not_running(directory, ours=bool(token))
        if token:
            _check_nothing_new(directory, force=force)
        else:
            _check_may_empty(directory, force=force or delta)
            if delta and not force:
                _check_same_cluster(backup, directory)
        full.append(directory)
    old = linked(directory) if force or delta else ()
    for place in outside:
        if _holds_something(place.path):
            ours = bool(token) and _token(place.path) == token
            check_may_overwrite(place, backup, directory, linked=place.path in old, ours=ours)
            full.append(place.path)
    targets = Targets(
        directory, tuple((place.tablespace, place.path) for place in places), None, tuple(full),
        bool(full) and (delta or bool(token)), delta and not force, (),
        {place.tablespace.oid: place.name for place in places}, token or secrets.token_hex(8),
    )  # fmt: skip
    archives = [(targets.folder(area_of(a.name)), a.size) for member in (*before, backup) for a in member.archives]
    check_room([(directory, wal_margin), *((path or directory, size) for path, size in archives)], full)
    owner, remarks = _owner(directory)
    notices += remarks
    if full and token:
        notices.append(
            f"{directory} holds what an interrupted restore has left: what of it is as in the backup is kept"
        )
    elif full and _token(directory):
        notices.append(
            f"{directory}/{MARKER} is of a restore that changed nothing or was through: it counts for nothing"
        )
    return replace(targets, owner=owner, notices=tuple(notices))


def prepare(targets: Targets, backup: BackupInfo, names: Collection[str] = ()) -> None:
    """Make the folders, mode 0700, and put the markers into them, durably; before ``disarm``.

    ``names``: what the backup has at the top of its data directory. With what is there now, which may be removed, they
    are all that the marker will let the next restore take for its own.
    """
    for _, folder in targets.roots:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        give(folder, targets.owner)
    places = [str(path) for _, path in targets.outside]
    known = sorted({*names, *(entry.name for entry in targets.directory.iterdir())})
    content = {
        "backup": backup.name, "directory": str(targets.directory), "tablespaces": places, "id": targets.token,
        "names": known,
    }  # fmt: skip
    # The data directory's first: one in a tablespace says nothing by itself.
    for _, folder in targets.roots:
        _mark(folder, json.dumps(content).encode(), targets.owner)


def _mark(folder: Path, content: bytes, owner: tuple[int, int] | None) -> None:
    """Whatever lies in the marker's place goes, and nothing is done to where it may lead."""
    marker = folder / MARKER
    if marker.parent.is_symlink() or (os.path.lexists(marker.parent) and not marker.parent.is_dir()):
        marker.parent.unlink()
    marker.parent.mkdir(mode=0o700, exist_ok=True)
    give(marker.parent, owner)
    if marker.is_dir() and not marker.is_symlink():
        shutil.rmtree(marker)
    create(marker, content, 0o600, owner)
    for path in (marker.parent, folder):
        sync(path)


def disarm(targets: Targets) -> None:
    """Remove pg_control, durably, before anything else is changed: what is half restored cannot be started."""
    control = targets.directory / CONTROL
    if control.parent.is_symlink():  # where it leads is not ours to change
        control.parent.unlink()
        sync(targets.directory)
        return
    try:
        control.unlink()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return  # a folder is no control file: it goes with all the rest
    sync(control.parent)


def finish(targets: Targets) -> None:
    """Remove the markers, once a server may start: the data directory's last."""
    for prefix, folder in reversed(targets.roots):
        (folder / MARKER).unlink()
        sync((folder / MARKER).parent)
        if prefix:
            (folder / OURS).rmdir()
            sync(folder)


def create(path: Path, content: bytes | bytearray, mode: int, owner: tuple[int, int] | None) -> None:
    """A file that is there as a whole or not at all, and is durable once its folder is. It replaces what is no folder.

    Nothing is written through a link, and nobody else can read it in between. Raises OSError.
    """
    temporary = path.with_name(f"{path.name}.walship")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as out:
        out.write(content)
        out.flush()
        os.fchmod(handle, mode)
        if owner is not None:
            os.fchown(handle, *owner)
        os.fsync(handle)
    temporary.replace(path)


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


def _check_may_write(folder: Path) -> None:
    """As the restore itself would find out, so that a plan that is shown can be carried out."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written to" if there == folder else f"cannot be made: {there} is closed to this user"
        raise RecoveryError(
            f"{folder} {what}",
            hint="choose another folder, or make it for the user that runs this:"
            f" install -d -o USER -m 700 {shlex.quote(str(folder))}",
        )


def _check_in_no_other(folder: Path) -> None:
    """Refuse what lies in a data directory, or where a server version has its files in a tablespace: that server and
    its base backups would take the files for theirs.
    """
    for parent in Path(os.path.realpath(folder)).parents:
        if _is_recognised(parent):
            raise RecoveryError(f"{folder} lies inside the data directory {parent}", hint="choose a folder elsewhere")
        if VERSION_FOLDER.fullmatch(parent.name):
            raise RecoveryError(
                f"{folder} lies inside the tablespace at {parent.parent}", hint="choose a folder elsewhere"
            )


def _token(folder: Path) -> str:
    """What the marker in it says; empty if there is none that can be read."""
    token = _marker(folder).get("id")
    return token if isinstance(token, str) else ""


def _marker(folder: Path) -> dict[str, object]:
    """All that it says."""
    if (folder / OURS).is_symlink():
        return {}
    try:
        found = json.loads(read_file(folder / MARKER, _MOST) or b"")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _check_nothing_new(directory: Path, *, force: bool) -> None:
    """Refuse what came into the folder after the restore that was interrupted there: years may have gone by, and the
    marker of a restore that was stopped before it wrote anything gives nobody leave to remove what others keep there.
    """
    names = _marker(directory).get("names")
    known = {*_USUAL, *(names if isinstance(names, list) else ())}
    known |= {f"{name}.walship" for name in known}  # of ``create``
    with os.scandir(directory) as entries:
        new = sorted(entry.name for entry in entries if entry.name not in known and _holds_files(entry))
    if new and not (force and _is_recognised(directory)):
        shown = ", ".join(new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
        raise RecoveryError(
            f"{directory} holds {shown}, which the restore that was interrupted there has not left",
            hint="move that elsewhere, and run the same restore again; or choose another folder",
        )


def _holds_files(entry: os.DirEntry[str]) -> bool:
    return not entry.is_dir(follow_symlinks=False) or any(files for _, files in walk(Path(entry.path)))


def _links(directory: Path) -> list[str]:
    """Sentences about the links in a data directory that is replaced: PostgreSQL works with pg_wal elsewhere, say."""
    return [
        f"{entry} is a link to {entry.readlink()}: the restore follows none, makes a folder or file of its own in its"
        " place, and leaves alone where it leads"
        for entry in sorted(directory.iterdir())
        if entry.is_symlink() and entry.name != OURS
    ]


def _holds_something(folder: Path) -> bool:
    """Anything but our own folder, which a restore that was killed at its very beginning has left."""
    try:
        return any(entry.name not in (LOST_AND_FOUND, OURS) for entry in folder.iterdir())
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        raise RecoveryError(f"{folder} is not a folder") from None
    except PermissionError as error:
        raise RecoveryError(f"{folder} cannot be looked at: {error.strerror}") from None


def _check_may_empty(directory: Path, *, force: bool) -> None:
    if force and _is_recognised(directory):
        return
    hint = "choose an empty folder"
    if _is_recognised(directory):
        hint += ", or --force to replace the data directory that is there; --delta keeps what of it is as in the backup"
    elif force:
        hint += ": --force empties only what can be told to be a PostgreSQL data directory"
    raise RecoveryError(f"{directory} is not empty", hint=hint)


def _is_recognised(directory: Path) -> bool:
    return (directory / "PG_VERSION").is_file() and (directory / "global").is_dir()


def _check_same_cluster(backup: BackupInfo, directory: Path) -> None:
    """Whose data directory it is, its pg_control says in the first eight bytes (``pg_control.h``)."""
    start = None if (directory / CONTROL).parent.is_symlink() else read_file(directory / CONTROL, 8)
    if start is None or len(start) < 8:
        raise RecoveryError(
            f"{directory} has no {CONTROL}, so it cannot be told which cluster it is of",
            hint="choose an empty folder, or --force to overwrite it all the same",
        )
    found = str(int.from_bytes(start, sys.byteorder))
    if found != backup.system_id:
        raise RecoveryError(
            f"{directory} is the data directory of the cluster {found}, and backup {backup.name} is of the cluster"
            f" {backup.system_id}",
            hint="choose another folder, or --force to overwrite that cluster with this one",
        )


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
