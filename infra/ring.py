"""The key ring and the data keys, as bytes: format 1, ``docs/format.md``. No I/O; ``keys`` reads and writes them.

Both are two lines: a JSON object, and the HMAC-SHA256 of that line's bytes as hex. The ring's is keyed from the private
key of the repository, which nobody has who cannot open the ring; a data key's from the writer secret, which only
writers have. So whoever may write to a bucket can destroy keys but not put keys or a weaker policy in their place.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from pipeline.catalog import data_key_name
from pipeline.contracts import DataKey
from pipeline.errors import ConfigError, IntegrityError
from pipeline.objects import read_members

#: RFC 9180, mode base: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.
_HPKE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
#: What a new wrap costs: 64 MiB and about a quarter of a second.
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 16, 8, 2
#: A ring that asks for more is refused unread: 256 MiB for one wrap, and 16 times a new wrap's work for all together.
_MAX_N = 1 << 18
_MAX_WORK = 16 * SCRYPT_N * SCRYPT_P
#: More wraps than this are no ring that walship made.
_MAX_WRAPS = 256

_RING = {"ring": int, "system_id": str, "created": str, "public_key": str, "wraps": list, "sealed": str}
_SEALED = {"policy": dict, "writer_secret": str, "former": list}
_FORMER = {"private_key": str, "writer_secret": str, "data_keys": list}
_DATA = {"id": str, "system_id": str, "ring": int, "created": str, "sealed": str}
_SCRYPT = {"kind": str, "n": int, "r": int, "p": int, "salt": str, "sealed": str}
_RECIPIENT = {"kind": str, "public_key": str, "sealed": str}
_TWO_LINES = re.compile(rb"([^\n]+)\n([0-9a-f]{64})\n")


@dataclass(frozen=True, slots=True)
class Policy:
    """Which kinds of objects a reader must refuse when they are stored plain."""

    wal: bool
    base: bool


@dataclass(frozen=True, slots=True)
class Former:
    """What a ring before a rotation had: opens what was written until then, and nothing new."""

    private_key: bytes = field(repr=False)
    writer_secret: bytes = field(repr=False)
    #: Ids of the data keys made under it; no other is accepted, should the secret have leaked.
    data_keys: frozenset[str]


@dataclass(frozen=True, slots=True)
class Ring:
    """An opened ring. To write, only ``public_key`` and ``writer_secret`` are used; ``private_key`` reads."""

    number: int
    system_id: str
    policy: Policy
    writer_secret: bytes = field(repr=False)
    private_key: bytes = field(repr=False)
    #: Newest first.
    former: tuple[Former, ...] = ()

    @property
    def public_key(self) -> bytes:
        return X25519PrivateKey.from_private_bytes(self.private_key).public_key().public_bytes_raw()

    @property
    def fingerprint_key(self) -> bytes:
        """The same for the whole life of a repository, so that a rotation makes no segment look like another."""
        return derive(self.former[-1].writer_secret if self.former else self.writer_secret, "fingerprint")


@dataclass(frozen=True, slots=True)
class SealedKey:
    """A data key of this repository's writers, not opened yet."""

    id: str
    #: Number of the ring that was in force when it was made.
    ring: int
    sealed: bytes = field(repr=False)
    #: The repository key it was sealed to.
    private_key: bytes = field(repr=False)


def ring_name(number: int) -> str:
    """Key of a ring below the cluster's folder. The highest number counts."""
    return f"keys/ring-{number:08d}"


def fresh_ring(system_id: str, policy: Policy) -> Ring:
    """The first ring of a new repository."""
    return Ring(1, system_id, policy, os.urandom(32), X25519PrivateKey.generate().private_bytes_raw())


