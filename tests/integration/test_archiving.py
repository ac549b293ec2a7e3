"""Real servers archive into a watched spool; and what they wrote is judged and read as PostgreSQL itself reads it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from infra.clock import SystemClock
from infra.postgres.processes import give, run_as
from infra.postgres.programs import environment_for
from infra.postgres.throwaway import ThrowawayServer
from infra.sources import watcher
from infra.sources.watcher import SpoolWatcher
from pipeline.errors import IntegrityError
from pipeline.events import BackupReady, Notice
from pipeline.wal import Lsn, WalFile
from pipeline.walmarks import find_restore_point, find_xid, transaction_of
from pipeline.walpages import check_segment, read_page_header
from pipeline.walrecords import Carry, Payload
from tests.servers import NEWEST, SERVER_VERSIONS, StartServer, programs, server_folder, start_server

__all__ = ["server_folder", "start_server"]  # fixtures

MB = 1 << 20
#: Of every kind: large, spanning segments, prepared, with a time, with a name.
LOAD = (
    "create table t as select g, md5(g::text) from generate_series(1, 8000) g",
    "select pg_logical_emit_message(true, 'x', repeat(md5(random()::text), 100000))",
    "select pg_logical_emit_message(false, 'x', repeat('y', i * 31)) from generate_series(1, 300) i",
    "select pg_create_restore_point('between')",
    "update t set md5 = 'x' where g % 3 = 0",
    "checkpoint",
    "delete from t where g % 2 = 0",
)
PREPARED = "begin; create table p (a int); insert into p values (1); prepare transaction 'two'"


def archiving(spool: Path, mode: str) -> dict[str, str]:
    spool.mkdir()
    give(spool, run_as())
    if mode == "cp":
        way = {"archive_command": f"cp %p {spool}/%f"}
    else:
        way = {"archive_library": "basic_archive", "basic_archive.archive_directory": str(spool)}
    return {"archive_mode": "on", "wal_level": "logical", "max_prepared_transactions": "5", **way}


def run_load(server: ThrowawayServer) -> None:
    for statement in LOAD:
        server.query(statement)
    server.run("psql", "-Xqd", server.dsn(), "-c", PREPARED)
    server.query("commit prepared 'two'")


def system_id(server: ThrowawayServer) -> str:
    return str(server.query("select system_identifier from pg_control_system()")[0][0])


async def collect(spool: Path, until: WalFile, cluster: str, *, segment_size: int = MB) -> dict[str, bytes]:
    """Ship, into memory, up to the segment ``until``."""
    notices: list[Notice] = []
    source = SpoolWatcher(
        spool, system_id=cluster, segment_size=segment_size, clock=SystemClock(), notify=notices.append
    )
    shipped: dict[str, bytes] = {}
    events = source.events()
    async with asyncio.timeout(60):
        async for event in events:
            assert not isinstance(event, BackupReady)
            shipped[event.file.name] = bytes(source.read(event))
            await source.done(event)
            if event.file.name == until.name:
                break
    await events.aclose()  # type: ignore[attr-defined]  # it is an async generator
    assert notices == []
    return shipped


def has_files(folder: Path, count: int) -> bool:
    return len(list(folder.iterdir())) >= count


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wait_for(condition: Callable[[], bool]) -> None:
    # After three failures, which a kill may cause, the archiver itself waits for a minute.
    deadline = time.monotonic() + 150
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def finished(server: ThrowawayServer) -> WalFile:
    """End the open segment."""
    ((lsn, timeline),) = server.query(
        "select pg_switch_wal()::text, ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int"
    )
    return WalFile.segment(timeline, Lsn.parse(lsn) - 1, MB)


@pytest.mark.parametrize(
    ("major", "mode"),
    [(SERVER_VERSIONS[0], "basic_archive"), (NEWEST, "basic_archive"), (NEWEST, "cp")],
)
async def test_what_a_server_archives_is_shipped_whole(
    server_folder: Path, start_server: StartServer, major: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crash and restart on the way; every segment from the first to the last arrives, and none stays in the spool."""
    # Most was closed before anybody watched. A short file is never taken for settled, however little that takes.
    monkeypatch.setattr(watcher, "SETTLE", 0.2)
    spool = server_folder / "spool"
    server = start_server(major, settings=archiving(spool, mode), segment_mb=1)
    cluster = system_id(server)
    ((first,),) = server.query("select pg_walfile_name(pg_current_wal_lsn())")
    load = asyncio.create_task(asyncio.to_thread(run_load, server))
    shipped = {}
    await load
    server.kill9()
    server.start()
    server.query("select pg_logical_emit_message(true, 'x', repeat('after', 300000))")
    last = finished(server)
    shipped = await collect(spool, last, cluster)
    segments = [name for name in shipped if len(name) == 24]
    expected = []
    file = WalFile.parse(first)
    while file and file.name <= last.name:
        expected.append(file.name)
        file = file.next(MB)
    assert segments == expected
    assert [path.name for path in spool.iterdir() if WalFile.parse(path.name)] == []
    judge_as_postgres_does(server_folder, major, shipped)


