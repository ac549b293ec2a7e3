"""The key ring and the data keys, as bytes: format 1, ``docs/format.md``. No I/O; ``keys`` reads and writes them.

Both are two lines: a JSON object, and the HMAC-SHA256 of that line's bytes as hex. The ring's is keyed from the private
key of the repository, which nobody has who cannot open the ring; a data key's from the writer secret, which only
writers have. So whoever may write to a bucket can destroy keys but not put keys or a weaker policy in their place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from infra.sealing import as_json, context, derive, from_hex, is_mac, public_of, seal, signed, two_lines, unseal
from infra.wraps import SCRYPT_N, Wrap, check_wraps, unwrap, wrap_passphrase, wrap_recipient
from pipeline.catalog import data_key_name
from pipeline.contracts import DataKey
from pipeline.errors import IntegrityError
from pipeline.objects import read_members

_RING = {"ring": int, "system_id": str, "created": str, "public_key": str, "wraps": list, "sealed": str}
_SEALED = {"policy": dict, "writer_secret": str, "former": list}
_FORMER = {"private_key": str, "writer_secret": str, "data_keys": list}
_DATA = {"id": str, "system_id": str, "ring": int, "created": str, "sealed": str}


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
        return public_of(self.private_key)

    @property
    def fingerprint_key(self) -> bytes:
        """The same for the whole life of a repository, so that a rotation makes no segment look like another."""
        return derive(self.former[-1].writer_secret if self.former else self.writer_secret, "fingerprint")

    @property
    def writer(self) -> Writer:
        """What is left of it for a host that is to write and not to read."""
        return Writer(
            self.number, self.system_id, self.policy, self.public_key, self.writer_secret, self.fingerprint_key
        )


@dataclass(frozen=True, slots=True)
class Writer:
    """What writes to a repository, tells same from other bytes there, and reads nothing."""

    #: Of the ring that it was taken from.
    number: int
    system_id: str
    policy: Policy
    public_key: bytes
    writer_secret: bytes = field(repr=False)
    fingerprint_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Front:
    """What a ring shows to everybody, opened or not: authentic only once it was opened."""

    number: int
    system_id: str
    created: str
    public_key: bytes
    #: As they stand there, known or not: all of them wrap the same private key, or say something for people.
    wraps: tuple[Wrap, ...]

    @property
    def passphrases(self) -> int:
        return sum(wrap.get("kind") == "scrypt" for wrap in self.wraps)

    @property
    def recipients(self) -> dict[bytes, str]:
        """Public key → its label, or empty."""
        labels = {wrap.get("public_key"): wrap.get("label") for wrap in self.wraps if wrap.get("kind") == "label"}
        keys = [wrap["public_key"] for wrap in self.wraps if wrap.get("kind") == "recipient"]
        return {bytes.fromhex(key): str(labels.get(key) or "") for key in keys}

    @property
    def strange(self) -> int:
        """Wraps of kinds that this version does not know."""
        return sum(wrap.get("kind") not in ("scrypt", "recipient", "label") for wrap in self.wraps)


@dataclass(frozen=True, slots=True)
class SealedKey:
    """A data key of this repository's writers, not opened yet."""

    id: str
    #: Number of the ring that was in force when it was made.
    ring: int
    sealed: bytes = field(repr=False)
    #: The repository key it was sealed to; None for a host that only writes.
    private_key: bytes | None = field(repr=False)


def ring_name(number: int) -> str:
    """Key of a ring below the cluster's folder. The highest number counts."""
    return f"keys/ring-{number:08d}"


def fresh_ring(system_id: str, policy: Policy) -> Ring:
    """The first ring of a new repository."""
    return Ring(1, system_id, policy, os.urandom(32), X25519PrivateKey.generate().private_bytes_raw())


