"""Looks at a repository as a restore would, without restoring: stored bytes, completeness of backups, holes in the WAL.

Every object is read whole at every destination, and its SHA-256 trailer checked, for which no key is needed. With a
chain it is decoded as well, which proves that the keys open it. The chain has the keys of all destinations; so whether
each destination could be read if it were the only one left is found out from what lies under its own ``keys/``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from handlers.checksum import check_stored  # a leaf: plain bytes in, verdict out
from handlers.verify_tails import check_tails  # verification in two files: this one, and what is peculiar to tails
from pipeline.backup import BackupInfo
from pipeline.backup_chain import chain_of
from pipeline.catalog import Catalog, data_key_name, index_key, info_key, manifest_key, part_key, wal_key
from pipeline.chain import Chain, Expected
from pipeline.contracts import Body, Store
from pipeline.errors import IntegrityError, ObjectMissing, StoreError
from pipeline.lineage import Lineage, WalPath
from pipeline.objects import Header
from pipeline.runs import Hole, Runs
from pipeline.wal import Lsn, WalFile

#: Objects that are read at the same time.
_WIDTH = 4
_RING = "keys/ring-"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with one object at one destination."""

    destination: str
    name: str
    #: ``missing``, ``damaged`` or ``unreadable`` (the store failed: nothing is known of the object).
    kind: str
    fact: str


@dataclass(frozen=True, slots=True)
class BackupVerdict:
    """What can be made of one backup."""

    name: str
    #: Objects that belong to it, and how many of them are good at one destination at least.
    objects: int
    good: int
    #: The first missing segment between its start and its end, by name; empty if it can become consistent.
    needs: str
    #: The first missing segment on the way from it to the end of its timeline, or to that of the newest timeline that
    #: descends from it, which ``latest`` follows; by name, empty if there is none.
    hole: str
    #: The backup that it builds on and that cannot be used; empty if there is none.
    broken: str = ""

    @property
    def usable(self) -> bool:
        return self.objects == self.good and not self.needs and not self.broken


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a verification."""

    #: Objects and stored bytes that were read.
    objects: int
    size: int
    faults: tuple[Fault, ...]
    backups: tuple[BackupVerdict, ...]
    #: Gaps that a recovery from one of the backups would come to, on its own timeline or on the newest that descends
    #: from it: also the missing first segment of a timeline. What no backup reaches across does not count.
    holes: tuple[Hole, ...]
    #: As the catalog says: backup_info that cannot be read, tails that cannot be joined, and the like.
    problems: tuple[str, ...]
    #: What is wrong and does no harm.
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing is damaged or missing anywhere, and each backup reaches the ends of the timelines it leads to."""
        broken = any(not b.usable or b.hole for b in self.backups)
        return not (self.faults or broken or self.problems)

    def summary(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "ok": self.ok,
            "objects": self.objects,
            "bytes": self.size,
            "faults": [
                {"destination": f.destination, "name": f.name, "kind": f.kind, "fact": f.fact} for f in self.faults
            ],
            "backups": [
                {
                    "name": b.name, "usable": b.usable, "objects": b.objects, "good": b.good,
                    "missing_to_start": b.needs, "missing_behind": b.hole, "broken_parent": b.broken,
                }
                for b in self.backups
            ],
            "holes": [{"first": str(h.first), "last": str(h.last), "segments": h.count} for h in self.holes],
            "problems": list(self.problems),
            "warnings": list(self.warnings),
        }  # fmt: skip


@dataclass(slots=True)
class _Tally:
    objects: int = 0
    size: int = 0
    faults: list[Fault] = field(default_factory=list)
    #: Names that are good somewhere.
    good: set[str] = field(default_factory=set)
    #: Objects below ``keys/`` that are whole: name → destination → trailer.
    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    #: Destination → ids of the data keys that its objects name, each with an object that does.
    used: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Wanted:
    name: str
    #: SHA-256 trailer that it must have, as hex; empty for any.
    digest: str = ""
    #: Id of the backup it must belong to, None for unknown.
    backup: str | None = ""