def judge_as_postgres_does(folder: Path, major: int, shipped: dict[str, bytes]) -> None:
    """Every record that pg_waldump shows is found by us, at its place, and no other; with times, names and xids."""
    stored = folder / "stored"
    stored.mkdir()
    for name, content in shipped.items():
        (stored / name).write_bytes(content)
    names = sorted(name for name in shipped if len(name) == 24)
    expected = list(waldump(major, stored, names[0], names[-1]))
    found: list[tuple[int, int, int, int]] = []
    ends: list[tuple[int, int, str, bool]] = []
    points, carry = 0, None
    for name in names:
        file = WalFile.parse(name)
        assert file
        payload = Payload(shipped[name], file.start(MB), carry)
        records = list(payload.records())
        assert payload.major == major
        assert payload.last_record() == (records[-1] if records else None)
        for record in records:
            found.append((int(record.lsn), record.length, record.xid, int(record.prev)))
            if end := transaction_of(record, major):
                ends.append((int(end.lsn), end.xid, f"{end.time:%Y-%m-%d %H:%M:%S.%f}", end.committed))
                assert find_xid(payload, end.xid) == end
        points += find_restore_point(payload, "between") is not None
        carry = payload.carry()
    assert found == [(r.lsn, r.length, r.xid, r.prev) for r in expected]
    assert [(lsn, time, committed) for lsn, _, time, committed in ends] == [
        (r.lsn, r.time, r.words.startswith("COMMIT")) for r in expected if r.words.startswith(("COMMIT", "ABORT"))
    ]
    (prepared,) = [r for r in expected if r.words.startswith("COMMIT_PREPARED")]
    assert [xid for lsn, xid, _, _ in ends if lsn == prepared.lsn] == [
        int(re.sub(r"COMMIT_PREPARED (\d+).*", r"\1", prepared.words))
    ]
    assert points == 1


class Dumped:
    """A line of pg_waldump."""

    pattern = re.compile(
        r"rmgr: \S+\s+len \(rec/tot\):\s*\d+/\s*(\d+), tx:\s*(\d+), lsn: (\S+), prev (\S+), desc: (.*)"
    )

    def __init__(self, match: re.Match[str]) -> None:
        self.length, self.xid = int(match[1]), int(match[2])
        self.lsn, self.prev = int(Lsn.parse(match[3])), int(Lsn.parse(match[4]))
        self.words = match[5]

    @property
    def time(self) -> str:
        found = re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+", self.words)
        assert found
        return found[0]


