"""The keys of one repository: found in a store, checked, and handed to the stages as a Keyring.

The objects under ``keys/`` are walship objects with neither codec nor cipher; what protects them is inside (``ring``).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import blake3
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from handlers.checksum import Checksum
from handlers.compress import Compress
from handlers.encrypt import Encrypt
from infra.ring import (
    Policy,
    Ring,
    SealedKey,
    fresh_ring,
    make_data_key,
    open_data_key,
    open_ring,
    read_data_key,
    ring_name,
    seal_ring,
)
from pipeline.catalog import data_key_name, kind_of
from pipeline.chain import Chain, Expected
from pipeline.contracts import Body, Buffer, Clock, DataKey, ObjectInfo, Store
from pipeline.errors import ConfigError, IntegrityError, StoreError
from pipeline.objects import MemoryBody, read_members

__all__ = ["Policy", "RepositoryKeys", "create_ring", "new_ring", "open_keyring"]

#: A larger object under ``keys/`` is refused unread; a ring that lists 10,000 former data keys is 700 kB.
_MAX_SIZE = 1 << 20
#: Data keys read at a time.
_AT_ONCE = 16
_RING_KEY = re.compile(r"keys/ring-(\d{8})")
_DATA_KEY = re.compile(r"keys/data-([0-9a-f]{32})")
_RESTORE = {
    "walship_restore_keys": int, "system_id": str, "policy": dict, "keys": dict, "ring": str, "number": int,
    "identity": str,
}  # fmt: skip


class RepositoryKeys:
    """The Keyring of one repository. See ``pipeline.contracts.Keyring``; made by ``open_keyring``.

    ``find`` opens a data key when it is first asked for; ``refresh`` reads those written since. Safe to use from worker
    threads while ``refresh`` runs.
    """

    def __init__(
        self, system_id: str, ring: Ring | None, policy: Policy, *, store: Store | None, allow_unencrypted: bool
    ) -> None:
        self.policy = policy
        #: Name and content of the sealed data key that must be stored at a destination before anything encrypted
        #: under it; None unless this process writes encrypted objects.
        self.key_object: tuple[str, Body] | None = None
        self._system_id = system_id
        self._ring = ring
        self._store = store
        self._allow_unencrypted = allow_unencrypted
        self._fingerprint_key = ring.fingerprint_key if ring else None
        self._current: DataKey | None = None
        self._opened: dict[str, DataKey] = {}
        self._sealed: dict[str, SealedKey | IntegrityError] = {}

    @property
    def encrypted(self) -> bool:
        """Whether the repository has a key ring."""
        return self._ring is not None

    def current(self) -> DataKey:
        if self._current is not None:
            return self._current
        if self._ring is None:
            raise ConfigError(
                "nothing can be encrypted: the repository has no key ring",
                hint="walship init makes one, if encryption is on",
            )
        raise ConfigError("the keys of the repository were opened for reading only")

    def find(self, key_id: str) -> DataKey:
        found = self._opened.get(key_id)
        if found is not None:
            return found
        sealed = self._sealed.get(key_id)
        if isinstance(sealed, IntegrityError):
            raise IntegrityError(sealed.fact, hint=sealed.hint)
        if sealed is None or self._ring is None:
            raise self._missing(key_id)
        key = open_data_key(self._ring, sealed)
        self._opened[key_id] = key
        return key

    def must_encrypt(self, name: str) -> bool:
        if self._allow_unencrypted or name.startswith("keys/"):
            return False
        return self.policy.base if kind_of(name) == "base" else self.policy.wal

    def fingerprint(self, name: str, plain: Buffer) -> str:
        """BLAKE3 over the name's length (8 bytes, big-endian), name and plaintext; 32 bytes as hex."""
        return _fingerprint(self._fingerprint_key, name, plain)

    def agree(self, wanted: Policy) -> None:
        """Raises ConfigError if the settings and the repository differ about what is encrypted."""
        if self._ring is None and (wanted.wal or wanted.base):
            raise ConfigError(
                "the settings ask for encryption, and the repository has no key ring",
                hint="a repository is encrypted from its first day on or not at all: init a new one;"
                " if it used to have keys/ring-00000001, copy keys/ back from another destination",
            )
        for kind, theirs, ours in (
            ("WAL", self.policy.wal, wanted.wal),
            ("base backups", self.policy.base, wanted.base),
        ):
            if theirs and not ours:
                raise ConfigError(
                    f"this repository encrypts {kind}, and the settings do not",
                    hint="set BACKUP_ENCRYPTION_ENABLED (and WAL_ENCRYPTION_ENABLED) as they were at init",
                )

    async def refresh(self, store: Store | None = None) -> bool:
        """Read the data keys that are not known yet, from the store that was opened or from another one.

        True if any was there that was not known. A damaged key is an error only when ``find`` needs it. Raises
        IntegrityError if a data key knows of a newer ring than the store has: somebody put an older one back.
        """
        store = store or self._store
        if store is None or self._ring is None:
            return False
        rings, data = await _listing(store)
        unknown = {key_id: info for key_id, info in data.items() if not isinstance(self._sealed.get(key_id), SealedKey)}
        gate = asyncio.Semaphore(_AT_ONCE)
        try:
            async with asyncio.TaskGroup() as group:
                for key_id, info in unknown.items():
                    group.create_task(self._load(store, gate, self._ring, key_id, info))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None  # one store that fails is one error, however many keys it has
        newest = max((key.ring for key in self._sealed.values() if isinstance(key, SealedKey)), default=0)
        if newest > max(self._ring.number, *rings, 0):
            raise IntegrityError(
                f"data keys were made under {ring_name(newest)}, and {store.name} has no ring newer"
                f" than {ring_name(self._ring.number)}",
                hint="an older key ring was put back: copy keys/ from another destination",
            )
        return any(isinstance(self._sealed.get(key_id), SealedKey) for key_id in unknown)

    async def refresh_from(self, stores: Iterable[Store]) -> bool:
        """``refresh`` from each; one that does not answer, or whose keys were tampered with, teaches nothing."""
        learned = False
        for store in stores:
            with suppress(StoreError, IntegrityError):
                learned |= await self.refresh(store)
        return learned

    async def _load(self, store: Store, gate: asyncio.Semaphore, ring: Ring, key_id: str, info: ObjectInfo) -> None:
        async with gate:
            try:
                content = await _read(store, info, self._system_id)
                self._sealed[key_id] = read_data_key(ring, key_id, content)
            except IntegrityError as error:
                self._sealed[key_id] = error

    def _missing(self, key_id: str) -> IntegrityError:
        if self._ring is None and not self._opened:
            return IntegrityError(
                f"an object is encrypted under the data key {key_id}, and no key ring was opened",
                hint="the repository has none: copy keys/ from another destination, if it was encrypted",
            )
        opener = ring_name(self._ring.number) if self._ring else "the key ring of the repository"
        return IntegrityError(
            f"the data key {key_id} is not known here",
            hint=f"{data_key_name(key_id)} is missing; copied back from another destination, whoever opens {opener}"
            " can open it",
        )

    def restore_keys(self, *, follow: bool = False) -> bytes:
        """All data keys known now, opened: what a restored server needs to read WAL without the passphrase.

        A JSON object; secret, to be stored with mode 0600. It can read and not write, and knows no later data key;
        unless it is to ``follow`` the archive: a data key is new each time the service starts. Then it holds the opened
        ring, which reads whatever is written under it from now on, and could write.
        """
        ring = identity = b""
        if follow and self._ring is not None:
            # Sealed to an identity that goes with it: the ring is read as any other, and no format is new.
            private = X25519PrivateKey.generate()
            identity = private.private_bytes_raw()
            ring = seal_ring(self._ring, [], [private.public_key().public_bytes_raw()], datetime.now(UTC))
        for key_id, sealed in self._sealed.items():
            if isinstance(sealed, SealedKey):  # a damaged one is an error when an object needs it, not here
                self.find(key_id)
        keys = {key.id: key.secret.hex() for key in self._opened.values()}
        return json.dumps(
            {
                "walship_restore_keys": 1,
                "system_id": self._system_id,
                "policy": asdict(self.policy),
                "keys": keys,
                "ring": ring.decode(),
                "number": self._ring.number if self._ring else 0,
                "identity": identity.hex(),
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def from_restore_keys(cls, content: bytes, *, allow_unencrypted: bool = False) -> RepositoryKeys:
        """The opposite of ``restore_keys``. Raises IntegrityError."""
        what = "the file of restore keys"
        members = read_members(what, content, _RESTORE)
        if members["walship_restore_keys"] != 1:
            raise IntegrityError(f"{what} is of format {members['walship_restore_keys']}; this walship reads format 1")
        policy = read_members(what, json.dumps(members["policy"]).encode(), {"wal": bool, "base": bool})
        ring = _identified(what, members) if members["ring"] else None
        keys = cls(members["system_id"], ring, Policy(**policy), store=None, allow_unencrypted=allow_unencrypted)
        for key_id, secret in members["keys"].items():
            if not isinstance(secret, str) or not re.fullmatch("[0-9a-f]{64}", secret):
                raise IntegrityError(f"{what} holds a data key {key_id} that is not 32 bytes of hex")
            keys._opened[key_id] = DataKey(key_id, bytes.fromhex(secret))
        return keys

    def write_under_known(self, now: datetime) -> None:
        """Let ``current`` answer also where the keys were opened to read: for a record of what a reader did.

        Under a data key that is stored already, since each new one is kept for ever and read at every start; under a
        fresh one (``key_object``) where there is none of the ring in force. Nothing to do without a ring.
        """
        ring = self._ring
        if ring is None or self._current is not None:
            return
        for key_id, sealed in sorted(self._sealed.items()):
            if isinstance(sealed, SealedKey) and sealed.private_key == ring.private_key:
                self._current = self.find(key_id)
                return
        self._begin_writing(ring, now)

    def _begin_writing(self, ring: Ring, now: datetime) -> None:
        key, content = make_data_key(ring, now)
        self._current = self._opened[key.id] = key
        name = data_key_name(key.id)
        self.key_object = (name, _stored(name, self._system_id, content, now))


def _identified(what: str, members: dict[str, Any]) -> Ring:
    """The ring among restore keys. Raises IntegrityError."""
    if not re.fullmatch("[0-9a-f]{64}", members["identity"]):
        raise IntegrityError(f"{what} holds an identity that is not 32 bytes of hex")
    content, identity = members["ring"].encode(), bytes.fromhex(members["identity"])
    ring = open_ring(what, members["number"], members["system_id"], content, identity=identity)
    if ring is None:
        raise IntegrityError(f"{what} holds a key ring that its identity does not open")
    return ring


async def new_ring(system_id: str, passphrase: str, policy: Policy, clock: Clock) -> tuple[str, Body]:
    """Name and stored bytes of a new repository's first ring: the same ones go to every destination.

    Raises ConfigError for an empty passphrase.
    """
    now = clock.now()
    content = await asyncio.to_thread(seal_ring, fresh_ring(system_id, policy), [passphrase], [], now)
    return ring_name(1), _stored(ring_name(1), system_id, content, now)


async def create_ring(store: Store, system_id: str, passphrase: str, policy: Policy, clock: Clock) -> None:
    """Store a new repository's first ring. ObjectConflict if it has one."""
    name, body = await new_ring(system_id, passphrase, policy, clock)
    await store.put(name, body)


async def open_keyring(
    store: Store,
    system_id: str,
    passphrase: str,
    *,
    writer: bool = False,
    clock: Clock,
    wanted: Policy | None = None,
    allow_unencrypted: bool = False,
) -> RepositoryKeys:
    """The keys of the repository in ``store`` (rooted at the cluster's folder), by its newest ring.

    A repository without a ring has a plain keyring: nothing encrypted, unkeyed fingerprints. ``writer`` makes a fresh
    data key in memory and reads no other (call ``refresh`` before reading what others wrote). ``wanted`` is what the
    settings want encrypted: see ``agree``. A passphrase means that the repository is encrypted: one without a ring is
    refused then, to be written or read, unless ``allow_unencrypted``.

    Raises ConfigError if the passphrase is missing or wrong, or the settings disagree; IntegrityError for keys that
    cannot be what walship wrote.
    """
    rings, _ = await _listing(store)
    ring: Ring | None = None
    if rings:
        ring = await _open_newest(store, system_id, passphrase, max(rings), rings[max(rings)])
    policy = ring.policy if ring else Policy(wal=False, base=False)
    keys = RepositoryKeys(system_id, ring, policy, store=store, allow_unencrypted=allow_unencrypted)
    if wanted is not None:
        keys.agree(wanted)
    if passphrase and ring is None and not allow_unencrypted:
        # Whoever may write to the store could remove keys/ and put plain objects in the place of ours.
        raise ConfigError(
            f"BACKUP_ENCRYPTION_PASSWORD is set, and the repository {system_id} in {store.name} has no key ring",
            hint="unset it if this repository was never encrypted; if it was, copy keys/ back from another destination",
        )
    if ring and writer:
        keys._begin_writing(ring, clock.now())  # noqa: SLF001  # the other half of this function
    elif ring:
        await keys.refresh()
    return keys


async def _open_newest(store: Store, system_id: str, passphrase: str, number: int, info: ObjectInfo) -> Ring:
    if not passphrase:
        raise ConfigError(
            f"the repository {system_id} in {store.name} is encrypted, and BACKUP_ENCRYPTION_PASSWORD is empty",
            hint="set it, or BACKUP_ENCRYPTION_PASSWORD_FILE",
        )
    content = await _read(store, info, system_id)
    ring = await asyncio.to_thread(open_ring, info.key, number, system_id, content, passphrase=passphrase)
    if ring is None:
        raise ConfigError(
            f"BACKUP_ENCRYPTION_PASSWORD does not open the key ring {info.key} of {system_id} in {store.name}",
            hint="use the passphrase of this repository; if it is the right one, the ring was replaced:"
            " compare it with the one at another destination",
        )
    return ring


async def _listing(store: Store) -> tuple[dict[int, ObjectInfo], dict[str, ObjectInfo]]:
    """Rings by number, data keys by id; anything else under ``keys/`` is not ours to judge."""
    rings: dict[int, ObjectInfo] = {}
    data: dict[str, ObjectInfo] = {}
    async for info in store.list("keys/"):
        if match := _RING_KEY.fullmatch(info.key):
            rings[int(match[1])] = info
        elif match := _DATA_KEY.fullmatch(info.key):
            data[match[1]] = info
    return rings, data


async def _read(store: Store, info: ObjectInfo, system_id: str) -> bytes:
    if info.size > _MAX_SIZE:
        raise IntegrityError(f"{info.key} in {store.name} is {info.size} bytes; a key object has at most {_MAX_SIZE}")
    body = await store.get(info.key)
    try:
        expected = Expected(info.key, system_id, most=_MAX_SIZE)
        return bytes(_chain(system_id).decode(expected, body.chunks())[1])
    finally:
        body.close()


def _stored(name: str, system_id: str, content: bytes, now: datetime) -> Body:
    pieces = _chain(system_id).encode(name, content, created=now.astimezone(UTC))
    return MemoryBody([b"".join(bytes(piece) for piece in pieces)])


def _chain(system_id: str) -> Chain:
    """For the objects under ``keys/``: framed and checksummed as all are, and plain."""
    plain = RepositoryKeys(system_id, None, Policy(wal=False, base=False), store=None, allow_unencrypted=False)
    return Chain([Compress("none"), Encrypt(plain, lambda _name: "none"), Checksum()], plain, system_id)


def _fingerprint(key: bytes | None, name: str, plain: Buffer) -> str:
    digest = blake3.blake3() if key is None else blake3.blake3(key=key)
    encoded = name.encode()
    digest.update(len(encoded).to_bytes(8, "big") + encoded)
    digest.update(plain)
    return digest.hexdigest()
