"""One stored object, from one destination to another, as it is: checked on the way, created only if absent.

No key is needed: what is compared is the SHA-256 trailer, and where another encoding of the same bytes may be stored,
the fingerprint. Shippers, the filling of destinations that lag and ``walship copy`` all go through here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from handlers.checksum import check_stored
from pipeline.catalog import data_key_name
from pipeline.contracts import Body, Store
from pipeline.errors import IntegrityError, ObjectConflict, ObjectMissing, StoreError, WalshipError
from pipeline.objects import Header


@dataclass(frozen=True, slots=True)
class Parcel:
    """An encoded object on its way. Whoever makes it closes its body."""

    header: Header
    body: Body
    #: SHA-256 trailer, as hex.
    digest: str

    @property
    def name(self) -> str:
        return self.header.name


async def take(store: Store, name: str, *, system_id: str = "") -> Parcel:
    """The object as it is stored there, whole. IntegrityError if it is damaged, or not of that cluster; StoreError."""
    body = await store.get(name)
    try:
        header, digest = await asyncio.to_thread(check_stored, name, body.chunks())
        if system_id and header.system_id != system_id:
            raise IntegrityError(f"{name} belongs to the cluster {header.system_id}, not to {system_id}")
    except BaseException:
        body.close()
        raise
    return Parcel(header, body, digest)


async def create(store: Store, parcel: Parcel) -> bool:
    """Store it under its name if nothing is there. False: the same object was there already, or its same plaintext.

    Nothing is ever overwritten: ObjectConflict for other bytes, IntegrityError if what is there is damaged; StoreError.
    """
    try:
        await store.put(parcel.name, parcel.body)
    except ObjectConflict:
        await compare(store, parcel)
        return False
    return True


async def compare(store: Store, parcel: Parcel) -> None:
    """What is there under its name is the same object: an earlier attempt of ours, or the same file shipped before.

    Raises as ``create`` does.
    """
    try:
        stored = await take(store, parcel.name)
    except IntegrityError as error:
        raise IntegrityError(
            f"{error.fact}, at {store.name}; it was to be stored again",
            hint="the source still has it: move the damaged object away, and it is shipped at the next attempt",
        ) from None
    stored.body.close()
    header = stored.header
    if stored.digest == parcel.digest or _same_plaintext(header, parcel.header):
        return
    raise ObjectConflict(
        f"{parcel.name} is stored at {store.name} with other bytes (made {header.created or 'at an unknown time'})",
        hint="two servers write to one repository, or this one was rolled back: find the other one; a clone needs"
        " archive_mode=off, or a destination of its own. Nothing was overwritten",
        ours=parcel.header.fingerprint,
        theirs=header.fingerprint,
    )


def _same_plaintext(one: Header, other: Header) -> bool:
    """By name, size and fingerprint. Parts of a backup have none: another encoding of one is another part."""
    if (one.name, one.system_id, one.plain_size) != (other.name, other.system_id, other.plain_size):
        return False
    return one.fingerprint == other.fingerprint != ""


class NoneServes(IntegrityError):  # noqa: N818  what was found, as ObjectMissing is
    """No source has the object whole. ``failures``: what each of them answered."""

    def __init__(self, name: str, failures: Sequence[WalshipError]) -> None:
        super().__init__(failures[0].fact if failures else f"{name}: nobody is there to give it")
        self.failures = tuple(failures)

    @property
    def missing(self) -> bool:
        """All of them answered, and none has it."""
        return bool(self.failures) and all(isinstance(error, ObjectMissing) for error in self.failures)

    @property
    def lost(self) -> bool:
        """All of them answered, and none has it whole."""
        return all(isinstance(error, ObjectMissing | IntegrityError) for error in self.failures)

    @property
    def silent(self) -> StoreError | None:
        """Why one of them did not answer: it may have the object."""
        for error in self.failures:
            if isinstance(error, StoreError) and not isinstance(error, ObjectMissing):
                return error
        return None


async def bring(
    name: str,
    sources: Sequence[Store],
    target: Store,
    *,
    system_id: str = "",
    give: Callable[[Parcel], Awaitable[object]] | None = None,
    keys: set[str] | None = None,
) -> int:
    """Copy the object from the first source that has it whole; returns its size in bytes.

    ``give`` stores it, and is ``create`` at the target if left out. ``keys``: names of data keys that are known to be
    at the target, and grows. Raises NoneServes, and what ``create`` raises.
    """
    failures: list[WalshipError] = []
    for source in sources:
        try:
            parcel = await take(source, name, system_id=system_id)
        except (StoreError, IntegrityError) as error:
            failures.append(error)
            continue
        try:
            await _bring_key(parcel, sources, target, set() if keys is None else keys)
            await (give(parcel) if give is not None else create(target, parcel))
            return parcel.body.size
        finally:
            parcel.body.close()
    raise NoneServes(name, failures)


async def _bring_key(parcel: Parcel, sources: Sequence[Store], target: Store, known: set[str]) -> None:
    """The data key goes before what is encrypted under it: it may be one that the target has not seen."""
    name = data_key_name(parcel.header.key)
    if not parcel.header.key or name in known:
        return
    try:
        await target.head(name)
    except ObjectMissing:
        try:
            await bring(name, sources, target)
        except NoneServes as error:
            fact = f"{parcel.name} is encrypted under {name}, which no source has whole"
            raise NoneServes(parcel.name, [error.silent or IntegrityError(fact)]) from None
    known.add(name)
