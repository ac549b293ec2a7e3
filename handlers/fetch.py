"""The way back of every object: the first good destination, then the chain backwards. And the listing of a repository.

An object is absent only if *every* destination answered and none has it: a store that fails may be the one that holds
it, and "absent" ends a recovery.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from functools import partial
from typing import TypeVar

from handlers.checksum import Trailing, check_stored
from handlers.stitch import read_tail  # fetch in two files: one object, and all tails of a segment
from handlers.to_the_end import in_thread
from pipeline import operations
from pipeline.catalog import Catalog, backup_of, checked_info, info_key, wal_key
from pipeline.chain import Chain, Expected
from pipeline.contracts import Body, Buffer, Fetch, Fetched, Store
from pipeline.errors import IntegrityError, ObjectMissing, RecoveryError, Sealed, StoreError
from pipeline.listing import Listing
from pipeline.objects import MAX_PLAIN, TRAILER_SIZE, Header
from pipeline.tail import Stitched
from pipeline.wal import SEGMENT_SIZES, WalFile, parse_history

#: A backup_info of a cluster of 16 TB is 64 MB; a history file a few hundred bytes.
_MOST_INFO = 256 << 20
_MOST_HISTORY = 1 << 20
#: So many sentences about one destination; a bucket that was lost half way would fill the screen with the rest.
_TOLD = 5
#: How often a segment is looked for whose tails go while they are read.
_LOOKS = 5

T = TypeVar("T")


class Fetcher:
    """Reads objects. A ``pipeline.contracts.Fetch``.

    ``destinations`` are rooted at the cluster's folder, the first is read first. ``notify`` is told, in a sentence,
    what went wrong at one destination although another one served. ``refresh`` reads the data keys that were stored
    since, and says whether there were any: a service that starts makes a new one. ``turns`` is held while an object
    that is returned whole, or streamed, is decoded.
    """

    def __init__(
        self,
        destinations: Sequence[Store],
        chain: Chain,
        system_id: str,
        *,
        notify: Callable[[str], None] = lambda _: None,
        refresh: Callable[[], Awaitable[bool]] | None = None,
        turns: AbstractAsyncContextManager[object] | None = None,
    ) -> None:
        self._destinations = tuple(destinations)
        self._chain = chain
        self._system_id = system_id
        self._notify = notify
        self._told: Counter[str] = Counter()
        self._refresh = refresh
        self._turns = turns or nullcontext()
        self._refreshing = asyncio.Lock()
        #: How often a refresh has found something.
        self._learned = 0

    async def __call__(self, name: str, *, backup: str | None = "", most: int = MAX_PLAIN) -> Fetched:
        """See ``pipeline.contracts.Fetch``."""
        expected = Expected(name, self._system_id, backup, most)
        return await self._first(name, lambda store: self._fetched(store, expected))

    async def stream(
        self, name: str, use: Callable[[Iterator[Buffer]], None], *, backup: str | None = "", most: int = MAX_PLAIN
    ) -> None:
        """See ``pipeline.contracts.Fetch``."""
        expected = Expected(name, self._system_id, backup, most)
        await self._first(name, lambda store: self._from(store, expected, partial(self._stream, use)))

    def _stream(self, use: Callable[[Iterator[Buffer]], None], expected: Expected, body: Body) -> None:
        whole = False

        def pieces() -> Iterator[Buffer]:
            nonlocal whole
            yield from self._chain.pieces(expected, body.chunks())
            whole = True

        use(pieces())
        if not whole:  # what comes last is its checksum: without that nothing of it may count
            raise IntegrityError(f"{expected.name} was not read to its end")

    async def into(
        self,
        name: str,
        use: Callable[[Iterator[Buffer]], None],
        *,
        digest: str,
        backup: str | None = "",
        most: int = MAX_PLAIN,
    ) -> None:
        """See ``pipeline.contracts.Fetch``."""
        expected = Expected(name, self._system_id, backup, most)
        body = await self._first(name, lambda store: _whole(store, name, digest))
        try:
            await in_thread(partial(self._hand_over, expected, body, use))
        finally:
            body.close()

    def _hand_over(self, expected: Expected, body: Body, use: Callable[[Iterator[Buffer]], None]) -> None:
        use(self._chain.expand(expected, _cut(body.chunks(), body.size - TRAILER_SIZE)))

    async def _first(self, name: str, read: Callable[[Store], Awaitable[T]]) -> T:
        """What ``read`` makes of the first destination that has it whole."""
        failures: list[StoreError | IntegrityError] = []
        passed_over: list[tuple[Store, str]] = []
        for store in self._destinations:
            try:
                found = await read(store)
            except ObjectMissing:
                # A record is where it could be written that day; the service copies it later.
                if not name.startswith(operations.FOLDER):
                    passed_over.append((store, f"{store.name} lacks {name}"))
                continue
            except Sealed:
                raise  # here it can be read nowhere
            except (StoreError, IntegrityError) as error:
                failures.append(error)
                passed_over.append((store, error.fact))
                continue
            for other, fact in passed_over:
                self._tell(other, f"{fact}; {store.name} served {'it' if name in fact else name} instead")
            return found
        raise self._verdict(name, failures)

    def _tell(self, store: Store, sentence: str) -> None:
        self._told[store.name] += 1
        if self._told[store.name] <= _TOLD:
            self._notify(sentence)
        elif self._told[store.name] == _TOLD + 1:
            self._notify(f"{store.name} has more that others have to serve; that is not told one by one")

    async def tail(self, file: WalFile, segment_size: int, *, lenient: bool = False) -> Stitched | None:
        """See ``pipeline.contracts.Fetch``."""

        async def read(store: Store, name: str, most: int) -> Fetched:
            return await self._fetched(store, Expected(name, self._system_id, "", most))

        return await read_tail(self._destinations, read, file, segment_size, lenient=lenient, passed_over=self._tell)

    async def _fetched(self, store: Store, expected: Expected) -> Fetched:
        header, plain, digest = await self._from(store, expected, self._decode)
        return Fetched(header, plain, digest, store.name)

    async def _from(self, store: Store, expected: Expected, work: Callable[[Expected, Body], T]) -> T:
        """Read once more if a data key was stored since we looked: perhaps it was that."""
        known = self._learned
        try:
            return await self._read(store, expected, work)
        except Sealed:
            raise
        except IntegrityError:
            if not await self._know_more_than(known):
                raise
        return await self._read(store, expected, work)

    async def _know_more_than(self, known: int) -> bool:
        async with self._refreshing:
            if self._refresh is not None and self._learned == known and await self._refresh():
                self._learned += 1
            return self._learned > known

    async def _read(self, store: Store, expected: Expected, work: Callable[[Expected, Body], T]) -> T:
        """What ``work`` makes of the object at one destination, in a thread: the whole chain in one hop."""
        body = await store.get(expected.name)
        try:
            async with self._turns:
                return await in_thread(partial(work, expected, body))
        except Sealed as error:
            raise Sealed(f"{expected.name} cannot be read: {error.fact}", hint=error.hint) from None
        except IntegrityError as error:
            raise IntegrityError(f"{store.name}: {error.fact}", hint=error.hint) from None
        finally:
            body.close()

    def _decode(self, expected: Expected, body: Body) -> tuple[Header, bytearray, str]:
        end = Trailing(body.chunks())
        header, plain = self._chain.decode(expected, end)
        return header, plain, end.trailer.hex()

    def _verdict(self, name: str, failures: list[StoreError | IntegrityError]) -> StoreError | IntegrityError:
        if not failures:
            places = ", ".join(store.name for store in self._destinations)
            return ObjectMissing(f"{name} is missing from {places}")
        # A damaged copy is known to exist; a store that failed may yet serve a good one, so it is the one to name.
        return next((error for error in failures if isinstance(error, StoreError)), failures[0])


async def _whole(store: Store, name: str, digest: str) -> Body:
    """The object at one destination, compared with its own checksum and with the digest that was asked for."""
    body = await store.get(name)
    try:
        _, found = await in_thread(partial(check_stored, name, body.chunks()))
        if found != digest:
            raise IntegrityError(
                f"{name} is not the one that is listed: its digest is {found[:16]}…, not {digest[:16]}…",
                hint="it was exchanged; read from another destination with --from, or choose another backup",
            )
    except IntegrityError as error:
        body.close()
        raise IntegrityError(f"{store.name}: {error.fact}", hint=error.hint) from None
    except BaseException:
        body.close()
        raise
    return body


def _cut(pieces: Iterable[Buffer], size: int) -> Iterator[Buffer]:
    """The first ``size`` bytes."""
    for piece in pieces:
        if size <= 0:
            return
        yield piece if len(piece) <= size else memoryview(piece)[:size]
        size -= len(piece)


async def read_catalog(
    destinations: Sequence[Store],
    fetch: Fetch,
    system_id: str,
    *,
    segment_size: int | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> Catalog:
    """List the destinations and read each backup_info, history and tail: what any of them has is there.

    Tails are read of segments only that are finished nowhere, and not kept: how far they reach is.

    What cannot be read is a problem of the catalog, not an error; so is a destination that cannot be listed, unless it
    was the last one. ``segment_size`` in bytes is needed only where there is neither a backup nor a segment.
    """
    listing = Listing(system_id)
    names: set[str] = set()
    failures: list[StoreError] = []
    for store in destinations:
        try:
            names |= await _list(store, listing)
        except StoreError as error:
            failures.append(error)
            listing.problem(f"{store.name} could not be listed: {error.fact}")
    if failures and len(failures) == len(destinations):
        raise failures[0]
    for name in sorted(names):
        await _read_info(listing, fetch, name)
    for file in sorted(listing.history_files):
        try:
            fetched = await fetch(wal_key(file), most=_MOST_HISTORY)
            listing.add_history(file.timeline, parse_history(file.name, bytes(fetched.plain)))
        except Sealed:
            listing.add_history(file.timeline, ())  # by itself, then
        except (IntegrityError, StoreError) as error:
            listing.unreadable_history(file.timeline, error.fact)
    size = listing.segment_size or segment_size or await _measured(listing, fetch) or SEGMENT_SIZES[4]
    for file in listing.unfinished(size):
        await _join(listing, destinations, fetch, file, size)
    catalog = listing.catalog(size)
    for problem in catalog.problems:
        notify(problem)
    return catalog


async def _join(listing: Listing, destinations: Sequence[Store], fetch: Fetch, file: WalFile, size: int) -> None:
    """What the tails of a segment make that is not finished; or by now it is."""
    fact = "they went while they were read"
    for _ in range(_LOOKS):
        made = None
        try:
            made = await fetch.tail(file, size, lenient=True)
        except ObjectMissing as error:
            fact = error.fact
        except Sealed:
            return  # how far they reach, who can read tells
        except StoreError as error:
            listing.problem(f"the tails of segment {file} cannot be read: {error.fact}")
            return
        if (made is None or made.reach < size) and await _is_there(destinations, wal_key(file)):
            listing.add(wal_key(file))
            return
        if made is not None:
            listing.add_tail(made)
            return
    listing.problem(f"the tails of segment {file} cannot be read: {fact}")


async def _is_there(destinations: Sequence[Store], key: str) -> bool:
    """Whether any destination has it; what one that does not answer has is not known."""
    for store in destinations:
        with suppress(StoreError):
            await store.head(key)
            return True
    return False


async def _list(store: Store, listing: Listing) -> set[str]:
    # In this order: tails go once the finished segment is there, so each segment is seen in one of the two.
    for prefix in ("tail/", "wal/"):
        async for info in store.list(prefix):
            listing.add(info.key)
    names = set()
    async for info in store.list("base/", shallow=True):
        # A folder proves nothing: whether there is a backup in it, its backup_info tells.
        name = info.key.removeprefix("base/").rstrip("/")
        if backup_of(info_key(name)):
            names.add(name)
    return names


async def _read_info(listing: Listing, fetch: Fetch, name: str) -> None:
    key = info_key(name)
    try:
        fetched = await fetch(key, backup=None, most=_MOST_INFO)
        info = checked_info(key, name, fetched.plain)
        if info.id != fetched.header.backup:
            raise IntegrityError(f"{key} says another backup id than its header does")
        listing.add_backup(info)
    except ObjectMissing:
        return  # being taken, or never finished
    except Sealed:
        listing.add_sealed(name)
    except StoreError as error:  # expired, never finished, or only there: nobody knows
        listing.problem(f"whether {name} is a backup cannot be told now: {error.fact}")
    except IntegrityError as error:
        listing.problem(f"backup {name} cannot be used: {error.fact}")


async def _measured(listing: Listing, fetch: Fetch) -> int | None:
    """The segment size as a stored segment shows it; None if there is none."""
    file = listing.any_segment
    if file is None:
        return None
    size = len((await fetch(wal_key(file))).plain)
    if size not in SEGMENT_SIZES:
        raise RecoveryError(f"segment {file} holds {size} bytes, which is no segment size")
    return size
