"""Looks at a repository as a restore would, without restoring: stored bytes, completeness of backups, holes in the WAL.

Every object is read whole at every destination, and its SHA-256 trailer checked, for which no key is needed. With
``deep`` it is decoded as well, which proves that the keys open it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from handlers.checksum import check_stored  # a leaf: plain bytes in, verdict out
from pipeline.backup import BackupInfo
from pipeline.catalog import Catalog, Hole, index_key, info_key, manifest_key, part_key, wal_key
from pipeline.chain import Chain, Expected
from pipeline.contracts import Body, Store
from pipeline.errors import IntegrityError, ObjectMissing, StoreError
from pipeline.lineage import WalPath
from pipeline.wal import WalFile

#: Objects that are read at the same time.
_WIDTH = 4


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
    #: The first missing segment on the way from it to the end of its timeline, by name; empty if there is none.
    hole: str

    @property
    def usable(self) -> bool:
        return self.objects == self.good and not self.needs


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a verification."""

    #: Objects and stored bytes that were read.
    objects: int
    size: int
    faults: tuple[Fault, ...]
    backups: tuple[BackupVerdict, ...]
    #: Gaps between stored segments that matter to a backup.
    holes: tuple[Hole, ...]
    #: As the catalog says: backup_info that cannot be read and the like.
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Nothing is damaged or missing anywhere, and each backup reaches the end of its timeline."""
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
                    "missing_to_start": b.needs, "missing_behind": b.hole,
                }
                for b in self.backups
            ],
            "holes": [{"first": str(h.first), "last": str(h.last), "segments": h.count} for h in self.holes],
            "problems": list(self.problems),
        }  # fmt: skip


@dataclass(slots=True)
class _Tally:
    objects: int = 0
    size: int = 0
    faults: list[Fault] = field(default_factory=list)
    #: Names that are good somewhere.
    good: set[str] = field(default_factory=set)


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
    """Verify the repository, or one backup with the WAL from its start on.

    ``chain`` decodes each object as well; None checks trailers only. ``progress`` is told (objects, bytes) read.
    What is wrong is in the report, never an error; RecoveryError only for a backup that does not exist.
    """
    backups = (catalog.backup(backup),) if backup else catalog.backups
    paths = {b.name: _path(catalog, b) for b in backups}
    tally = _Tally()
    gate = asyncio.Semaphore(_WIDTH)
    for store in destinations:
        async with asyncio.TaskGroup() as group:
            async for wanted in _wanted(store, backups, paths, whole=backup is None, tally=tally):
                await gate.acquire()
                task = group.create_task(_check(store, wanted, catalog.system_id, chain, tally, progress))
                task.add_done_callback(lambda _: gate.release())
    verdicts = tuple(_verdict(b, paths[b.name], tally.good) for b in backups)
    holes = tuple(h for h in catalog.holes() if backup is None or str(h.first) in {v.hole for v in verdicts})
    faults = tuple(sorted(tally.faults, key=lambda f: (f.destination, f.name)))
    return Report(tally.objects, tally.size, faults, verdicts, holes, catalog.problems)


def _path(catalog: Catalog, backup: BackupInfo) -> WalPath:
    return catalog.wal_path(catalog.lineage(backup.timeline), backup.start_lsn)


async def _wanted(
    store: Store,
    backups: Sequence[BackupInfo],
    paths: dict[str, WalPath],
    *,
    whole: bool,
    tally: _Tally,
) -> AsyncIterator[_Wanted]:
    """What a destination should have of the backups, and what it has of the WAL."""
    for info in backups:
        for wanted in objects_of(info):
            yield wanted
    needed = {wal_key(file) for path in paths.values() for file in path.stored()}
    if whole:
        try:
            async for entry in store.list("wal/"):
                if not entry.key.endswith("/") and WalFile.parse(entry.key.rsplit("/", 1)[-1]):
                    needed.discard(entry.key)
                    yield _Wanted(entry.key)
        except StoreError as error:
            tally.faults.append(Fault(store.name, "wal/", "unreadable", error.fact))
            return
    # With a whole verification, what is left is what another destination has and this one lacks.
    for name in sorted(needed):
        yield _Wanted(name)


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
            await asyncio.to_thread(_judge, body, wanted, system_id, chain)
        finally:
            body.close()
        tally.size += body.size
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


def _judge(body: Body, wanted: _Wanted, system_id: str, chain: Chain | None) -> None:
    """Runs in a thread. Raises IntegrityError."""
    header, digest = check_stored(wanted.name, body.chunks())
    if header.system_id != system_id:
        raise IntegrityError(f"{wanted.name} belongs to the cluster {header.system_id}, not to {system_id}")
    if wanted.backup is not None and header.backup != wanted.backup:
        raise IntegrityError(f"{wanted.name} belongs to the base backup {header.backup or '(none)'}")
    if wanted.digest and digest != wanted.digest:
        raise IntegrityError(f"{wanted.name} is not the one that its backup_info lists")
    if chain is not None:
        chain.decode(Expected(wanted.name, system_id, wanted.backup), body.chunks())


def _verdict(info: BackupInfo, path: WalPath, good: set[str]) -> BackupVerdict:
    objects = [wanted.name for wanted in objects_of(info)]
    missing = str(path.missing) if path.missing else ""
    needs = missing if path.end < info.stop_lsn else ""
    return BackupVerdict(info.name, len(objects), sum(name in good for name in objects), needs, missing)
