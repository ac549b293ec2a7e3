"""``walship key add | rotate | remove | accept``: the next key ring, proved to open before it is stored.

A ring is never changed: each of these makes one with the next number, create-only, and the highest number counts. So
whatever interrupts it, a destination has the ring before or the ring after, whole; and of two people who do this at one
moment, the first one's ring is there and the second one is told. Data is not touched.

    open the newest ring ──> make the next one ──> prove that what is at hand opens it ──> store it everywhere
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from handlers.body import joined
from infra.at_hand import AtHand
from infra.key_objects import MAX_SIZE, KeyListing, key_object, list_keys, openers, read_key_object
from infra.keyring import RepositoryKeys
from infra.keys import not_opened, open_with
from infra.ring import Former, Front, Ring, fresh_ring, read_front, ring_name, seal_ring, unlisted_maker
from infra.wraps import Wrap, label_of, unwrap, wrap_recipient
from pipeline.catalog import REPOSITORY, data_key_name
from pipeline.contracts import Body, Clock, Store
from pipeline.errors import ConfigError, IntegrityError, ObjectConflict, ObjectMissing, StoreError, WalshipError

#: How often a replaced key is looked at again, because writers have begun meanwhile.
_ROUNDS = 5


@dataclass(slots=True)
class Current:
    """The newest ring of all destinations, opened."""

    ring: Ring
    front: Front
    #: What opened it.
    at_hand: AtHand
    #: Those that answer, in the order in which they are written to: everybody's, whatever the settings say first.
    stores: tuple[Store, ...]
    #: destination → what lies under ``keys/`` there.
    listings: dict[str, KeyListing]
    #: destination → why it was passed over.
    away: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ring_name(self.ring.number)


@dataclass(frozen=True, slots=True)
class Changed:
    """What was done."""

    number: int
    front: Front
    #: Destinations that have the new ring; and those that have not, with the reason.
    stored: tuple[str, ...]
    away: dict[str, str]


async def open_current(stores: Sequence[Store], system_id: str, at_hand: AtHand) -> Current:
    """Raises ConfigError if there is none or it does not open, StoreError if no destination answers."""
    ordered = sorted(stores, key=lambda store: store.name)
    answers = await asyncio.gather(*(_listing(store) for store in ordered))
    listings = {s.name: a for s, a in zip(ordered, answers, strict=True) if isinstance(a, KeyListing)}
    failures = [a for a in answers if isinstance(a, StoreError)]
    if not listings:
        raise failures[0]
    number = max(listing.newest for listing in listings.values())
    if not number:
        raise ConfigError(
            f"the repository {system_id} has no key ring: nothing in it is encrypted",
            hint="a repository is encrypted from its first day on or not at all",
        )
    there = [store for store in ordered if store.name in listings and number in listings[store.name].rings]
    ring, front = await _opened(there, listings, number, system_id, at_hand)
    return Current(
        ring,
        front,
        at_hand,
        tuple(store for store in ordered if store.name in listings),
        listings,
        {s.name: a.fact for s, a in zip(ordered, answers, strict=True) if isinstance(a, StoreError)},
    )


async def _listing(store: Store) -> KeyListing | StoreError:
    try:
        await store.head(REPOSITORY)  # or it was emptied, or is another disk: not for us to begin a repository there
        return await list_keys(store)
    except ObjectMissing:
        return StoreError(
            f"{store.name} has no {REPOSITORY}", hint="`walship init` makes or joins the repository there"
        )
    except StoreError as error:
        return error


async def _opened(
    stores: Sequence[Store], listings: dict[str, KeyListing], number: int, system_id: str, at_hand: AtHand
) -> tuple[Ring, Front]:
    """The ring from the first destination whose copy opens."""
    name = ring_name(number)
    failure: WalshipError | None = None
    for store in stores:
        try:
            content = await read_key_object(store, listings[store.name].rings[number], system_id)
            front = read_front(name, content)
            ring = await asyncio.to_thread(open_with, name, number, system_id, content, at_hand)
        except (StoreError, IntegrityError) as error:
            failure = failure or error
            continue
        if ring is not None:
            return ring, front
        failure = failure or await not_opened(store, system_id, at_hand, listings[store.name].rings, front)
    assert failure is not None, "a destination has the ring"
    raise failure


async def add(
    current: Current, clock: Clock, *, passphrase: str = "", recipient: bytes = b"", label: str = ""
) -> Changed:
    """One more passphrase, or one more recipient, with a name for people. Raises ConfigError, StoreError."""
    carried: list[Wrap] = [*current.front.wraps]
    if recipient:
        if recipient in current.front.recipients:
            raise ConfigError("that recipient opens the key ring already", hint="`walship key list` shows all of them")
        carried += [label_of(recipient, label)] if label else []
        return await _next(current, clock, [], [recipient], carried, [current.at_hand])
    if await opens(current, passphrase):
        raise ConfigError("that passphrase opens the key ring already", hint="nothing was changed")
    return await _next(current, clock, [passphrase], [], carried, [current.at_hand])


async def rotate(current: Current, clock: Clock, passphrase: str) -> Changed:
    """A new passphrase in the place of the one at hand. Raises ConfigError, StoreError."""
    if not current.at_hand.passphrase:
        raise ConfigError(
            "BACKUP_ENCRYPTION_PASSWORD is not set: there is no passphrase at hand that the new one could replace",
            hint="`walship key add --passphrase-file F` adds one, `walship key remove` takes one away",
        )
    old = await _places(current, AtHand(current.at_hand.passphrase))
    if not old:
        raise ConfigError(
            f"BACKUP_ENCRYPTION_PASSWORD does not open {current.name}, only WALSHIP_IDENTITY_FILE does",
            hint="`walship key add --passphrase-file F` adds a passphrase, and replaces none",
        )
    if await opens(current, passphrase):
        raise ConfigError("the new passphrase opens the key ring already", hint="choose one that was not used here")
    carried = [wrap for place, wrap in enumerate(current.front.wraps) if place not in old]
    return await _next(current, clock, [passphrase], [], carried, [AtHand(passphrase)])


async def remove(current: Current, clock: Clock, *, passphrase: str = "", recipient: bytes = b"") -> Changed:
    """Take one away, if what is at hand opens what remains. Raises ConfigError, StoreError."""
    if recipient:
        gone = {n for n, wrap in enumerate(current.front.wraps) if wrap.get("public_key") == recipient.hex()}
        what = "that recipient does not open the key ring"
    else:
        gone = await _places(current, AtHand(passphrase))
        what = "that passphrase does not open the key ring"
    if not gone:
        raise ConfigError(what, hint=f"{current.name} opens with {openers(current.front)}")
    carried = [wrap for place, wrap in enumerate(current.front.wraps) if place not in gone]
    if not any(wrap.get("kind") in ("scrypt", "recipient") for wrap in carried):
        raise ConfigError(
            f"it is the only one that opens {current.name}: without it nobody could read anything",
            hint="add another one first: walship key add",
        )
    return await _next(current, clock, [], [], carried, [current.at_hand])


async def accept(current: Current, clock: Clock, key_id: str) -> Changed:
    """Take a data key for ours that a writer made under a former key, and that was not listed when it was replaced."""
    for store in current.stores:
        info = current.listings[store.name].data.get(key_id)
        if info is None:
            continue
        content = await read_key_object(store, info, current.ring.system_id)
        if (place := unlisted_maker(current.ring, key_id, content)) is not None:
            former = list(current.ring.former)
            former[place] = replace(former[place], data_keys=former[place].data_keys | {key_id})
            ring = replace(current.ring, number=current.ring.number + 1, former=tuple(former))
            content = await asyncio.to_thread(_sealed, ring, clock, [], [], current.front.wraps)
            await _prove(ring, content, [current.at_hand])
            return await _store(current, ring, content, clock)
    raise ConfigError(
        f"{data_key_name(key_id)} is not there, or was not made under a former writer secret of this repository",
        hint="`walship key list` names the data keys that can be accepted",
    )


async def replace_key(
    current: Current,
    clock: Clock,
    passphrases: Sequence[str],
    recipients: dict[bytes, str],
    tell: Callable[[str], None],
) -> Changed:
    """A new repository key and writer secret: whoever had the former ones reads nothing that is written from then on.

    It opens with exactly these passphrases and recipients (public key → label). What was stored stays readable with
    it. Raises StoreError if a destination does not answer: its data keys have to be listed. Else as the others.
    """
    if current.away:
        name, fact = next(iter(current.away.items()))
        raise StoreError(
            f"{name} does not answer, and the data keys there have to be listed in the new ring: {fact}",
            hint="nothing was changed. Where it is gone for good, take it out of WALSHIP_DESTINATIONS first",
        )
    proofs = [AtHand(each) for each in passphrases]
    proofs += [AtHand(identity=current.at_hand.identity)] if current.at_hand.identity else []
    labels = [label_of(public, label) for public, label in recipients.items() if label]
    genuine = RepositoryKeys(
        current.ring.system_id, current.ring, current.ring.policy, store=None, allow_unencrypted=False
    )
    fresh = fresh_ring(current.ring.system_id, current.ring.policy)
    carried: Sequence[Wrap] = labels
    done: Changed | None = None
    listed: frozenset[str] = frozenset()
    for _ in range(_ROUNDS):
        try:
            for store in current.stores:
                await genuine.refresh(store)
        except StoreError as error:
            if done is None:
                raise
            tell(f"who has begun to write meanwhile is not known: {error.fact}. Look again: walship key list")
            return done
        ours = _made_under(current.ring, genuine)
        if done is not None and ours == listed:
            return done
        listed = ours
        if done is None and (odd := _unlisted(current, genuine)):
            tell(
                f"{len(odd)} data keys are damaged or were made by nobody of this repository, {data_key_name(odd[0])}"
                " for one, and are not listed in the new ring: once mended, `walship key accept` takes what is genuine"
            )
        former = (Former(current.ring.private_key, current.ring.writer_secret, listed), *current.ring.former)
        number = (done.number if done else current.ring.number) + 1
        ring = replace(fresh, number=number, former=former)
        words = ([], []) if done else ([*passphrases], [*recipients])
        content = await asyncio.to_thread(_sealed, ring, clock, *words, done.front.wraps if done else carried)
        await _prove(ring, content, proofs)
        done = await _store(current, ring, content, clock)
        if done.away:
            name, fact = next(iter(done.away.items()))
            tell(f"{name} did not take the new ring: {fact}. Whoever starts to write meanwhile may use the former key")
    raise StoreError(
        f"{ring_name(number)} is stored, and data keys are still being made under the former key",
        hint="stop what writes with the old keys, then look: walship key list",
    )


def _made_under(ring: Ring, keys: RepositoryKeys) -> frozenset[str]:
    """The data keys of the ring's own writer secret: the others are listed as a former ring's already."""
    return frozenset(keys.data_keys) - {key_id for old in ring.former for key_id in old.data_keys}


def _unlisted(current: Current, keys: RepositoryKeys) -> list[str]:
    """Ids of data keys that are somewhere, and genuine nowhere."""
    there = set().union(*(listing.data for listing in current.listings.values()))
    return sorted(there - set(keys.data_keys))


async def opens(current: Current, passphrase: str) -> bool:
    """Whether that passphrase is one of the newest ring's."""
    return bool(await _places(current, AtHand(passphrase)))


