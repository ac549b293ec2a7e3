"""What ``status`` says of destinations and of the spool: holes, damage, and what does not answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from handlers.fetch import Fetcher, read_catalog
from infra.cli.list import _lines, _result
from infra.cli.status import _lines as status_lines
from infra.holdings import hold
from infra.postgres.control import Archiver, Role, ServerFacts
from infra.postgres.senders import Sender, StreamFacts
from infra.postgres.slots import Slot
from infra.recoverable import Backup, Gap, Recoverable, Stretch
from infra.repository import Destination, RepositoryFacts
from infra.settings import Settings
from infra.standing import DestinationStatus, judge, stopped_by
from infra.status import _lacks, _late, _stream, destination_status, read_status
from infra.storage.lease import Lease
from infra.storage.memory import MemoryStore
from infra.wiring import Listeners, Site
from pipeline.backup import ArchiveInfo, BackupInfo
from pipeline.catalog import REPOSITORY, info_key, wal_key
from pipeline.contracts import Store
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody
from pipeline.wal import Lsn, WalFile
from tests.clock import FastClock
from tests.keys import SYSTEM_ID, plain_keys
from tests.parts import Shelf
from tests.stores import Faulty

SIZE = 1 << 20
NOON = datetime(2026, 1, 14, 12, tzinfo=UTC)
#: A server that has written half of the segment 9.
SERVER = ServerFacts(
    version_num=170011, system_identifier=SYSTEM_ID, segment_size=SIZE, timeline=1, in_recovery=False,
    wal_lsn=Lsn(9 * SIZE + SIZE // 2), wal_level="replica", archive_mode="on", archive_command="",
    archive_library="basic_archive", archive_directory="/spool", archive_timeout=60, max_wal_senders=10,
    data_directory=None, server_encoding="UTF8", fsync=True, full_page_writes=True, synchronous_standby_names="",
    synchronous_commit="on", summarize_wal=True,
    role=Role("walship", superuser=False, replication=True, monitor=True, missing_functions=()),
    archiver=Archiver(9, "", None, 0, "", None),
)  # fmt: skip


async def repository(name: str = "memory") -> MemoryStore:
    """With nothing in it yet."""
    store = MemoryStore(name)
    await store.put(REPOSITORY, MemoryBody([b"{}"]))
    return store


async def repository_shelf() -> Shelf:
    made = Shelf(SYSTEM_ID)
    made.store = await repository()
    return made


@pytest.fixture
async def shelf() -> Shelf:
    return await repository_shelf()


async def archive(shelf: Shelf, numbers: Iterable[int], timeline: int = 1) -> None:
    for number in numbers:
        await shelf(wal_key(WalFile.segment(timeline, number * SIZE, SIZE)), b"WAL")


async def back_up(shelf: Shelf, number: int, name: str = "base_20260114_120000") -> str:
    """A backup that begins in the middle of that segment."""
    start = Lsn(number * SIZE + SIZE // 2)
    info = BackupInfo(
        name=name, id="b" * 32, kind="full", system_id=SYSTEM_ID, server_version=170011, segment_size=SIZE, timeline=1,
        start_lsn=start, stop_lsn=Lsn(start + 1000), started=NOON, stopped=NOON, tablespaces=(),
        archives=(ArchiveInfo("base", 1000, ("a" * 64,)),), index=(), manifest="", stored_size=100,
    )  # fmt: skip
    await shelf(info_key(name), info.encode(), backup=info.id)
    return name


def site_of(shelf: Shelf, store: Store, *, server: str = "/nowhere", spool: Path | None = None) -> Site:
    settings = Settings(_env_file=None, POSTGRES_HOST=server, WALSHIP_SPOOL_DIR=spool)
    facts = RepositoryFacts(SYSTEM_ID, 17, SIZE, NOON.isoformat())
    return Site(
        settings, facts, (Destination(store, required=True),), (store,), plain_keys(), shelf.chain,
        Fetcher([store], shelf.chain, SYSTEM_ID), FastClock(), Listeners(),
    )  # fmt: skip


async def look(shelf: Shelf, store: Store | None = None) -> DestinationStatus:
    store = store or shelf.store
    return destination_status(await hold(store, site_of(shelf, store), {}, required=True), SERVER)


async def test_without_holes_the_lag_is_what_the_server_has_not_finished(shelf: Shelf) -> None:
    await archive(shelf, range(3, 9))
    backup = await back_up(shelf, 3)
    found = await look(shelf)
    assert (found.durable_lsn, found.lag_bytes, found.missing) == (str(Lsn(9 * SIZE)), SIZE // 2, "")
    assert (found.last_segment, found.last_backup) == ("000000010000000000000008", backup)


async def test_what_lies_behind_a_hole_counts_as_not_there(shelf: Shelf) -> None:
    await archive(shelf, (3, 4, 5, 7, 8))
    await back_up(shelf, 3)
    found = await look(shelf)
    assert (found.durable_lsn, found.lag_bytes) == (str(Lsn(6 * SIZE)), 3 * SIZE + SIZE // 2)
    assert (found.missing, found.holes) == ("000000010000000000000006", 1)
    assert found.last_segment == "000000010000000000000008"


async def test_a_hole_before_the_newest_backup_does_not_count(shelf: Shelf) -> None:
    await archive(shelf, (3, 4, 5, 7, 8))
    await back_up(shelf, 3)
    newest = await back_up(shelf, 7, "base_20260114_130000")
    # Being taken: its backup_info comes last.
    await shelf("base/base_20260114_140000/data/base/00000001", b"x")
    found = await look(shelf)
    assert (found.durable_lsn, found.missing, found.last_backup) == (str(Lsn(9 * SIZE)), "", newest)
    assert found.holes == 1


async def test_the_first_segment_of_the_newest_backup_is_missing(shelf: Shelf) -> None:
    await archive(shelf, (3, 5, 6, 7, 8))
    await back_up(shelf, 4)
    found = await look(shelf)
    assert (found.durable_lsn, found.missing) == (str(Lsn(4 * SIZE)), "000000010000000000000004")


async def test_without_a_backup_the_first_segment_is_where_it_begins(shelf: Shelf) -> None:
    await archive(shelf, (3, 4, 8))
    found = await look(shelf)
    assert (found.durable_lsn, found.missing) == (str(Lsn(5 * SIZE)), "000000010000000000000005")
    empty = await look(shelf, await repository())
    assert (empty.durable_lsn, empty.lag_bytes, empty.missing, empty.last_segment) == (None, None, "", "")


async def test_the_way_goes_over_a_fork(shelf: Shelf) -> None:
    """The backup is on timeline 1, the server on timeline 2, which left it in the middle of the segment 6."""
    await archive(shelf, range(3, 9))
    await archive(shelf, (6, 7), timeline=2)
    await back_up(shelf, 3)
    await shelf("wal/00000002.history", f"1\t{Lsn(6 * SIZE + 100)}\tno recovery target specified\n".encode())
    site = site_of(shelf, shelf.store)
    (found,) = (await read_status(site)).destinations
    assert (found.durable_lsn, found.last_segment) == (str(Lsn(8 * SIZE)), "000000020000000000000007")


async def test_a_damaged_history_is_told(shelf: Shelf) -> None:
    await archive(shelf, (6, 7), timeline=2)
    await shelf.store.put("wal/00000002.history", MemoryBody([b"garbage"]))
    status = await read_status(site_of(shelf, shelf.store))
    assert any("the history of timeline 2 cannot be read" in reason for reason in status.reasons)
    assert status.destinations[0].durable_lsn == str(Lsn(8 * SIZE))


async def test_a_damaged_description_is_told_and_the_next_backup_counts(shelf: Shelf) -> None:
    await archive(shelf, range(3, 9))
    older = await back_up(shelf, 3)
    await shelf.store.put(info_key("base_20260114_130000"), MemoryBody([b"garbage"]))
    site = site_of(shelf, shelf.store)
    status = await read_status(site)
    assert status.destinations[0].last_backup == older
    assert any("backup base_20260114_130000 cannot be used" in reason for reason in status.reasons)


async def test_what_does_not_answer_is_part_of_the_status(shelf: Shelf, tmp_path: Path) -> None:
    store = Faulty(shelf.store, down={"list": StoreError("the store is away", passing=True)})
    spool = tmp_path / "gone"
    status = await read_status(site_of(shelf, store, server=str(tmp_path), spool=spool))
    assert not status.healthy
    assert status.spool is None
    server, spooled, stored = status.reasons
    assert server.startswith("server: PostgreSQL at ")
    assert spooled == f"spool: the spool {spool} cannot be read: No such file or directory"
    assert stored == "memory: the store is away"
    assert status.result()["spool_error"] == spooled.removeprefix("spool: ")


@pytest.mark.parametrize("stored", [range(0), range(3, 9)])
async def test_an_emptied_destination_is_told_as_the_service_tells_it(shelf: Shelf, stored: Iterable[int]) -> None:
    """``stored``: also where a service has put WAL there that has not noticed yet."""
    await archive(shelf, range(3, 9))
    await back_up(shelf, 3)
    far = MemoryStore("far")
    for number in stored:
        await far.put(wal_key(WalFile.segment(1, number * SIZE, SIZE)), MemoryBody([b"WAL"]))
    site = site_of(shelf, shelf.store)
    destinations = (*site.destinations, Destination(far, required=True))
    site = replace(site, stores=(shelf.store, far), destinations=destinations)
    status = replace(await read_status(site), server_error="")
    told = "far has no repository.json: it was emptied, or it is new, or something else is in its place"
    assert judge(status) == ("at_risk", f"At risk: {told}; memory has everything.")
    assert (status.reasons, stopped_by(status)) == ((told,), [told])
    assert "; ".join(status.hints).startswith("nothing counts as stored there; after walship init what other")
    place = status.destinations[1]
    assert (place.error, place.hint, place.last_segment, place.lacks) == (told, *status.hints, "", "")
    assert status_lines(status).count("far") == 1
    assert not [line for line in status_lines(status) if "walship switch" in line or "walship backup" in line]


async def test_a_hole_is_a_reason_not_to_be_well(shelf: Shelf) -> None:
    await archive(shelf, (3, 5))
    status = await read_status(site_of(shelf, shelf.store))
    reason = "memory: 000000010000000000000004 is missing: what lies behind it cannot be reached"
    assert reason in status.reasons


async def test_tails_take_a_destination_further(shelf: Shelf) -> None:
    """Names alone count: what is in them is not read."""
    await archive(shelf, range(3, 9))
    await back_up(shelf, 3)
    for start, end in ((0, 1000), (1000, 5000), (6000, 7000)):
        key = f"tail/{WalFile.segment(1, 9 * SIZE, SIZE)}/00000001-{start:08x}-{end:08x}"
        await shelf.store.put(key, MemoryBody([b"unread"]))
    found = await look(shelf)
    assert (found.durable_lsn, found.tail_bytes) == (str(Lsn(9 * SIZE + 5000)), 5000)
    assert (found.lag_bytes, found.missing) == (SIZE // 2 - 5000, "")
    assert found.last_segment == "000000010000000000000008"


SLOT = Slot(
    name="walship", physical=True, temporary=False, restart_lsn=Lsn(9 * SIZE), active=True, active_pid=7,
    application_name="walship", holder="walship (process 7 of the server)", wal_status="reserved", safe_wal_size=None,
    retained=SIZE // 2, lost=False,
)  # fmt: skip
OURS = Sender(7, "walship", "shipper", "a local socket", "streaming", "sync")


def settings(**more: Any) -> Settings:
    return Settings(_env_file=None, WALSHIP_SOURCES="stream", **more)


def stream_facts(slot: Slot | None, *senders: Sender) -> StreamFacts:
    return StreamFacts(slot, senders, 1, 10, None, 60.0, 0, ())


@pytest.mark.parametrize(
    ("slot", "senders", "problem"),
    [
        (SLOT, (OURS,), ""),
        (None, (), "there is no slot walship"),
        (replace(SLOT, active=False, active_pid=None), (), "is idle: nothing streams; it keeps 524288 bytes"),
        (SLOT, (replace(OURS, application_name="pg_receivewal"),), "is in use by another program"),
        (replace(SLOT, lost=True), (OURS,), "is lost: the server did not keep its WAL"),
        (replace(SLOT, wal_status="unreserved"), (OURS,), "is about to be lost"),
    ],
)  # fmt: skip
async def test_the_stream_as_the_server_tells_of_it(
    shelf: Shelf, slot: Slot | None, senders: tuple[Sender, ...], problem: str
) -> None:
    server = replace(SERVER, synchronous_standby_names="walship")
    stream = _stream(server, stream_facts(slot, *senders), settings(), "0/900000")
    assert problem in stream.problem
    assert bool(stream.problem) is bool(problem)
    assert stream.commits.startswith("commits wait until walship has stored them")
    site = site_of(shelf, shelf.store)
    status = replace(await read_status(site), server_error="", stream=stream)
    assert any(reason.startswith("stream: ") for reason in status.reasons) is bool(problem)
    (line,) = (line for line in status_lines(status) if line.startswith("stream "))
    assert (problem or "WAL streams, commits wait for it; the slot walship keeps ") in line
    assert status.result()["stream"]["slot"] == "walship"


@pytest.mark.parametrize(
    ("interval", "timeline", "missing", "word"),
    [
        (1, 1, 0, ""),
        (1, 1, 1, "the WAL is there up to LSN 0/97FFFF, and the server was at LSN 0/980000"),
        (1, 2, 0, "nothing of timeline 2 is there, on which the server was"),
        # Nobody waits for so long: a segment may be missing, which is shipped as soon as it is whole.
        (60, 1, SIZE, ""),
        (60, 1, SIZE + 1, "the WAL is there up to LSN 0/87FFFF"),
        (60, 2, 0, ""),
    ],
)
async def test_what_the_stream_was_due_to_bring(
    shelf: Shelf, interval: float, timeline: int, missing: int, word: str
) -> None:
    site = site_of(shelf, shelf.store)
    site = replace(site, settings=site.settings.model_copy(update={"tail_interval": interval}))
    flushed = SERVER.wal_lsn
    place = DestinationStatus("memory", required=True, durable_lsn=str(Lsn(flushed - missing)))
    stream = _stream(SERVER, stream_facts(SLOT, OURS), settings(), str(flushed))
    first = replace(await read_status(site), stream=stream, timeline=timeline, destinations=(place,))
    found = _late(first, first, site)
    assert found.get("memory", "").startswith(word)
    assert bool(found) is bool(word)
    idle = replace(first, stream=replace(stream, problem="the slot walship is idle"))
    assert _late(idle, first, site) == {}, "that is told instead"
    for hidden in (replace(place, error="away"), replace(place, missing="x"), replace(place, durable_lsn=None)):
        assert _late(replace(first, destinations=(hidden,)), first, site) == {}


@pytest.mark.parametrize(
    ("names", "commit", "senders", "line", "error"),
    [
        ("walship", "on", (OURS,), "commits wait for it", ""),
        ("", "on", (replace(OURS, sync_state="async"),), "commits do not wait for it", ""),
        ("walship", "local", (OURS,), "commits need not wait for it", ""),
        ("ANY 1 (walship, replica)", "on", (replace(OURS, sync_state="quorum"),), "commits need not wait for it",
         "commits wait for any 1 of walship and replica"),
        ("walship", "on", (OURS, replace(OURS, pid=8)), "commits need not wait for it",
         "commits need not wait for walship: other connections release them"),
        ("walship", "on", (), "stream   the slot walship is idle", "commits wait: nobody streams as walship"),
    ],
)  # fmt: skip
async def test_what_commits_wait_for_is_told_as_check_tells_it(
    shelf: Shelf, names: str, commit: str, senders: tuple[Sender, ...], line: str, error: str
) -> None:
    server = replace(SERVER, synchronous_standby_names=names, synchronous_commit=commit)
    slot = SLOT if senders else replace(SLOT, active=False, active_pid=None, application_name="", holder="")
    site = replace(site_of(shelf, shelf.store), settings=settings())
    status = replace(await read_status(site), stream=_stream(server, stream_facts(slot, *senders), settings(), "0/9"))
    assert any(line in shown for shown in status_lines(status))
    assert not any("commits  commits" in shown for shown in status_lines(status))
    found = [reason for reason in status.reasons if reason.startswith("commits")]
    assert [reason.startswith(error) for reason in found] == ([True] if error else [])


async def test_without_spool_and_server_the_lease_tells_of_the_service(shelf: Shelf, tmp_path: Path) -> None:
    site = replace(site_of(shelf, shelf.store), settings=settings(POSTGRES_HOST=str(tmp_path)))
    assert "service  unknown" in status_lines(await read_status(site))
    lease = await Lease.acquire([shelf.store], clock=site.clock, tell=lambda _: None, server="slot walship")
    (line,) = (line for line in status_lines(await read_status(site)) if line.startswith("service "))
    assert line.startswith("service  process ")
    assert line.endswith("; its last sign of life was at 2026-01-14T12:00:00Z")
    await lease.release()
    (line,) = (line for line in status_lines(await read_status(site)) if line.startswith("service "))
    assert line.startswith("service  not running; the last was process ")


async def test_a_timeline_that_has_only_tails_so_far(shelf: Shelf) -> None:
    place = DestinationStatus("memory", required=True, timeline=3, durable_lsn="0/9", tail_bytes=29800)
    status = replace(await read_status(site_of(shelf, shelf.store)), destinations=(place,))
    assert "  timeline 3: no finished segment yet, 29.1 KB in tails; behind by unknown" in status_lines(status)


async def test_the_terminal_tells_what_can_be_restored(shelf: Shelf) -> None:
    noon, missing = "2026-01-14 12:00:00 UTC", "000000010000000000000006"
    stretch = Stretch(1, NOON, NOON, "0/1", "0/9", "hole", missing, 0, ("base",))
    stored = Recoverable(
        newest_timeline=2,
        backups=(Backup("base_20260114_120000", "full", 1, NOON, NOON, 1 << 20, 5, ("memory",)),),
        stretches=(stretch, replace(stretch, timeline=2, ended_by="open", missing="", ends=None)),
        holes=(Gap(1, missing, missing, 1), Gap(1, "a", "b", 2)),
        missing_segments=3,
    )
    status = replace(await read_status(site_of(shelf, shelf.store)), recoverable=stored)
    lines = status_lines(status)
    assert lines[0] == judge(status)[1]
    assert lines[-7:] == [
        f"restore  any moment from {noon} to {noon} on timeline 1 (--timeline); {missing} is missing behind it",
        f"restore  any moment from {noon} to a time that is not known",
        f"backups  1 base backup, the last one base_20260114_120000 of {noon} (1.0 MB)",
        f"hole     segment {missing} is missing",
        "hole     2 segments are missing, a to b",
        "verified never with success, as far as is known",
        "drill    never with success, as far as is known",
    ]
    empty = status_lines(replace(status, recoverable=Recoverable()))
    assert "restore  nothing: there is no base backup with the WAL that it needs" in empty


async def test_list_tells_of_names_that_are_not_walships(shelf: Shelf) -> None:
    await archive(shelf, (3,))
    catalog = await read_catalog(
        [shelf.store], Fetcher([shelf.store], shelf.chain, SYSTEM_ID), SYSTEM_ID, segment_size=SIZE
    )
    assert not any("not walship's" in line for line in _lines(catalog, {}, {}))
    for name in ("wal/readme.txt", "wal/0000000100000000/000000010000000000000003.bak"):
        await shelf.store.put(name, MemoryBody([b"x"]))
    catalog = await read_catalog(
        [shelf.store], Fetcher([shelf.store], shelf.chain, SYSTEM_ID), SYSTEM_ID, segment_size=SIZE
    )
    examples = ["wal/0000000100000000/000000010000000000000003.bak", "wal/readme.txt"]
    assert _lines(catalog, {}, {})[-1] == f"not walship's: 2 objects below wal/, for example {', '.join(examples)}"
    assert _result(catalog, {}, {}, ())["unknown"] == {"objects": 2, "examples": examples}


async def test_what_one_destination_lacks_of_another_is_told_but_not_what_is_on_its_way() -> None:
    full, new = await repository_shelf(), await repository_shelf()
    await archive(full, range(3, 9))
    await archive(new, range(7, 9))
    holdings = [await hold(each.store, site_of(each, each.store), {}, required=True) for each in (full, new)]
    assert [_lacks(holding, holdings) for holding in holdings] == ["", ""], "four segments may be on their way"
    await archive(full, range(2, 3))
    await back_up(full, 3)
    holdings = [await hold(each.store, site_of(each, each.store), {}, required=True) for each in (full, new)]
    said = "1 base backups and 5 segments of WAL that others have are not there yet"
    assert [_lacks(holding, holdings) for holding in holdings] == ["", said]
