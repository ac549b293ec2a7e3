"""A minimal configuration for a restored server whose backup holds none, so that it starts at all.

Debian and Ubuntu keep postgresql.conf, pg_hba.conf and pg_ident.conf below /etc/postgresql, where no backup of a data
directory finds them. A server does not start without the first two; of the third it only logs that it is not there,
for it is needed by nothing but ``map=`` in pg_hba.conf (documentation, "User Name Maps").
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from handlers.target_dir import create, sync
from infra.postgres.programs import Programs
from infra.postgres.recovery_files import inherited_value
from infra.postgres.restored import control_data
from pipeline.errors import RecoveryError

#: A server in recovery must not go below what the old one had (chapter "Hot Standby", "Administrator's Overview").
#: pg_controldata's word → the setting.
LIMITS: Mapping[str, str] = {
    "max_connections setting": "max_connections",
    "max_worker_processes setting": "max_worker_processes",
    "max_wal_senders setting": "max_wal_senders",
    "max_prepared_xacts setting": "max_prepared_transactions",
    "max_locks_per_xact setting": "max_locks_per_transaction",
}
_CONF, _HBA = "postgresql.conf", "pg_hba.conf"
_HEAD = """\
# walship restore --start: the backup holds no postgresql.conf (Debian keeps it below /etc/postgresql).
# This one lets the server start. Put the old server's in its place.
"""
_ACCESS = """\
# walship restore --start: the backup holds no pg_hba.conf (Debian keeps it below /etc/postgresql).
# Users of this machine get in over the socket, each as the role of that name; nobody over the network.
# Put the old server's in its place.
local all all peer
"""
#: Last line of both, before a digest of all others.
_SEAL = "# nobody has changed this file since, as long as this fits: "
_ETC = "below /etc/postgresql if your service reads them there"
_PLACE = f"there, or {_ETC}"
_WHERE = "not in the backup (Debian keeps such files below /etc/postgresql)"


def limits(directory: Path, programs: Programs) -> dict[str, str]:
    """What ``LIMITS`` were on the old server at the time of the backup, from pg_control. Blocking."""
    found = control_data(directory, programs)
    return {setting: found[word] for word, setting in LIMITS.items() if word in found}


def lacking(directory: Path) -> tuple[str, ...]:
    """Which of the files a server cannot start without are not there; one of ours from another restore is none."""
    missing = []
    if _is_free(directory / _CONF):
        missing.append(_CONF)
    # Where postgresql.conf says that it lies elsewhere nothing is looked for here.
    if not inherited_value(directory, "hba_file") and _is_free(directory / _HBA):
        missing.append(_HBA)
    return tuple(missing)


def furnish(directory: Path, programs: Programs, *, port: int | None, owner: tuple[int, int] | None) -> str:
    """Write what ``lacking`` finds into a directory that was restored, pg_control included. Blocking.

    Nothing that people have put there is changed. ``port``: where the server shall listen, also when it is started by
    hand later. Returns a sentence that says what was written; empty if nothing was. Raises RecoveryError.
    """
    missing = lacking(directory)
    if not missing:
        return ""
    settings = {"listen_addresses": "localhost", **({"port": str(port)} if port is not None else {})}
    try:
        if _CONF in missing:
            settings = limits(directory, programs) | settings
            lines = [f"{name} = '{value}'\n" for name, value in settings.items()]
            _write(directory / _CONF, _HEAD + "".join(lines), owner)
        if _HBA in missing:
            _write(directory / _HBA, _ACCESS, owner)
        sync(directory)
    except OSError as error:
        raise RecoveryError(
            f"{' and '.join(missing)} cannot be written into {directory}: {error.strerror}",
            hint=f"all else is there: mend that, put the old server's {_files(missing)} there, and start the server as"
            f" its owner, with pg_ctl -D {shlex.quote(str(directory))} start",
        ) from error
    what = {
        _CONF: "a minimal postgresql.conf",
        _HBA: "a pg_hba.conf that lets users of this machine in over the socket, each as the role of that name, and"
        " nobody over the network",
    }
    return (
        f"{_these(missing)} {_WHERE}: walship wrote into {directory} {' and '.join(what[name] for name in missing)};"
        f" put the old server's {_files(missing)} {_PLACE}, before this server takes its place"
    )


def left(directory: Path, spared: Sequence[str]) -> str:
    """A sentence on files that lay there, are not in the backup, and stay; empty if there are none but ours."""
    ours = lacking(directory)
    theirs = [str(directory / name) for name in spared if name not in ours]
    return f"kept, for the backup has none: {', '.join(theirs)}" if theirs else ""


def to_be_put(directory: Path) -> str:
    """A sentence for people who start the server themselves; empty if it has all that it needs."""
    missing = lacking(directory)
    if not missing:
        return ""
    limited = ", with max_connections and its like not below what they were" if _CONF in missing else ""
    return (
        f"{_these(missing)} {_WHERE}: put the old server's {_files(missing)} into {directory}, or {_ETC}, before the"
        f" start{limited}"
    )


def _these(missing: Sequence[str]) -> str:
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'}"


def _files(missing: Sequence[str]) -> str:
    return "file" if len(missing) == 1 else "files"


def _write(path: Path, text: str, owner: tuple[int, int] | None) -> None:
    create(path, f"{text}{_SEAL}{_digest(text)}\n".encode(), 0o600, owner)


def _is_free(path: Path) -> bool:
    """Nothing lies there; or what another restore has written, and nobody has changed: a backup may hold that.

    Its limits are those of an older backup, and may be too low for this one.
    """
    if not path.is_file():
        return not os.path.lexists(path)
    text, seal, digest = path.read_text("utf-8", "replace").rpartition(_SEAL)
    return bool(seal) and digest == f"{_digest(text)}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
