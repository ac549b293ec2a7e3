"""``walship init``: make or join the repository of a cluster at every destination. Nothing else ever makes one.

Order matters: the key ring first, at every destination, then ``repository.json``, which is what makes a folder a
repository. Killed in between, the next ``init`` finds the ring, opens it with the same passphrase, and goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handlers.body import joined
from infra.at_hand import look_at_hand, refuse_placeholder
from infra.keys import create_ring, open_keyring, policy_of
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
    wanted, at_hand = policy_of(settings), look_at_hand(settings)
    rings = [await _keys_at(store) for store in stores]
    newest = [max((name for name in keys if name.startswith("keys/ring-")), default="") for keys in rings]
    first = newest.index(max(newest)) if any(newest) else None
    if first is None:
        if not (wanted.wal or wanted.base):
            if at_hand.reads or at_hand.writer:  # reading would be refused: a secret means that there is a ring
                name = "BACKUP_ENCRYPTION_PASSWORD" if at_hand.passphrase else "WALSHIP_IDENTITY_FILE or _WRITER_FILE"
                raise ConfigError(
                    f"{name} is set, and encryption is off",
                    hint="unset it, or set BACKUP_ENCRYPTION_ENABLED=true before the first init",
                )
            return
        if anywhere:
            raise ConfigError(
                "encryption is on, and the repository was made without it",
                hint="use another destination (or prefix) for an encrypted repository, or switch encryption off",
            )
        if at_hand.writer is not None:
            raise ConfigError(
                "there is no key ring at any destination, and WALSHIP_WRITER_FILE cannot make one",
                hint="run init where BACKUP_ENCRYPTION_PASSWORD or WALSHIP_IDENTITY_FILE is set; then `walship key"
                " export-writer` makes a writer file for it",
            )
        refuse_placeholder(at_hand.passphrase)
        await create_ring(stores[0], system_id, at_hand, wanted, clock)
        first, rings[0] = 0, await _keys_at(stores[0])
    # Settings that a writer would refuse are refused now, not at the first segment.
    await open_keyring(stores[first], system_id, at_hand, clock=clock, wanted=wanted)
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
