"""The keys of one repository, opened: what the stages ask when they encrypt. ``keys`` finds and opens them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from infra.key_objects import fingerprint, key_object, list_keys, read_key_object, read_newest_front
from infra.ring import (
    Policy,
    Ring,
    SealedKey,
    Writer,
    make_data_key,
    open_data_key,
    open_ring,
    read_data_key,
    ring_name,
    seal_ring,
)
from infra.sealing import public_of
from pipeline.catalog import data_key_name, kind_of
from pipeline.contracts import Body, Buffer, DataKey, ObjectInfo, Store
from pipeline.errors import ConfigError, IntegrityError, Sealed, StoreError
from pipeline.objects import read_members

#: Data keys read at a time.
_AT_ONCE = 16
_RESTORE = {
    "walship_restore_keys": int, "system_id": str, "policy": dict, "keys": dict, "ring": str, "number": int,
    "identity": str,
}  # fmt: skip


class KeyReplacedError(ConfigError):
    """The repository got another key while this process began to write: it has to begin anew."""


class RepositoryKeys:
    """The Keyring of one repository. See ``pipeline.contracts.Keyring``; made by ``open_keyring``.

    ``find`` opens a data key when it is first asked for; ``refresh`` reads those written since. Safe to use from worker
    threads while ``refresh`` runs.
    """

    def __init__(
        self,
        system_id: str,
        ring: Ring | Writer | None,
        policy: Policy,
        *,
        store: Store | None,
        allow_unencrypted: bool,
        opened_by: str = "a passphrase of the repository",
    ) -> None:
        """``opened_by``: who could open the ring, in words, for a host that cannot."""
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
        self._opened_by = opened_by
        #: Number of the newest ring that was seen anywhere.
        self._newest = ring.number if ring else 0
        #: Our data key was stored before the repository got another key, if it ever does.
        self._confirmed = False

    @property
    def reads(self) -> bool:
        """False for a host that can only write; True also where nothing is encrypted."""
        return not isinstance(self._ring, Writer)

    @property
    def ring(self) -> Ring | Writer | None:
        """What was opened; None in a repository without a ring."""
        return self._ring

    @property
    def data_keys(self) -> dict[str, int]:
        """Id → number of the ring that was in force, of each data key that is genuine, as far as they were read."""
        return {key_id: key.ring for key_id, key in self._sealed.items() if isinstance(key, SealedKey)}

    def need_reading(self, what: str) -> None:
        """Raises ConfigError on a host that can only write. ``what`` is what needs more: ``walship restore``."""
        if not self.reads:
            raise ConfigError(
                f"{what} reads what is stored, and this host can only write: WALSHIP_WRITER_FILE opens nothing",
                hint=f"run it where WALSHIP_IDENTITY_FILE or BACKUP_ENCRYPTION_PASSWORD is set: the key ring opens with"
                f" {self._opened_by}",
            )

    def superseded(self) -> str:
        """A sentence if a newer ring was seen than the one that was opened, else empty."""
        if self._ring is None or self._newest <= self._ring.number:
            return ""
        return (
            f"{ring_name(self._newest)} is there: the keys of the repository were changed, and this process goes on"
            f" with {ring_name(self._ring.number)} until it is started again"
        )

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
        if isinstance(self._ring, Writer):
            raise Sealed(
                f"it is encrypted under the data key {key_id}, and this host can only write (WALSHIP_WRITER_FILE)",
                hint=f"read it where a key is at hand: {ring_name(self._ring.number)} opens with {self._opened_by}",
            )
        if isinstance(sealed, IntegrityError):
            raise IntegrityError(sealed.fact, hint=sealed.hint)
        if sealed is None or self._ring is None:
            raise self._missing(key_id)
        key = open_data_key(self._ring, sealed)
        self._opened[key_id] = key
        return key

    def must_encrypt(self, name: str) -> bool:
        if self._allow_unencrypted or name.startswith(("keys/", "verified/")):
            return False  # these hold no secret, and show by themselves who has made them
        return self.policy.base if kind_of(name) == "base" else self.policy.wal

    def fingerprint(self, name: str, plain: Buffer) -> str:
        """BLAKE3 over the name's length (8 bytes, big-endian), name and plaintext; 32 bytes as hex."""
        return fingerprint(self._fingerprint_key, name, plain)

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
        listing = await list_keys(store)
        self._newest = max(self._newest, listing.newest)
        # A damaged one may have been mended; those of a former key are nothing that a writer will ever know.
        settled = SealedKey if self.reads else SealedKey | IntegrityError
        unknown = {
            key_id: info for key_id, info in listing.data.items() if not isinstance(self._sealed.get(key_id), settled)
        }
        gate = asyncio.Semaphore(_AT_ONCE)
        try:
            async with asyncio.TaskGroup() as group:
                for key_id, info in unknown.items():
                    group.create_task(self._load(store, gate, self._ring, key_id, info))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None  # one store that fails is one error, however many keys it has
        newest = max((key.ring for key in self._sealed.values() if isinstance(key, SealedKey)), default=0)
        if newest > max(self._ring.number, listing.newest):
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

    async def confirm(self, store: Store) -> None:
        """Called once our data key is stored there, before anything is encrypted under it.

        Whoever replaces the repository's key lists, in the new ring, the data keys that go on being accepted. So ours
        has to be there before that ring is; or what lies under it could never be read. He stores the ring and looks for
        keys once more, we store our key and look for rings: one of us sees the other. Raises KeyReplacedError.
        """
        ring = self._ring
        if ring is None or self._confirmed:
            return
        try:
            front = await read_newest_front(store, self._system_id)
        except IntegrityError:
            return  # damaged, or no ring at all: nothing that was made by whoever replaced the key
        if front is not None and front.number > ring.number and front.public_key != ring.public_key:
            raise KeyReplacedError(
                f"the repository has a new key since {ring_name(front.number)}, and {ring_name(ring.number)} was"
                " opened",
                hint="start again; nothing was stored under the former key",
            )
        self._confirmed = True

    async def _load(
        self, store: Store, gate: asyncio.Semaphore, ring: Ring | Writer, key_id: str, info: ObjectInfo
    ) -> None:
        async with gate:
            try:
                content = await read_key_object(store, info, self._system_id)
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
        self.need_reading("what a restored server gets")
        ring = identity = b""
        if follow and isinstance(self._ring, Ring):
            # Sealed to an identity that goes with it: the ring is read as any other, and no format is new.
            identity = X25519PrivateKey.generate().private_bytes_raw()
            ring = seal_ring(self._ring, [], [public_of(identity)], datetime.now(UTC))
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
            if isinstance(ring, Ring) and isinstance(sealed, SealedKey) and sealed.private_key == ring.private_key:
                self._current = self.find(key_id)
                return
        self._begin_writing(ring, now)

    def _begin_writing(self, ring: Ring | Writer, now: datetime) -> None:
        key, content = make_data_key(ring, now)
        self._current = self._opened[key.id] = key
        name = data_key_name(key.id)
        self.key_object = (name, key_object(name, self._system_id, content, now))


def _identified(what: str, members: dict[str, Any]) -> Ring:
    """The ring among restore keys. Raises IntegrityError."""
    if not re.fullmatch("[0-9a-f]{64}", members["identity"]):
        raise IntegrityError(f"{what} holds an identity that is not 32 bytes of hex")
    content, identity = members["ring"].encode(), bytes.fromhex(members["identity"])
    ring = open_ring(what, members["number"], members["system_id"], content, identity=identity)
    if ring is None:
        raise IntegrityError(f"{what} holds a key ring that its identity does not open")
    return ring