def seal_ring(
    ring: Ring, passphrases: Sequence[str], recipients: Sequence[bytes], created: datetime, *, scrypt_n: int = SCRYPT_N
) -> bytes:
    """The content of ``keys/ring-<number>``. Slow: one scrypt for each passphrase; ``scrypt_n`` is its cost.

    ``recipients`` are X25519 public keys whose owners may open it too. Raises ConfigError for an empty passphrase.
    """
    wraps: list[dict[str, Any]] = []
    for passphrase in passphrases:
        if not passphrase:
            raise ConfigError(
                "a key ring needs a passphrase, and BACKUP_ENCRYPTION_PASSWORD is empty",
                hint="set it, or BACKUP_ENCRYPTION_PASSWORD_FILE, and keep a copy far from this machine",
            )
        salt = os.urandom(32)
        wrap = AESGCM(_scrypt(passphrase, salt, scrypt_n, SCRYPT_R, SCRYPT_P))
        # The wrap's key is used this once, because the salt is fresh: so a constant nonce is right.
        sealed = wrap.encrypt(bytes(12), ring.private_key, _context("passphrase", ring.system_id))
        costs = {"n": scrypt_n, "r": SCRYPT_R, "p": SCRYPT_P}
        wraps.append({"kind": "scrypt", **costs, "salt": salt.hex(), "sealed": sealed.hex()})
    for recipient in recipients:
        sealed = _seal(ring.private_key, recipient, _context("recipient", ring.system_id))
        wraps.append({"kind": "recipient", "public_key": recipient.hex(), "sealed": sealed.hex()})
    former = [
        {
            "private_key": old.private_key.hex(),
            "writer_secret": old.writer_secret.hex(),
            "data_keys": sorted(old.data_keys),
        }
        for old in ring.former
    ]
    inner = _json({"policy": asdict(ring.policy), "writer_secret": ring.writer_secret.hex(), "former": former})
    return _signed(
        {
            "ring": ring.number,
            "system_id": ring.system_id,
            "created": _moment(created),
            "public_key": ring.public_key.hex(),
            "wraps": wraps,
            "sealed": _seal(inner, ring.public_key, _context("ring", ring.system_id)).hex(),
        },
        derive(ring.private_key, "ring"),
    )


def open_ring(
    name: str, number: int, system_id: str, content: bytes, *, passphrase: str = "", identity: bytes = b""
) -> Ring | None:
    """The ring, opened with a passphrase or with a recipient's X25519 private key; None if that does not open it.

    Slow: one scrypt for each passphrase wrap tried. Raises IntegrityError for a ring that is damaged, of another
    cluster or number, asks for unreasonable work, or was not made by somebody who holds the private key.
    """
    line, mac = _two_lines(name, content)
    members = read_members(name, line, _RING)
    public = _hex(name, "public_key", members["public_key"], 32)
    private = _unwrap(name, system_id, members["wraps"], public, passphrase, identity)
    if private is None:
        return None
    if not _is_mac(derive(private, "ring"), line, mac):
        raise IntegrityError(
            f"{name} was changed by somebody who cannot open it",
            hint="take the ring from another destination, and find out who else may write to this one",
        )
    if (members["ring"], members["system_id"]) != (number, system_id):
        raise IntegrityError(
            f"{name} is ring {members['ring']} of the cluster {members['system_id']}, not ring {number} of {system_id}"
        )
    sealed = _unseal(name, _hex(name, "sealed", members["sealed"]), private, _context("ring", system_id))
    inner = read_members(name, sealed, _SEALED)
    policy = read_members(name, _json(inner["policy"]), {"wal": bool, "base": bool})
    secret = _hex(name, "writer_secret", inner["writer_secret"], 32)
    former = tuple(_former(name, old) for old in inner["former"])
    return Ring(number, system_id, Policy(**policy), secret, private, former)


def make_data_key(ring: Ring, created: datetime) -> tuple[DataKey, bytes]:
    """A fresh data key, and the content of its ``keys/data-<id>``. Needs no private key."""
    key = DataKey(os.urandom(16).hex(), os.urandom(32))
    context = _context("data key", ring.system_id, key.id)
    content = _signed(
        {
            "id": key.id,
            "system_id": ring.system_id,
            "ring": ring.number,
            "created": _moment(created),
            "sealed": _seal(key.secret, ring.public_key, context).hex(),
        },
        derive(ring.writer_secret, "data key"),
    )
    return key, content


def read_data_key(ring: Ring, key_id: str, content: bytes) -> SealedKey:
    """A data key, checked but not opened. Raises IntegrityError if no writer of this repository made it."""
    name = data_key_name(key_id)
    line, mac = _two_lines(name, content)
    makers = [(ring.writer_secret, ring.private_key)]
    makers += [(old.writer_secret, old.private_key) for old in ring.former if key_id in old.data_keys]
    private = next((private for secret, private in makers if _is_mac(derive(secret, "data key"), line, mac)), None)
    if private is None:
        raise IntegrityError(
            f"{name} was not made by a writer of this repository, or was changed",
            hint="take it from another destination; what is encrypted under it cannot be trusted until then",
        )
    members = read_members(name, line, _DATA)
    if (members["id"], members["system_id"]) != (key_id, ring.system_id):
        raise IntegrityError(f"{name} is the data key {members['id']} of the cluster {members['system_id']}")
    return SealedKey(key_id, members["ring"], _hex(name, "sealed", members["sealed"]), private)