def seal_ring(
    ring: Ring,
    passphrases: Sequence[str],
    recipients: Sequence[bytes],
    created: datetime,
    *,
    carried: Sequence[Wrap] = (),
    scrypt_n: int = SCRYPT_N,
) -> bytes:
    """The content of ``keys/ring-<number>``. Slow: one scrypt for each passphrase; ``scrypt_n`` is its cost.

    ``recipients`` are X25519 public keys whose owners may open it too. ``carried``: wraps of the same private key, from
    the ring before. Raises ConfigError for an empty passphrase, IntegrityError for a ring that readers would refuse.
    """
    wraps: list[Wrap] = [*carried]
    wraps += [wrap_passphrase(ring.private_key, ring.system_id, each, scrypt_n) for each in passphrases]
    wraps += [wrap_recipient(ring.private_key, ring.system_id, each) for each in recipients]
    list(check_wraps(ring_name(ring.number), wraps))
    former = [
        {
            "private_key": old.private_key.hex(),
            "writer_secret": old.writer_secret.hex(),
            "data_keys": sorted(old.data_keys),
        }
        for old in ring.former
    ]
    inner = as_json({"policy": asdict(ring.policy), "writer_secret": ring.writer_secret.hex(), "former": former})
    return signed(
        {
            "ring": ring.number,
            "system_id": ring.system_id,
            "created": moment(created),
            "public_key": ring.public_key.hex(),
            "wraps": [dict(wrap) for wrap in wraps],
            "sealed": seal(inner, ring.public_key, context("ring", ring.system_id)).hex(),
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
    line, mac = two_lines(name, content)
    members = read_members(name, line, _RING)
    public = from_hex(name, "public_key", members["public_key"], 32)
    opened = unwrap(name, system_id, members["wraps"], public, passphrase, identity)
    private = next((private for _, private in opened), None)
    if private is None:
        return None
    if not is_mac(derive(private, "ring"), line, mac):
        raise IntegrityError(
            f"{name} was changed by somebody who cannot open it",
            hint="take the ring from another destination, and find out who else may write to this one",
        )
    if (members["ring"], members["system_id"]) != (number, system_id):
        raise IntegrityError(
            f"{name} is ring {members['ring']} of the cluster {members['system_id']}, not ring {number} of {system_id}"
        )
    sealed = _unseal(name, from_hex(name, "sealed", members["sealed"]), private, context("ring", system_id))
    inner = read_members(name, sealed, _SEALED)
    policy = read_members(name, as_json(inner["policy"]), {"wal": bool, "base": bool})
    secret = from_hex(name, "writer_secret", inner["writer_secret"], 32)
    former = tuple(_former(name, old) for old in inner["former"])
    return Ring(number, system_id, Policy(**policy), secret, private, former)


def read_front(name: str, content: bytes) -> Front:
    """What a ring says without being opened. Raises IntegrityError for what is no ring, or asks for too much work."""
    members = read_members(name, two_lines(name, content)[0], _RING)
    public = from_hex(name, "public_key", members["public_key"], 32)
    for _, wrap in check_wraps(name, members["wraps"]):
        if wrap["kind"] == "recipient":
            from_hex(name, "public_key", wrap["public_key"], 32)
    wraps = tuple(wrap if isinstance(wrap, dict) else {"kind": None, "was": wrap} for wrap in members["wraps"])
    return Front(members["ring"], members["system_id"], members["created"], public, wraps)


def make_data_key(ring: Ring | Writer, created: datetime) -> tuple[DataKey, bytes]:
    """A fresh data key, and the content of its ``keys/data-<id>``. Needs no private key."""
    key = DataKey(os.urandom(16).hex(), os.urandom(32))
    info = context("data key", ring.system_id, key.id)
    content = signed(
        {
            "id": key.id,
            "system_id": ring.system_id,
            "ring": ring.number,
            "created": moment(created),
            "sealed": seal(key.secret, ring.public_key, info).hex(),
        },
        derive(ring.writer_secret, "data key"),
    )
    return key, content


def read_data_key(ring: Ring | Writer, key_id: str, content: bytes) -> SealedKey:
    """A data key, checked but not opened. Raises IntegrityError if no writer of this repository made it.

    Those made under a former writer secret are nothing that a ``Writer`` knows.
    """
    name = data_key_name(key_id)
    line, mac = two_lines(name, content)
    makers: list[tuple[bytes, bytes | None]]
    if isinstance(ring, Writer):
        makers = [(ring.writer_secret, None)]
    else:
        makers = [(ring.writer_secret, ring.private_key)]
        makers += [(old.writer_secret, old.private_key) for old in ring.former if key_id in old.data_keys]
    maker = next((maker for maker in makers if is_mac(derive(maker[0], "data key"), line, mac)), None)
    if maker is None:
        raise IntegrityError(
            f"{name} was not made by a writer of this repository, or was changed",
            hint="take it from another destination; what is encrypted under it cannot be trusted until then",
        )
    members = read_members(name, line, _DATA)
    if (members["id"], members["system_id"]) != (key_id, ring.system_id):
        raise IntegrityError(f"{name} is the data key {members['id']} of the cluster {members['system_id']}")
    return SealedKey(key_id, members["ring"], from_hex(name, "sealed", members["sealed"]), maker[1])


def unlisted_maker(ring: Ring, key_id: str, content: bytes) -> int | None:
    """Which of ``ring.former`` a data key was made under that is not listed there; None for all others.

    A writer made it just as the repository's key was replaced; or somebody who has the former writer secret did, later:
    only people can tell. Raises IntegrityError for what is no data key of that name.
    """
    name = data_key_name(key_id)
    line, mac = two_lines(name, content)
    for place, old in enumerate(ring.former):
        if key_id not in old.data_keys and is_mac(derive(old.writer_secret, "data key"), line, mac):
            members = read_members(name, line, _DATA)
            if (members["id"], members["system_id"]) == (key_id, ring.system_id):
                return place
    return None


def open_data_key(ring: Ring, key: SealedKey) -> DataKey:
    """The data key itself. Raises IntegrityError if it was sealed to another repository key."""
    name = data_key_name(key.id)
    assert key.private_key is not None, "a ring has one"
    secret = _unseal(name, key.sealed, key.private_key, context("data key", ring.system_id, key.id))
    if len(secret) != 32:
        raise IntegrityError(f"{name} holds a key of {len(secret)} bytes, not 32")
    return DataKey(key.id, secret)


def _former(name: str, value: Any) -> Former:
    old = read_members(name, as_json(value), _FORMER)
    if not all(isinstance(key_id, str) for key_id in old["data_keys"]):
        raise IntegrityError(f"{name} lists data keys of a former ring that are no ids")
    private = from_hex(name, "private_key", old["private_key"], 32)
    secret = from_hex(name, "writer_secret", old["writer_secret"], 32)
    return Former(private, secret, frozenset(old["data_keys"]))


def _unseal(name: str, sealed: bytes, private: bytes, info: bytes) -> bytes:
    try:
        return unseal(sealed, private, info)
    except InvalidTag:
        raise IntegrityError(f"{name} was sealed to another key than this repository's") from None


def moment(when: datetime) -> str:
    """RFC 3339 in UTC."""
    return when.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
