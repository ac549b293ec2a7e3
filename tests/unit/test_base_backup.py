"""How a stream of messages becomes objects: order, cuts, memory, and what is left when it fails."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import pytest

from handlers.base_backup import Cluster, Progress, take
from pipeline.backup import (
    ArchiveBegan,
    ArchiveData,
    ArchiveEnded,
    BackupInfo,
    BackupMessage,
    BackupStarted,
    BackupStopped,
    ManifestData,
    Tablespace,
)
from pipeline.catalog import PART_SIZE, part_key
from pipeline.contracts import Buffer, Shipped
from pipeline.errors import IntegrityError, ObjectConflict, SourceError, StoreError, WalshipError
from pipeline.index import Slice
from pipeline.wal import Lsn
from tests.clock import FastClock
from tests.parts import Shelf

START, STOP = Lsn.parse("0/2000028"), Lsn.parse("0/2000100")
CLUSTER = Cluster("7", 170011, 16 << 20)


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def manifest(*, system_id: str = "7", start: Lsn = START, stop: Lsn = STOP) -> bytes:
    lines = (
        f'{{ "PostgreSQL-Backup-Manifest-Version": 2,\n"System-Identifier": {system_id},\n"Files": [\n],\n'
        '"WAL-Ranges": [\n'
        f'{{ "Timeline": 1, "Start-LSN": "{start}", "End-LSN": "{stop}" }}\n],\n'
    ).encode()
    return lines + f'"Manifest-Checksum": "{hashlib.sha256(lines).hexdigest()}"}}\n'.encode()


def backup(archives: dict[str, bytes], *, paper: bytes | None = None, step: int = 1 << 20) -> list[BackupMessage]:
    messages: list[BackupMessage] = [BackupStarted(START, 1, (Tablespace(16384, "/fast"),), 1000)]
    for name, data in archives.items():
        messages.append(ArchiveBegan(name))
        messages += [ArchiveData(data[at : at + step]) for at in range(0, len(data), step)]
    paper = manifest() if paper is None else paper
    messages += [ManifestData(paper[at : at + 50]) for at in range(0, len(paper), 50)]
    return [*messages, BackupStopped(STOP, 1)]


async def play(messages: list[BackupMessage]) -> AsyncIterator[BackupMessage]:
    for message in messages:
        await asyncio.sleep(0)
        yield message


async def safe(start: Lsn, stop: Lsn, timeline: int) -> None:
    assert (start, stop, timeline) == (START, STOP, 1)


async def run(messages: list[BackupMessage], shelf: Shelf) -> BackupInfo:
    return await take(play(messages), ship=shelf, cluster=CLUSTER, wal_safe=safe, clock=FastClock())


BIG = {"base/1/1": b"\x01\x02\x03" * (PART_SIZE // 2), "base/1/2": b"", "global/pg_control": b"c" * 8192}


async def test_parts_joined_are_the_archive_and_the_index_points_into_them() -> None:
    shelf = Shelf()
    archives = {"16384": tar({"PG_17/5/6": b"t" * 100}), "base": tar(BIG)}
    info = await run(backup(archives), shelf)
    assert [(a.name, a.size, len(a.parts)) for a in info.archives] == [
        ("16384", len(archives["16384"]), 1), ("base", len(archives["base"]), 2),
    ]  # fmt: skip
    for name, data in archives.items():
        assert await shelf.archive(info, name) == data
    found: dict[str, bytearray] = {}
    for line in await shelf.index(info):
        piece = Slice.decode("index", line)
        part = await shelf.read(part_key(info.name, piece.archive, piece.part), info.id)
        content = found.setdefault(piece.path, bytearray())
        assert piece.offset == len(content)
        content += part[piece.part_offset : piece.part_offset + piece.length]
    assert found == {**BIG, "PG_17/5/6": b"t" * 100}
    assert await shelf.manifest(info) == manifest()


@pytest.mark.parametrize("small", [0, 700])
async def test_the_last_piece_of_an_archive_is_a_part_as_it_is(small: int) -> None:
    """Not copied: it lies in room that its reader has anyway. Behind other small pieces (``small``) it has to be."""
    data = tar({"global/pg_control": b"c" * 8192})
    freed: list[str] = []
    first = [ArchiveData(data[:small])] if small else []
    last = ArchiveData(memoryview(data)[small:], free=lambda: freed.append("last"), last=True)
    came: list[object] = []

    class Watching(Shelf):
        async def __call__(
            self, name: str, plain: Buffer, *, backup: str = "", encoded: Callable[[], None] | None = None
        ) -> Shipped:
            if "/data/" in name:
                came.append(plain.obj if isinstance(plain, memoryview) else plain)
            return await super().__call__(name, plain, backup=backup, encoded=encoded)

    shelf = Watching()
    messages = backup({})
    messages[1:1] = [ArchiveBegan("base"), *first, last, ArchiveEnded("base")]
    info = await run(messages, shelf)
    assert await shelf.archive(info, "base") == data
    assert [each is data for each in came] == [not small]
    assert freed == ["last"]


async def test_backup_info_is_last_says_all_and_waits_for_the_wal() -> None:
    shelf = Shelf()
    at_wal: list[str] = []

    async def wal_safe(_start: Lsn, _stop: Lsn, _timeline: int) -> None:
        async with asyncio.timeout(60):
            while len(shelf.names) < 4:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)  # of a fifth one, which must not come before the WAL is there
        at_wal.extend(shelf.names)

    info = await take(
        play(backup({"base": tar(BIG)})), ship=shelf, cluster=CLUSTER, wal_safe=wal_safe, clock=FastClock()
    )
    assert info.name == "base_20260114_120000"
    # Small ones may overtake a part that was sent before them.
    assert sorted(name.removeprefix(f"base/{info.name}/") for name in at_wal) == [
        "backup_manifest", "data/base/00000001", "data/base/00000002", "index/00000001",
    ]  # fmt: skip
    assert shelf.names == [*at_wal, f"base/{info.name}/backup_info"]
    assert await shelf.info(info.name, info.id) == info
    assert (info.start_lsn, info.stop_lsn, info.timeline, info.system_id) == (START, STOP, 1, "7")
    assert info.tablespaces == (Tablespace(16384, "/fast"),)
    stored = [(await shelf.store.head(name)).size for name in at_wal]
    assert info.stored_size == sum(stored)


async def test_no_more_than_three_parts_are_under_way() -> None:
    shelf, now, most = Shelf(), 0, 0

    async def ship(name: str, plain: Buffer, *, backup: str = "", encoded: Callable[[], None] | None = None) -> Shipped:
        nonlocal now, most
        now += 1
        most = max(most, now)
        async with asyncio.timeout(60):
            while most < 3 and "/data/" in name:
                await asyncio.sleep(0)  # compressed as fast as zeros are, one might be done before the next begins
        shipped = await shelf(name, plain, backup=backup, encoded=encoded)
        now -= 1
        return shipped

    messages = play(backup({"base": tar({"x": bytes(PART_SIZE * 6)})}))
    await take(messages, ship=ship, cluster=CLUSTER, wal_safe=safe, clock=FastClock())
    assert most == 3


async def test_index_objects_are_cut_and_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handlers.base_backup.INDEX_SIZE", 300)
    shelf = Shelf()
    files = {f"base/1/{n}": b"x" * n for n in range(40)}
    info = await run(backup({"base": tar(files)}, step=700), shelf)
    assert len(info.index) > 10
    assert [json.loads(line)["path"] for line in await shelf.index(info)] == list(files)


async def test_progress_grows_and_names_what_is_done() -> None:
    seen: list[Progress] = []
    await take(
        play(backup({"base": tar({"x": bytes(3 << 20)})})), ship=Shelf(), cluster=CLUSTER, wal_safe=safe,
        clock=FastClock(), report=seen.append,
    )  # fmt: skip
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert [p.current for p in seen][:1] + [p.current for p in seen][-2:] == ["base", "manifest", "wal"]
    assert len(seen) >= 5
    assert seen[0].estimate == 1000


WHOLE = backup({"base": tar(BIG)})


@pytest.mark.parametrize(
    ("messages", "kind", "words"),
    [
        (WHOLE[:-1], SourceError, "ended before it was complete"),
        (WHOLE[:1], SourceError, "ended before it was complete"),
        ([m for m in WHOLE if not isinstance(m, ArchiveBegan)], SourceError, "belongs to no archive"),
        ([m for m in WHOLE if m is not WHOLE[10]], IntegrityError, "archive base"),
        (backup({"base": tar(BIG)}, paper=manifest(system_id="8")), IntegrityError, "belongs to 8, the backup to 7"),
        (backup({"base": tar(BIG)}, paper=manifest(stop=START)), IntegrityError, "does not end at 0/2000100"),
        (backup({"base": tar(BIG)}, paper=manifest(start=STOP)), IntegrityError, "does not begin at 0/2000028"),
        (backup({"base": tar(BIG)}, paper=manifest()[:-40]), IntegrityError, "is cut, or none"),
        (backup({"base": tar(BIG)}, paper=manifest().replace(b"1,", b"2,", 1)), IntegrityError, "its own checksum"),
    ],
)  # fmt: skip
async def test_a_stream_that_is_not_whole_makes_no_backup(
    messages: list[BackupMessage], kind: type[WalshipError], words: str
) -> None:
    shelf = Shelf()
    with pytest.raises(kind, match=words) as caught:
        await run(messages, shelf)
    assert shelf.backups == []
    assert "no backup was made" in caught.value.hint
    assert "base/base_20260114_120000/ is of no use" in caught.value.hint


async def test_a_store_that_fails_makes_no_backup_and_leaves_nothing_running() -> None:
    def refuse(name: str) -> None:
        if name.endswith("00000002"):
            raise StoreError("the store is full", hint="make room")

    shelf = Shelf(before=refuse)
    with pytest.raises(StoreError, match="the store is full") as caught:
        await run(backup({"base": tar({"x": bytes(PART_SIZE * 5)})}), shelf)
    assert caught.value.hint.startswith("make room; no backup was made")
    assert shelf.backups == []
    assert len(asyncio.all_tasks()) == 1


async def test_what_one_of_several_destinations_may_have_is_not_called_useless() -> None:
    class OneOfTwo(Shelf):
        async def __call__(
            self, name: str, plain: Buffer, *, backup: str = "", encoded: Callable[[], None] | None = None
        ) -> Shipped:
            shipped = await super().__call__(name, plain, backup=backup, encoded=encoded)
            if name.endswith("/backup_info"):
                raise StoreError("the other destination is full", hint="Make room.")
            return shipped

    shelf = OneOfTwo()
    with pytest.raises(StoreError, match="the other destination is full") as caught:
        await run(WHOLE, shelf)
    assert shelf.backups == ["base/base_20260114_120000/backup_info"]
    assert caught.value.hint.startswith("Make room; base_20260114_120000 may be complete all the same")


async def test_wal_that_never_becomes_safe_makes_no_backup() -> None:
    async def wal_safe(_start: Lsn, _stop: Lsn, _timeline: int) -> None:
        raise SourceError("WAL up to 0/2000100 is not safe after 600 s")

    shelf = Shelf()
    with pytest.raises(SourceError, match="is not safe"):
        await take(play(WHOLE), ship=shelf, cluster=CLUSTER, wal_safe=wal_safe, clock=FastClock())
    assert shelf.backups == []


@pytest.mark.parametrize("last", ["00000002", "backup_manifest"])
async def test_backup_info_waits_for_what_is_slower_than_the_wal(last: str) -> None:
    shelf = Shelf()
    done = asyncio.Event()

    async def wal_safe(_start: Lsn, _stop: Lsn, _timeline: int) -> None:
        done.set()

    async def ship(name: str, plain: Buffer, *, backup: str = "", encoded: Callable[[], None] | None = None) -> Shipped:
        if name.endswith(last):
            await done.wait()
            await asyncio.sleep(0.05)
        return await shelf(name, plain, backup=backup, encoded=encoded)

    info = await take(play(WHOLE), ship=ship, cluster=CLUSTER, wal_safe=wal_safe, clock=FastClock())
    assert shelf.names[-2].endswith(last)
    assert shelf.names[-1].endswith("backup_info")
    assert await shelf.info(info.name, info.id) == info


async def test_what_fails_beside_the_wal_ends_the_wait_for_it() -> None:
    def refuse(name: str) -> None:
        if name.endswith("backup_manifest"):
            raise StoreError("the store is full")

    async def wal_safe(_start: Lsn, _stop: Lsn, _timeline: int) -> None:
        await asyncio.Event().wait()

    shelf = Shelf(before=refuse)
    with pytest.raises(StoreError, match="the store is full"):
        await take(play(WHOLE), ship=shelf, cluster=CLUSTER, wal_safe=wal_safe, clock=FastClock())
    assert shelf.backups == []
    assert len(asyncio.all_tasks()) == 1


async def test_another_backup_of_the_same_second_is_left_alone() -> None:
    shelf = Shelf()
    info = await run(WHOLE, shelf)
    with pytest.raises(ObjectConflict, match="began in the same second") as caught:
        await run(WHOLE, shelf)
    assert caught.value.hint == "take the backup again"
    assert await shelf.info(info.name, info.id) == info
    assert await shelf.archive(info, "base") == tar(BIG)


async def test_cancelling_stops_the_stream_and_all_that_is_under_way() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncIterator[BackupMessage]:
        try:
            for message in WHOLE[:3]:
                yield message
            await asyncio.Event().wait()
        finally:
            closed.set()

    task = asyncio.create_task(
        take(endless(), ship=Shelf(), cluster=CLUSTER, wal_safe=safe, clock=FastClock(datetime.now(UTC)))
    )
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed.is_set()
    assert len(asyncio.all_tasks()) == 1


async def test_a_backup_that_was_made_earlier_keeps_its_times_and_gets_a_name_of_its_own() -> None:
    """The first attempt at it may have left parts below the name of that time, with another id."""
    took = datetime(2025, 12, 24, 18, tzinfo=UTC)
    messages = backup({"base": tar({"x": b"1"})})
    messages[0] = BackupStarted(START, 1, (), at=took)
    messages[-1] = BackupStopped(STOP, 1, at=took + timedelta(hours=1))
    clock = FastClock()
    info = await take(play(messages), ship=Shelf(), cluster=CLUSTER, wal_safe=safe, clock=clock)
    assert (info.started, info.stopped) == (took, took + timedelta(hours=1))
    assert info.name == f"base_{clock.now():%Y%m%d_%H%M%S}"
    messages[-1] = BackupStopped(STOP, 1, at=datetime(2999, 1, 1, tzinfo=UTC))
    info = await take(play(messages), ship=Shelf(), cluster=CLUSTER, wal_safe=safe, clock=clock)
    assert info.stopped == clock.now(), "a clock that is ahead dates no backup in the future"
