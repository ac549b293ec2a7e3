"""The keys of one repository: made, found in the stores, opened with what is at hand, and handed to whoever asks.

The objects under ``keys/`` are walship objects with neither codec nor cipher; what protects them is inside (``ring``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress

import structlog

from infra.at_hand import AtHand, look_at_hand
from infra.key_objects import key_object, list_keys, openers, read_key_object, read_newest_front
from infra.keyring import KeyReplacedError, RepositoryKeys
from infra.ring import Front, Policy, Ring, Writer, fresh_ring, open_ring, read_front, ring_name, seal_ring
from infra.sealing import public_of
from infra.settings import Settings
from pipeline.catalog import REPOSITORY
from pipeline.contracts import Body, Clock, ObjectInfo, Store
from pipeline.errors import ConfigError, IntegrityError, ObjectMissing, StoreError, WalshipError
from pipeline.moments import moment_in, show

log = structlog.get_logger()

__all__ = [
    "KeyReplacedError", "Policy", "RepositoryKeys", "create_ring", "new_ring", "not_opened", "open_keyring",
    "open_keys", "open_with",
]  # fmt: skip

#: Seconds that the other destinations have to tell which ring is their newest, once one has told.
ANSWER = 5.0


async def new_ring(system_id: str, at_hand: AtHand | str, policy: Policy, clock: Clock) -> tuple[str, Body]:
    """Name and stored bytes of a new repository's first ring: the same ones go to every destination.

    It opens with what is at hand; a string is a passphrase alone. Raises ConfigError if nothing is.
    """
    at_hand = AtHand(at_hand) if isinstance(at_hand, str) else at_hand
    now = clock.now()
    recipients = [public_of(at_hand.identity)] if at_hand.identity else []
    passphrases = [at_hand.passphrase] if at_hand.passphrase or not recipients else []
    content = await asyncio.to_thread(seal_ring, fresh_ring(system_id, policy), passphrases, recipients, now)
    return ring_name(1), key_object(ring_name(1), system_id, content, now)


async def create_ring(store: Store, system_id: str, at_hand: AtHand | str, policy: Policy, clock: Clock) -> None:
    """Store a new repository's first ring. ObjectConflict if it has one."""
    name, body = await new_ring(system_id, at_hand, policy, clock)
    await store.put(name, body)


async def open_keyring(
    store: Store,
    system_id: str,
    at_hand: AtHand | str,
    *,
    writer: bool = False,
    clock: Clock,
    wanted: Policy | None = None,
    allow_unencrypted: bool = False,
) -> RepositoryKeys:
    """The keys of the repository in ``store`` (rooted at the cluster's folder), by its newest ring.

    ``at_hand``: what is to open it; a string is a passphrase alone. With a writer file alone nothing is opened: see
    ``RepositoryKeys.reads``. A repository without a ring has a plain keyring: nothing encrypted, unkeyed fingerprints.
    ``writer`` makes a fresh data key in memory and reads no other (call ``refresh`` before reading what others wrote).
    ``wanted`` is what the settings want encrypted: see ``agree``. A passphrase means that the repository is encrypted:
    one without a ring is refused then, to be written or read, unless ``allow_unencrypted``.

    Raises ConfigError if what is at hand does not open it, or the settings disagree; IntegrityError for keys that
    cannot be what walship wrote.
    """
    at_hand = AtHand(at_hand) if isinstance(at_hand, str) else at_hand
    listing = await list_keys(store)
    ring: Ring | Writer | None = None
    opened_by = ""
    if listing.rings:
        ring, opened_by = await _open_newest(store, system_id, at_hand, listing.rings)
    policy = ring.policy if ring else Policy(wal=False, base=False)
    keys = RepositoryKeys(
        system_id, ring, policy, store=store, allow_unencrypted=allow_unencrypted, opened_by=opened_by
    )
    if wanted is not None:
        keys.agree(wanted)
    if (at_hand.reads or at_hand.writer) and ring is None and not allow_unencrypted:
        # Whoever may write to the store could remove keys/ and put plain objects in the place of ours.
        name = "BACKUP_ENCRYPTION_PASSWORD" if at_hand.passphrase else "WALSHIP_IDENTITY_FILE or WALSHIP_WRITER_FILE"
        raise ConfigError(
            f"{name} is set, and the repository {system_id} in {store.name} has no key ring",
            hint="unset it if this repository was never encrypted; if it was, copy keys/ back from another destination",
        )
    if ring and writer:
        keys._begin_writing(ring, clock.now())  # noqa: SLF001  # the other half of this function
    elif ring:
        await keys.refresh()
    return keys


