"""Which cluster a destination holds: ``repository.json``, found, read, compared and (by ``init`` only) written.

The file is for people and a first look. What must be true of an object is in the object itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from handlers.body import joined
from pipeline.catalog import REPOSITORY
from pipeline.contracts import Store
from pipeline.errors import ConfigError, IntegrityError, ObjectMissing, StoreError
from pipeline.objects import MemoryBody
from pipeline.wal import SEGMENT_SIZES

FORMAT = 1


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


@dataclass(frozen=True, slots=True)
class Destination:
    """A place that holds repositories."""

    #: The store, with folders of clusters in it.
    root: Store
    #: Must confirm an object before it is acknowledged.
    required: bool

    @property
    def name(self) -> str:
        return self.root.name


async def read_facts(store: Store, system_id: str) -> RepositoryFacts:
    """``repository.json`` of one cluster. ObjectMissing if it is not there, IntegrityError if it makes no sense."""
    key = f"{system_id}/{REPOSITORY}"
    content = joined(await store.get(key))
    try:
        facts = RepositoryFacts(**json.loads(content))
        sensible = facts.system_id == system_id and facts.segment_size in SEGMENT_SIZES
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{key} at {store.name} cannot be read: {error}") from None
    if facts.format != FORMAT:
        raise IntegrityError(
            f"the repository at {store.name} is of format {facts.format}; this walship knows format {FORMAT}",
            hint="use the walship version that wrote it, or a newer one",
        )
    if not sensible:
        raise IntegrityError(f"{key} at {store.name} contradicts itself: {facts}")
    return facts


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
    """The one repository that is there, or the one that was asked for, from the first destination that answers.

    ConfigError if there is none or several to choose from; the last StoreError if no destination answers.
    """
    failure: StoreError | None = None
    seen: set[str] = set()
    for destination in destinations:
        try:
            here = [cluster] if cluster else await clusters(destination.root)
            seen.update(here)
            if len(here) == 1:
                return await read_facts(destination.root, here[0])
        except ObjectMissing:
            seen.discard(cluster)
        except StoreError as error:
            failure = error
    if len(seen) > 1:
        raise ConfigError(
            f"the destinations hold {len(seen)} clusters: {', '.join(sorted(seen))}", hint="choose one with --cluster"
        )
    if failure is not None:
        raise failure
    names = ", ".join(d.name for d in destinations)
    what = f"cluster {cluster}" if cluster else "any cluster"
    raise ConfigError(f"there is no repository of {what} at {names}", hint="`walship init` makes it")
