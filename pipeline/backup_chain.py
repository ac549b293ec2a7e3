"""Chains of backups: a full one, and incremental ones, each of which holds what changed since the one before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from pipeline.backup import BackupInfo
from pipeline.errors import RecoveryError

#: More than anybody restores from; and an end to chains that were made to have none.
MOST = 1000


def chain_of(backup: BackupInfo, known: Mapping[str, BackupInfo]) -> tuple[BackupInfo, ...]:
    """The full backup and all incremental ones up to this one, in that order. RecoveryError if one is missing."""
    links = [backup]
    while links[-1].parent:
        last = links[-1]
        before = known.get(last.parent)
        if before is None or before.id != last.parent_id:
            fact = f"backup {backup.name} cannot be used: it builds on {last.parent}, which is"
            raise RecoveryError(
                f"{fact} {'missing' if before is None else 'another one than it was taken from'}",
                hint="restore from another backup, and take a full one now: walship backup",
            )
        if len(links) >= MOST:
            raise RecoveryError(f"backup {backup.name} builds on {MOST} others and more", hint="take a full one")
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
