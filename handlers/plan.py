"""The restore plan, made by reading as little WAL as the target needs: ``pipeline.recovery`` decides, this reads.

- latest, time, LSN: the last segments, backwards, until the last record and the last transaction are known;
- restore point, transaction: forwards from the newest backup; from older ones only if it was not found behind that;
- immediate: none.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TypeAlias

from handlers.serve_wal import WalServer  # a leaf: it only answers for one file
from pipeline.backup import BackupInfo
from pipeline.backup_chain import chain_of
from pipeline.catalog import Catalog
from pipeline.confirmed import Confirmed, never_confirmed
from pipeline.contracts import Buffer, Fetch
from pipeline.errors import IntegrityError, RecoveryError, WalshipError
from pipeline.lineage import Lineage, WalPath
from pipeline.moments import show
from pipeline.recovery import (
    Ending,
    RestorePlan,
    candidates,
    check_start,
    choose,
    elsewhere,
    not_found,
    remarks,
    settle,
    timeline_setting,
)
from pipeline.targets import Target, TargetKind
from pipeline.wal import Lsn, WalFile
from pipeline.walmarks import (
    RestorePoint,
    Transaction,
    find_restore_point,
    find_xid,
    restore_points,
    transactions,
)
from pipeline.walrecords import Carry, Payload

#: Told of each segment that is read: how many so far.
Progress = Callable[[int], None]

#: What a restore point and a transaction are found as.
Mark: TypeAlias = RestorePoint | Transaction


async def plan_restore(
    catalog: Catalog,
    target: Target,
    *,
    fetch: Fetch,
    now: datetime,
    backup: str | None = None,
    progress: Progress = lambda _: None,
    confirmed: Iterable[Confirmed] = (),
) -> RestorePlan:
    """What to restore and where to stop. Touches nothing.

    ``backup`` is the name of one that has to be used, or None. ``confirmed``: what leases said of the WAL that is safe
    before the catalog was read. Raises RecoveryError when the target cannot be reached, with what can be; StoreError
    and IntegrityError when the WAL that decides it cannot be read.
    """
    lineage, able = candidates(catalog, target, backup)
    reader = _Reader(fetch, lineage, progress)
    said: list[str] = []
    ending: Ending | None = None
    stop = target
    found: Lsn | None = None
    if target.kind in (TargetKind.NAME, TargetKind.XID):
        chosen, path, mark = await _search(catalog, lineage, able, target, reader, backup)
        found, notice = mark.lsn, f"{target} ended at {show(mark.time)}, LSN {mark.lsn}"
    else:
        chosen = choose(able, target, backup)
        immediate = target.kind is TargetKind.IMMEDIATE
        path = catalog.wal_path(lineage, chosen.start_lsn, chosen.stop_lsn if immediate else None)
        check_start(chosen, path)
        notice = ""
        if not immediate:
            ending = await _ending(reader, path, chosen)
            if path.missing and (told := never_confirmed(path, lineage, confirmed)):
                said.append(_on_their_way(path, catalog.known_end(lineage), told))
                path = replace(path, missing=None)  # it is the end
            others = elsewhere(catalog, lineage, target.lsn) if target.lsn is not None else ()
            stop, notice = settle(target, chosen, path, ending, now, others)
    said += [notice] if notice else []
    if path.tail:
        said.append(f"the end of the WAL, {path.tail} bytes before LSN {path.end}, comes from tails of an open segment")
    last = ending.last_transaction if ending else None
    if target.kind is TargetKind.LATEST and last:
        said.append(f"the last transaction that is stored ended at {show(last)}")
    return RestorePlan(
        backup=chosen,
        target=target,
        stop=replace(stop, timeline=lineage.timeline),
        lineage=lineage,
        timeline_setting=timeline_setting(catalog, lineage),
        path=path,
        last_transaction=last,
        end=ending.end if ending else None,
        notices=(*said, *remarks(catalog, lineage)),
        found=found,
        before=chain_of(chosen, {backup.name: backup for backup in catalog.backups})[:-1],
    )


def _on_their_way(path: WalPath, end: Lsn, told: Confirmed) -> str:
    return (
        f"segment {path.missing} is not stored whole, and WAL behind it is, up to LSN {end}: it was on its way, or"
        f" still is, for the last that was reported as safe is LSN {told.lsn}. What lies behind LSN {path.end} cannot"
        " be reached; if the server still runs, it will come: plan again in a moment"
    )


async def last_moment(catalog: Catalog, backup: BackupInfo, timeline: int, *, fetch: Fetch) -> Ending:
    """Up to where a backup can be rolled forward on a timeline, with the time of the last transaction."""
    lineage = catalog.lineage(timeline)
    path = catalog.wal_path(lineage, backup.start_lsn)
    return await _ending(_Reader(fetch, lineage, lambda _: None), path, backup)


class _Reader:
    """Segments of a lineage as recovery would be given them; the one read last is remembered."""

    def __init__(self, fetch: Fetch, lineage: Lineage, progress: Progress) -> None:
        self._fetch = fetch
        self._server = WalServer(fetch, lineage)
        self._size = lineage.segment_size
        self._progress = progress
        self._count = 0
        self._last: tuple[WalFile, Buffer] | None = None

    def along(self, lineage: Lineage) -> _Reader:
        """Another one, for another lineage."""
        return _Reader(self._fetch, lineage, self._progress)

    async def payload(self, file: WalFile, carry: Carry | None = None) -> Payload:
        return self._payload(file, await self._content(file), carry)

    def _payload(self, file: WalFile, content: Buffer, carry: Carry | None) -> Payload:
        try:
            return Payload(content, file.start(self._size), carry)
        except IntegrityError as error:
            raise IntegrityError(f"{file}: {error.fact}", hint=error.hint) from None

    async def _content(self, file: WalFile) -> Buffer:
        if self._last and self._last[0] == file:
            return self._last[1]
        content = await self._server.read(file.name)
        if content is None:
            raise RecoveryError(
                f"segment {file} was listed and is gone", hint="is WAL being expired right now? try again"
            )
        self._count += 1
        self._progress(self._count)
        self._last = file, content
        return content

    async def forwards(self, files: Iterable[WalFile]) -> AsyncIterator[Payload]:
        """Consecutive segments, each with what the one before left open."""
        carry: Carry | None = None
        for file in files:
            payload = await self.payload(file, carry)
            yield payload
            carry = payload.carry()

    async def backwards(self, path: WalPath, down_to: Lsn) -> AsyncIterator[Payload]:
        """The last segment first, each with what the one before left open; none that ends before ``down_to``."""
        files = [file for file in path.backwards() if file.end(self._size) > down_to]
        for position, file in enumerate(files):
            content = await self._content(file)
            before = files[position + 1] if position + 1 < len(files) else None
            # What is read now is remembered for the next round.
            carry = (await self.payload(before)).carry() if before else None
            yield self._payload(file, content, carry)


async def _ending(reader: _Reader, path: WalPath, backup: BackupInfo) -> Ending:
    """Reads backwards until both the last record and the last transaction behind the backup's end are known."""
    last: Lsn | None = None
    end = path.start
    async for payload in reader.backwards(path, backup.stop_lsn):
        if last is None and (record := payload.last_record()):
            last, end = record.lsn, record.end
        ended = [t for t in transactions(payload) if t.lsn >= backup.stop_lsn]
        if ended and last is not None:
            return Ending(last, end, max(t.time for t in ended), ended[-1].xid)
    return Ending(last, end, None)


