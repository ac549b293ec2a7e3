"""Which cluster a destination holds: ``repository.json``, found, read, compared and (by ``init`` only) written.

The file is for people and a first look. What must be true of an object is in the object itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

import structlog

from handlers.body import joined
from handlers.outlet import emptied
from pipeline.catalog import REPOSITORY
from pipeline.contracts import Store
from pipeline.errors import ConfigError, IntegrityError, ObjectMissing, StoreError, WalshipError
from pipeline.objects import MemoryBody, check_members, strict_json
from pipeline.wal import SEGMENT_SIZES

log = structlog.get_logger()

FORMAT = 1
#: Bytes; ours has two hundred.
_MOST = 64 << 10
#: Seconds after which the next destination is asked as well.
ANSWER = 5.0


@dataclass(frozen=True, slots=True)
class RepositoryFacts:
    """What ``repository.json`` says."""

    #: System identifier of the cluster, decimal digits.
    system_id: str
    #: Major version of the server when the repository was made.
    server_major: int
    #: Bytes.
    segment_size: int
    #: RFC 3339.
    created: str
    format: int = FORMAT

    def encode(self) -> MemoryBody:
        return MemoryBody([json.dumps(asdict(self), indent=1).encode() + b"\n"])


_MEMBERS: dict[str, type] = {
    f.name: int if f.name in ("server_major", "segment_size", "format") else str for f in fields(RepositoryFacts)
}


@dataclass(frozen=True, slots=True)
class Destination:
    """A place that holds repositories."""

    #: The store, with folders of clusters in it.
    root: Store
    #: Must confirm an object before it is acknowledged.
    required: bool
    #: It shows the past: see ``storage.as_of``.
    past: bool = False

    @property
    def name(self) -> str:
        return self.root.name


async def read_facts(store: Store, system_id: str) -> RepositoryFacts:
    """``repository.json`` of one cluster. ObjectMissing if it is not there, IntegrityError if it makes no sense."""
    key = f"{system_id}/{REPOSITORY}"
    body = await store.get(key)
    try:
        if body.size > _MOST:
            raise IntegrityError(f"{key} at {store.name} is {body.size} bytes; a repository.json has at most {_MOST}")
        content = joined(body)
    finally:
        body.close()
    try:
        members = strict_json(content)
        if isinstance(members, dict) and type(members.get("format")) is int and members["format"] != FORMAT:
            raise IntegrityError(
                f"the repository at {store.name} is of format {members['format']}; this walship knows format {FORMAT}",
                hint="use the walship version that wrote it, or a newer one",
            )
        facts = RepositoryFacts(**check_members(members, _MEMBERS))
    except ValueError as error:
        raise IntegrityError(
            f"{key} at {store.name} cannot be read: {error}", hint="copy it back from another destination"
        ) from None
    if facts.system_id != system_id or facts.segment_size not in SEGMENT_SIZES or facts.server_major < 1:
        raise IntegrityError(f"{key} at {store.name} contradicts itself: {facts}")
    return facts


async def refuse_emptied(stores: Iterable[Store]) -> None:
    """Raise what the service tells of the first of the stores, rooted at a cluster's folder, that holds it no more.

    Without ``repository.json`` nothing counts as stored there, whatever a listing shows.
    """
    for store in stores:
        try:
            await store.head(REPOSITORY)
        except ObjectMissing:
            raise emptied(store) from None


async def clusters(store: Store) -> list[str]:
    """System identifiers of the clusters that have a repository at a destination, oldest number first."""
    found = []
    async for entry in store.list("", shallow=True):
        folder = entry.key.rstrip("/")
        if not (entry.key.endswith("/") and folder.isdigit()):
            continue
        try:
            await store.head(f"{folder}/{REPOSITORY}")
        except ObjectMissing:
            continue  # a listing may show folders that hold nothing
        found.append(folder)
    return sorted(found)


async def find(destinations: Sequence[Destination], cluster: str = "") -> RepositoryFacts:
    """The one repository that is there, or the one that was asked for, from the first destination that has it whole.

    A destination that fails or holds a damaged ``repository.json`` is passed over, with a warning if another serves;
    so is one that has not answered for ``ANSWER`` seconds: the next one is asked beside it.
    ConfigError if there is none or several to choose from; the last StoreError or IntegrityError if none can be read.
    """
    if cluster and not (cluster.isascii() and cluster.isdigit()):
        raise ConfigError(
            f"--cluster {cluster!r} is not a system identifier", hint="it is a number, as `pg_controldata` shows it"
        )
    looks: list[tuple[Destination, asyncio.Task[_Look]]] = []
    try:
        for destination in destinations:
            task = asyncio.create_task(_look(destination, cluster))
            looks.append((destination, task))
            await asyncio.wait([task], timeout=ANSWER)
            if task.done() and task.result().facts is not None:
                break
        else:
            await asyncio.wait([task for _, task in looks])  # nobody else serves: they have all the time they need
        return _chosen(looks, destinations, cluster)
    finally:
        for _, task in looks:
            task.cancel()
        await asyncio.gather(*(task for _, task in looks), return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Look:
    """What a destination has: clusters, the facts of the only one that can be meant, or what is wrong there."""

    clusters: Sequence[str] = ()
    facts: RepositoryFacts | None = None
    failure: StoreError | IntegrityError | None = None


async def _look(destination: Destination, cluster: str) -> _Look:
    here: Sequence[str] = [cluster] if cluster else ()
    try:
        here = here or await clusters(destination.root)
        return _Look(here, await read_facts(destination.root, here[0]) if len(here) == 1 else None)
    except ObjectMissing:
        return _Look(() if cluster else here)
    except (StoreError, IntegrityError) as error:
        return _Look(here, failure=error)


def _chosen(
    looks: Sequence[tuple[Destination, asyncio.Task[_Look]]], destinations: Sequence[Destination], cluster: str
) -> RepositoryFacts:
    """The facts of the first that has them; each one that was passed over for it is told."""
    seen: set[str] = set()
    failures: list[tuple[Destination, StoreError | IntegrityError]] = []
    facts = None
    for destination, task in looks:
        if not task.done():
            fact = f"{destination.name} has not answered for {ANSWER:g} seconds, and another destination has"
            failures.append((destination, StoreError(fact, hint="it is gone on without it", passing=True)))
            continue
        found = task.result()
        seen.update(found.clusters)
        if found.failure is not None:
            failures.append((destination, found.failure))
        facts = facts or found.facts
    if facts is None:
        raise _none_found(destinations, cluster, seen, [error for _, error in failures])
    for passed_over, failure in failures:
        log.warning("repository", destination=passed_over.name, error=failure.fact, hint=failure.hint)
    return facts


def _none_found(
    destinations: Sequence[Destination], cluster: str, seen: set[str], failures: Sequence[WalshipError]
) -> WalshipError:
    if len(seen) > 1:
        return ConfigError(
            f"the destinations hold {len(seen)} clusters: {', '.join(sorted(seen))}", hint="choose one with --cluster"
        )
    if failures:
        return failures[-1]
    names = ", ".join(d.name for d in destinations)
    what = f"cluster {cluster}" if cluster else "any cluster"
    hint = "name a later moment" if any(d.past for d in destinations) else "`walship init` makes it"
    return ConfigError(f"there is no repository of {what} at {names}", hint=hint)