async def _open_newest(
    store: Store, system_id: str, at_hand: AtHand, rings: Mapping[int, ObjectInfo]
) -> tuple[Ring | Writer, str]:
    """The ring, or what a host that only writes knows of it; and who could open it, in words."""
    number = max(rings)
    info = rings[number]
    content = await read_key_object(store, info, system_id)
    front = read_front(info.key, content)
    if at_hand.writer is not None and not at_hand.reads:
        return _joined(store, at_hand.writer, front, system_id, number), openers(front)
    if not at_hand.reads:
        raise ConfigError(
            f"the repository {system_id} in {store.name} is encrypted, and BACKUP_ENCRYPTION_PASSWORD is empty",
            hint=f"set it, or BACKUP_ENCRYPTION_PASSWORD_FILE, or WALSHIP_IDENTITY_FILE: {info.key} opens with"
            f" {openers(front)}",
        )
    ring = await asyncio.to_thread(open_with, info.key, number, system_id, content, at_hand)
    if ring is None:
        raise await not_opened(store, system_id, at_hand, rings, front)
    return ring, openers(front)


async def not_opened(
    store: Store, system_id: str, at_hand: AtHand, rings: Mapping[int, ObjectInfo], front: Front
) -> ConfigError:
    """The error for the newest of ``rings``, whose front is given, if what is at hand does not open it.

    Most often it was changed, and the settings were not: so it is tried on the ring before, which costs another scrypt.
    What that opens with is for the words alone.
    """
    name = ring_name(max(rings))
    which = f"the key ring {name} of {system_id} in {store.name}"
    compare = "`walship key list` compares it with those at other destinations"
    former = max((number for number in rings if number < max(rings)), default=0)
    opened = None
    if former:
        with suppress(StoreError, IntegrityError):  # it would only explain
            content = await read_key_object(store, rings[former], system_id)
            for alone in at_hand.each():
                if await asyncio.to_thread(open_with, ring_name(former), former, system_id, content, alone):
                    opened = alone
                    break
    if opened is None:
        return ConfigError(
            f"{at_hand.names} {which}",
            hint=f"it is not the right one for this repository, which opens with {openers(front)}. Nobody has that?"
            f' docs/procedures.md, "Passphrase lost". {at_hand.cut_off}If what is at hand is right, the ring was'
            f" replaced: {compare}",
        )
    made = moment_in(front.created)
    what, others = "the passphrase", front.passphrases
    names = "the new one into the settings (BACKUP_ENCRYPTION_PASSWORD or its _FILE)"
    if opened.identity:
        what, others, names = "the recipient's key", len(front.recipients), "the new one into WALSHIP_IDENTITY_FILE"
    if not others:
        names = "one of those into the settings"
    return ConfigError(
        f"{what} was {'changed' if others else 'removed'} when {name} was made{f' ({show(made)})' if made else ''}:"
        f" {opened.names} {which}, only the one before, {ring_name(former)}",
        hint=f"{name} opens with {openers(front)}: put {names}, here and wherever else the repository is used. If none"
        f" of you has changed that, somebody else has put the ring there: {compare}",
    )


def open_with(name: str, number: int, system_id: str, content: bytes, at_hand: AtHand) -> Ring | None:
    """See ``open_ring``; the private key first, which is quick."""
    ring = None
    if at_hand.identity:
        ring = open_ring(name, number, system_id, content, identity=at_hand.identity)
    if ring is None and at_hand.passphrase:
        ring = open_ring(name, number, system_id, content, passphrase=at_hand.passphrase)
    return ring


def _joined(store: Store, writer: Writer, front: Front, system_id: str, number: int) -> Writer:
    """The writer file, if what it writes can be read by whoever opens the ring that is there. Raises ConfigError.

    Nothing tells it that the ring is genuine: who replaces it makes us stop, or write on for the key that we know.
    """
    if writer.system_id != system_id:
        raise ConfigError(
            f"WALSHIP_WRITER_FILE is for the cluster {writer.system_id}, not for {system_id}",
            hint="make one for this cluster, where the repository can be read: walship key export-writer FILE",
        )
    if writer.public_key != front.public_key:
        raise ConfigError(
            f"WALSHIP_WRITER_FILE is of {ring_name(writer.number)}, and the repository in {store.name} has another key"
            f" since {ring_name(number)}: nobody who opens that could read what this host writes",
            hint="make it anew, where the repository can be read: walship key export-writer FILE. If nobody has"
            " replaced the key, somebody else has put that ring there: compare it with the one at another destination",
        )
    if writer.number > number:
        raise ConfigError(
            f"WALSHIP_WRITER_FILE is of {ring_name(writer.number)}, and {store.name} has no ring newer than"
            f" {ring_name(number)}",
            hint="an older key ring was put back, or the newest is not there yet: copy keys/ from another destination",
        )
    return writer


