"""What a command has at hand to open a key ring with: a passphrase, a recipient's private key, or neither of them.

With a writer file alone it can write and not read. Where more than one is set, any of them will do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import structlog

from infra.dotfile import COMMENT
from infra.recipients import parse_identity, read_secret
from infra.ring import Writer
from infra.settings import Settings
from infra.writer_file import decode_writer
from pipeline.errors import ConfigError

log = structlog.get_logger()

#: Characters of a passphrase below which it is warned of.
SHORT = 12
#: What stands in examples in the place of a passphrase, and what is too short to have been meant as one.
_PLACEHOLDER = re.compile(r"[.…*xX_\s-]*|.{,3}|<.*>|change[-_ ]?me", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AtHand:
    """Secrets; never shown."""

    passphrase: str = field(default="", repr=False)
    #: X25519 private key of a recipient; empty if there is none.
    identity: bytes = field(default=b"", repr=False)
    writer: Writer | None = None

    @property
    def reads(self) -> bool:
        """Whether there is anything that could open a ring."""
        return bool(self.passphrase or self.identity)

    def each(self) -> Iterator[AtHand]:
        """What could open a ring, one by one; the private key first, which is quick."""
        if self.identity:
            yield AtHand(identity=self.identity)
        if self.passphrase:
            yield AtHand(self.passphrase)

    @property
    def names(self) -> str:
        """The settings of what could open a ring, as a subject with its verb: ``X does not open`` a ring."""
        if self.passphrase and self.identity:
            return "neither BACKUP_ENCRYPTION_PASSWORD nor WALSHIP_IDENTITY_FILE opens"
        return f"{'WALSHIP_IDENTITY_FILE' if self.identity else 'BACKUP_ENCRYPTION_PASSWORD'} does not open"

    @property
    def cut_off(self) -> str:
        """A sentence of a hint, of rings from when such lines of .env were taken. Empty if it has no such sign."""
        words = "If the ring was made with a line of .env without quotes, only what stands before the ` #` opens it. "
        return words if COMMENT.search(self.passphrase) else ""


def look_at_hand(settings: Settings, tell: Callable[[str, str], None] | None = None) -> AtHand:
    """Read the files that the settings name. ``tell`` is told of one that others may read, and what to do about it.

    The writer file is read only where nothing else is at hand. Raises ConfigError.
    """
    tell = tell or _warn
    identity, writer = b"", None
    if (path := settings.identity_file) is not None:
        identity = parse_identity(read_secret(path, "WALSHIP_IDENTITY_FILE", tell), str(path))
    if (path := settings.writer_file) is not None and not identity and not settings.passphrase:
        writer = decode_writer(read_secret(path, "WALSHIP_WRITER_FILE", tell), str(path))
    return AtHand(settings.passphrase, identity, writer)


def weakness(passphrase: str) -> tuple[str, str] | None:
    """A sentence about a passphrase that is soon guessed, and what to do; None if it is none, or long enough.

    Whoever has the bucket can guess for as long as he likes; each guess costs a quarter of a second and 64 MiB.
    """
    if not passphrase or len(passphrase) >= SHORT:
        return None
    fact = f"the passphrase has {len(passphrase)} characters: whoever gets hold of the bucket may guess it"
    return fact, f"take {SHORT} or more, or five random words; `walship key rotate` puts it in the place of this one"


def refuse_placeholder(passphrase: str, what: str = "BACKUP_ENCRYPTION_PASSWORD") -> None:
    """Before a key ring is made with it: afterwards there is a repository that anybody may open. Raises ConfigError.

    ``what``: where it was given.
    """
    if passphrase and _PLACEHOLDER.fullmatch(passphrase):
        raise ConfigError(
            f"{what} is a placeholder, or too short: {len(passphrase)} characters",
            hint=f"take {SHORT} or more, or five random words, and keep a copy somewhere else",
        )


def _warn(fact: str, hint: str) -> None:
    log.warning("keys", error=fact, hint=hint)