async def _places(current: Current, secret: AtHand) -> set[int]:
    """Which wraps of the ring a secret opens."""
    front = current.front
    arguments = (current.name, front.system_id, front.wraps, front.public_key, secret.passphrase, secret.identity)
    return await asyncio.to_thread(lambda: {place for place, _ in unwrap(*arguments)})


async def _next(
    current: Current,
    clock: Clock,
    passphrases: Sequence[str],
    recipients: Sequence[bytes],
    carried: Sequence[Wrap],
    proofs: Sequence[AtHand],
) -> Changed:
    """The same repository key, wrapped otherwise."""
    ring = replace(current.ring, number=current.ring.number + 1)
    content = await asyncio.to_thread(_sealed, ring, clock, passphrases, recipients, carried)
    await _prove(ring, content, proofs)
    return await _store(current, ring, content, clock)


def _sealed(
    ring: Ring, clock: Clock, passphrases: Sequence[str], recipients: Sequence[bytes], carried: Sequence[Wrap]
) -> bytes:
    """Raises ConfigError for a ring that readers would refuse."""
    for recipient in recipients:
        wrap_recipient(ring.private_key, ring.system_id, recipient)  # a ConfigError of its own
    try:
        content = seal_ring(ring, passphrases, recipients, clock.now(), carried=carried)
    except IntegrityError as error:
        raise ConfigError(
            f"{error.fact}: no reader would open it", hint="at most 16 passphrases make sense: remove one first"
        ) from None
    if len(content) > MAX_SIZE - 4096:
        count = sum(len(old.data_keys) for old in ring.former)
        raise ConfigError(
            f"the new ring would list {count} former data keys in {len(content)} bytes; it may have {MAX_SIZE}",
            hint="begin a new repository at another destination; what is stored here stays readable with its own keys",
        )
    return content


