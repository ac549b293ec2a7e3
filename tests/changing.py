"""A repository in memory whose keys are changed, and what every command does with it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from infra.at_hand import AtHand
from infra.key_changes import Changed, Current, open_current
from infra.keyring import RepositoryKeys
from infra.keys import Policy, create_ring, open_keyring, open_keys
from infra.ring import ring_name, seal_ring
from infra.settings import Settings
from infra.storage.memory import MemoryStore
from pipeline.catalog import REPOSITORY
from pipeline.contracts import Store
from pipeline.errors import ConfigError
from pipeline.objects import MemoryBody
from tests.clock import FastClock
from tests.keys import SYSTEM_ID, chain, stored
from tests.stores import Faulty

OLD, NEW = "correct horse battery", "staple of another day"
IDENTITY = X25519PrivateKey.generate()
PUBLIC = IDENTITY.public_key().public_bytes_raw()
PRIVATE = IDENTITY.private_bytes_raw()
CLOCK = FastClock()
BOTH = Policy(wal=True, base=True)
NAME = "wal/0000000100000000/000000010000000000000001"

Change = Callable[[Current], Awaitable[Changed]]


class KilledError(BaseException):
    """The process ends here."""


def make_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """What opening costs stands in the ring; making one is slow on purpose."""
    assert seal_ring.__kwdefaults__ is not None
    monkeypatch.setitem(seal_ring.__kwdefaults__, "scrypt_n", 16)


async def repository(*names: str) -> list[Faulty]:
    """Destinations that have the same first ring."""
    stores = [Faulty(MemoryStore(name)) for name in names or ("a", "b")]
    await create_ring(stores[0], SYSTEM_ID, OLD, BOTH, CLOCK)
    for store in stores:
        await store.put(REPOSITORY, MemoryBody([b"{}"]))
    for store in stores[1:]:
        await store.put(ring_name(1), await stores[0].get(ring_name(1)))
    return stores


async def current(stores: list[Faulty], passphrase: str = OLD, identity: bytes = b"") -> Current:
    return await open_current(stores, SYSTEM_ID, AtHand(passphrase, identity))


async def opened(stores: list[Faulty], passphrase: str = "", *, writer: bool = False) -> RepositoryKeys:
    """As every command opens it."""
    settings = Settings(
        BACKUP_ENCRYPTION_PASSWORD=passphrase, BACKUP_ENCRYPTION_ENABLED=bool(passphrase), WALSHIP_DESTINATIONS=()
    )
    return await open_keys(stores, settings, SYSTEM_ID, CLOCK, writer=writer, allow_unencrypted=False)


async def opens(store: Store, at_hand: AtHand) -> bool:
    try:
        await open_keyring(store, SYSTEM_ID, at_hand, clock=CLOCK)
    except ConfigError:
        return False
    return True


async def write(stores: list[Faulty], keys: RepositoryKeys, text: bytes) -> bytes:
    """What a service does: its data key first, at every destination, then an object."""
    assert keys.key_object is not None
    for store in stores:
        await store.put(*keys.key_object)
        await keys.confirm(store)
    return stored(chain(keys, "zstd", "aes-256-gcm"), NAME, text)


async def rings(store: Store) -> list[str]:
    return sorted([entry.key async for entry in store.list("keys/ring-")])


async def content(store: Store, key: str) -> bytes:
    return b"".join((await store.get(key)).chunks())
