"""Records of operations in the repository: written at the end of each, by whoever did it; read from listings.

A record is no part of the operation: one that cannot be written is told of, and fails nothing. A restore often has
credentials that may only read.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from handlers.body import collect
from handlers.checksum import Checksum
from handlers.compress import Compress
from handlers.encrypt import Encrypt
from infra.wiring import Site
from pipeline import operations
from pipeline.backup import BackupInfo
from pipeline.catalog import data_key_name
from pipeline.chain import Chain
from pipeline.contracts import Body, Fetch, Store
from pipeline.errors import ObjectConflict, ObjectMissing, ReadOnly, StoreError, WalshipError, foreseen
from pipeline.operations import Record, RecordName

#: Seconds that a destination has to take a record; and where somebody waits for the process to end.
PATIENCE, STOPPING = 20.0, 5.0
#: Records that are read at a time.
AT_ONCE = 16


@dataclass(slots=True)
class Entry:
    """What will be said of an operation that is under way."""

    verb: str
    #: The verb's own: what can be told in figures and names. JSON, no secrets.
    summary: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    hint: str = ""
    stopped: bool = False

    def fail(self, fact: str, *, hint: str = "") -> None:
        """It did its work, and the outcome is bad: damage was found. The first fact counts."""
        if not self.error:
            self.error, self.hint = fact, hint


@contextlib.asynccontextmanager
async def recording(
    site: Site, verb: str, arguments: Sequence[str] = (), *, tell: Callable[[str], None]
) -> AsyncIterator[Entry]:
    """Leave a record of what the block does at every destination that takes it, however the block ends.

    ``verb`` is one of ``operations.RECORDED``; ``arguments`` are what was typed behind it, ``tell`` hears which
    destination did not take the record. What the block raises is recorded and goes on.
    """
    entry = Entry(verb)
    began, start = site.clock.now(), site.clock.monotonic()
    patience = PATIENCE
    try:
        yield entry
    except BaseException as error:
        ours = foreseen(error)
        if isinstance(error, asyncio.CancelledError):
            patience, entry.stopped = STOPPING, True
            entry.fail("it was stopped before it was done")
        elif ours is not None:
            entry.fail(ours.fact, hint=ours.hint)
        else:
            entry.fail(f"it was ended by {type(error).__name__}")
        raise
    finally:
        ended = site.clock.now()
        record = Record(
            verb=verb,
            began=began,
            ended=ended,
            seconds=site.clock.monotonic() - start,
            ok=not entry.error,
            host=socket.gethostname(),
            version=version("walship"),
            arguments=tuple(arguments),
            error=entry.error,
            hint=entry.hint,
            stopped=entry.stopped,
            summary=entry.summary,
        )
        await write(site, record, tell=tell, patience=patience)


def backup_summary(taken: BackupInfo) -> dict[str, Any]:
    """What the record of a backup says of it; ``kind`` tells the schedule which of them it was."""
    return {
        "name": taken.name,
        "kind": taken.kind,
        "parent": taken.parent or None,
        "size": taken.size,
        "stored_size": taken.stored_size,
        "timeline": taken.timeline,
        "start_lsn": str(taken.start_lsn),
        "stop_lsn": str(taken.stop_lsn),
    }


async def write(
    site: Site, record: Record, *, tell: Callable[[str], None], patience: float = PATIENCE
) -> RecordName | None:
    """Store the record wherever it is taken; None if it is nowhere. Raises nothing of ours."""
    ended = record.ended.astimezone(UTC).replace(microsecond=0)
    name = RecordName(ended, record.verb, record.ok, secrets.token_hex(4))
    try:
        site.keys.write_under_known(site.clock.now())
        body = await asyncio.to_thread(encoded, site, name.key, record.encode(), ended)
    except WalshipError as error:
        tell(f"no record of this {record.verb} could be made: {error.fact}")
        return None
    taken = await asyncio.gather(*(_put(site, store, name.key, body, tell, patience) for store in site.stores))
    return name if any(taken) else None


def encoded(site: Site, key: str, content: bytes, created: datetime) -> Body:
    """Encrypted as the repository's policy for WAL says, whatever the settings of this host do: it must be readable."""
    keys, settings = site.keys, site.settings
    encrypted = keys.policy.wal or (keys.encrypted and settings.wal_encrypted)
    cipher = settings.backup_encryption_algorithm if encrypted else "none"
    chain = Chain([Compress("zstd"), Encrypt(keys, lambda _name: cipher), Checksum()], keys, site.facts.system_id)
    return collect(chain.encode(key, content, created=created))


