"""Recipients: people who read with a key pair instead of a passphrase. Their two keys as text, and the file of one.

    walship-recipient-1-<58 characters>    the public key: may be known to everybody, and is given to ``key add``
    walship-identity-1-<58 characters>     the private key: in a file of mode 0600 on its owner's machine

The characters are base32 of the 32 bytes of the X25519 key and 4 bytes of a checksum, so that a mistyped letter is
noticed before backups are sealed to nobody.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
import stat
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from infra.sealing import public_of
from pipeline.errors import ConfigError

_RECIPIENT, _IDENTITY = "walship-recipient-1-", "walship-identity-1-"
#: Bytes of the checksum: one mistyped key of four thousand millions is taken for another.
_CHECK = 4
#: A file of secrets is a few hundred bytes; a larger one is another file.
_MOST = 64 << 10


def show_recipient(public: bytes) -> str:
    """The public key as people type it."""
    return _encode(_RECIPIENT, public)


def parse_recipient(text: str) -> bytes:
    """The opposite; 32 bytes. Raises ConfigError for what is mistyped."""
    text = text.strip()
    if text.lower().startswith(_IDENTITY):
        raise ConfigError(
            "that is a private key, where a recipient's public key is wanted",
            hint="the public one begins with walship-recipient-1 and stands in the identity file as well; and who has"
            " seen the private one by now (a shell's history)? make a new pair: walship key new-identity FILE",
        )
    return _decode(_RECIPIENT, text, "the recipient's public key")


def parse_identity(text: str, where: str) -> bytes:
    """The private key in the content of an identity file; ``where`` names the file. Raises ConfigError."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(lines) != 1 or not lines[0].lower().startswith(_IDENTITY):
        raise ConfigError(
            f"{where} is no identity file: it has {len(lines)} lines that are no comment, not one that begins with"
            f" {_IDENTITY.rstrip('-')}",
            hint="`walship key new-identity FILE` makes one",
        )
    return _decode(_IDENTITY, lines[0], f"the private key in {where}")


def make_identity(path: Path, created: datetime) -> bytes:
    """A new key pair: writes the file, which must not be there, and returns the public key. Raises ConfigError."""
    private = X25519PrivateKey.generate().private_bytes_raw()
    public = public_of(private)
    text = (
        "# walship: the private key of a recipient. Whoever has this file reads what is sealed to it: keep it away from"
        " the\n# database host, and a copy of it somewhere else.\n"
        f"# made {created:%Y-%m-%d}; its public key is\n# {show_recipient(public)}\n{_encode(_IDENTITY, private)}\n"
    )
    write_secret(path, text)
    return public


def write_secret(path: Path, text: str) -> None:
    """A new file of mode 0600, durable; never over another one. Raises ConfigError."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), 0o600)  # whatever the umask says
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # a key that a power cut takes along opens nothing
        except OSError:
            path.unlink(missing_ok=True)
            raise
        folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # nor one whose name is forgotten
        finally:
            os.close(folder)
    except FileExistsError:
        raise ConfigError(f"{path} is there already, and is not overwritten", hint="choose another name") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def read_secret(path: Path, setting: str, tell: Callable[[str, str], None]) -> str:
    """The text of a file that holds a secret. ``tell``: of a file that others may read, and what to do about it.

    ``setting`` is how the user named the file. Raises ConfigError.
    """
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            content = file.read(_MOST + 1)
        if len(content) > _MOST:
            raise ConfigError(f"{setting}: {path} has more than {_MOST} bytes: it is another file")
        text = content.decode("utf-8")
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    else:
        if stat.S_ISREG(state.st_mode) and (mode := too_open(state)):
            fact = f"{setting}: {path} has mode {mode:04o}: others on this host may read it"
            tell(fact, f"chmod 600 {shlex.quote(str(path))}")
        return text
    raise ConfigError(
        f"{setting}: {path} cannot be read: {reason}",
        hint="it has to be there, readable for the user that runs walship",
    )


def too_open(state: os.stat_result) -> int:
    """The mode of a file that more than its owner may use; else 0.

    The rule is PostgreSQL's for its server key (ssl_key_file): 0600, or 0640 if root owns it.
    """
    mode = stat.S_IMODE(state.st_mode)
    return mode if mode & (0o037 if state.st_uid == 0 else 0o077) else 0


def _encode(prefix: str, key: bytes) -> str:
    text = base64.b32encode(key + _checksum(prefix, key)).decode()
    return prefix + text.rstrip("=").lower()


def _decode(prefix: str, text: str, what: str) -> bytes:
    """Raises ConfigError, which never shows the text."""
    text = text.lower()
    hint = f"it is {prefix}, and 58 letters and digits behind it; copy it rather than type it"
    if not text.startswith(prefix):
        newer = text.startswith(prefix[: prefix.rindex("-1-")])
        fact = "is of a form that this walship does not know" if newer else f"does not begin with {prefix}"
        raise ConfigError(f"{what} {fact}", hint=hint)
    body = text.removeprefix(prefix)
    if len(body) != 58 or set(body) - set("abcdefghijklmnopqrstuvwxyz234567"):
        raise ConfigError(f"{what} is mistyped: it is cut, or has other characters than a to z and 2 to 7", hint=hint)
    raw = base64.b32decode(body.upper() + "======")
    key, check = raw[:-_CHECK], raw[-_CHECK:]
    if _encode(prefix, key) != text or check != _checksum(prefix, key):
        raise ConfigError(f"{what} is mistyped: its checksum does not match", hint=hint)
    return key


def _checksum(prefix: str, key: bytes) -> bytes:
    return hashlib.sha256(prefix.encode() + key).digest()[:_CHECK]
