"""What a planned restore will fetch, and from where: found by listing, before anything is touched.

One listing of the backup and one of each folder of WAL that the plan touches, at each destination. A part that no
destination has is found here, and not when half of the backup is laid down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.backup import BackupInfo
from pipeline.catalog import index_key, manifest_key, part_key, wal_key
from pipeline.contracts import Clock, Fetch, Store
from pipeline.errors import IntegrityError, StoreError
from pipeline.lineage import WalPath
from pipeline.recovery import RestorePlan
from pipeline.tail import TailName, tail_folder

#: Parts that are fetched side by side to measure how fast that goes, and for how many seconds at most.
_SAMPLE = 3
_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Share:
    """What one destination will serve: it is the first one that has these objects."""

    #: Name of the destination.
    destination: str
    objects: int
    #: Bytes as stored.
    size: int


@dataclass(frozen=True, slots=True)
class Shares:
    """Where the objects of a plan lie. Sizes are of what is stored: compressed, encrypted."""

    base: tuple[Share, ...]
    #: Finished segments.
    wal: tuple[Share, ...]
    #: Keys that no destination has. Empty also when one of them could not be listed: it may have them.
    missing: tuple[str, ...] = ()
    #: What could not be listed, one sentence each.
    problems: tuple[str, ...] = ()
    #: Of segments that are stored in no other way.
    tails: tuple[Share, ...] = ()

    @property
    def base_size(self) -> int:
        return sum(share.size for share in self.base)

    @property
    def wal_size(self) -> int:
        return sum(share.size for share in (*self.wal, *self.tails))

    @property
    def size(self) -> int:
        """Bytes to fetch, if nothing is there already."""
        return self.base_size + self.wal_size


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the first parts of the backup came, fetched and decoded side by side."""

    parts: int
    #: Bytes of plaintext.
    size: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes of plaintext a second; 0 if none of them came in time."""
        return self.size / max(self.seconds, 0.001)


async def share_out(plan: RestorePlan, destinations: Sequence[Store]) -> Shares:
    """Which destination will serve what. A destination that cannot be listed is a problem, not an error."""
    chain = (*plan.before, plan.backup)
    problems: list[str] = []
    index = {index_key(backup.name, number) for backup in chain for number in range(1, len(backup.index) + 1)}
    needed = index.union(*map(_needed, chain))
    base, missing = await _shares(destinations, needed, [f"base/{backup.name}/" for backup in chain], problems)
    segments = {wal_key(file) for file in plan.path.stored()}
    folders = sorted({f"{key.rpartition('/')[0]}/" for key in segments})
    wal, _ = await _shares(destinations, segments, folders, problems)
    tails = await _tails(destinations, plan.path, problems)
    # A restore can do without the index, and a destination that did not answer may have the rest.
    lost = () if problems else tuple(sorted(missing - index))
    return Shares(base, wal, lost, tuple(dict.fromkeys(problems)), tails)


def check_complete(found: Shares, backup: BackupInfo) -> None:
    """Raises IntegrityError for the first object that no destination has: of the backup, or of what it builds on."""
    if found.missing:
        owner = found.missing[0].split("/")[1]
        builds = "" if owner == backup.name else f", and {backup.name} builds on it"
        more = f", and {len(found.missing) - 1} more" if len(found.missing) > 1 else ""
        raise IntegrityError(
            f"{found.missing[0]}{more} is missing from every destination: backup {owner} is not complete{builds}",
            hint="choose another one with --backup; `walship list` shows them, and what each can reach",
        )


async def measure(backup: BackupInfo, fetch: Fetch, clock: Clock) -> Pace:
    """Fetch the first parts and drop them. Raises StoreError and IntegrityError, as the restore would."""
    names = [
        part_key(backup.name, archive.name, number)
        for archive in backup.archives
        for number in range(1, len(archive.parts) + 1)
    ][:_SAMPLE]
    began = clock.monotonic()
    tasks = [asyncio.create_task(fetch(name, backup=backup.id)) for name in names]
    try:
        done, _ = await asyncio.wait(tasks, timeout=_PATIENCE) if tasks else (set(), set())
        sizes = [len(task.result().plain) for task in done]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Pace(len(sizes), sum(sizes), clock.monotonic() - began)


def _needed(backup: BackupInfo) -> set[str]:
    """Without these there is no restore."""
    keys = {
        part_key(backup.name, archive.name, number)
        for archive in backup.archives
        for number in range(1, len(archive.parts) + 1)
    }
    return keys | {manifest_key(backup.name)} if backup.manifest else keys


async def _shares(
    destinations: Sequence[Store], wanted: set[str], prefixes: Sequence[str], problems: list[str]
) -> tuple[tuple[Share, ...], set[str]]:
    """What each destination is the first to have, and what none has."""
    left = set(wanted)
    shares = []
    for store in destinations:
        count = size = 0
        try:
            for prefix in prefixes if left else ():
                async for info in store.list(prefix):
                    if info.key in left:
                        left.remove(info.key)
                        count, size = count + 1, size + info.size
        except StoreError as error:
            problems.append(f"what {store.name} has is not known: {error.fact}")
        if count:
            shares.append(Share(store.name, count, size))
    return tuple(shares), left


async def _tails(destinations: Sequence[Store], path: WalPath, problems: list[str]) -> tuple[Share, ...]:
    """Tails of all destinations are joined; what counts here is the first one that has any."""
    shares = []
    for folder in (tail_folder(file) for file in path.in_tails()):
        for store in destinations:
            try:
                sizes = [info.size async for info in store.list(folder) if TailName.parse(info.key)]
            except StoreError as error:
                problems.append(f"what {store.name} has is not known: {error.fact}")
                continue
            if sizes:
                shares.append(Share(store.name, len(sizes), sum(sizes)))
                break
    return tuple(shares)