async def _prove(ring: Ring, content: bytes, proofs: Sequence[AtHand]) -> None:
    """Open what is to be stored as a reader would, before it is. Raises ConfigError."""
    name = ring_name(ring.number)
    for proof in proofs:
        if proof.reads:
            opened = await asyncio.to_thread(open_with, name, ring.number, ring.system_id, content, proof)
            if opened == ring:
                return
    raise ConfigError(
        "nothing that is at hand here would open the new key ring, so that nobody knows whether anything does",
        hint="set BACKUP_ENCRYPTION_PASSWORD or WALSHIP_IDENTITY_FILE to one that stays; nothing was changed",
    )


async def _store(current: Current, ring: Ring, content: bytes, clock: Clock) -> Changed:
    """One destination after the other, in everybody's order: whoever comes second finds the name taken."""
    name = ring_name(ring.number)
    body = key_object(name, ring.system_id, content, clock.now())
    stored: list[str] = []
    away = dict(current.away)
    for store in current.stores:
        try:
            await _bring_up(store, current)
            await _create(store, name, body)
        except ObjectConflict as conflict:
            where = f"; at {', '.join(stored)} it is yours" if stored else ", and nothing of yours was stored"
            raise ConfigError(
                f"somebody else has changed the keys at this moment: {name} is at {store.name} already{where}",
                hint="look what was changed (walship key list), and say it again if it is still wanted",
            ) from conflict
        except StoreError as error:
            away[store.name] = error.fact
        else:
            stored.append(store.name)
    if not stored:
        first, fact = next(iter(away.items()))
        raise StoreError(
            f"{name} could not be stored anywhere: {first}: {fact}",
            hint="the former ring counts, unless an answer was lost: `walship key list` tells",
        )
    return Changed(ring.number, read_front(name, content), tuple(stored), away)


async def _create(store: Store, name: str, body: Body) -> None:
    """Only if absent; and looked at, since some stores do not keep to that. Raises ObjectConflict, StoreError."""
    conflict = None
    try:
        await store.put(name, body)
    except ObjectConflict as error:
        conflict = error  # an earlier attempt of ours whose answer was lost, perhaps
    if joined(await store.get(name)) != joined(body):
        raise conflict or ObjectConflict(f"{name} at {store.name} has other bytes than were stored")


async def _bring_up(store: Store, current: Current) -> None:
    """What this destination lacks of the rings before, from whoever has it: it was away when they were made."""
    for number in sorted(set().union(*(listing.rings for listing in current.listings.values()))):
        if number in current.listings[store.name].rings:
            continue
        for other in current.stores:
            if number not in current.listings[other.name].rings:
                continue
            try:
                body = await other.get(ring_name(number))
                await store.put(ring_name(number), body)
            except ObjectMissing:
                continue
            except ObjectConflict:
                pass  # somebody was faster
            break