async def _put(site: Site, store: Store, key: str, body: Body, tell: Callable[[str], None], patience: float) -> bool:
    try:
        async with asyncio.timeout(patience):
            await put_key(site, store)
            with contextlib.suppress(ObjectConflict):  # an attempt whose answer was lost: the name is ours alone
                await store.put(key, body)
    except ReadOnly:
        return False  # whoever looks at the past knows that nothing is written there
    except StoreError as error:
        fact = error.fact
    except TimeoutError:
        fact = f"no answer within {patience:g} seconds"
    else:
        return True
    tell(f"{store.name} took no record of this: {fact}")
    return False


async def put_key(site: Site, store: Store) -> None:
    """The data key of what was ``encoded``, where it is not yet: a record is worth nothing without."""
    if not site.keys.encrypted:
        return
    name = data_key_name(site.keys.current().id)
    try:
        await store.head(name)
    except ObjectMissing:
        body = site.keys.key_object[1] if site.keys.key_object else await _found(site, store, name)
        with contextlib.suppress(ObjectConflict):
            await store.put(name, body)


async def _found(site: Site, lacking: Store, name: str) -> Body:
    for other in site.stores:
        if other is not lacking:
            with contextlib.suppress(StoreError):
                return await other.get(name)
    raise StoreError(f"{name}, which it would be encrypted under, is nowhere to be had")


@dataclass(frozen=True, slots=True)
class Listed:
    """The records at some destinations."""

    #: The one that ended last in front; each once, wherever it is.
    names: tuple[RecordName, ...]
    #: Destination → why it could not be listed.
    failures: dict[str, StoreError] = field(default_factory=dict)

    def newest(self, verb: str, *, ok: bool | None = None) -> RecordName | None:
        """The last one of the verb; see ``operations.newest``."""
        return operations.newest(self.names, verb, ok=ok)


async def listed(stores: Sequence[Store]) -> Listed:
    """Names of all records. A destination that fails is left out, and said; StoreError if none answers."""

    async def names(store: Store) -> set[RecordName] | StoreError:
        try:
            found = [RecordName.parse(entry.key) async for entry in store.list(operations.FOLDER)]
        except StoreError as error:
            return error
        return {name for name in found if name is not None}

    answers = await asyncio.gather(*map(names, stores))
    failures = {s.name: a for s, a in zip(stores, answers, strict=True) if isinstance(a, StoreError)}
    if stores and len(failures) == len(stores):
        raise next(iter(failures.values()))
    together = set[RecordName]().union(*(answer for answer in answers if isinstance(answer, set)))
    return Listed(tuple(sorted(together, reverse=True)), failures)


async def read(fetch: Fetch, name: RecordName) -> Record:
    """The content of a record. Raises StoreError, IntegrityError."""
    fetched = await fetch(name.key, most=operations.MOST)
    return Record.decode(name.key, fetched.plain)


async def read_all(fetch: Fetch, names: Sequence[RecordName]) -> list[Record | WalshipError]:
    """The contents, in that order; in the place of one that cannot be read, why: a host may be able to write only."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(name: RecordName) -> Record | WalshipError:
        async with gate:
            try:
                return await read(fetch, name)
            except WalshipError as error:
                return error

    return await asyncio.gather(*map(one, names))
