"""The few primitives that rings, data keys and wraps are made of: ``docs/format.md``, section 5.1. No I/O."""

from __future__ import annotations

import hmac
import json
import re
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pipeline.errors import IntegrityError

#: RFC 9180, mode base: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.
_HPKE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_TWO_LINES = re.compile(rb"([^\n]+)\n([0-9a-f]{64})\n")


def context(purpose: str, *values: str) -> bytes:
    """What a derivation or a sealing is bound to."""
    return "\0".join((f"walship 1 {purpose}", *values)).encode()


def derive(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose, by HKDF-SHA256 without salt."""
    return HKDF(SHA256(), 32, salt=None, info=context(purpose)).derive(secret)


def public_of(private: bytes) -> bytes:
    """The public key of an X25519 private key; 32 bytes each."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def seal(secret: bytes, public: bytes, info: bytes) -> bytes:
    """Encapsulated key (32 bytes), ciphertext, tag. Raises ValueError for a public key that no private key has."""
    return _HPKE.encrypt(secret, X25519PublicKey.from_public_bytes(public), info)


def unseal(sealed: bytes, private: bytes, info: bytes) -> bytes:
    """The opposite of ``seal``. Raises InvalidTag."""
    try:
        return _HPKE.decrypt(sealed, X25519PrivateKey.from_private_bytes(private), info)
    except ValueError:  # too short, or an encapsulated key that is no point of the curve
        raise InvalidTag from None


def signed(members: dict[str, Any], key: bytes) -> bytes:
    """A line of JSON, and a line with its HMAC-SHA256."""
    line = as_json(members)
    return line + b"\n" + hmac.digest(key, line, "sha256").hex().encode() + b"\n"


def is_mac(key: bytes, line: bytes, mac: bytes) -> bool:
    return hmac.compare_digest(hmac.digest(key, line, "sha256"), mac)


def two_lines(name: str, content: bytes) -> tuple[bytes, bytes]:
    """What ``signed`` made: the line of JSON and the MAC. Raises IntegrityError about ``name``."""
    match = _TWO_LINES.fullmatch(content)
    if match is None:
        raise IntegrityError(f"{name} is not a line of JSON and a line of its HMAC")
    return match[1], bytes.fromhex(match[2].decode())


def as_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def from_hex(name: str, member: str, text: str, size: int | None = None) -> bytes:
    """The bytes of a member, ``size`` of them. Raises IntegrityError about ``name``."""
    if not re.fullmatch(r"(?:[0-9a-f]{2})*", text) or (size is not None and len(text) != 2 * size):
        raise IntegrityError(f"{name} has a {member} that is not {'' if size is None else f'{size} bytes of '}hex")
    return bytes.fromhex(text)
