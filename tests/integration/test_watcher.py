"""The spool watched for real: real folders, real inotify, WAL made by hand, and a clock that the test moves."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.clock import SystemClock
from infra.sources import arrivals, watcher
from infra.sources.spool import look_at_spool
from infra.sources.watcher import SpoolWatcher
from pipeline.errors import SourceError
from pipeline.events import BackupReady, Event, FileRefused, Notice, WatchingHampered
from tests.clock import FastClock
from tests.waldata import SEGMENT_SIZE, SYSTEM_ID, full, switched

HISTORY = b"1\t0/300000\tno recovery target specified\n"
LABEL = b"START WAL LOCATION: 0/200028 (file 000000010000000000000002)\nSTOP WAL LOCATION: 0/200100\nLABEL: x\n"


def name_of(number: int, timeline: int = 1) -> str:
    return f"{timeline:08X}00000000{number:08X}"


class Watch:
    """A watcher on a folder, and what it has told."""

    def __init__(self, folder: Path, *, once: bool = False, clock: FastClock | SystemClock | None = None) -> None:
        self.folder = folder
        self.notices: list[Notice] = []
        self.clock = clock or FastClock()
        self.watcher = SpoolWatcher(
            folder, system_id=str(SYSTEM_ID), segment_size=SEGMENT_SIZE, clock=self.clock,
            notify=self.notices.append, once=once,
        )  # fmt: skip

    def put(self, name: str, content: bytes | None = None, *, age: float = 60.0) -> Path:
        """A file that nobody has touched for a minute (by the watcher's clock)."""
        path = self.folder / name
        path.write_bytes(switched(name) if content is None else content)
        moment = self.clock.now().timestamp() - age
        os.utime(path, (moment, moment))
        return path

    async def all(self) -> list[str]:
        """Everything that ``once`` announces."""
        return [label(event) async for event in self.watcher.events()]

    @property
    def refusals(self) -> list[FileRefused]:
        return [notice for notice in self.notices if isinstance(notice, FileRefused)]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def label(event: Event) -> str:
    return Path(event.folder).name if isinstance(event, BackupReady) else event.file.name


@asynccontextmanager
async def events_of(watch: Watch) -> AsyncIterator[AsyncIterator[Event]]:
    events = watch.watcher.events()
    try:
        yield events
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # it is an async generator


async def following(events: AsyncIterator[Event]) -> Event:
    return await asyncio.wait_for(anext(events), 20)


# -- what is there already


async def test_history_first_then_wal_order(tmp_path: Path) -> None:
    watch = Watch(tmp_path, once=True)
    for number in (9, 3, 0x10):
        watch.put(name_of(number))
    watch.put(name_of(3, 2))
    watch.put("00000002.history", HISTORY)
    watch.put(f"{name_of(3)}.00000028.backup", LABEL)
    watch.put(f"{name_of(0x11)}.partial", full(name_of(0x11)))
    assert await watch.all() == [
        "00000002.history", name_of(3), f"{name_of(3)}.00000028.backup", name_of(9), name_of(0x10),
        f"{name_of(0x11)}.partial", name_of(3, 2),
    ]  # fmt: skip
    assert watch.notices == []


async def test_a_file_leaves_only_when_it_is_done(tmp_path: Path) -> None:
    watch = Watch(tmp_path, once=True)
    path = watch.put(name_of(3))
    (event,) = [event async for event in watch.watcher.events()]
    assert watch.watcher.read(event) == path.read_bytes() == watch.watcher.read(event)
    assert watch.watcher.waiting == 1
    await watch.watcher.done(event)
    assert not path.exists()
    await watch.watcher.done(event)
    assert watch.watcher.waiting == 0


async def test_a_new_start_finds_what_was_not_done(tmp_path: Path) -> None:
    Watch(tmp_path).put(name_of(3))
    for _ in range(2):
        assert await Watch(tmp_path, once=True).all() == [name_of(3)]


async def test_a_file_that_comes_back_is_announced_again(tmp_path: Path) -> None:
    """PostgreSQL archives a segment again when it died before it noted that it was archived."""
    watch = Watch(tmp_path)
    watch.put(name_of(3))
    async with events_of(watch) as events:
        event = await following(events)
        watch.watcher.read(event)
        await watch.watcher.done(event)
        watch.put(name_of(3))
        assert label(await following(events)) == name_of(3)


async def test_a_file_that_was_replaced_is_not_removed(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.put(name_of(3))
    async with events_of(watch) as events:
        event = await following(events)
        watch.watcher.read(event)
        again = watch.put("other", switched(name_of(3), records=[b"other"]), age=30)
        again.rename(tmp_path / name_of(3))
        await watch.watcher.done(event)
        assert (tmp_path / name_of(3)).exists()
        assert label(await following(events)) == name_of(3)


async def test_reading_what_is_being_written_again_fails_and_passes(tmp_path: Path) -> None:
    watch = Watch(tmp_path, once=True)
    path = watch.put(name_of(3))
    (event,) = [event async for event in watch.watcher.events()]
    content = path.read_bytes()
    path.write_bytes(content[:5000])
    with pytest.raises(SourceError, match="is 5000 bytes"):
        watch.watcher.read(event)
    path.write_bytes(content)
    assert watch.watcher.read(event) == content
    path.unlink()
    with pytest.raises(SourceError, match="has vanished before it was shipped"):
        watch.watcher.read(event)


async def test_a_longer_queue_than_memory_is_told_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "_MOST", 3)
    watch = Watch(tmp_path, once=True)
    for number in range(10):
        watch.put(name_of(number))
    watch.put("00000002.history", HISTORY)
    assert await watch.all() == ["00000002.history", *map(name_of, range(10))]


# -- what arrives


@pytest.mark.parametrize("way", ["written", "renamed", "moved in", "linked"])
async def test_what_arrives_is_noticed(tmp_path: Path, way: str) -> None:
    """With the real clock, long before the next look at the whole folder."""
    spool, elsewhere = tmp_path / "spool", tmp_path / "elsewhere"
    spool.mkdir()
    elsewhere.mkdir()
    watch = Watch(spool, clock=SystemClock())
    async with events_of(watch) as events:
        arrival = asyncio.create_task(following(events))
        while not watch.watcher._arrivals.alive:
            await asyncio.sleep(0.01)
        name, content = name_of(3), switched(name_of(3))
        if way == "written":
            (spool / name).write_bytes(content)
        elif way == "renamed":
            (spool / f"archtemp.{name}.1.1").write_bytes(content)
            (spool / f"archtemp.{name}.1.1").rename(spool / name)
        else:
            (elsewhere / name).write_bytes(content)
            if way == "linked":
                (spool / name).hardlink_to(elsewhere / name)
            else:
                (elsewhere / name).rename(spool / name)
        assert label(await arrival) == name
    assert watch.notices == []


async def test_files_that_appear_while_others_are_announced(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    for number in range(2, 8):
        watch.put(name_of(number))
    found: list[str] = []
    async with events_of(watch) as events:
        while len(found) < 12:
            found.append(label(await following(events)))
            if len(found) <= 6:
                watch.put(name_of(10 + len(found)))
    assert found == sorted(found)


async def test_without_inotify_the_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoObserver:
        def schedule(self, *_: object, **__: object) -> None:
            raise OSError(errno.EMFILE, "inotify instance limit reached")

    monkeypatch.setattr(arrivals, "Observer", NoObserver)
    watch = Watch(tmp_path)
    async with events_of(watch) as events:
        arrival = asyncio.create_task(following(events))
        await asyncio.sleep(0)
        watch.put(name_of(3))
        assert label(await arrival) == name_of(3)
    (notice,) = watch.notices
    assert isinstance(notice, WatchingHampered)
    assert "inotify instance limit reached" in notice.fact
    assert "max_user_instances" in notice.hint


async def test_what_inotify_has_lost_is_found_by_the_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals.Arrivals, "on_any_event", lambda *_: None)
    watch = Watch(tmp_path)
    async with events_of(watch) as events:
        arrival = asyncio.create_task(following(events))
        while not watch.watcher._arrivals.alive:
            await asyncio.sleep(0.01)
        watch.put(name_of(3))
        assert label(await arrival) == name_of(3)
    assert watch.notices == []


# -- what is written in place


async def test_a_copy_under_way_is_waited_for_and_holds_back_its_timeline(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    content = switched(name_of(3))
    watch.put(name_of(4))
    watch.put(name_of(2, 2), switched(name_of(2, 2)))
    with (tmp_path / name_of(3)).open("wb") as copy:
        copy.write(content[:100_000])
        copy.flush()
        async with events_of(watch) as events:
            assert label(await following(events)) == name_of(2, 2)
            pending = asyncio.create_task(following(events))
            started = watch.clock.monotonic()
            # An hour in which the writer hangs: it is not taken from under its hands.
            while watch.clock.monotonic() < started + 3600:
                await asyncio.sleep(0.001)
            assert not pending.done()
            copy.write(content[100_000:])
            copy.close()
            assert label(await pending) == name_of(3)
            assert label(await following(events)) == name_of(4)
    assert watch.refusals == []


async def test_a_cut_file_that_nobody_writes_is_moved_aside(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    content = switched(name_of(3))
    watch.put(name_of(3), content[:100_000])
    watch.put(name_of(4))
    watch.put("00000002.history", HISTORY[:12])
    async with events_of(watch) as events:
        assert label(await following(events)) == name_of(4)
        assert watch.clock.monotonic() >= watcher.STALL
        assert not (tmp_path / name_of(3)).exists()
        assert (tmp_path / "refused" / name_of(3)).read_bytes() == content[:100_000]
        assert (tmp_path / "refused" / "00000002.history").read_bytes() == HISTORY[:12]
        # PostgreSQL can archive it again now; and the same mishap does not overwrite the first.
        watch.put(name_of(3), content[:50_000])
        watch.put(name_of(5))
        assert label(await following(events)) == name_of(5)
        assert len((tmp_path / "refused" / f"{name_of(3)}.1").read_bytes()) == 50_000
        watch.put(name_of(3))
        assert label(await following(events)) == name_of(3)
    assert [notice.fact for notice in watch.refusals[:2]] == [
        "00000002.history is 12 bytes and does not end in a whole line",
        f"{name_of(3)} is 100000 bytes; a segment of this cluster is 1048576",
    ]
    assert "take a new base backup" in watch.refusals[0].hint
    assert look_at_spool(tmp_path, watch.clock.now()).refused == 3


async def test_where_the_kernel_cannot_tell_of_writers_nothing_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.sources.judge._has_writer", lambda _: None)
    watch = Watch(tmp_path)
    watch.put(name_of(3), switched(name_of(3))[:100_000])
    watch.put(name_of(4))
    async with events_of(watch) as events:
        assert label(await following(events)) == name_of(4)
    assert (tmp_path / name_of(3)).exists()
    assert watch.watcher.refused == [str(tmp_path / name_of(3))]


async def test_a_young_file_is_looked_at_twice(tmp_path: Path) -> None:
    """Its size and pages may be right before its writer is done with it: on NFS pages come in any order."""
    watch = Watch(tmp_path, once=True)
    watch.put(name_of(3), age=0.0)
    assert await watch.all() == [name_of(3)]
    assert watch.clock.monotonic() >= watcher.SETTLE


# -- what does not belong there


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (switched(name_of(3), system_id=5), f"belongs to the cluster 5, not to {SYSTEM_ID}"),
        (switched(name_of(7)), "should begin with 0/300000"),
        (full(name_of(3))[:500_000] + bytes(SEGMENT_SIZE - 500_000), "is not a finished segment"),
        (bytes(SEGMENT_SIZE), "is no WAL segment"),
        (full(name_of(3)) + bytes(8), "is 1048584 bytes"),
    ],
    ids=["cluster", "address", "padded", "zeros", "long"],
)
@pytest.mark.parametrize("once", [True, False])
async def test_a_wrong_segment_is_refused_once_and_left_in_place(
    tmp_path: Path, content: bytes, fact: str, *, once: bool
) -> None:
    watch = Watch(tmp_path, once=once)
    path = watch.put(name_of(3), content)
    watch.put(name_of(4))
    async with events_of(watch) as events:
        assert label(await following(events)) == name_of(4)
        if not once:
            # Many looks later it is still there, and nobody was told again; until it is mended.
            watch.put(name_of(5))
            assert label(await following(events)) == name_of(5)
            pending = asyncio.create_task(following(events))
            started = watch.clock.monotonic()
            while watch.clock.monotonic() < started + 300:
                await asyncio.sleep(0.001)
            assert path.read_bytes() == content
            assert watch.watcher.refused == [str(path)]
            path.unlink()
            watch.put(name_of(3))
            assert label(await pending) == name_of(3)
            assert watch.watcher.refused == []
    (notice,) = watch.refusals
    assert fact in notice.fact
    assert notice.path == str(path)
    assert notice.hint


async def test_unknown_files_are_told_of_once_and_left_alone(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    for stranger in ("notes.txt", "000000010000000000000003.gz", ".hidden"):
        watch.put(stranger, b"x")
    (tmp_path / "empty-folder").mkdir()
    async with events_of(watch) as events:
        pending = asyncio.create_task(following(events))
        while watch.clock.monotonic() < 600:
            await asyncio.sleep(0.001)
        pending.cancel()
        await asyncio.wait([pending])
    assert sorted(Path(n.path).name for n in watch.refusals) == [".hidden", "000000010000000000000003.gz", "notes.txt"]
    assert (tmp_path / "notes.txt").exists()


async def test_left_overs_of_basic_archive_go_by_age(tmp_path: Path) -> None:
    watch = Watch(tmp_path, once=True)
    old = watch.put(f"archtemp.{name_of(3)}.4711.1768392000123", b"x", age=3700)
    young = watch.put(f"archtemp.{name_of(4)}.4711.1768392000123", b"x", age=3500)
    alike = watch.put("archtemp.of.mine.1.2", b"x", age=9999)
    assert await watch.all() == []
    assert (old.exists(), young.exists(), alike.exists()) == (False, True, True)
    assert [notice.path for notice in watch.refusals] == [str(alike)]


async def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(switched(name_of(3)))
    (tmp_path / name_of(3)).symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / name_of(4))
    watch = Watch(tmp_path, once=True)
    assert await watch.all() == []
    assert {Path(n.path).name for n in watch.refusals} == {name_of(3), name_of(4), "real"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_an_unreadable_file_names_the_remedy(tmp_path: Path) -> None:
    watch = Watch(tmp_path, once=True)
    watch.put(name_of(3)).chmod(0)
    assert await watch.all() == []
    (notice,) = watch.refusals
    assert "Permission denied" in notice.fact
    assert "run walship as that user" in notice.hint


# -- the folder itself


async def test_a_missing_spool(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no folder") as caught:
        await Watch(tmp_path / "none", once=True).all()
    assert "create it" in caught.value.hint


async def test_a_spool_is_shipped_by_one(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.put(name_of(3))
    async with events_of(watch) as events:
        await following(events)
        with pytest.raises(SourceError, match=f"is shipped by process {os.getpid()} already"):
            await Watch(tmp_path, once=True).all()
    assert await Watch(tmp_path, once=True).all() == [name_of(3)]


async def test_a_spool_that_vanishes_is_an_error(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    watch = Watch(spool)
    watch.put(name_of(3))
    async with events_of(watch) as events:
        await following(events)
        spool.rename(tmp_path / "gone")
        with pytest.raises(SourceError, match="is no folder"):
            await following(events)


async def test_a_base_backup_is_announced_and_removed(tmp_path: Path) -> None:
    watch = Watch(tmp_path, once=True)
    folder = tmp_path / "monday"
    folder.mkdir()
    for file in ("base.tar.gz", "16384.tar", "pg_wal.tar", "backup_manifest"):
        (folder / file).write_bytes(b"x")
    unfinished = tmp_path / "tuesday"
    unfinished.mkdir()
    (unfinished / "base.tar").write_bytes(b"x")
    moment = (datetime(2026, 1, 14, 12, tzinfo=UTC) - timedelta(hours=2)).timestamp()
    os.utime(unfinished / "base.tar", (moment, moment))
    watch.put(name_of(3))
    found = [event async for event in watch.watcher.events()]
    assert [label(event) for event in found] == [name_of(3), "monday"]
    await watch.watcher.done(found[1])
    assert not folder.exists()
    assert names_in(tmp_path) == [".walship.lock", name_of(3), "tuesday"]
    await watch.watcher.done(found[1])
    assert [(n.path, "no base backup" in n.fact) for n in watch.refusals] == [(str(unfinished), True)]


async def test_a_backup_that_was_shipped_when_we_died_is_not_shipped_again(tmp_path: Path) -> None:
    half = tmp_path / ".walship-shipped-monday"
    half.mkdir()
    for file in ("base.tar", "backup_manifest", "notes.txt"):
        (half / file).write_bytes(b"x")
    assert await Watch(tmp_path, once=True).all() == []
    assert names_in(tmp_path / "monday") == ["notes.txt"]


def test_the_lease_question_survives_a_writer_that_comes_at_that_moment(tmp_path: Path) -> None:
    """The kernel signals the holder of a lease; by default that would end the process."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    script = (
        "import os, sys, threading, time\n"
        "from infra.sources.judge import _has_writer\n"
        "path = sys.argv[1]; end = time.monotonic() + 1.5\n"
        "def write():\n"
        "    while time.monotonic() < end: os.close(os.open(path, os.O_WRONLY))\n"
        "if os.fork() == 0:\n"
        "    write(); os._exit(0)\n"
        "answers = set()\n"
        "while time.monotonic() < end:\n"
        "    handle = os.open(path, os.O_RDONLY); answers.add(_has_writer(handle)); os.close(handle)\n"
        "os.wait(); print(sorted(map(str, answers)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "False" in done.stdout
