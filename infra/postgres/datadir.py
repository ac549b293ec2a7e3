"""What of a data directory belongs in a base backup: the files and folders, and what PostgreSQL leaves out.

The rules are those of BASE_BACKUP (PostgreSQL source, ``src/backend/backup/basebackup.c``; documentation, "Making a
Base Backup Using the Low Level API"): what a server makes anew at its start, temporary files and relations, unlogged
relations but for their init forks, and the WAL. Folders that are emptied are kept.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: Their content goes, they stay.
_EMPTIED = frozenset(
    {"pg_dynshmem", "pg_notify", "pg_replslot", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans"}
)
#: In the data directory itself; what a restored server would be misled by, or makes itself.
_LEFT_OUT = frozenset(
    {"backup_label", "tablespace_map", "backup_manifest", "postmaster.pid", "postmaster.opts"}
    | {"current_logfiles.tmp", "postgresql.auto.conf.tmp", "recovery.signal", "standby.signal"}
)
#: ``pgsql_tmp`` is every temporary file's and folder's, and our own folder's.
_TEMPORARY = "pgsql_tmp"
_CACHE = "pg_internal.init"
#: Folders that PostgreSQL expects below pg_wal, from the version on in which it makes them.
_BELOW_WAL = (("pg_wal/archive_status", 0), ("pg_wal/summaries", 17))
#: Relation files: of temporary relations, and of all others (number, fork, segment).
_TEMPORARY_RELATION = re.compile(r"t\d+_\d+(_(fsm|vm|init))?(\.\d+)?")
_RELATION = re.compile(r"(\d+)(?:_(fsm|vm|init))?(?:\.(\d+))?")
#: Where relations lie: global/, base/OID/, and PG_17_202406281/OID/ of a tablespace.
_OF_RELATIONS = re.compile(r"(?:base|PG_\d+(?:\.\d+)?_\d+|pg_tblspc/\d+/PG_\d+(?:\.\d+)?_\d+)/\d+")
#: Where data lies that a cluster cannot be without.
_VITAL = frozenset({"base", "global", "pg_xact", "pg_multixact", "pg_twophase", "PG_VERSION"})
#: Written last, by whoever takes the backup.
CONTROL = "global/pg_control"


@dataclass(frozen=True, slots=True)
class Found:
    """One folder or regular file."""

    #: In the archive: relative to the data directory, or to the tablespace's folder.
    path: str
    source: Path
    folder: bool
    #: Permission bits; owner.
    mode: int
    uid: int
    gid: int
    mtime: int
    #: Of a relation's main fork or another: number of its first segment's block is 0. None: it has no page checksums.
    segment: int | None = None
    #: Bytes when it was listed.
    size: int = 0


def walk(
    root: Path,
    major: int,
    *,
    tablespace: str = "",
    inside: frozenset[str] = frozenset(),
    passed: Callable[[Path], None] = lambda _: None,
) -> Iterator[Found]:
    """All that belongs in the archive of the data directory ``root``, or of a tablespace's folder; folders first.

    ``tablespace``: the one folder of a tablespace that is this server's: ``PG_17_202406281``. Beside it may be what
    another version left there, or ``lost+found``. ``inside``: folders of the data directory that are tablespaces, and
    archives of their own. ``passed`` is told of links and special files, which are left out as BASE_BACKUP leaves them
    out. What vanishes meanwhile is left out: relations may be dropped at any time.

    Raises OSError for what is there and cannot be read, and for a link in the place of what a cluster cannot be
    without.
    """
    yield from _below(root, "", _Rules(major, tablespace, frozenset() if tablespace else inside, passed))


@dataclass(frozen=True, slots=True)
class _Rules:
    """As ``walk`` was told."""

    major: int
    tablespace: str
    inside: frozenset[str]
    passed: Callable[[Path], None]

    def leave_out(self, folder: str, path: str) -> bool:
        if self.tablespace:
            return not folder and path != self.tablespace
        return path == CONTROL or (folder == "pg_tblspc" and path in self.inside)


def _below(root: Path, folder: str, rules: _Rules) -> Iterator[Found]:
    try:
        with os.scandir(root / folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    names = {entry.name for entry in listed}
    relations = bool(_OF_RELATIONS.fullmatch(folder))
    folders = []
    for entry in listed:
        path = f"{folder}/{entry.name}" if folder else entry.name
        if rules.leave_out(folder, path) or _is_left_out(entry.name, folder, names, relations=relations):
            continue
        try:
            seen = entry.stat(follow_symlinks=False)
            if not rules.tablespace and path in _EMPTIED:
                yield _found(path, Path(entry.path), entry.stat())  # a link, to a disk in memory, becomes a folder
            elif not rules.tablespace and path == "pg_wal":
                yield from _wal(Path(entry.path), rules.major)
            elif stat.S_ISDIR(seen.st_mode):
                yield _found(path, Path(entry.path), seen)
                folders.append(path)
            elif stat.S_ISREG(seen.st_mode):
                yield _found(path, Path(entry.path), seen, _segment(entry.name, folder, relations=relations))
            elif folder != "pg_tblspc":  # the links to tablespaces: archives of their own
                _refuse_vital(path, entry.path, rules.tablespace)
                rules.passed(Path(entry.path))
        except FileNotFoundError:
            continue
    for path in folders:
        if path not in rules.inside:
            yield from _below(root, path, rules)


def _refuse_vital(path: str, source: str, tablespace: str) -> None:
    """PostgreSQL leaves a link out with a warning; here that would be a backup without its tables."""
    if tablespace or path.partition("/")[0] in _VITAL:
        raise OSError(errno.EINVAL, "it is no file and no folder but a link, or a special file", source)


def _is_left_out(name: str, folder: str, names: set[str], *, relations: bool) -> bool:
    if name.startswith((_TEMPORARY, _CACHE)) or name == ".DS_Store":
        return True
    if not folder and name in _LEFT_OUT:
        return True
    if not relations:
        return False
    if _TEMPORARY_RELATION.fullmatch(name):
        return True
    match = _RELATION.fullmatch(name)
    # Unlogged: its init fork alone, from which it is made empty after a crash, and after a restore.
    return bool(match and match[2] != "init" and f"{match[1]}_init" in names)


def _segment(name: str, folder: str, *, relations: bool) -> int | None:
    if not relations and folder != "global":
        return None
    match = _RELATION.fullmatch(name)
    return int(match[3] or 0) if match else None


def _wal(folder: Path, major: int) -> Iterator[Found]:
    """pg_wal as an empty folder, wherever a link leads to, with the folders in it that a server expects."""
    seen = folder.stat()
    yield _found("pg_wal", folder, seen)
    for path, since in _BELOW_WAL:
        if major >= since:
            yield _found(path, folder, seen)


def _found(path: str, source: Path, seen: os.stat_result, segment: int | None = None) -> Found:
    return Found(
        path, source, stat.S_ISDIR(seen.st_mode), stat.S_IMODE(seen.st_mode), seen.st_uid, seen.st_gid,
        int(seen.st_mtime), segment, seen.st_size,
    )  # fmt: skip