def waldump(major: int, folder: Path, first: str, last: str) -> Iterator[Dumped]:
    bin_dir = programs(major)
    with subprocess.Popen(
        [bin_dir / "pg_waldump", "-p", folder, first, last], env={**environment_for(bin_dir), "TZ": "UTC"},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as dump:  # fmt: skip
        assert dump.stdout
        for line in dump.stdout:
            if match := Dumped.pattern.match(line):
                yield Dumped(match)


def test_a_standby_that_archives_what_it_restored_makes_poison(server_folder: Path, start_server: StartServer) -> None:
    """archive_mode=always: a padded tail comes back under its final name, with valid size and first page."""
    spool, poisoned = server_folder / "spool", server_folder / "poisoned"
    server = start_server(settings=archiving(spool, "cp"), segment_mb=1)
    server.run("pg_basebackup", "-D", str(server_folder / "copy"), "-d", server.dsn(), "-c", "fast", "-X", "none")
    server.query("create table t as select 1 a")
    server.query("select pg_logical_emit_message(true, 'x', repeat('z', 200000))")
    ((open_name, open_lsn),) = server.query(
        "select pg_walfile_name(pg_current_wal_lsn()), pg_current_wal_flush_lsn()::text"
    )
    used = Lsn.parse(open_lsn) % MB
    cluster = int(system_id(server))
    content = (server.data_dir / "pg_wal" / open_name).read_bytes()[:used]
    server.stop("immediate")
    (spool / open_name).write_bytes(content + bytes(MB - used))
    poisoned.mkdir()
    give(poisoned, run_as())
    standby = ThrowawayServer(server.bin_dir, server_folder / "copy")
    standby.configure(
        {
            "archive_mode": "always", "archive_command": f"cp %p {poisoned}/%f", "hot_standby": "on",
            "restore_command": f"cp {spool}/%f %p", "recovery_target_timeline": "latest",
        }
    )  # fmt: skip
    (standby.data_dir / "standby.signal").touch()
    try:
        standby.start()
        wait_for(lambda: size_of(poisoned / open_name) == MB)
        data = (poisoned / open_name).read_bytes()
    finally:
        standby.close()
    assert data[:used] == content
    file = WalFile.parse(open_name)
    assert file
    with pytest.raises(IntegrityError, match="is not a finished segment"):
        check_segment(file, data, system_id=cluster, segment_size=MB)


def test_segments_of_crashes_promotions_and_large_records(server_folder: Path, start_server: StartServer) -> None:
    """None of a few hundred difficult segments is refused, and cut ones are."""
    spool = server_folder / "spool"
    settings = archiving(spool, "cp")
    # A copy that is killed leaves no short file under the segment's name: a server that then starts into archive
    # recovery may remove the segment without ever archiving it again, and the short file would stay.
    settings["archive_command"] = f"cp %p {spool}/%f.tmp && mv {spool}/%f.tmp {spool}/%f"
    server = start_server(settings=settings, segment_mb=1)
    cluster = int(system_id(server))
    for size in (30, 4000, 90_000):
        load = (
            f"do $$ begin for i in 1..10000 loop perform pg_logical_emit_message(false, 'x', repeat('abc', {size}));"
            " if i % 50 = 0 then perform pg_switch_wal(); end if; end loop; end $$"
        )
        writer = subprocess.Popen(
            [server.bin_dir / "psql", "-Xqd", server.dsn(), "-c", load],
            env=environment_for(server.bin_dir), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_for(partial(has_files, spool, len(list(spool.iterdir())) + 15))
        finally:
            server.kill9()
            writer.wait()
        if size == 4000:  # a new timeline from wherever the WAL ends
            (server.data_dir / "recovery.signal").touch()
            server.configure({"restore_command": "exit 1"})
        server.start()
        # It takes readers as soon as it is consistent, and the writer only after its promotion.
        wait_for(lambda: server.query("select pg_is_in_recovery()") == [(False,)])
    last = finished(server)
    wait_for(lambda: size_of(spool / last.name) == MB)
    server.stop()
    names = sorted(path.name for path in spool.iterdir() if len(path.name) == 24)
    assert len(names) > 40
    assert {name[:8] for name in names} == {"00000001", "00000002"}
    carry: Carry | None = None
    previous: WalFile | None = None
    for name in names:
        data, file = (spool / name).read_bytes(), WalFile.parse(name)
        assert file
        check_segment(file, data, system_id=cluster, segment_size=MB)
        carry = Payload(data, file.start(MB), carry if previous and previous.next(MB) == file else None).carry()
        previous = file
        end = len(data.rstrip(b"\0"))
        # Behind the start of a record that goes on in the next segment nothing can be known of a cut.
        knowable = int(carry.lsn) - file.start(MB) + 16 if carry else end
        for cut in {end // 3, end - 8200, knowable - 1, knowable - 30} if knowable > 0 else {end // 3}:
            if 0 < cut < knowable and any(data[cut:]):
                with pytest.raises(IntegrityError):
                    check_segment(file, data[:cut] + bytes(MB - cut), system_id=cluster, segment_size=MB)


def test_the_template_of_this_file_reads_real_pages(start_server: StartServer) -> None:
    """Magic numbers are looked up, not guessed: each tested major is known by its number."""
    server = start_server(segment_mb=1)
    ((name,),) = server.query("select pg_walfile_name(pg_current_wal_lsn())")
    header = read_page_header((server.data_dir / "pg_wal" / name).read_bytes()[:40])
    assert (header.major, header.segment_size, header.block_size) == (SERVER_VERSIONS[-1], MB, 8192)
