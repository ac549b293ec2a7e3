"""The private key of a repository, wrapped for everybody who may read: ``docs/format.md``, section 5.3. No I/O.

A wrap holds the private key and nothing of the ring around it: so it is carried over into the next ring as it is, and
whoever changes a ring needs to know one secret that opens it, not all of them.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from infra import early
from infra.sealing import as_json, context, from_hex, public_of, seal, unseal
from pipeline.errors import ConfigError, IntegrityError
from pipeline.objects import read_members

#: As it stands in the ring: a JSON object with a ``kind``.
Wrap: TypeAlias = Mapping[str, Any]

#: What a new wrap costs: 64 MiB and about a quarter of a second.
SCRYPT_N, SCRYPT_R, SCRYPT_P = early.N, early.R, early.P
#: A ring that asks for more is refused unread: 256 MiB for one wrap, and 16 times a new wrap's work for all together.
_MAX_N = 1 << 18
_MAX_WORK = 16 * SCRYPT_N * SCRYPT_P
#: More wraps than this are no ring that walship made.
_MAX_WRAPS = 256
#: Characters of a recipient's name.
_MAX_LABEL = 100

_SCRYPT = {"kind": str, "n": int, "r": int, "p": int, "salt": str, "sealed": str}
_RECIPIENT = {"kind": str, "public_key": str, "sealed": str}


def wrap_passphrase(private: bytes, system_id: str, passphrase: str, scrypt_n: int) -> Wrap:
    """For whoever knows the passphrase. Slow: one scrypt. Raises ConfigError for an empty one."""
    if not passphrase:
        raise ConfigError(
            "a key ring needs a passphrase, and BACKUP_ENCRYPTION_PASSWORD is empty",
            hint="set it, or BACKUP_ENCRYPTION_PASSWORD_FILE, and keep a copy far from this machine",
        )
    salt = os.urandom(32)
    key = AESGCM(_scrypt(passphrase, salt, scrypt_n, SCRYPT_R, SCRYPT_P))
    # The wrap's key is used this once, because the salt is fresh: so a constant nonce is right.
    sealed = key.encrypt(bytes(12), private, context("passphrase", system_id))
    costs = {"n": scrypt_n, "r": SCRYPT_R, "p": SCRYPT_P}
    return {"kind": "scrypt", **costs, "salt": salt.hex(), "sealed": sealed.hex()}


def wrap_recipient(private: bytes, system_id: str, recipient: bytes) -> Wrap:
    """For the owner of an X25519 key pair. Raises ConfigError if that is no public key of anybody."""
    try:
        sealed = seal(private, recipient, context("recipient", system_id))
    except ValueError:
        raise ConfigError("the recipient's public key is no point of the curve: nobody has its private key") from None
    return {"kind": "recipient", "public_key": recipient.hex(), "sealed": sealed.hex()}


def label_of(recipient: bytes, text: str) -> Wrap:
    """A name for a recipient, for people. It opens nothing, so readers that do not know the kind pass over it."""
    if not text.strip() or len(text) > _MAX_LABEL or any(not character.isprintable() for character in text):
        raise ConfigError(f"a label is 1 to {_MAX_LABEL} printable characters", hint="for example --label safe-in-Bern")
    return {"kind": "label", "public_key": recipient.hex(), "label": text}


def check_wraps(name: str, wraps: Sequence[Any]) -> Iterator[tuple[int, Wrap]]:
    """The ones that can be opened, each with its place. Those of unknown kinds are for newer versions to know.

    Raises IntegrityError, before anything is yielded, for wraps that walship would not make, or that ask for
    unreasonable work: nobody has authenticated them yet.
    """
    if len(wraps) > _MAX_WRAPS:
        raise IntegrityError(f"{name} has {len(wraps)} wraps; at most {_MAX_WRAPS} make sense")
    work, known = 0, []
    for place, wrap in enumerate(wraps):
        kind = wrap.get("kind") if isinstance(wrap, Mapping) else None
        if kind == "scrypt":
            work += _scrypt_work(name, read_members(name, as_json(wrap), _SCRYPT))
            known.append((place, wrap))
        elif kind == "recipient":
            known.append((place, read_members(name, as_json(wrap), _RECIPIENT)))
    if work > _MAX_WORK:
        raise IntegrityError(f"{name} asks for {work // (SCRYPT_N * SCRYPT_P)} times the work of one passphrase")
    yield from known


def unwrap(
    name: str, system_id: str, wraps: Sequence[Any], public: bytes, passphrase: str, identity: bytes
) -> Iterator[tuple[int, bytes]]:
    """Each wrap that the passphrase, or the recipient's private key, opens: its place, and the private key in it.

    Slow: one scrypt for each passphrase tried; take only as many as are needed. Raises IntegrityError.
    """
    for place, wrap in check_wraps(name, wraps):
        sealed = from_hex(name, "sealed", wrap["sealed"])
        try:
            if wrap["kind"] == "scrypt" and passphrase:
                salt = from_hex(name, "salt", wrap["salt"], 32)
                key = _scrypt(passphrase, salt, wrap["n"], wrap["r"], wrap["p"])
                private = AESGCM(key).decrypt(bytes(12), sealed, context("passphrase", system_id))
            elif wrap["kind"] == "recipient" and identity:
                private = unseal(sealed, identity, context("recipient", system_id))
            else:
                continue
        except InvalidTag:
            continue
        # A ciphertext can be made to open under several keys; only one private key has this public key.
        if len(private) == 32 and public_of(private) == public:
            yield place, private


def _scrypt_work(name: str, wrap: Mapping[str, Any]) -> int:
    """The n × p of a wrap, refused when it could exhaust this machine."""
    n, r, p = wrap["n"], wrap["r"], wrap["p"]
    if not 2 <= n <= _MAX_N or n & (n - 1) or r != SCRYPT_R or not 1 <= p <= 16:
        raise IntegrityError(
            f"{name} asks for scrypt with n={n} r={r} p={p};"
            f" walship allows powers of two up to n={_MAX_N}, r={SCRYPT_R} and p up to 16"
        )
    return int(n * p)


def _scrypt(passphrase: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    # The same letters can be typed as different code points (macOS, Linux); NFC makes them one.
    try:
        text = unicodedata.normalize("NFC", passphrase).encode()
    except UnicodeEncodeError:
        raise ConfigError("BACKUP_ENCRYPTION_PASSWORD is not valid UTF-8") from None
    return early.take(text, salt, n, r, p) or Scrypt(salt=salt, length=32, n=n, r=r, p=p).derive(text)
