"""What a restore would stumble over is in the report: holes on the timeline that latest follows, keys of each place."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from handlers.fetch import Fetcher, read_catalog
from handlers.verify import Report, verify
from infra.storage.memory import MemoryStore
from pipeline.backup import ArchiveInfo, BackupInfo
from pipeline.catalog import data_key_name, info_key, part_key, wal_key
from pipeline.chain import Chain
from pipeline.contracts import Store
from pipeline.objects import MemoryBody
from pipeline.wal import Lsn, WalFile
from tests.keys import SYSTEM_ID, chain, encrypting_keys, plain_keys, stored
from tests.parts import Shelf

SIZE = 1 << 20
NAME = "base_20260114_120000"
NOON = datetime(2026, 1, 14, 12, tzinfo=UTC)


def segment(timeline: int, number: int) -> str:
    return wal_key(WalFile.segment(timeline, number * SIZE, SIZE))


def info_of(system_id: str, part: str) -> BackupInfo:
    """A backup that begins in segment 3 and ends in segment 4 of timeline 1."""
    return BackupInfo(
        NAME, "b" * 32, "full", system_id, 170000, SIZE, 1, Lsn(3 * SIZE + 40), Lsn(4 * SIZE + 80), NOON, NOON, (),
        (ArchiveInfo("base", 1000, (part,)),), (), "", 100,
    )  # fmt: skip


async def shelf_with(*segments: tuple[int, int]) -> Shelf:
    """The backup and the segments; timeline 2 leaves timeline 1 in the middle of segment 6."""
    shelf = Shelf()
    shipped = await shelf(part_key(NAME, "base", 1), bytes(1000), backup="b" * 32)
    await shelf(info_key(NAME), info_of(shelf.system_id, shipped.digest).encode(), backup="b" * 32)
    for timeline, number in segments:
        await shelf(segment(timeline, number), bytes(SIZE))
    if any(timeline == 2 for timeline, _ in segments):
        await shelf("wal/00000002.history", f"1\t{Lsn(6 * SIZE + SIZE // 2)}\twhy\n".encode())
    return shelf


async def report_on(shelf: Shelf, *stores: Store, backup: str | None = None) -> Report:
    stores = stores or (shelf.store,)
    catalog = await read_catalog(stores, Fetcher(stores, shelf.chain, shelf.system_id), shelf.system_id)
    return await verify(catalog, stores, chain=shelf.chain, backup=backup)


OLD = [(1, n) for n in (3, 4, 5, 6)]


@pytest.mark.parametrize("backup", [None, NAME])
@pytest.mark.parametrize(
    ("segments", "holes"),
    [
        ([*OLD, (2, 6), (2, 7), (2, 8)], []),
        ([*OLD, (2, 6), (2, 8)], [(2, 7, 1)]),
        ([*OLD, (2, 6), (2, 9), (2, 11)], [(2, 7, 2), (2, 10, 1)]),
        # The first segment of the timeline: PostgreSQL asks for it, and timeline 1 has the bytes before the fork only.
        ([*OLD, (2, 7), (2, 8)], [(2, 6, 1)]),
        # On the way to the fork, and behind it where only timeline 1 went.
        ([(1, 3), (1, 4), (2, 6), (2, 7)], [(1, 5, 1)]),
        ([*OLD, (1, 9), (2, 6), (2, 7)], [(1, 7, 2)]),
        ([*OLD], []),
    ],
)
async def test_holes_on_the_way_of_any_heir_count(
    segments: list[tuple[int, int]], holes: list[tuple[int, int, int]], backup: str | None
) -> None:
    report = await report_on(await shelf_with(*segments), backup=backup)
    assert [(h.first.timeline, h.first.start(SIZE) // SIZE, h.count) for h in report.holes] == holes
    assert report.ok is (not holes)
    (verdict,) = report.backups
    assert verdict.usable
    assert verdict.hole == (WalFile.segment(holes[0][0], holes[0][1] * SIZE, SIZE).name if holes else "")


async def test_what_no_backup_reaches_across_is_no_hole() -> None:
    report = await report_on(await shelf_with((1, 1), *OLD))
    assert (report.ok, report.holes) == (True, ())


async def test_a_backup_without_the_last_of_its_wal_is_not_usable() -> None:
    report = await report_on(await shelf_with((1, 3)))
    (verdict,) = report.backups
    assert (verdict.usable, verdict.needs) == (False, "000000010000000000000004")


async def test_a_history_that_makes_no_sense_is_in_the_report() -> None:
    shelf = await shelf_with(*OLD)
    await shelf("wal/00000001.history", b"7\t0/500000\twhy\n")
    report = await report_on(shelf)
    assert not report.ok
    assert report.backups[0].needs == "00000001.history"
    assert report.problems == (f"backup {NAME} cannot be used: the history of timeline 1 does not lead to it",)


@pytest.mark.parametrize("backup", [None, NAME])
async def test_a_destination_that_lacks_a_history_is_told_of(backup: str | None) -> None:
    shelf = await shelf_with(*OLD, (2, 6))
    other = MemoryStore("other")
    async for entry in shelf.store.list(""):
        if not entry.key.endswith(".history"):
            await other.put(entry.key, await shelf.store.get(entry.key))
    report = await report_on(shelf, other, shelf.store, backup=backup)
    assert [(f.destination, f.name, f.kind) for f in report.faults] == [("other", "wal/00000002.history", "missing")]


class Encrypted:
    """A repository with a ring and two data keys at two destinations; each data key has objects."""

    def __init__(self) -> None:
        self.keys = encrypting_keys()
        self.chain: Chain = chain(self.keys, cipher="aes-256-gcm")
        assert self.keys.key_object
        self.data = self.keys.key_object[0]
        part = stored(self.chain, part_key(NAME, "base", 1), bytes(1000), backup="b" * 32)
        info = info_of(SYSTEM_ID, part[-32:].hex())
        self.objects = {
            # What is inside a ring matters to whoever opens it; here it is stored bytes.
            "keys/ring-00000001": stored(chain(plain_keys(), "none"), "keys/ring-00000001", b"a ring"),
            self.data: b"".join(self.keys.key_object[1].chunks()),
            part_key(NAME, "base", 1): part,
            info_key(NAME): stored(self.chain, info_key(NAME), info.encode(), backup="b" * 32),
            **{segment(1, n): stored(self.chain, segment(1, n), bytes(SIZE)) for n in (3, 4)},
        }

    async def report(self, *, backup: str | None = None, **changed: bytes | None) -> Report:
        """``first`` is whole; in ``second`` what ``changed`` names is another, or missing."""
        stores = [MemoryStore("first"), MemoryStore("second")]
        for name, content in self.objects.items():
            await stores[0].put(name, MemoryBody([content]))
            other = changed.get(name, content)
            if other is not None:
                await stores[1].put(name, MemoryBody([other]))
        catalog = await read_catalog(stores, Fetcher(stores, self.chain, SYSTEM_ID), SYSTEM_ID)
        return await verify(catalog, stores, chain=self.chain, backup=backup)


@pytest.mark.parametrize("backup", [None, NAME])
async def test_a_destination_that_lost_a_key_is_told_of_although_another_has_it(backup: str | None) -> None:
    repository = Encrypted()
    report = await repository.report(backup=backup)
    assert report.ok
    assert report.objects == 2 * len(repository.objects)
    for name in ("keys/ring-00000001", repository.data):
        report = await repository.report(backup=backup, **{name: None})
        assert [(f.destination, f.name, f.kind) for f in report.faults] == [("second", name, "missing")]
        flipped = bytearray(repository.objects[name])
        flipped[-40] ^= 1
        report = await repository.report(backup=backup, **{name: bytes(flipped)})
        assert [(f.destination, f.name, f.kind) for f in report.faults] == [("second", name, "damaged")]
    ring = stored(chain(plain_keys(), "none"), "keys/ring-00000001", b"another ring")
    report = await repository.report(backup=backup, **{"keys/ring-00000001": ring})
    assert [(f.destination, f.kind, f.fact) for f in report.faults] == [
        ("second", "conflict", "keys/ring-00000001 differs from the one at first")
    ]


async def test_a_data_key_that_no_object_names_is_not_missed() -> None:
    repository = Encrypted()
    idle = data_key_name("0" * 32)
    repository.objects[idle] = stored(chain(plain_keys(), "none"), idle, b"of a process that wrote nothing")
    assert (await repository.report(**{idle: None})).ok
