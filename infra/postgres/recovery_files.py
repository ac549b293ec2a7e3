"""What makes a restored data directory recover to the target, and do no harm: settings, signal file, wrapper.

A backup carries the settings of the server it was taken from. Started with them a restored server archives into the
production spool, with the same system identifier, so that no guard sees it; waits for standbys that it does not have;
or follows the target of an earlier restore. All of that is switched off in postgresql.auto.conf, which is read last,
and the later of two lines counts. Of the size limits that a server in recovery must not lower, none is touched.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path

from infra.postgres.preloaded import acting
from infra.postgres.wal_script import CONTEXT, FOLDER, RESTORE_COMMAND, SCRIPT, script
from pipeline.recovery import RestorePlan
from pipeline.targets import TargetKind

#: Switched off in every restored server: name → value, as far as its version knows them (``neutral``).
NEUTRAL: Mapping[str, str] = {
    "archive_mode": "off",
    "archive_command": "",
    "archive_library": "",
    "synchronous_standby_names": "",
    "primary_conninfo": "",
    "primary_slot_name": "",
    "recovery_end_command": "",
    "archive_cleanup_command": "",
    # A subscriber would go on where the backup has it, and take from the publisher what the old server waits for.
    "max_logical_replication_workers": "0",
    # The file that it names may lie on this machine, and would promote a standby.
    "promote_trigger_file": "",
    # It would delay each commit of the replay.
    "recovery_min_apply_delay": "0",
    # off with a target shuts the server down.
    "hot_standby": "on",
}
_TARGETS = (
    "recovery_target",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_xid",
    "recovery_target_lsn",
)
#: What serves one recovery only. Left behind it gets into every pg_basebackup, and a standby that is made of that would
#: follow it, with a restore_command whose script no backup holds.
_ONCE = (
    "restore_command",
    "recovery_target_timeline",
    "recovery_target_inclusive",
    "recovery_target_action",
    *_TARGETS,
)
#: Their values may hold passwords.
_QUIET = frozenset({"primary_conninfo", "archive_command", "recovery_end_command", "archive_cleanup_command"})
_DEFAULTS = {
    "archive_mode": "off",
    "recovery_min_apply_delay": "0",
    "hot_standby": "on",
    "max_logical_replication_workers": "0",
}
#: It beats -D, wherever the server was told to look, and has no effect in postgresql.auto.conf: a start of the restored
#: directory would start the ORIGINAL one. And the old server's own process id would be overwritten in its
#: external_pid_file, and removed in the end; set to nothing, it makes every start log an error. So the lines of both
#: are commented out.
_COMMENTED = ("data_directory", "external_pid_file")
_COMMENTED_LINE = re.compile(rb"^(?=[ \t]*(?:data_directory|external_pid_file)\b)", re.IGNORECASE | re.MULTILINE)
#: They are left alone: what they name is only read, and a pg_hba.conf in the directory itself may still be initdb's,
#: which trusts everybody.
_ELSEWHERE = ("hba_file", "ident_file")
_INCLUDES = ("include", "include_if_exists", "include_dir")
_REMARK = b"# walship restore: "
_REMOVED = ("standby.signal", "recovery.signal", "postmaster.pid", "postmaster.opts")
_ONCE_LINE = re.compile(rf"\s*(?:{'|'.join(_ONCE)})\s*(?:=|\s)", re.IGNORECASE)
_ARCHIVING = (
    "the restored server archives nothing; once it replaces the old one, which must never run again, turn that on,"
    " in psql: ALTER SYSTEM RESET archive_mode; ALTER SYSTEM RESET archive_library; ALTER SYSTEM RESET"
    " archive_command; (what was itself set with ALTER SYSTEM has to be set again); then restart it and take a base"
    " backup: walship backup"
)
_NO_ARCHIVING = (
    "the restored server archives nothing, and the stream needs no archive; once it replaces the old one, which must"
    " never run again, let walship run stream from it and take a base backup: walship backup"
)
_SUBSCRIPTIONS = (
    "subscriptions apply nothing on the restored server (max_logical_replication_workers is 0): it would take what its"
    " publisher keeps for the old one; once it replaces the old one, which must never run again: ALTER SYSTEM RESET"
    " max_logical_replication_workers; and restart it"
)
#: What a person has to do where ``forget_recovery`` does not.
FORGET = (
    "once the server is promoted, take out what served this recovery, or a standby that is made of it follows that;"
    " in psql: " + " ".join(f"ALTER SYSTEM RESET {name};" for name in _ONCE)
)
#: ALTER SYSTEM writes this, and renames it to postgresql.auto.conf.
_ALTERED = "postgresql.auto.conf.tmp"
#: Seconds that an ALTER SYSTEM which is under way may take.
_PATIENCE = 5.0
#: Seconds until one that had begun before has written what it read.
_AGAIN = 0.05
_LINE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.]*)\s*(?:=|\s)\s*('(?:[^'\\]|''|\\.)*'|[^\s#']*)")


@dataclass(frozen=True, slots=True)
class Neutralised:
    """A setting that the backup brought along and that was switched off."""

    name: str
    #: Empty where it may hold a secret.
    value: str

    def __str__(self) -> str:
        return f"{self.name} (was {self.value!r})" if self.value else self.name


def settings_for(plan: RestorePlan, *, extra: Mapping[str, str] | None = None, standby: bool = False) -> dict[str, str]:
    """All that is written, in this order. Exactly one recovery target is set, or none.

    A ``standby`` has none, whatever the plan's: it goes on for ever, on the plan's timeline only. Following "latest" it
    would go over to whatever history appears in the archive, before it is known that all of that timeline is stored.

    PostgreSQL takes a setting of one target kind, even to nothing, for a second target when another is set before it:
    so the kind that is meant comes last. ``extra`` (a drill's port and the like) may not name any of ours.
    """
    stop = plan.stop
    settings = neutral(plan.backup.major)
    settings["restore_command"] = RESTORE_COMMAND
    settings["recovery_target_timeline"] = plan.timeline_setting
    settings["recovery_target_inclusive"] = "on" if stop.inclusive else "off"
    settings["recovery_target_action"] = stop.action.value
    settings |= dict.fromkeys(_TARGETS, "")
    value = {
        TargetKind.TIME: ("recovery_target_time", stop.time.astimezone(UTC).isoformat(sep=" ") if stop.time else ""),
        TargetKind.LSN: ("recovery_target_lsn", str(stop.lsn)),
        TargetKind.XID: ("recovery_target_xid", str(stop.xid)),
        TargetKind.NAME: ("recovery_target_name", stop.name),
        TargetKind.IMMEDIATE: ("recovery_target", "immediate"),
    }.get(stop.kind)
    if value and not standby:
        del settings[value[0]]
        settings[value[0]] = value[1]
    if extra:
        if both := sorted(settings.keys() & extra.keys()):
            raise ValueError(f"{both[0]} is the restore's own to set")
        settings |= extra
    return settings


def neutral(major: int) -> dict[str, str]:
    """Of ``NEUTRAL`` what servers of that version have: they do not start with a name that they do not know."""
    unknown = {"archive_library"} if major < 15 else {"promote_trigger_file"} if major > 15 else set()
    return {name: value for name, value in NEUTRAL.items() if name not in unknown}


def write_recovery_files(
    directory: Path,
    settings: Mapping[str, str],
    *,
    segment_size: int,
    fetch: Sequence[str],
    context: bytes,
    owner: tuple[int, int] | None,
    standby: bool = False,
) -> tuple[Neutralised, ...]:
    """Write it all into a data directory whose files lie there already. Blocking. Returns what was neutralised.

    ``fetch``: the command of ``fetch-wal``; ``context``: content of the file it is given, secret. ``owner``: user and
    group id, or None. ``standby``: it goes on recovering until it is promoted. Raises OSError.
    """
    neutralised = inherited(directory)
    for name in _REMOVED:
        (directory / name).unlink(missing_ok=True)
    folder = directory / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    _give(folder, owner)
    _write(folder / SCRIPT, script(fetch, segment_size).encode(), 0o600, owner)
    _write(folder / CONTEXT, context, 0o600, owner)
    conf = directory / "postgresql.auto.conf"
    before = _COMMENTED_LINE.sub(_REMARK, conf.read_bytes()) if conf.exists() else b""
    lines = [f"{name} = {quoted(value)}\n" for name, value in settings.items()]
    end = b"" if not before or before.endswith(b"\n") else b"\n"
    _write(conf, before + end + b"# walship restore\n" + "".join(lines).encode(), 0o600, owner)
    _disarm(directory / "postgresql.conf", owner)
    _write(directory / ("standby.signal" if standby else "recovery.signal"), b"", 0o600, owner)
    return neutralised


def _disarm(conf: Path, owner: tuple[int, int] | None) -> None:
    """Comment out what must not be there."""
    if not conf.is_file():
        return
    before = conf.read_bytes()
    after = _COMMENTED_LINE.sub(_REMARK, before)
    if after != before:
        _write(conf, after, conf.stat().st_mode & 0o777, owner)


def inherited(directory: Path) -> tuple[Neutralised, ...]:
    """Which of the dangerous settings the restored files set to something. Includes are not followed."""
    found = _inherited(directory)
    dangerous = (*NEUTRAL, *_TARGETS, *_COMMENTED)
    return tuple(
        Neutralised(name, "" if name in _QUIET else found[name])
        for name in dangerous
        if found.get(name, "") not in ("", _DEFAULTS.get(name, ""))
    )


def inherited_value(directory: Path, name: str) -> str:
    """What the restored files set it to, or an empty string. Includes are not followed."""
    return _inherited(directory).get(name, "")


def _inherited(directory: Path) -> dict[str, str]:
    """Of two lines, and of two files, the later counts."""
    found: dict[str, str] = {}
    for name in ("postgresql.conf", "postgresql.auto.conf"):
        path = directory / name
        if path.is_file():
            found |= parse_conf(path.read_text("utf-8", "replace"))
    return found


def parse_conf(text: str) -> dict[str, str]:
    """A configuration file's settings; of two lines the later counts. Names in lower case."""
    settings: dict[str, str] = {}
    for line in text.split("\n"):
        match = _LINE.match(line)
        if match is None or line.lstrip().startswith("#"):
            continue
        value = match[2]
        if value.startswith("'"):
            value = re.sub(r"''|\\(.)", lambda m: m[1] or "'", value[1:-1])
        settings[match[1].lower()] = value
    return settings


def quoted(value: str) -> str:
    """A string for a configuration file: quotes are doubled and so are backslashes, which it takes for escapes."""
    if "\n" in value or "\0" in value:
        raise ValueError("a setting cannot hold a line break")
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def forget_recovery(directory: Path, *, owner: tuple[int, int] | None) -> bool:
    """Take what served the recovery out of postgresql.auto.conf, once the server is promoted. Blocking. Raises OSError.

    What ``ALTER SYSTEM RESET`` does, without a connection; what postgresql.conf sets itself stays switched off. The
    server runs, and an ALTER SYSTEM at the same moment would be lost, or undo this: it writes ``_ALTERED`` and renames
    that. So a folder takes that name meanwhile, for some milliseconds, in which ALTER SYSTEM ends in an error and
    changes nothing; one that had read the file before and writes it after brings the old lines back, so it is looked at
    once more. False if the name was not free for seconds.
    """
    lock, deadline = directory / _ALTERED, time.monotonic() + _PATIENCE
    while True:
        try:
            lock.mkdir(mode=0o700)
        except FileExistsError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
            continue
        try:
            changed = _forget(directory, owner)
        finally:
            lock.rmdir()
        if not changed:
            return True
        time.sleep(_AGAIN)


def _forget(directory: Path, owner: tuple[int, int] | None) -> bool:
    """False if there was nothing to forget."""
    conf, own = directory / "postgresql.auto.conf", directory / "postgresql.conf"
    set_there = parse_conf(own.read_text("utf-8", "replace")) if own.is_file() else {}
    kept = []
    before = conf.read_text("utf-8", "surrogateescape")
    for line in before.splitlines(keepends=True):
        if not line.lstrip().startswith("#") and _ONCE_LINE.match(line):
            continue
        kept.append(line)
    kept += [f"{name} = ''\n" for name in _TARGETS if set_there.get(name)]
    if (after := "".join(kept)) == before:
        return False
    _write(conf, after.encode("utf-8", "surrogateescape"), 0o600, owner)
    return True


def notices(
    neutralised: Sequence[Neutralised], directory: Path, *, archiving: bool = True, promoted: bool = False
) -> tuple[str, ...]:
    """What people have to know of a directory that was made ready to recover.

    ``archiving``: whether walship takes WAL from an archive at all. ``promoted``: whether ``forget_recovery`` follows.
    """
    said = [
        f"commented out in {directory}/postgresql.conf: {setting}"
        for setting in neutralised
        if setting.name in _COMMENTED
    ]
    if off := [setting for setting in neutralised if setting.name not in _COMMENTED]:
        said.append(f"switched off in {directory}/postgresql.auto.conf: {', '.join(map(str, off))}")
    if any(n.name in ("archive_mode", "archive_command", "archive_library") for n in neutralised):
        said.append(_ARCHIVING if archiving else _NO_ARCHIVING)
    if names := next((n.value for n in neutralised if n.name == "synchronous_standby_names"), ""):
        said.append(
            "commits on the restored server wait for nobody; to let them wait again, once walship run streams from it,"
            f" in psql: ALTER SYSTEM SET synchronous_standby_names = {_literal(names)}; SELECT pg_reload_conf();"
        )
    said.append(_SUBSCRIPTIONS)
    if not promoted:
        said.append(FORGET)
    said.append(
        "settings on the server's command line (in a service unit, a compose file) win over all that is written here:"
        " start it without archive_mode, archive_command, archive_library and data_directory there"
    )
    if libraries := acting(inherited_value(directory, "shared_preload_libraries")):
        said.append(
            f"{', '.join(libraries)} in shared_preload_libraries may work by itself in the restored server, as in the"
            " old one: jobs, connections to other servers; where that must not be, take it out before the start"
        )
    conf = directory / "postgresql.conf"
    if conf.is_file():
        settings = parse_conf(conf.read_text("utf-8", "replace"))
        if others := [f"{name} {settings[name]}" for name in _INCLUDES if settings.get(name)]:
            said.append(
                f"{conf} has {', '.join(others)}: what those files set was not looked at; a data_directory there starts"
                " the old directory in place of this one, unless the command line names this one"
            )
        if others := [f"{name} ({settings[name]})" for name in _ELSEWHERE if settings.get(name)]:
            said.append(f"{conf} still names the old server's {', '.join(others)}")
    said.append(
        f"{directory}/{FOLDER}/{CONTEXT} lets the server fetch WAL without any environment: it holds what opens the"
        " repository, is readable by its owner only, and gets into no backup. `restore --start` deletes it once"
        " recovery has ended; where you start the server, so may you"
    )
    return tuple(said)


def _literal(value: str) -> str:
    """A string in SQL, with standard_conforming_strings."""
    return "'" + value.replace("'", "''") + "'"


def remove_recovery_files(directory: Path) -> None:
    """Delete what could open the repository, once recovery has ended. The wrapper stays: the server knows it still."""
    (directory / FOLDER / CONTEXT).unlink(missing_ok=True)


def _write(path: Path, content: bytes, mode: int, owner: tuple[int, int] | None) -> None:
    """A new file in the place of an old one; never through a link, never readable by others in between."""
    temporary = path.with_name(f"{path.name}.walship")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(handle, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(handle)
        if owner is not None:
            os.fchown(handle, *owner)
    temporary.replace(path)


def _give(path: Path, owner: tuple[int, int] | None) -> None:
    if owner is not None:
        os.chown(path, *owner, follow_symlinks=False)
