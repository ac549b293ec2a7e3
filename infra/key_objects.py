"""The objects under ``keys/``: listed, read and made. They are walship objects with neither codec nor cipher."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import blake3

from handlers.checksum import Checksum
from handlers.compress import Compress
from handlers.encrypt import Encrypt
from infra.recipients import show_recipient
from infra.ring import Front, read_front, ring_name
from pipeline.chain import Chain, Expected
from pipeline.contracts import Body, Buffer, DataKey, ObjectInfo, Store
from pipeline.errors import ConfigError, IntegrityError
from pipeline.objects import MemoryBody

#: A larger object under ``keys/`` is refused unread; a ring that lists 10,000 former data keys is 700 kB.
MAX_SIZE = 1 << 20
_RING_KEY = re.compile(r"keys/ring-(\d{8})")
_DATA_KEY = re.compile(r"keys/data-([0-9a-f]{32})")


@dataclass(frozen=True, slots=True)
class KeyListing:
    """What lies under ``keys/`` at one destination; anything else there is not ours to judge."""

    #: By number.
    rings: dict[int, ObjectInfo] = field(default_factory=dict)
    #: By id.
    data: dict[str, ObjectInfo] = field(default_factory=dict)

    @property
    def newest(self) -> int:
        """Number of the newest ring; 0 if there is none."""
        return max(self.rings, default=0)


async def list_keys(store: Store, prefix: str = "keys/") -> KeyListing:
    """Raises StoreError. ``prefix``: ``keys/ring-`` for the rings alone."""
    listing = KeyListing()
    async for info in store.list(prefix):
        if match := _RING_KEY.fullmatch(info.key):
            listing.rings[int(match[1])] = info
        elif match := _DATA_KEY.fullmatch(info.key):
            listing.data[match[1]] = info
    return listing


async def read_key_object(store: Store, info: ObjectInfo, system_id: str) -> bytes:
    """The plaintext of one of them. Raises StoreError, IntegrityError."""
    if info.size > MAX_SIZE:
        raise IntegrityError(f"{info.key} in {store.name} is {info.size} bytes; a key object has at most {MAX_SIZE}")
    body = await store.get(info.key)
    try:
        expected = Expected(info.key, system_id, most=MAX_SIZE)
        return bytes(_chain(system_id).decode(expected, body.chunks())[1])
    finally:
        body.close()


async def read_newest_front(store: Store, system_id: str) -> Front | None:
    """What the newest ring of a destination shows unopened; None if it has none. Raises StoreError, IntegrityError."""
    rings = (await list_keys(store, "keys/ring-")).rings
    if not rings:
        return None
    number = max(rings)
    front = read_front(ring_name(number), await read_key_object(store, rings[number], system_id))
    if (front.number, front.system_id) != (number, system_id):
        raise IntegrityError(f"{ring_name(number)} in {store.name} is ring {front.number} of {front.system_id}")
    return front


def key_object(name: str, system_id: str, content: bytes, now: datetime) -> Body:
    """The object to be stored."""
    pieces = _chain(system_id).encode(name, content, created=now.astimezone(UTC))
    return MemoryBody([b"".join(bytes(piece) for piece in pieces)])


def openers(front: Front) -> str:
    """Who could open a ring, in words: the end of ``keys/ring-00000002 opens with …``."""
    ways = []
    if front.passphrases:
        ways.append("a passphrase" if front.passphrases == 1 else f"any of {front.passphrases} passphrases")
    for public, label in front.recipients.items():
        ways.append(f"the private key of {show_recipient(public)}{f' ({label})' if label else ''}")
    if front.strange:
        ways.append("a way that a newer walship knows")
    return " or ".join(ways) or "nothing"


def fingerprint(key: bytes | None, name: str, plain: Buffer) -> str:
    """BLAKE3 over the name's length (8 bytes, big-endian), name and plaintext; 32 bytes as hex."""
    digest = blake3.blake3() if key is None else blake3.blake3(key=key)
    encoded = name.encode()
    digest.update(len(encoded).to_bytes(8, "big") + encoded)
    digest.update(plain)
    return digest.hexdigest()


class _Plain:
    """The Keyring of what lies under ``keys/``, and nothing else: framed and checksummed as all objects are, plain."""

    def current(self) -> DataKey:
        raise ConfigError("a key object is not encrypted")

    def find(self, key_id: str) -> DataKey:
        raise IntegrityError(f"a key object says that it is encrypted under the data key {key_id}")

    def must_encrypt(self, name: str) -> bool:  # noqa: ARG002  as the protocol wants it
        return False

    fingerprint: Callable[[str, Buffer], str] = staticmethod(lambda name, plain: fingerprint(None, name, plain))


def _chain(system_id: str) -> Chain:
    plain = _Plain()
    return Chain([Compress("none"), Encrypt(plain, lambda _name: "none"), Checksum()], plain, system_id)
