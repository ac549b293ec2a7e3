"""What is shown before a restore: from where, how much, how long, over what."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from handlers.fetch import Fetcher, read_catalog
from handlers.occupant import Occupant, occupant
from handlers.plan import plan_restore
from handlers.restore import Laid
from handlers.shares import Pace, Share, Shares, check_complete, measure, share_out
from handlers.target_dir import Targets
from infra.cli.planned import fitted, lasting, plan_facts, plan_lines
from infra.cli.restore import _saved
from infra.storage.memory import MemoryStore
from pipeline.backup import ArchiveInfo, BackupInfo
from pipeline.catalog import info_key, part_key, wal_key
from pipeline.contracts import Store
from pipeline.errors import IntegrityError, StoreError
from pipeline.recovery import RestorePlan
from pipeline.targets import Target
from pipeline.wal import Lsn, WalFile
from tests.clock import FastClock
from tests.parts import Shelf
from tests.stores import Faulty
from tests.tails import lay

SIZE = 1 << 20
NAME = "base_20260114_120000"
NOON = datetime(2026, 1, 14, 12, tzinfo=UTC)
MEGABYTE = 1 << 20


async def shipped() -> Shelf:
    """A backup of four parts that ends in segment 3, on timeline 1; the fork is in segment 4, a tail in segment 6."""
    shelf = Shelf()
    parts = [part_key(NAME, "base", number) for number in range(1, 5)]
    digests = tuple([(await shelf(key, key.encode() * 100, backup="b" * 32)).digest for key in parts])
    info = BackupInfo(
        NAME, "b" * 32, "full", "7", 170000, SIZE, 1, Lsn(2 * SIZE + 40), Lsn(3 * SIZE + 80), NOON,
        NOON, (), (ArchiveInfo("base", 3 * MEGABYTE, digests),), (), "", 100,
    )  # fmt: skip
    await shelf(info_key(NAME), info.encode(), backup=info.id)
    await shelf("wal/00000002.history", f"1\t{Lsn(4 * SIZE + 512)}\twhy\n".encode())
    for timeline, number in ((1, 2), (1, 3), (2, 4), (2, 5)):
        await shelf(wal_key(WalFile.segment(timeline, number * SIZE, SIZE)), bytes(SIZE))
    await lay(shelf.store, shelf.chain, WalFile.segment(2, 6 * SIZE, SIZE), b"x" * SIZE, [(0, 4096)])
    return shelf


async def planned(shelf: Shelf) -> RestorePlan:
    """As far as the WAL goes; these segments hold no record that would tell where that is."""
    fetch = Fetcher([shelf.store], shelf.chain, "7")
    catalog = await read_catalog([shelf.store], fetch, "7")
    plan = await plan_restore(catalog, Target.parse(immediate=True, timeline=2), fetch=fetch, now=NOON)
    path = catalog.wal_path(plan.lineage, plan.backup.start_lsn)
    return replace(plan, path=path, target=Target(), stop=Target(timeline=2), end=path.end)


async def test_the_first_destination_that_has_an_object_is_named_for_it() -> None:
    shelf = await shipped()
    plan = await planned(shelf)
    other = MemoryStore("other")
    for key in (part_key(NAME, "base", 3), wal_key(WalFile.segment(2, 4 * SIZE, SIZE))):
        await other.put(key, await shelf.store.get(key))
    found = await share_out(plan, [other, shelf.store])
    counts = {(share.destination, share.objects) for share in found.base}
    assert counts == {("other", 1), ("memory", 3)}
    assert [(share.destination, share.objects) for share in found.wal] == [("other", 1), ("memory", 3)]
    assert [(share.destination, share.objects) for share in found.tails] == [("memory", 1)]
    sizes = {info.key: info.size async for info in shelf.store.list("")}
    wanted = sum(size for key, size in sizes.items() if "history" not in key and "backup_info" not in key)
    assert found.size == found.base_size + found.wal_size == wanted
    check_complete(found, plan.backup)


async def test_a_part_that_no_destination_has_is_found_before_anything_is_touched() -> None:
    shelf = await shipped()
    plan = await planned(shelf)
    lost = [part_key(NAME, "base", number) for number in (2, 4)]
    await shelf.store.delete(lost)
    found = await share_out(plan, [shelf.store])
    assert found.missing == tuple(lost)
    with pytest.raises(IntegrityError, match=f"{lost[0]}, and 1 more is missing from every destination") as caught:
        check_complete(found, plan.backup)
    assert "--backup" in caught.value.hint
    # A destination that does not answer may have them.
    down: Store = Faulty(MemoryStore("down"), down={"list": StoreError("down does not answer", passing=True)})
    found = await share_out(plan, [down, shelf.store])
    assert (found.missing, found.problems) == ((), ("what down has is not known: down does not answer",))
    check_complete(found, plan.backup)


async def test_the_pace_is_measured_on_the_first_parts() -> None:
    shelf = await shipped()
    plan = await planned(shelf)
    faulty = Faulty(shelf.store)
    pace = await measure(plan.backup, Fetcher([faulty], shelf.chain, "7"), FastClock())
    wanted = [part_key(NAME, "base", number) for number in (1, 2, 3)]
    assert sorted(key for operation, key in faulty.calls if operation == "get") == wanted
    assert (pace.parts, pace.size) == (3, 3 * 100 * len(wanted[0]))
    await shelf.store.delete(wanted[:1])
    with pytest.raises(StoreError, match="is missing"):
        await measure(plan.backup, Fetcher([shelf.store], shelf.chain, "7"), FastClock())


async def test_the_plan_in_words_and_as_json() -> None:
    plan = await planned(await shipped())
    old = Occupant(Path("/restored"), 12, 5 * MEGABYTE, "16", "42")
    targets = Targets(Path("/restored"), (), None, (old.folder,))
    problems = ("what x has is not known: why",)
    found = Shares((Share("near", 4, MEGABYTE),), (Share("far", 1, 2048),), (), problems, (Share("far", 3, 1024),))
    pace = Pace(3, 3 * MEGABYTE, 1.0)
    now = NOON + timedelta(hours=3)
    lines = plan_lines(plan, targets, found, [old], pace, now, delta=False)
    assert lines == [
        "restore latest into /restored",
        f"  backup    {NAME} (full, PostgreSQL 17), finished 2026-01-14 12:00:00 UTC, 3.0 h ago: 3.0 MB",
        "  WAL       timeline 1: 2 segments, LSN 0/200028 to 0/400200",
        "            timeline 2: 3 segments, LSN 0/400200 to 0/601000, the last 4.0 KB from tails",
        "  fetches   1.0 MB, as stored",
        "            backup: 4 objects, 1.0 MB from near",
        "            WAL segments: 1 object, 2.0 KB from far",
        "            WAL tails: 3 objects, 1.0 KB from far",
        "  time      perhaps 2 s: 1 s for the backup, 1 s for the WAL",
        "            no promise: the first 3 parts (3.0 MB) came at 3.0 MB/s, the WAL is taken to go at 3.0 MB/s",
        "  replaces  /restored: a cluster of PostgreSQL 16, system identifier 42, 12 files, 5.0 MB",
        "  note: what x has is not known: why",
    ]
    kept = plan_lines(plan, targets, found, [old], None, now, delta=True)
    assert "  fetches   at most 1.0 MB, as stored" in kept
    assert not any("time " in line for line in kept)
    assert "  compares  /restored: a cluster of PostgreSQL 16, system identifier 42, 12 files, 5.0 MB" in kept
    slow = plan_lines(plan, targets, found, [], Pace(0, 0, 10.0), now, delta=False)
    assert "  time      unknown: no part of the backup came within 10 s" in slow
    chained = replace(plan, before=(replace(plan.backup, name="full"), replace(plan.backup, name="middle")))
    built = [line for line in plan_lines(chained, targets, found, [], None, now, delta=False) if "builds on" in line]
    assert built == ["            it builds on middle, full"]
    early = replace(plan, stop=Target(timeline=2).to_time(NOON))
    lines = plan_lines(early, targets, found, [], pace, now, delta=False)
    assert any(line.strip() == "replayed up to the target, which may lie before that end" for line in lines)
    assert "  fetches   at most 1.0 MB, as stored" in lines
    assert "  time      perhaps at most 2 s: 1 s for the backup, at most 1 s for the WAL" in lines
    quick = plan_lines(early, targets, found, [], Pace(1, MEGABYTE, 0.001), now, delta=False)
    assert any(line.startswith("  time      perhaps at most 1 s: less than 1 s for the backup") for line in quick)
    assert any("the first part (1.0 MB) came at" in line for line in quick)
    facts = plan_facts(plan, targets, found, [old], pace)
    assert facts["fetches"][1] == {"kind": "wal", "destination": "far", "objects": 1, "bytes": 2048}
    assert facts["fetches"][2] == {"kind": "tail", "destination": "far", "objects": 3, "bytes": 1024}
    assert facts["wal_timelines"][1] == {
        "timeline": 2, "segments": 3, "start": "0/400200", "end": "0/601000", "tail_bytes": 4096,
    }  # fmt: skip
    assert facts["overwrites"][0]["system_id"] == "42"
    assert facts["expected_seconds"] == {"base": 1.0, "replay": 1.335}


def test_a_long_note_is_wrapped_where_somebody_reads_it_and_nowhere_else(tmp_path: Path) -> None:
    words = "the old server archived with archive_library, and this one does not until somebody has looked at it"
    leader, follower = pty.openpty()
    with os.fdopen(leader, "wb"), os.fdopen(follower, "w") as terminal, (tmp_path / "log").open("w") as log:
        assert fitted(f"  note: {words}", terminal) == f"  note: {words}", "it does not say how wide it is"
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
        for start in ("  note: ", "note: "):
            first, *rest = fitted(start + words, terminal).splitlines()
            assert first.startswith(start + "the old server")
            assert all(line.startswith(" " * len(start) + line.strip()) for line in rest)
            assert max(map(len, (first, *rest))) <= 60
            assert " ".join([first.removeprefix(start), *map(str.strip, rest)]) == words
        assert fitted(f"  backup {words}", terminal) == f"  backup {words}"
        assert fitted(f"  note: {words}", log) == f"  note: {words}"


@pytest.mark.parametrize(
    ("laid", "words"),
    [
        (
            Laid(9, 100 << 10, 100 << 10, 90 << 10, 0),
            (
                "90.0 KB were there already; for the other 10.0 KB, 100.0 KB were fetched, in whole parts that hold"
                " many files each: saved 0 %"
            ),
        ),
        (Laid(9, 100 << 10, 0, 100 << 10, 0), "100.0 KB were there already, and nothing was fetched"),
    ],
)
def test_what_was_saved_is_said_without_a_contradiction(laid: Laid, words: str) -> None:
    assert _saved(laid) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "less than 1 s"), (5, "5 s"), (119, "119 s"), (150, "2.5 min"), (7300, "2.0 h"), (3 * 86400, "3.0 days")],
)
def test_how_long_in_words(seconds: float, words: str) -> None:
    assert lasting(seconds) == words


def test_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "global").mkdir()
    (tmp_path / "PG_VERSION").write_text("17\n")
    (tmp_path / "global/pg_control").write_bytes((7590000000000000007).to_bytes(8, sys.byteorder) + bytes(8184))
    found = occupant(tmp_path)
    assert (found.files, found.version, found.system_id) == (2, "17", "7590000000000000007")
    assert found.size >= 8192
    assert str(found) == "a cluster of PostgreSQL 17, system identifier 7590000000000000007, 2 files"
    (tmp_path / "global/pg_control").write_bytes(b"cut")
    (tmp_path / "PG_VERSION").unlink()
    assert str(occupant(tmp_path)) == "1 file"
    assert str(occupant(tmp_path / "nowhere")) == "0 files"