async def _search(
    catalog: Catalog,
    lineage: Lineage,
    able: Sequence[BackupInfo],
    target: Target,
    reader: _Reader,
    name: str | None,
) -> tuple[BackupInfo, WalPath, Mark]:
    """The newest backup behind which the restore point or transaction is found, for PostgreSQL stops at the first.

    If it stands between start and end of a backup, that one cannot stop there, and an older one is needed.
    """
    searched: Lsn | None = None
    known: dict[Lsn, RestorePoint] = {}
    for backup in able:
        path = catalog.wal_path(lineage, backup.start_lsn)
        if path.end < backup.stop_lsn:
            continue
        files = (f for f in path.files() if searched is None or f.start(path.segment_size) <= searched)
        found = await _find(reader, files, path.start, target, known)
        if found and found.lsn >= backup.stop_lsn:
            return backup, path, found
        searched = backup.stop_lsn
    newest, oldest = able[0], able[-1]
    path = catalog.wal_path(lineage, oldest.start_lsn)
    check_start(oldest, path)
    await _look_elsewhere(catalog, lineage, path, target, name, reader)
    points = {point.name: point.time for _, point in sorted(known.items())}
    raise not_found(target, newest, path, await _ending(reader, path, oldest), points)


async def _find(
    reader: _Reader, files: Iterable[WalFile], start: Lsn, target: Target, known: dict[Lsn, RestorePoint]
) -> Mark | None:
    """What is looked for, in these segments and not before ``start``; adds the restore points that were seen."""
    async for payload in reader.forwards(files):
        found: Mark | None = None
        if target.kind is TargetKind.NAME:
            found = find_restore_point(payload, target.name)
            known |= {point.lsn: point for point in restore_points(payload) if point.lsn >= start}
        else:
            assert target.xid is not None
            found = find_xid(payload, target.xid)
        if found and found.lsn >= start:
            return found
    return None


async def _look_elsewhere(
    catalog: Catalog, lineage: Lineage, path: WalPath, target: Target, name: str | None, reader: _Reader
) -> None:
    """Raises RecoveryError if another timeline has it: what is only there was not searched yet."""
    seen = {*path.files()}
    for timeline in reversed(catalog.timelines):
        if timeline == lineage.timeline:
            continue
        try:
            other, able = candidates(catalog, replace(target, timeline=timeline), name)
            way = catalog.wal_path(other, able[-1].start_lsn)
            files = [file for file in way.files() if file not in seen]
            found = await _find(reader.along(other), files, way.start, target, {})
        except WalshipError:
            continue  # what that timeline lacks is no reason to say less about the one that was asked for
        seen.update(files)
        if found:
            raise RecoveryError(
                f"{target} is on timeline {timeline}, at LSN {found.lsn}, {show(found.time)}, and not on timeline"
                f" {lineage.timeline}, which was followed",
                hint=f"--timeline {timeline} restores to it",
            )
