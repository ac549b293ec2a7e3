"""The contracts that join the rooms. Whoever keeps these promises can take part; nothing else is assumed.

Object *names* are keys relative to the folder of one cluster (``<destination>/<system identifier>/``): see ``catalog``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, TypeAlias

from pipeline.events import Event
from pipeline.objects import MAX_PLAIN, Header
from pipeline.tail import Stitched
from pipeline.wal import WalFile

#: What stages hand on: anything that looks like bytes. A stage may reuse its buffer once the next piece is asked for.
Buffer: TypeAlias = bytes | bytearray | memoryview

#: A half-open range of bytes, ``(start, end)``.
Span: TypeAlias = tuple[int, int]


class Body(Protocol):
    """The bytes of one stored object, readable any number of times: the same for every destination and every retry."""

    @property
    def size(self) -> int: ...

    def chunks(self) -> Iterator[bytes]:
        """From the first byte on, at each call. May read a local file, so call it from a thread where that matters."""
        ...

    def close(self) -> None:
        """Free what holds the bytes; idempotent."""
        ...


class Source(Protocol):
    """Whoever notices that there is something to ship."""

    @property
    def name(self) -> str: ...

    def events(self) -> AsyncIterator[Event]:
        """What is ready, in WAL order per timeline. Ends only when there will never be more."""
        ...

    def read(self, event: Event) -> Buffer:
        """The bytes of the event: the same at each call until ``done``. Blocks; called from a worker thread."""
        ...

    async def done(self, event: Event) -> None:
        """The event is durable at every required destination: forget it. Idempotent."""
        ...


class Stage(Protocol):
    """A filter on bytes and the way back. No I/O, no asyncio: the whole chain runs in one hop to a thread."""

    def describe(self, header: Header) -> Header:
        """Write into the header what ``backward`` will need: codec; cipher, key and a fresh salt."""
        ...

    def forward(self, header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]: ...

    def backward(self, header: Header, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        """Undo ``forward``. Raises IntegrityError for what ``forward`` cannot have made; never returns short."""
        ...


@dataclass(frozen=True, slots=True)
class DataKey:
    """A key that objects are encrypted under."""

    #: Public name of the key, in each object's header and in ``keys/data-<id>``.
    id: str
    #: 32 random bytes; never printed.
    secret: bytes = field(repr=False)


class Keyring(Protocol):
    """The keys of one repository, loaded and opened beforehand: nothing here waits."""

    def current(self) -> DataKey:
        """The key this process writes under. Raises ConfigError when the repository has no ring."""
        ...

    def find(self, key_id: str) -> DataKey:
        """The key of that id, or an IntegrityError that says who could open it."""
        ...

    def must_encrypt(self, name: str) -> bool:
        """Whether the sealed policy of the repository forbids that an object of this name is stored plain."""
        ...

    def fingerprint(self, name: str, plain: Buffer) -> str:
        """Digest of name and plaintext, keyed with the writer secret: tells same from other without decrypting."""
        ...


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One line of a listing. The key of a folder ends in ``/`` and its size is 0."""

    key: str
    size: int
    modified: datetime | None = None


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a store was found to be able to do when it was probed."""

    #: "Create only if absent" is decided by the store itself, in one step.
    conditional_put: bool
    #: One line for people about what was found and what it means.
    remark: str = ""


class Store(Protocol):
    """A place that keeps objects. Keys are relative to the store's root; all errors are StoreError."""

    @property
    def name(self) -> str:
        """For people, metrics and messages; holds no secret."""
        ...

    async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
        """Store the object whole and durably, or not at all; readers never see a part of it.

        Without ``replace`` it is created only if absent, else ObjectConflict. May be called again with the same body
        after any failure. ``keep_until`` asks for object lock where the store has it and is an error where not.
        """
        ...

    async def get(self, key: str, span: Span | None = None) -> Body:
        """The object, or the span of it (cut at its end). ObjectMissing if absent; a short answer is an error."""
        ...

    async def head(self, key: str) -> ObjectInfo:
        """Size and time of one object. ObjectMissing if absent."""
        ...

    def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        """What begins with ``prefix`` and sorts behind ``after``; no order promised.

        ``shallow`` stops at the next ``/`` behind the prefix and gives the folder once. An empty folder may be shown.
        """
        ...

    async def delete(self, keys: Collection[str]) -> None:
        """Remove; a key that is absent already is a success."""
        ...

    async def probe(self, key: str, body: Body) -> Abilities:
        """Find out what the store can do, by creating ``key`` anew; it must hold exactly ``body`` already."""
        ...

    async def close(self) -> None:
        """Free connections; idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Shipped:
    """What is known of an object once it is durable at every required destination."""

    name: str
    #: Bytes as stored.
    size: int
    #: SHA-256 trailer of the stored object, as hex.
    digest: str


class Ship(Protocol):
    """Encode an object once and store it everywhere. What handlers that make objects are given."""

    async def __call__(
        self, name: str, plain: Buffer, *, backup: str = "", encoded: Callable[[], None] | None = None
    ) -> Shipped:
        """Returns once all required destinations have confirmed; raises StoreError when one has failed for good.

        ``encoded`` is called as soon as ``plain`` is not needed any more, long before it is stored.
        """
        ...


class Fetch(Protocol):
    """Read an object from the first destination that has it whole. What handlers that read objects are given."""

    async def __call__(self, name: str, *, backup: str | None = "", most: int = MAX_PLAIN) -> Fetched:
        """The checked plaintext. ObjectMissing only if *every* destination answered and none has it.

        Raises IntegrityError if it is damaged wherever it is, StoreError if a destination that may have it fails.
        """
        ...

    async def stream(
        self, name: str, use: Callable[[Iterator[Buffer]], None], *, backup: str | None = "", most: int = MAX_PLAIN
    ) -> None:
        """Hand the plaintext to ``use``, in a thread, while it is decoded; none of it is kept.

        What is wrong with a copy may be found at its very end: the pieces then end with an IntegrityError, which
        ``use`` lets through, and ``use`` is called anew with those of the next destination. What was handed over is
        right only if this returns. Each piece is valid until the next is asked for. When it is cancelled, it ends once
        ``use`` has. Errors as above, and whatever ``use`` raises.
        """
        ...

    async def into(
        self,
        name: str,
        use: Callable[[Iterator[Buffer]], None],
        *,
        digest: str,
        backup: str | None = "",
        most: int = MAX_PLAIN,
    ) -> None:
        """Hand the plaintext of an object to ``use``, in a thread, at most once. ``digest``: its trailer as hex, known.

        What differs from the digest is no copy of it: that is found before ``use`` is called, and the next destination
        is asked. Each piece is valid until the next is asked for; what was handed over is right only if this returns.
        When it is cancelled, it ends once ``use`` has. Errors as above, and whatever ``use`` raises.
        """
        ...

    async def tail(self, file: WalFile, segment_size: int, *, lenient: bool = False) -> Stitched | None:
        """The open segment, joined from the tails of all destinations; None only if all answered and none has any.

        Raises ObjectMissing if a tail went while it was read: look for the finished segment, then here again; and
        StoreError if a destination does not answer (``lenient``: only if none does; else that is a notice).
        """
        ...


@dataclass(frozen=True, slots=True)
class Fetched:
    """A stored object, read back and checked."""

    header: Header
    plain: bytearray
    #: SHA-256 trailer of the stored object, as hex.
    digest: str
    #: Name of the destination that served it.
    destination: str


class Clock(Protocol):
    """Time, passed in so that tests need not wait."""

    def now(self) -> datetime:
        """Wall clock, in UTC: for people and stored records."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back: for decisions."""
        ...

    async def sleep(self, seconds: float) -> None: ...
