"""Chains of backups: a full one, and incremental ones, each of which holds what changed since the one before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from pipeline.backup import BackupInfo
from pipeline.catalog import info_key
from pipeline.errors import RecoveryError

#: Backups of a chain that is built upon no further: a restore lays down each of them, one over the other, and one that
#: is damaged spoils all behind it. Longer ones that are stored are restored as all others.
LONGEST = 50

_HINT = "restore from another backup, and take a full one now: walship backup"


def chain_of(backup: BackupInfo, known: Mapping[str, BackupInfo]) -> tuple[BackupInfo, ...]:
    """The full backup and all incremental ones up to this one, in that order. RecoveryError if one is missing."""
    links = [backup]
    seen = {backup.name}
    while links[-1].parent:
        last = links[-1]
        before = known.get(last.parent)
        whose = "" if last is backup else f" by way of {last.name}"
        fact = f"backup {backup.name} cannot be used: it builds on {last.parent}{whose}"
        if before is None:
            raise RecoveryError(f"{fact}, and {info_key(last.parent)} is not there, or of no use", hint=_HINT)
        if before.id != last.parent_id:
            raise RecoveryError(
                f"{fact}, and {info_key(last.parent)} is of another backup than it was taken from", hint=_HINT
            )
        if before.name in seen:
            raise RecoveryError(f"{fact}, and so in the end on itself", hint=_HINT)
        seen.add(before.name)
        links.append(before)
    return tuple(reversed(links))


def whole_ones(backups: Iterable[BackupInfo], problem: Callable[[str], None]) -> list[BackupInfo]:
    """Those whose chain is whole; ``problem`` is told of each of the others."""
    known = {backup.name: backup for backup in backups}
    found = []
    for backup in known.values():
        try:
            chain_of(backup, known)
        except RecoveryError as error:
            problem(error.fact)
        else:
            found.append(backup)
    return found
