"""Where the tablespaces of a restore go, and whether what lies there is the restore's to overwrite. Blocking.

A tablespace's folder does not say which data directory it belongs to. Only links lead there, and a data directory that
was copied has the links of the original; and one folder may serve several clusters, each with a folder of its version
in it (pg_upgrade leaves it so).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from handlers.running import user_of
from handlers.target_walk import LOST_AND_FOUND, read_file
from pipeline.backup import BackupInfo, Tablespace
from pipeline.errors import ConfigError, RecoveryError

#: Our folder, in the data directory and in each tablespace. Base backups leave out what begins with ``pgsql_tmp``.
OURS = "pgsql_tmp.walship"
#: The folder that a server version makes in a tablespace: PG_17_202406281.
VERSION_FOLDER = re.compile(r"PG_(\d+(?:\.\d+)?)_\d+")
#: postmaster.opts is one line.
_MOST = 64 << 10


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tablespace goes."""

    tablespace: Tablespace
    #: Links are resolved.
    path: Path
    #: The name that people gave it, which pg_tblspc leads to.
    name: str
    #: Whether they named it for this very restore.
    chosen: bool = False


def locate(backup: BackupInfo, directory: Path, mapping: Mapping[str, str]) -> tuple[Place, ...]:
    """Where each tablespace goes; in-place ones lie below ``directory``, whose links are resolved. Changes nothing.

    Raises ConfigError for a ``mapping`` (old location → new one) that makes no sense.
    """
    known = {tablespace.location for tablespace in backup.tablespaces}
    if unknown := sorted(set(mapping) - known):
        raise ConfigError(
            f"--tablespace-map: backup {backup.name} has no tablespace at {unknown[0]}",
            hint=f"its tablespaces: {', '.join(sorted(known)) or 'none'}",
        )
    found: list[Place] = []
    for tablespace in backup.tablespaces:
        name = mapping.get(tablespace.location, tablespace.location)
        if not Path(name).is_absolute():
            if tablespace.location != f"pg_tblspc/{tablespace.oid}" or name != tablespace.location:
                raise ConfigError(f"--tablespace-map: {name} is not an absolute path")
            path = directory / name  # made with allow_in_place_tablespaces
        else:
            path = Path(os.path.realpath(name))
            if ".." in Path(name).parts:  # the server would go wherever that leads some day
                name = str(path)
            if path.is_relative_to(directory) or directory.is_relative_to(path) or _same(path, directory):
                raise ConfigError(f"tablespace {tablespace.oid} and the data directory cannot share {name}")
        if any(path.is_relative_to(o.path) or o.path.is_relative_to(path) or _same(path, o.path) for o in found):
            raise ConfigError(f"two tablespaces cannot share {name}")
        found.append(Place(tablespace, path, name, chosen=tablespace.location in mapping))
    return tuple(found)


def _same(path: Path, other: Path) -> bool:
    """Whether both are there, and are one folder: a bind mount has several names."""
    return path.exists() and other.exists() and path.samefile(other)


def check_may_overwrite(place: Place, backup: BackupInfo, directory: Path, *, linked: bool, ours: bool) -> None:
    """Refuse to overwrite a tablespace's folder that holds something, unless that is this restore's to lose.

    ``linked``: the data directory in whose place the restore goes may be overwritten, and a link of it leads here.
    ``ours``: this restore was interrupted here before. Raises RecoveryError.
    """
    oid, path = place.tablespace.oid, place.path
    elsewhere = f"--tablespace-map {place.tablespace.location}=/another/folder puts it elsewhere"
    names = sorted(entry.name for entry in path.iterdir() if entry.name not in (LOST_AND_FOUND, OURS))
    versions = {name: found[1] for name in names if (found := VERSION_FOLDER.fullmatch(name))}
    if not (linked or ours) or len(versions) < len(names) or any((path / name).is_symlink() for name in names):
        raise RecoveryError(f"the location of tablespace {oid}, {path}, is not empty", hint=elsewhere)
    foreign = [name for name, version in versions.items() if version != str(backup.major)]
    if foreign or len(versions) > 1:
        raise RecoveryError(
            f"the location of tablespace {oid}, {path}, holds {', '.join(foreign or versions)}: that may be another"
            f" cluster's, and backup {backup.name} is of PostgreSQL {backup.major}",
            hint=f"{elsewhere}; or move away what is not needed any more (pg_upgrade leaves the old version's)",
        )
    if user := user_of(path):
        raise RecoveryError(
            f"the location of tablespace {oid}, {path}, is in use by a running server, {user}",
            hint=f"{elsewhere}; or stop that server, if its tablespace may be overwritten",
        )
    if not (ours or place.chosen) and (other := _ran_as(directory)):
        raise RecoveryError(
            f"{directory} was last started as {other}, so it may be a copy, and the tablespace {oid} in {path} the"
            " original's",
            hint=f"{elsewhere}; if no other data directory uses {path}, --tablespace-map"
            f" {place.tablespace.location}={place.name} says that it may be overwritten",
        )


def linked(directory: Path) -> Sequence[Path]:
    """Where the tablespaces of the data directory that is there lie, links resolved."""
    folder = directory / "pg_tblspc"
    if folder.is_symlink() or not folder.is_dir():
        return ()
    return [Path(os.path.realpath(entry)) for entry in folder.iterdir() if entry.is_symlink()]


def _ran_as(directory: Path) -> str:
    """The name of the data directory that a server was last started on, if it was another one: this one is a copy.

    postmaster.opts, which no base backup holds, has the command line: its program, and each argument in quotes.
    """
    try:
        words = shlex.split(os.fsdecode(read_file(directory / "postmaster.opts", _MOST) or b""))
    except ValueError:  # a quote is missing
        return ""
    for number, word in enumerate(words):
        named = word.removeprefix("-D") if word.startswith("-D") else ""
        if word == "-D":
            named = "".join(words[number + 1 : number + 2])
        if (
            Path(named).is_absolute()
            and os.path.realpath(named) != str(directory)
            and not _same(Path(named), directory)
        ):
            return named
    return ""