async def verify(
    catalog: Catalog,
    destinations: Sequence[Store],
    *,
    chain: Chain | None = None,
    backup: str | None = None,
    progress: Callable[[int, int], None] = lambda _objects, _size: None,
) -> Report:
    """Verify the repository, or one backup with those that it builds on and the WAL from its start on.

    ``chain`` decodes each object as well; None checks trailers only. ``progress`` is told (objects, bytes) read.
    What is wrong is in the report, never an error; RecoveryError only for a backup that does not exist.
    """
    known = {info.name: info for info in catalog.backups}
    backups = chain_of(catalog.backup(backup), known) if backup else catalog.backups
    ways = {b.name: [_Way.of(catalog, b, lineage) for lineage in catalog.heirs(b)] for b in backups}
    tally = _Tally()
    gate = asyncio.Semaphore(_WIDTH)
    for store in destinations:
        async with asyncio.TaskGroup() as group:
            async for wanted in _wanted(store, catalog, backups, ways, whole=backup is None, tally=tally):
                await gate.acquire()
                task = group.create_task(_check(store, wanted, catalog.system_id, chain, tally, progress))
                task.add_done_callback(lambda _: gate.release())
        await _tails(store, catalog, backups if backup else (), chain, tally, progress)
    _check_keys(destinations, tally)
    verdicts = _with_chains({b.name: _verdict(b, ways[b.name], tally.good) for b in backups}, known)
    holes = sorted({hole for found in ways.values() for way in found for hole in way.holes}, key=lambda h: h.first)
    astray = [
        f"backup {b.name} cannot be used: the history of timeline {b.timeline} does not lead to it"
        for b in backups
        if not ways[b.name]
    ]
    problems = (*catalog.problems, *catalog.tail_notices, *astray)
    faults = tuple(sorted(tally.faults, key=lambda f: (f.destination, f.name)))
    return Report(tally.objects, tally.size, faults, verdicts, tuple(holes), problems, tuple(tally.warnings))


def _with_chains(found: dict[str, BackupVerdict], known: dict[str, BackupInfo]) -> tuple[BackupVerdict, ...]:
    """An incremental backup is no better than each of those that it builds on: its own WAL is enough for them all."""
    verdicts = []
    for verdict in found.values():
        before = chain_of(known[verdict.name], known)[:-1]
        broken = next((info.name for info in before if found[info.name].objects > found[info.name].good), "")
        verdicts.append(replace(verdict, broken=broken))
    return tuple(verdicts)


@dataclass(frozen=True, slots=True)
class _Way:
    """How a backup can be followed: on its own timeline, or on one that descends from it."""

    lineage: Lineage
    path: WalPath
    #: The first missing segment before the end of the backup, by name; empty if there is none.
    needs: str
    holes: tuple[Hole, ...]

    @classmethod
    def of(cls, catalog: Catalog, backup: BackupInfo, lineage: Lineage) -> _Way:
        path = catalog.wal_path(lineage, backup.start_lsn)
        needs = catalog.wal_path(lineage, backup.start_lsn, backup.stop_lsn).missing
        return cls(lineage, path, str(needs or ""), tuple(_holes(catalog, lineage, backup.start_lsn)))