async def open_keys(
    stores: Sequence[Store],
    settings: Settings,
    system_id: str,
    clock: Clock,
    *,
    writer: bool,
    allow_unencrypted: bool,
) -> RepositoryKeys:
    """The keys by the newest ring of all destinations: one of them may have been away when that was made.

    A destination whose ring is damaged, or does not open, is passed over for one that has an older ring, with a
    warning; but to write, only if that is of the same repository key: under a former one nobody could read it.
    """
    at_hand = look_at_hand(settings)
    wanted = policy_of(settings) if writer else None
    numbers, failures = await _newest_rings(stores)
    newest = max(numbers.values(), default=0)
    for store in sorted((s for s in stores if s.name in numbers), key=lambda store: -numbers[store.name]):
        try:
            keys = await open_keyring(
                store,
                system_id,
                at_hand,
                writer=writer,
                wanted=wanted,
                allow_unencrypted=allow_unencrypted,
                clock=clock,
            )
            if writer and keys.ring is not None and newest > keys.ring.number and newest > numbers[store.name]:
                await _refuse_former(stores, numbers, newest, keys, system_id)
        except (StoreError, ConfigError, IntegrityError) as error:
            failures.append((store, error))
            continue
        for passed_over, failure in failures:
            log.warning(
                "keys", destination=passed_over.name, error=failure.fact, hint=failure.hint, served_by=store.name
            )
        for behind in (other for other in stores if numbers.get(other.name, newest) < numbers[store.name]):
            if await _is_gone(behind):
                continue  # nothing is copied there, and all else that is said of it is another matter
            fact = f"{ring_name(numbers[store.name])} is missing there, which {store.name} has"
            hint = (
                "`walship run` copies it there; until then it can be read there with the former secrets, or not at all"
            )
            log.warning("keys", destination=behind.name, error=fact, hint=hint, served_by=store.name)
        if not writer:
            await _learn_from_others(keys, store, [other for other in stores if other.name in numbers])
        return keys
    raise failures[0][1]


async def _is_gone(store: Store) -> bool:
    """Whether it has answered that it holds no repository: it was emptied, or is new. Whoever writes there tells."""
    try:
        await store.head(REPOSITORY)
    except ObjectMissing:
        return True
    except StoreError:
        return False
    return False


async def _learn_from_others(keys: RepositoryKeys, served: Store, stores: Sequence[Store]) -> None:
    """An object that only another destination has may lie under a data key that only it has.

    ``stores``: those that have just answered. Of the others it is asked, with patience, when such an object is read.
    """
    for other in stores:
        if other is served:
            continue
        with suppress(StoreError):  # it will be named when it is needed
            if await keys.refresh(other):
                fact = f"data keys are missing or damaged there, which {other.name} has"
                log.warning("keys", destination=served.name, error=fact)


async def _newest_rings(stores: Sequence[Store]) -> tuple[dict[str, int], list[tuple[Store, WalshipError]]]:
    """Destination → number of its newest ring, 0 for none; and those that fail, or do not answer for long."""
    if len(stores) == 1:
        return {stores[0].name: 0}, []
    tasks = [asyncio.create_task(list_keys(store, "keys/ring-")) for store in stores]
    waiting = set(tasks)
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if waiting and any(task.exception() is None for task in done):
                _, waiting = await asyncio.wait(waiting, timeout=ANSWER)
                break
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    found: dict[str, int] = {}
    failures: list[tuple[Store, WalshipError]] = []
    for store, task in zip(stores, tasks, strict=True):
        if task.cancelled():
            fact = f"{store.name} has not answered for {ANSWER:g} seconds, and another destination has"
            failures.append((store, StoreError(fact, hint="it is gone on without it", passing=True)))
        elif isinstance(error := task.exception(), StoreError):
            failures.append((store, error))
        else:
            found[store.name] = task.result().newest
    return found, failures


async def _refuse_former(
    stores: Sequence[Store], numbers: dict[str, int], newest: int, keys: RepositoryKeys, system_id: str
) -> None:
    """What would be written under a key that was replaced, nobody could read. Raises ConfigError, IntegrityError."""
    store = next(store for store in stores if numbers.get(store.name) == newest)
    front = await read_newest_front(store, system_id)
    if keys.ring is not None and front is not None and front.public_key != keys.ring.public_key:
        raise ConfigError(
            f"the repository has a new key since {ring_name(front.number)} at {store.name}, which is not the one of"
            f" {ring_name(keys.ring.number)}: nobody could read what is written under that",
            hint=f"{ring_name(front.number)} opens with {openers(front)}: set what opens it",
        )


def policy_of(settings: Settings) -> Policy:
    """What the settings want encrypted; a writer must agree with what is sealed in the key ring."""
    return Policy(wal=settings.wal_encrypted, base=settings.backup_encryption_enabled)
