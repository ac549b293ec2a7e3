"""The spool watched for real: real folders, real inotify, WAL made by hand, and a clock that the test moves."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infra.clock import SystemClock
from infra.sources import arrivals, watcher
from infra.sources.spool import LOCK, holder
from pipeline.errors import SourceError
from pipeline.events import WatchingHampered
from tests.clock import FastClock
from tests.waldata import full, switched
from tests.watching import HISTORY, LABEL, Watch, events_of, following, label, name_of, names_in

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


async def test_a_file_that_could_not_be_removed_is_removed_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(tmp_path)
    path = watch.put(name_of(3))

    def forbid(_: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    async with events_of(watch) as events:
        event = await following(events)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", forbid)
            for _ in range(2):
                with pytest.raises(SourceError, match="is shipped but cannot be removed: Permission denied") as raised:
                    await watch.watcher.done(event)
                assert "allowed to write to the spool" in raised.value.hint
        assert watch.watcher.waiting == 1
        # It is ours to remove, and nobody else's to ship: looks at the whole folder do not announce it again.
        watch.put(name_of(4))
        assert label(await following(events)) == name_of(4)
        await watch.watcher.done(event)
        assert not path.exists()
        assert watch.watcher.waiting == 1


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
async def test_what_arrives_is_noticed(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real clock, long before the next look at the whole folder."""
    monkeypatch.setattr(watcher, "SETTLE", 0.2)  # nobody closes what is linked or moved in
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


async def test_a_look_at_the_lock_keeps_nobody_from_shipping(tmp_path: Path) -> None:
    """``status`` takes the lock for a moment to see whether it is free; a service that starts just then waits."""
    look = os.open(tmp_path / LOCK, os.O_RDONLY | os.O_CREAT)
    fcntl.flock(look, fcntl.LOCK_SH | fcntl.LOCK_NB)

    class Passing(FastClock):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds)
            if self.passed > 0.5:
                fcntl.flock(look, fcntl.LOCK_UN)

    clock = Passing()
    watch = Watch(tmp_path, clock=clock)
    watch.put(name_of(3))
    try:
        async with events_of(watch) as events:
            assert label(await following(events)) == name_of(3)
            assert 0.5 < clock.passed < 1
            assert holder(tmp_path) == os.getpid()
    finally:
        os.close(look)
    assert holder(tmp_path) is None


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