def open_data_key(ring: Ring, key: SealedKey) -> DataKey:
    """The data key itself. Raises IntegrityError if it was sealed to another repository key."""
    name = data_key_name(key.id)
    secret = _unseal(name, key.sealed, key.private_key, _context("data key", ring.system_id, key.id))
    if len(secret) != 32:
        raise IntegrityError(f"{name} holds a key of {len(secret)} bytes, not 32")
    return DataKey(key.id, secret)


def derive(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose, by HKDF-SHA256 without salt."""
    return HKDF(SHA256(), 32, salt=None, info=_context(purpose)).derive(secret)


def _former(name: str, value: Any) -> Former:
    old = read_members(name, _json(value), _FORMER)
    if not all(isinstance(key_id, str) for key_id in old["data_keys"]):
        raise IntegrityError(f"{name} lists data keys of a former ring that are no ids")
    private = _hex(name, "private_key", old["private_key"], 32)
    secret = _hex(name, "writer_secret", old["writer_secret"], 32)
    return Former(private, secret, frozenset(old["data_keys"]))


def _unwrap(
    name: str, system_id: str, wraps: list[Any], public: bytes, passphrase: str, identity: bytes
) -> bytes | None:
    """The private key that belongs to ``public``. Wraps of unknown kinds are for newer versions to know."""
    work = 0
    if len(wraps) > _MAX_WRAPS:
        raise IntegrityError(f"{name} has {len(wraps)} wraps; at most {_MAX_WRAPS} make sense")
    known: list[dict[str, Any]] = []
    for wrap in wraps:
        kind = wrap.get("kind") if isinstance(wrap, dict) else None
        if kind == "scrypt":
            work += _scrypt_work(name, read_members(name, _json(wrap), _SCRYPT))
            known.append(wrap)
        elif kind == "recipient":
            known.append(read_members(name, _json(wrap), _RECIPIENT))
    if work > _MAX_WORK:
        raise IntegrityError(f"{name} asks for {work // (SCRYPT_N * SCRYPT_P)} times the work of one passphrase")
    for wrap in known:
        sealed = _hex(name, "sealed", wrap["sealed"])
        try:
            if wrap["kind"] == "scrypt" and passphrase:
                key = _scrypt(passphrase, _hex(name, "salt", wrap["salt"], 32), wrap["n"], wrap["r"], wrap["p"])
                private = AESGCM(key).decrypt(bytes(12), sealed, _context("passphrase", system_id))
            elif wrap["kind"] == "recipient" and identity:
                owner = X25519PrivateKey.from_private_bytes(identity)
                private = _HPKE.decrypt(sealed, owner, _context("recipient", system_id))
            else:
                continue
        except InvalidTag:
            continue
        # A ciphertext can be made to open under several keys; only one private key has this public key.
        if (
            len(private) == 32
            and X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw() == public
        ):
            return private
    return None


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
    return Scrypt(salt=salt, length=32, n=n, r=r, p=p).derive(text)


def _seal(secret: bytes, public: bytes, info: bytes) -> bytes:
    return _HPKE.encrypt(secret, X25519PublicKey.from_public_bytes(public), info)


def _unseal(name: str, sealed: bytes, private: bytes, info: bytes) -> bytes:
    try:
        return _HPKE.decrypt(sealed, X25519PrivateKey.from_private_bytes(private), info)
    except InvalidTag:
        raise IntegrityError(f"{name} was sealed to another key than this repository's") from None


def _context(purpose: str, *values: str) -> bytes:
    return "\0".join((f"walship 1 {purpose}", *values)).encode()


def _signed(members: dict[str, Any], key: bytes) -> bytes:
    line = _json(members)
    return line + b"\n" + hmac.digest(key, line, "sha256").hex().encode() + b"\n"


def _is_mac(key: bytes, line: bytes, mac: bytes) -> bool:
    return hmac.compare_digest(hmac.digest(key, line, "sha256"), mac)


def _two_lines(name: str, content: bytes) -> tuple[bytes, bytes]:
    match = _TWO_LINES.fullmatch(content)
    if match is None:
        raise IntegrityError(f"{name} is not a line of JSON and a line of its HMAC")
    return match[1], bytes.fromhex(match[2].decode())


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _hex(name: str, member: str, text: str, size: int | None = None) -> bytes:
    if not re.fullmatch(r"(?:[0-9a-f]{2})*", text) or (size is not None and len(text) != 2 * size):
        raise IntegrityError(f"{name} has a {member} that is not {'' if size is None else f'{size} bytes of '}hex")
    return bytes.fromhex(text)


def _moment(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