def _holes(catalog: Catalog, lineage: Lineage, start: Lsn) -> Iterator[Hole]:
    """Every gap that recovery from ``start`` would come to, if it could pass the ones before."""
    size, end = catalog.segment_size, catalog.known_end(lineage)
    while (missing := catalog.wal_path(lineage, start).missing) is not None:
        first = missing.start(size) // size
        stored = catalog.segments.get(missing.timeline, Runs())
        # It ends with the next stored segment, finished or open, the next timeline, or the end of the lineage.
        tails = [n for n, reach in catalog.tails.get(missing.timeline, {}).items() if reach]
        ends = [n for n, _ in stored.ranges] + tails + [leg.begin // size for leg in lineage.legs] + [-(-end // size)]
        stop = min((n for n in ends if n > first), default=first + 1)
        yield Hole(missing, catalog.file(missing.timeline, stop - 1), stop - first)
        start = Lsn(stop * size)
        if start >= end:
            return


def _check_keys(destinations: Sequence[Store], tally: _Tally) -> None:
    """Each destination has the key rings that any has, and the data keys of its own objects; all of them the same."""
    for name in sorted(tally.keys):
        there = tally.keys[name]
        place, digest = next(iter(there.items()))
        for store in destinations:
            if there.get(store.name, digest) != digest:
                fact = f"{name} differs from the one at {place}"
                tally.faults.append(Fault(store.name, name, "damaged", fact))
            elif store.name not in there and name.startswith(_RING):
                fact = f"{name} is missing, and nothing that is encrypted there can be read without another destination"
                _lack(tally, store, name, fact)
    for store in destinations:
        for key_id, user in sorted(tally.used.get(store.name, {}).items()):
            name = data_key_name(key_id)
            if store.name not in tally.keys.get(name, {}):
                _lack(tally, store, name, f"{name} is missing, and {user} for one cannot be read without it")


def _lack(tally: _Tally, store: Store, name: str, fact: str) -> None:
    """A key that is not there; one that is there and damaged was told of already."""
    if not any(fault.destination == store.name and fault.name == name for fault in tally.faults):
        tally.faults.append(Fault(store.name, name, "missing", fact))


async def _wanted(
    store: Store,
    catalog: Catalog,
    backups: Sequence[BackupInfo],
    ways: dict[str, list[_Way]],
    *,
    whole: bool,
    tally: _Tally,
) -> AsyncIterator[_Wanted]:
    """What a destination should have of the backups, and what it has of keys and WAL."""
    for info in backups:
        for wanted in objects_of(info):
            yield wanted
    async for wanted in _sealed(store, catalog if whole else None, tally):
        yield wanted
    followed = [way for found in ways.values() for way in found]
    needed = {wal_key(file) for way in followed for file in way.path.stored()}
    timelines = {leg.timeline for way in followed for leg in way.lineage.legs} & catalog.histories.keys()
    needed |= {wal_key(WalFile.history(timeline)) for timeline in timelines}
    for prefix in ("keys/", "wal/", "conflict/") if whole else ("keys/",):
        try:
            async for entry in store.list(prefix):
                if prefix == "keys/" and entry.key.startswith((_RING, data_key_name(""))):
                    yield _Wanted(entry.key, "", "")
                elif not entry.key.endswith("/") and WalFile.parse(entry.key.rsplit("/", 1)[-1]):
                    needed.discard(entry.key)
                    yield _Wanted(entry.key)
                elif prefix == "conflict/" and not entry.key.endswith("/"):
                    tally.warnings.append(f"{entry.key} at {store.name}: two servers have used one timeline number")
                    yield _Wanted(entry.key)
        except StoreError as error:
            tally.faults.append(Fault(store.name, prefix, "unreadable", error.fact))
            return
    # With a whole verification, what is left is what another destination has and this one lacks.
    for name in sorted(needed):
        yield _Wanted(name)


async def _sealed(store: Store, catalog: Catalog | None, tally: _Tally) -> AsyncIterator[_Wanted]:
    """What there is of backups that cannot be looked into here: stored bytes need no key to be verified."""
    for name in catalog.sealed if catalog else ():
        try:
            async for entry in store.list(f"base/{name}/"):
                if not entry.key.endswith("/"):
                    yield _Wanted(entry.key, "", None)
        except StoreError as error:
            tally.faults.append(Fault(store.name, f"base/{name}/", "unreadable", error.fact))
        said = f"{name} is encrypted, and this host can only write: whether all of it is there, one that reads tells"
        if said not in tally.warnings:
            tally.warnings.append(said)


async def _tails(
    store: Store,
    catalog: Catalog,
    only: Sequence[BackupInfo],
    chain: Chain | None,
    tally: _Tally,
    progress: Callable[[int, int], None],
) -> None:
    """All tails of a destination, or those that lie behind the start of the backups in ``only``."""

    def count(objects: int, size: int) -> None:
        tally.objects += objects
        tally.size += size
        progress(tally.objects, tally.size)

    start = min((info.start_lsn for info in only), default=Lsn(0))
    try:
        report = await check_tails(store, catalog, start, chain=chain, progress=count)
    except StoreError as error:
        tally.faults.append(Fault(store.name, "tail/", "unreadable", error.fact))
        return
    tally.faults += [Fault(store.name, fault.name, fault.kind, fault.fact) for fault in report.faults]
    tally.warnings += report.warnings
    used = tally.used.setdefault(store.name, {})
    for key, name in report.used.items():
        used.setdefault(key, name)


def objects_of(info: BackupInfo) -> list[_Wanted]:
    """Every object that a complete backup consists of."""
    wanted = [_Wanted(info_key(info.name), "", info.id)]
    wanted += [
        _Wanted(part_key(info.name, archive.name, number), digest, info.id)
        for archive in info.archives
        for number, digest in enumerate(archive.parts, 1)
    ]
    wanted += [_Wanted(index_key(info.name, number), digest, info.id) for number, digest in enumerate(info.index, 1)]
    if info.manifest:
        wanted.append(_Wanted(manifest_key(info.name), info.manifest, info.id))
    return wanted


async def _check(
    store: Store,
    wanted: _Wanted,
    system_id: str,
    chain: Chain | None,
    tally: _Tally,
    progress: Callable[[int, int], None],
) -> None:
    fault = None
    try:
        body = await store.get(wanted.name)
        try:
            header, digest = await asyncio.to_thread(_judge, body, wanted, system_id, chain)
        finally:
            body.close()
        tally.size += body.size
        if wanted.name.startswith("keys/"):
            tally.keys.setdefault(wanted.name, {})[store.name] = digest
        if header.key:
            tally.used.setdefault(store.name, {}).setdefault(header.key, wanted.name)
    except ObjectMissing as error:
        fault = Fault(store.name, wanted.name, "missing", error.fact)
    except StoreError as error:
        fault = Fault(store.name, wanted.name, "unreadable", error.fact)
    except IntegrityError as error:
        fault = Fault(store.name, wanted.name, "damaged", error.fact)
    tally.objects += 1
    if fault:
        tally.faults.append(fault)
    else:
        tally.good.add(wanted.name)
    progress(tally.objects, tally.size)


def _judge(body: Body, wanted: _Wanted, system_id: str, chain: Chain | None) -> tuple[Header, str]:
    """Header and trailer. Runs in a thread. Raises IntegrityError."""
    header, digest = check_stored(wanted.name, body.chunks())
    if header.system_id != system_id:
        raise IntegrityError(f"{wanted.name} belongs to the cluster {header.system_id}, not to {system_id}")
    if wanted.backup is not None and header.backup != wanted.backup:
        raise IntegrityError(f"{wanted.name} belongs to the base backup {header.backup or '(none)'}")
    if wanted.digest and digest != wanted.digest:
        raise IntegrityError(f"{wanted.name} is not the one that its backup_info lists")
    if chain is not None and not wanted.name.startswith("keys/"):  # those were opened before anything else
        chain.decode(Expected(wanted.name, system_id, wanted.backup), body.chunks())
    return header, digest


def _verdict(info: BackupInfo, ways: Sequence[_Way], good: set[str]) -> BackupVerdict:
    objects = [wanted.name for wanted in objects_of(info)]
    hole = next((str(way.path.missing) for way in ways if way.path.missing), "")
    # Without a way, it is the history that does not let anybody find one.
    needs = [way.needs for way in ways] or [str(WalFile.history(info.timeline))]
    return BackupVerdict(
        info.name, len(objects), sum(name in good for name in objects), needs[0] if all(needs) else "", hole
    )
