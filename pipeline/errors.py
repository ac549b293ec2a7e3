"""What can go wrong, split by who can mend it. Each error is a fact with its values, and a hint: what to do next.

The exit codes belong to the command and are mapped in one place, ``infra/cli/exits.py``.
"""

from __future__ import annotations


class WalshipError(Exception):
    """Base of all that walship raises on purpose; anything else is a defect.

    ``fact`` is one sentence with the values in it and never a secret; ``hint`` says what to do and may be empty.
    """

    def __init__(self, fact: str, *, hint: str = "") -> None:
        super().__init__(fact)
        self.fact = fact
        self.hint = hint


class ConfigError(WalshipError):
    """A setting is missing, misspelled or contradicts another one."""


class SourceError(WalshipError):
    """PostgreSQL or the spool: unreachable, refuses, or gives what is not WAL of this cluster.

    ``lasting``: it stays so until a person has mended it.
    """

    def __init__(self, fact: str, *, hint: str = "", lasting: bool = False) -> None:
        super().__init__(fact, hint=hint)
        self.lasting = lasting


class StoreError(WalshipError):
    """A store: unreachable, refuses, full, or answers nonsense. ``passing`` tells whether trying again can help."""

    def __init__(self, fact: str, *, hint: str = "", passing: bool = False) -> None:
        super().__init__(fact, hint=hint)
        self.passing = passing


class ObjectMissing(StoreError):
    """The store answered, and there is no object of that name."""


class ObjectConflict(StoreError):
    """There is an object of that name already, and it was not to be replaced.

    ``ours`` and ``theirs``: fingerprints of what was to be stored and of what is there; empty where nobody has looked.
    """

    def __init__(self, fact: str, *, hint: str = "", ours: str = "", theirs: str = "") -> None:
        super().__init__(fact, hint=hint)
        self.ours = ours
        self.theirs = theirs


class RepositoryGone(StoreError):
    """The store answered, and holds no repository: it was emptied, or none was made there yet."""


class ReadOnly(StoreError):
    """The store shows the past, in which nothing can be written. Who only leaves marks and records goes on without."""


class IntegrityError(WalshipError):
    """Stored bytes are not what was written: damaged, exchanged, cut, or of another repository."""


class Sealed(IntegrityError):
    """What is stored is encrypted, and this host can only write: nothing is known to be wrong with it."""


class RecoveryError(WalshipError):
    """The recovery target cannot be reached with what is stored."""


def foreseen(error: BaseException) -> WalshipError | None:
    """The first error of ours in it (task groups wrap theirs), or None if there is a defect in it."""
    if isinstance(error, WalshipError):
        return error
    if not isinstance(error, BaseExceptionGroup):
        return None
    inner = [foreseen(member) for member in error.exceptions]
    return inner[0] if all(inner) else None
