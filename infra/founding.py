"""``walship init``: make or join the repository of a cluster at every destination. Nothing else ever makes one.

Order matters: the key ring first, at every destination, then ``repository.json``, which is what makes a folder a
repository. Killed in between, the next ``init`` finds the ring, opens it with the same passphrase, and goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handlers.body import joined
from infra.keys import Policy, create_ring, open_keyring
from infra.repository import Destination, RepositoryFacts, read_facts
from infra.settings import Settings
from infra.storage import make_folder
from infra.storage.rooted import Rooted
from pipeline.catalog import REPOSITORY
from pipeline.contracts import Abilities, Clock, Store
from pipeline.errors import ConfigError, ObjectConflict, ObjectMissing
from pipeline.objects import MemoryBody


@dataclass(frozen=True, slots=True)
class Founded:
    """What ``init`` found or did at one destination."""

    destination: str
    #: False: it was there already.
    made: bool
    abilities: Abilities


async def found(
    destinations: Sequence[Destination], facts: RepositoryFacts, settings: Settings, clock: Clock
) -> list[Founded]:
    """Make the repository where it is missing and join it where it is not. Idempotent.

    ConfigError if what is there belongs to another cluster or is encrypted otherwise than the settings say.
    """
    for url in settings.destinations:
        make_folder(url)
    there = [await _existing(destination, facts) for destination in destinations]
    stores = [Rooted(destination.root, facts.system_id) for destination in destinations]
    await _found_keys(stores, facts.system_id, settings, clock, anywhere=any(there))
    founded = []
    for store, destination, existing in zip(stores, destinations, there, strict=True):
        body = (existing or facts).encode()
        if existing is None:
            await store.put(REPOSITORY, body)
        # The very bytes that are there: other spacing would be another object to a store that ignores conditions.
        there_now = MemoryBody([joined(await store.get(REPOSITORY))])
        abilities = await store.probe(REPOSITORY, there_now)
        founded.append(Founded(destination.name, existing is None, abilities))
    return founded


async def _existing(destination: Destination, facts: RepositoryFacts) -> RepositoryFacts | None:
    try:
        existing = await read_facts(destination.root, facts.system_id)
    except ObjectMissing:
        return None
    if existing.segment_size != facts.segment_size:
        raise ConfigError(
            f"the repository at {destination.name} has segments of {existing.segment_size} bytes,"
            f" the server has {facts.segment_size}",
            hint="pg_resetwal changed the size: begin a new repository at another destination",
        )
    return existing


async def _found_keys(
    stores: Sequence[Store], system_id: str, settings: Settings, clock: Clock, *, anywhere: bool
) -> None:
    """One ring for all destinations: the one that is there, or a new one if encryption is on and nothing is there."""
    wanted = Policy(wal=settings.wal_encrypted, base=settings.backup_encryption_enabled)
    rings = [await _keys_at(store) for store in stores]
    first = next((i for i, keys in enumerate(rings) if any(k.startswith("keys/ring-") for k in keys)), None)
    if first is None:
        if not (wanted.wal or wanted.base):
            if settings.passphrase:  # reading would be refused: a passphrase means that there is a ring
                raise ConfigError(
                    "BACKUP_ENCRYPTION_PASSWORD is set, and encryption is off",
                    hint="unset it, or set BACKUP_ENCRYPTION_ENABLED=true before the first init",
                )
            return
        if anywhere:
            raise ConfigError(
                "encryption is on, and the repository was made without it",
                hint="use another destination (or prefix) for an encrypted repository, or switch encryption off",
            )
        await create_ring(stores[0], system_id, settings.passphrase, wanted, clock)
        first, rings[0] = 0, await _keys_at(stores[0])
    # Settings that a writer would refuse are refused now, not at the first segment.
    await open_keyring(stores[first], system_id, settings.passphrase, clock=clock, wanted=wanted)
    for index, store in enumerate(stores):
        for name in sorted(rings[first] - rings[index]):
            await _copy(name, stores[first], store)
        if rings[index]:
            await _same_ring(stores[first], store, min(name for name in rings[first] if name.startswith("keys/ring-")))


async def _keys_at(store: Store) -> set[str]:
    return {entry.key async for entry in store.list("keys/")}


async def _copy(name: str, source: Store, target: Store) -> None:
    body = await source.get(name)
    try:
        await target.put(name, body)
    except ObjectConflict:
        pass  # somebody else was faster; _same_ring tells whether it is the same
    finally:
        body.close()


async def _same_ring(one: Store, other: Store, name: str) -> None:
    if joined(await one.get(name)) != joined(await other.get(name)):
        raise ConfigError(
            f"{name} differs between {one.name} and {other.name}: they were made apart",
            hint="keep one of them, and give the other destination a new, empty prefix",
        )
