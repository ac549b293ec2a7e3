"""Looks at a repository as a restore would, without restoring: stored bytes, completeness of backups, holes in the WAL.

At every destination each object is read whole and its SHA-256 trailer checked, for which no key is needed. With a chain
it is decoded as well, which proves that the keys open it, and the files of each backup are compared with its manifest.
What was read a short while ago and has not changed since is only looked for in the listing: ``pipeline.verified``.
The chain has the keys of all destinations; so whether each destination could be read if it were the only one left is
found out from what lies under its own ``keys/``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from handlers.verify_files import compare_files  # verification in several files: backups against their manifests,
from handlers.verify_keys import check_keys, compare_keys  # what each destination has of the keys,
from handlers.verify_objects import Inspector, Pace, Place, Progress, Wanted, objects_of  # one object,
from handlers.verify_report import BackupVerdict, Fault, Healing, Report  # what is said of it,
from handlers.verify_tails import check_tails  # what is peculiar to tails,
from handlers.verify_wal import Needed, check_conflicts, check_wal  # and to WAL
from pipeline.backup import BackupInfo
from pipeline.backup_chain import chain_of
from pipeline.catalog import Catalog, info_key, manifest_key
from pipeline.chain import Chain
from pipeline.contracts import ObjectInfo, Store
from pipeline.errors import ObjectMissing, StoreError
from pipeline.lineage import Lineage, WalPath
from pipeline.runs import Hole, Runs
from pipeline.verified import Memory, pseudo
from pipeline.wal import Lsn, WalFile

__all__ = ["BackupVerdict", "Fault", "Report", "Verification", "objects_of", "verify"]

#: Objects that are read at the same time, unless said otherwise.
_WIDTH = 4


async def _at_once(_size: int) -> None:
    """No limit."""


async def verify(
    catalog: Catalog,
    destinations: Sequence[Store],
    *,
    chain: Chain | None = None,
    backup: str | None = None,
    progress: Progress = lambda _objects, _size, _trusted: None,
) -> Report:
    """Verify all of the repository, or one backup, and remember nothing. See ``Verification``."""
    run = Verification(catalog, destinations, chain=chain, backup=backup, progress=progress)
    await run.look()
    return run.report()


class Verification:
    """Verifies the repository, or one backup with those that it builds on and the WAL from its start on.

    ``chain`` decodes each object as well; None checks trailers only. ``memories``: what is remembered of each
    destination, by its name; it is added to. ``progress`` is told (objects, bytes) read and objects that need not be.
    What is wrong is in the report, never an error; RecoveryError only for a backup that does not exist.
    """

    def __init__(
        self,
        catalog: Catalog,
        destinations: Sequence[Store],
        *,
        chain: Chain | None = None,
        backup: str | None = None,
        memories: Mapping[str, Memory] | None = None,
        width: int = _WIDTH,
        pace: Pace = _at_once,
        progress: Progress = lambda _objects, _size, _trusted: None,
        refresh: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        now = datetime.now(UTC)
        self.places = [
            Place(s, (memories or {}).get(s.name) or Memory(s.name, catalog.system_id, now=now, interval=None))
            for s in destinations
        ]
        self.inspector = Inspector(catalog.system_id, chain, width=width, pace=pace, progress=progress, refresh=refresh)
        self.tally = self.inspector.tally
        self._catalog = catalog
        self._known = {info.name: info for info in catalog.backups}
        self._whole = backup is None
        self._backups = list(chain_of(catalog.backup(backup), self._known) if backup else catalog.backups)
        self._ways = {b.name: [_Way.of(catalog, b, lineage) for lineage in catalog.heirs(b)] for b in self._backups}
        self.healings: list[Healing] = []

    async def look(self) -> None:
        """Look at all of it, once."""
        for info in list(self._backups):
            await self._backup(info)
        followed = [way for info in self._backups for way in self._ways[info.name]]  # those that are still there
        needed = Needed.by([way.path for way in followed], [way.lineage for way in followed], self._catalog)
        start = min((info.start_lsn for info in self._backups), default=Lsn(0))
        for place in self.places:
            await check_keys(place, self.inspector)
            if self._whole:
                await self._sealed(place)
                await check_conflicts(place, self.inspector)
            await check_wal(place, self.inspector, needed, self._catalog, whole=self._whole)
            await check_tails(place, self._catalog, Lsn(0) if self._whole else start, self.inspector)
            silent = any(f.destination == place.name and f.kind == "unreadable" for f in self.tally.faults)
            place.memory.complete = self._whole and not silent and not self._catalog.problems
        compare_keys(self.places, self.inspector)

    def report(self) -> Report:
        """What was found."""
        tally, catalog = self.tally, self._catalog
        verdicts = self._with_chains({b.name: self._verdict(b) for b in self._backups})
        holes = {hole for info in self._backups for way in self._ways[info.name] for hole in way.holes}
        astray = [
            f"backup {b.name} cannot be used: the history of timeline {b.timeline} does not lead to it"
            for b in self._backups
            if not self._ways[b.name]
        ]
        return Report(
            tally.objects,
            tally.size,
            tuple(sorted(tally.faults, key=lambda f: (f.destination, f.name))),
            verdicts,
            tuple(sorted(holes, key=lambda h: h.first)),
            (*catalog.problems, *catalog.tail_notices, *astray),
            tuple(tally.warnings),
            tally.trusted,
            tally.compared,
            tuple(self.healings),
        )

    async def _backup(self, info: BackupInfo) -> None:
        wanted = objects_of(info)
        listed: dict[str, dict[str, ObjectInfo]] = {}
        for place in self.places:
            prefix = f"base/{info.name}/"
            found = {entry.key: entry async for entry in self.inspector.listing(place, prefix)}
            if self.inspector.answers(place, prefix):
                listed[place.name] = found
        read = await self._files(info, listed)
        async with self.inspector.crew() as begin:
            for place in self.places:
                if (there := listed.get(place.name)) is None:
                    continue
                for each in wanted:
                    entry = there.get(each.name)
                    if (place.name, each.name) not in read and not self.inspector.trusts(place, each, entry):
                        await begin(self.inspector.read(place, each, entry))
        if any(fault.name.startswith(f"base/{info.name}/") for fault in self.tally.faults):
            await self._forget_if_deleted(info)

    async def _files(self, info: BackupInfo, listed: Mapping[str, dict[str, ObjectInfo]]) -> set[tuple[str, str]]:
        """Compare its files with its manifest, unless that is known. What was read for it: (destination, name).

        Its objects are named by their digests: files that were right once are, wherever the objects are whole.
        """
        read: set[tuple[str, str]] = set()
        told = pseudo(manifest_key(info.name), [info.id, info.manifest, *(d for a in info.archives for d in a.parts)])
        if self.inspector.chain is None or not info.manifest:
            return read
        # All of them: each remembers it, and goes on doing so.
        if any([place.memory.knows(told, decoded=True) for place in self.places]):  # noqa: C419
            return read

        async def plain(name: str, digest: str) -> bytearray | None:
            wanted = Wanted(name, digest, info.id)
            for place in self.places:
                if (there := listed.get(place.name)) is not None:
                    read.add((place.name, name))
                    found = await self.inspector.read(place, wanted, there.get(name), keep=True)
                    if found is not None:
                        return found
            return None

        differs = await compare_files(info, plain, width=max(1, self.inspector.width // 2))
        if differs:
            self.tally.differs[info.name] = differs
        elif differs is not None:
            self.tally.compared += 1
            for place in self.places:
                place.memory.add(told, decoded=True)
        return read

    async def _forget_if_deleted(self, info: BackupInfo) -> None:
        """It may have been expired while we read it."""
        for place in self.places:
            try:
                await place.store.head(info_key(info.name))
            except ObjectMissing:
                continue
            except StoreError:
                pass
            return
        self._backups.remove(info)
        gone = f"base/{info.name}/"
        self.tally.faults = [fault for fault in self.tally.faults if not fault.name.startswith(gone)]
        self.tally.warnings.append(f"{info.name} was deleted while it was verified")

    async def _sealed(self, place: Place) -> None:
        """What there is of backups that cannot be looked into here: stored bytes need no key to be verified."""
        for name in self._catalog.sealed:
            async with self.inspector.crew() as begin:
                async for entry in self.inspector.listing(place, f"base/{name}/"):
                    wanted = Wanted(entry.key, "", None)
                    if not self.inspector.trusts(place, wanted, entry):
                        await begin(self.inspector.read(place, wanted, entry))
            said = (
                f"{name} is encrypted, and this host can only write: whether all of it is there, one that reads tells"
            )
            if said not in self.tally.warnings:
                self.tally.warnings.append(said)

    def _verdict(self, info: BackupInfo) -> BackupVerdict:
        names = [wanted.name for wanted in objects_of(info)]
        ways = self._ways[info.name]
        hole = next((str(way.path.missing) for way in ways if way.path.missing), "")
        # Without a way, it is the history that does not let anybody find one.
        needs = [way.needs for way in ways] or [str(WalFile.history(info.timeline))]
        good = sum(name in self.tally.good for name in names)
        differs = self.tally.differs.get(info.name, "")
        return BackupVerdict(info.name, len(names), good, needs[0] if all(needs) else "", hole, differs=differs)

    def _with_chains(self, found: dict[str, BackupVerdict]) -> tuple[BackupVerdict, ...]:
        """An incremental backup is no better than those that it builds on: its own WAL is enough for them all."""
        verdicts = []
        for verdict in found.values():
            before = [found[info.name] for info in chain_of(self._known[verdict.name], self._known)[:-1]]
            broken = next((each.name for each in before if each.objects > each.good or each.differs), "")
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
