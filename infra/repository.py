"""Which cluster a destination holds: ``repository.json``, found, read, compared and (by ``init`` only) written.

The file is for people and a first look. What must be true of an object is in the object itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import structlog

from handlers.body import joined
from pipeline.catalog import REPOSITORY
from pipeline.contracts import Store
from pipeline.errors import ConfigError, IntegrityError, ObjectMissing, StoreError, WalshipError
from pipeline.objects import MemoryBody, check_members, strict_json
from pipeline.wal import SEGMENT_SIZES

log = structlog.get_logger()

FORMAT = 1
#: Bytes; ours has two hundred.
_MOST = 64 << 10


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

    A destination that fails or holds a damaged ``repository.json`` is passed over, with a warning if another serves.
    ConfigError if there is none or several to choose from; the last StoreError or IntegrityError if none can be read.
    """
    if cluster and not (cluster.isascii() and cluster.isdigit()):
        raise ConfigError(
            f"--cluster {cluster!r} is not a system identifier", hint="it is a number, as `pg_controldata` shows it"
        )
    failures: list[tuple[Destination, StoreError | IntegrityError]] = []
    seen: set[str] = set()
    for destination in destinations:
        try:
            here = [cluster] if cluster else await clusters(destination.root)
            seen.update(here)
            if len(here) == 1:
                facts = await read_facts(destination.root, here[0])
                break
        except ObjectMissing:
            seen.discard(cluster)
        except (StoreError, IntegrityError) as error:
            failures.append((destination, error))
    else:
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
    return ConfigError(f"there is no repository of {what} at {names}", hint="`walship init` makes it")
