"""What the watch source makes of files that are not what their names say: waited for, moved aside, or left alone."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.mounts import is_ours_alone
from infra.sources import watcher
from infra.sources.judge import _has_writer
from infra.sources.spool import look_at_spool
from tests.waldata import SEGMENT_SIZE, SYSTEM_ID, full, switched
from tests.watching import HISTORY, Watch, events_of, following, label, name_of

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


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("writer", ["none", "one", "unknown", "elsewhere"])
async def test_a_young_whole_file_is_looked_at_twice_unless_nobody_can_be_writing_it(
    tmp_path: Path, writer: str, monkeypatch: pytest.MonkeyPatch, *, once: bool
) -> None:
    """Its size and pages may be right before its writer is done with it: on NFS pages come in any order."""
    if writer == "unknown":
        monkeypatch.setattr("infra.sources.judge._has_writer", lambda _: None)
    if writer == "elsewhere":  # what another kernel writes, this one grants leases for
        (tmp_path / "mounts").write_text("1 1 0:1 / / rw - fuse.sshfs host:/ rw\n")
        monkeypatch.setattr("infra.mounts._MOUNTS", tmp_path / "mounts")
    watch = Watch(tmp_path / "spool", once=once)
    watch.folder.mkdir()
    path = watch.put(name_of(3), age=0.0)
    with path.open("r+b" if writer == "one" else "rb") as file:
        if writer == "none" and not (is_ours_alone(watch.folder) and _has_writer(file.fileno()) is False):
            pytest.skip("no leases are to be had here")
        async with events_of(watch) as events:
            assert label(await following(events)) == name_of(3)
    assert (watch.clock.monotonic() >= watcher.SETTLE) == (writer != "none")


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


# -- whether somebody writes it


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
