"""restore_command and its sh script, run as PostgreSQL runs them: ``/bin/sh -c`` in the data directory."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

import pytest

from handlers.feed import Feed
from handlers.fetch import Fetcher
from infra.postgres.wal_script import FEED, FOLDER, RESTORE_COMMAND, SCRIPT, script
from infra.restore import feeding as serving
from pipeline.contracts import Buffer
from pipeline.errors import RecoveryError, StoreError
from pipeline.targets import Target
from pipeline.wal import WalFile
from tests.keys import SYSTEM_ID, chain, plain_keys
from tests.unit.test_recovery_files import plan

SIZE = 1 << 20
SEGMENT = "000000010000000000000003"
HISTORY = "00000002.history"
PATH = "pg_wal/RECOVERYXLOG"


def lay(data: Path, body: str) -> None:
    """A data directory with the script, and a ``fetch-wal`` made of these sh lines; its arguments are $1 to $4."""
    (data / "pg_wal").mkdir(exist_ok=True)
    (data / FOLDER).mkdir(exist_ok=True)
    fetch = data / "fetch it.sh"
    fetch.write_text(f"#!/bin/sh\n{body}\n")
    fetch.chmod(0o755)
    (data / FOLDER / SCRIPT).write_text(script((str(fetch),), SIZE))


def command(name: str) -> list[str]:
    return ["/bin/sh", "-c", RESTORE_COMMAND.replace("%f", name).replace("%p", PATH)]


def ask(data: Path, name: str = SEGMENT) -> int:
    return subprocess.run(command(name), cwd=data, capture_output=True, timeout=60, check=False).returncode


@pytest.fixture
def data(tmp_path: Path) -> Path:
    # A path that needs quoting wherever it is not relative.
    folder = tmp_path / "it's a $HOME"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("status", "wanted"),
    [(44, 1), (1, 200), (2, 200), (11, 200), (125, 200), (126, 200), (127, 200), (200, 200), (255, 200)],
)
def test_only_the_reserved_status_means_absent(data: Path, status: int, wanted: int) -> None:
    lay(data, f"exit {status}")
    assert ask(data) == wanted


@pytest.mark.parametrize("number", ["TERM", "KILL", "INT", "SEGV"])
def test_a_killed_fetch_stops_recovery(data: Path, number: str) -> None:
    lay(data, f"kill -{number} $$")
    assert ask(data) == 200


@pytest.mark.parametrize(
    ("body", "name", "wanted"),
    [
        (f'head -c {SIZE} /dev/zero >"$4"', SEGMENT, 0),
        (f'head -c {SIZE - 1} /dev/zero >"$4"', SEGMENT, 200),
        (f'head -c {SIZE + 1} /dev/zero >"$4"', SEGMENT, 200),
        (': >"$4"', SEGMENT, 200),
        ("exit 0", SEGMENT, 200),
        ('echo "1 0/3000000 why" >"$4"', HISTORY, 0),
        (': >"$4"', HISTORY, 200),
    ],
)
def test_found_means_that_all_of_it_is_there(data: Path, body: str, name: str, wanted: int) -> None:
    lay(data, body)
    assert ask(data, name) == wanted


def test_what_fetch_wal_is_given(data: Path) -> None:
    lay(data, 'printf "%s\\n" "$@" >given; exit 44')
    assert ask(data) == 1
    assert (data / "given").read_text().split("\n")[:4] == ["--context", f"{FOLDER}/context.json", SEGMENT, PATH]


def test_a_script_or_a_program_that_is_not_there_stops_recovery(data: Path) -> None:
    assert ask(data) == 200
    lay(data, "")
    (data / "fetch it.sh").unlink()
    assert ask(data) == 200
    (data / FOLDER / SCRIPT).write_text("if then (")
    assert ask(data) == 200


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash")
def test_bash_gives_the_same_answers(data: Path) -> None:
    lay(data, "exit 44")
    words = command(SEGMENT)
    words[2] = words[2].replace("/bin/sh", "/bin/bash --posix")
    assert subprocess.run(["/bin/bash", *words[1:]], cwd=data, check=False).returncode == 1


class Shelf:
    """What the feed reads from."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def read(self, name: str) -> Buffer | None:
        self.asked.append(name)
        if name == HISTORY:
            return b"1\t0/3000000\twhy\n"
        file = WalFile.parse(name)
        assert file is not None
        if file.seg == 99:
            raise StoreError("the store is on fire")
        return bytes([file.seg]) * SIZE if file.seg < 20 else None


def segment(number: int) -> WalFile:
    return WalFile.segment(1, number * SIZE, SIZE)


def feeding(data: Path, shelf: Shelf, order: list[WalFile], said: list[str]) -> AbstractAsyncContextManager[Feed]:
    return running(Feed(data / FOLDER / FEED, shelf.read, order, SIZE, notify=said.append))


@asynccontextmanager
async def running(feed: Feed) -> AsyncIterator[Feed]:
    feed.open()
    task = asyncio.create_task(feed.serve())
    try:
        yield feed
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        feed.close()


async def ask_feed(data: Path, name: str) -> int:
    return await asyncio.to_thread(ask, data, name)


async def test_the_feed_serves_as_recovery_asks_and_what_the_server_has_is_absent_at_once(data: Path) -> None:
    lay(data, "exit 126")
    shelf, said = Shelf(), list[str]()
    # 19 is no finished segment of the plan: it may be a tail, which grows.
    async with feeding(data, shelf, [segment(n) for n in range(3, 19)], said):
        assert await ask_feed(data, HISTORY) == 0
        # At first the segment of the checkpoint, then that of the redo point; the last one twice before the next.
        for number in (4, 3, 4, 5, 6, 18, 18, 19, 19):
            assert await ask_feed(data, segment(number).name) == 0
            assert (data / PATH).read_bytes() == bytes([number]) * SIZE
            (data / PATH).unlink()
        before = len(shelf.asked)
        for number in (18, 5, 3):
            assert await ask_feed(data, segment(number).name) == 1, "it is in pg_wal"
        assert len(shelf.asked) == before, "no store that fails now can spoil the end"
        assert await ask_feed(data, segment(20).name) == 1
        assert await ask_feed(data, segment(19).name) == 0, "tails are joined anew each time"
        assert await ask_feed(data, segment(20).name) == 1
        assert not said
        deadline = time.monotonic() + 20
        while list((data / FOLDER / FEED / "want").iterdir()):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
    assert ask(data) == 200, "without a feed it is fetch-wal's turn"


async def test_reading_ahead_is_bounded_and_needs_no_asking(data: Path) -> None:
    lay(data, "exit 126")
    shelf = Shelf()
    async with feeding(data, shelf, [segment(n) for n in range(3, 3 + 17)] + [segment(30)], []):
        ready = data / FOLDER / FEED / "ready"
        deadline = time.monotonic() + 20
        while len(list(ready.iterdir())) < 16:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert len(shelf.asked) == 16
        assert await ask_feed(data, segment(3).name) == 0
        while len(shelf.asked) < 17:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
    assert not list(ready.iterdir())


async def test_a_store_that_is_slower_than_the_server_is_read_once_for_each_segment(data: Path) -> None:
    """The server asks for what is being fetched ahead, takes it at once, and no request for it is left behind."""
    lay(data, "exit 126")
    reads: list[str] = []

    async def read(name: str) -> Buffer | None:
        reads.append(name)
        await asyncio.sleep(0.04)
        return bytes(SIZE)

    order = [segment(number) for number in range(3, 63)]
    home = data / FOLDER / FEED
    async with running(Feed(home, read, order, SIZE)):
        for file in order:
            assert await ask_feed(data, file.name) == 0
            assert len(list((home / "ready").iterdir())) <= 16
        assert await ask_feed(data, segment(63).name) == 0
        assert reads == [file.name for file in (*order, segment(63))]
        assert not list((home / "ready").iterdir())
        assert not list((home / "want").iterdir())


async def test_what_was_fetched_for_a_script_that_was_killed_does_not_stay(data: Path) -> None:
    """It had asked; the server asks anew, finds the file in ready/, and the old request brings the file once more."""
    lay(data, "exit 126")
    shelf, home = Shelf(), data / FOLDER / FEED
    async with feeding(data, shelf, [segment(n) for n in range(3, 7)], []):
        async with asyncio.timeout(20):
            while not (home / "ready" / segment(3).name).exists():
                await asyncio.sleep(0.01)
            assert await ask_feed(data, segment(3).name) == 0
            (home / "want" / segment(3).name).touch()
            while not (home / "ready" / segment(3).name).exists():
                await asyncio.sleep(0.01)
            for number in (4, 5, 6, 7):
                assert await ask_feed(data, segment(number).name) == 0
            while list((home / "ready").iterdir()):
                await asyncio.sleep(0.01)


async def test_a_failing_store_stops_recovery_and_says_why(data: Path) -> None:
    lay(data, "exit 44")
    said: list[str] = []
    async with feeding(data, Shelf(), [segment(99)], said) as feed:
        assert await ask_feed(data, segment(99).name) == 200
        assert "the store is on fire" in said[0]
        assert len(feed.failures) == 1


async def test_a_request_that_follows_an_answer_at_once_is_not_lost(data: Path) -> None:
    (data / FOLDER).mkdir()
    home = data / FOLDER / FEED
    answers: list[str] = []

    class Hasty(Feed):
        """The script takes the answer and asks again before the feed has drawn breath."""

        async def _hand_over(self, folder: str, name: str, *, sync: bool = False) -> None:
            await super()._hand_over(folder, name, sync=sync)
            answers.append(folder)
            if len(answers) == 1:
                (home / folder / name).unlink()
                (home / "want" / name).touch()

    feed = Hasty(home, Shelf().read, [], SIZE)
    feed.open()
    (home / "want" / segment(20).name).touch()
    task = asyncio.create_task(feed.serve())
    try:
        async with asyncio.timeout(20):
            while len(answers) < 2:
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        feed.close()
    assert answers == ["absent", "absent"]


async def test_a_feed_that_cannot_write_any_more_says_so_and_leaves_it_to_fetch_wal(data: Path) -> None:
    lay(data, "exit 44")

    said: list[str] = []
    nothing = Fetcher([], chain(plain_keys()), SYSTEM_ID)
    async with serving(nothing, plan(Target()), data, owner=None, say=said.append) as feed:
        (data / FOLDER / FEED / "stage").rmdir()
        assert await ask_feed(data, SEGMENT) == 1, "what fetch-wal says"
        async with asyncio.timeout(20):
            while not said:
                await asyncio.sleep(0.01)
    assert isinstance(feed.failures[-1], RecoveryError)
    assert "WAL can no longer be handed to the server" in said[-1]
    assert not (data / FOLDER / FEED / "pid").exists()


def test_whoever_waits_for_a_feed_that_dies_asks_fetch_wal(data: Path) -> None:
    lay(data, "exit 44")
    home = data / FOLDER / FEED
    for name in ("want", "ready", "absent", "failed"):
        (home / name).mkdir(parents=True)
    sleeper = subprocess.Popen(["/bin/sleep", "60"])
    began = Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(") ")[2].split()[19]
    (home / "pid").write_text(f"{sleeper.pid} {began}\n")
    waiting = subprocess.Popen(command(SEGMENT), cwd=data)
    deadline = time.monotonic() + 20
    while not (home / "want" / SEGMENT).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert waiting.poll() is None
    sleeper.send_signal(signal.SIGKILL)
    sleeper.wait()
    assert waiting.wait(20) == 1


def test_a_process_that_got_the_number_of_the_feed_is_not_asked(data: Path) -> None:
    lay(data, "exit 44")
    home = data / FOLDER / FEED
    (home / "ready").mkdir(parents=True)
    (home / "pid").write_text(f"{os.getpid()} 1\n")
    (home / "ready" / SEGMENT).write_bytes(bytes(SIZE))
    assert ask(data) == 1


async def test_it_is_never_at_more_than_its_turns_allow(data: Path) -> None:
    """The other processors are for whoever replays."""
    lay(data, "exit 126")
    turns, inside, most = asyncio.Semaphore(1), 0, 0

    class Watched(Feed):
        def _write(self, name: str, pieces: Iterable[Buffer]) -> None:
            nonlocal inside, most
            inside += bool(pieces)
            most = max(most, inside)
            time.sleep(0.005)
            super()._write(name, pieces)
            inside -= bool(pieces)

    async def read(name: str) -> Buffer | None:
        async with turns:
            assert not inside
        return await Shelf().read(name)

    feed = Watched(data / FOLDER / FEED, read, [segment(n) for n in range(3, 9)], SIZE, turns=turns)
    async with running(feed):
        for number in range(3, 9):
            assert await ask_feed(data, segment(number).name) == 0
    assert most == 1
    assert not feed.failures


async def test_a_full_disk_gives_up_what_was_fetched_ahead(data: Path) -> None:
    lay(data, "exit 126")
    room = 4

    class Small(Feed):
        """A disk with room for four segments. One thread at a time, or what another is renaming would count twice."""

        turn = threading.Lock()

        def _show(self, folder: str, name: str, sync: bool) -> None:
            with self.turn:
                super()._show(folder, name, sync)

        def _write(self, name: str, pieces: Iterable[Buffer]) -> None:
            with self.turn:
                there = [path for folder in ("stage", "ready") for path in (data / FOLDER / FEED / folder).iterdir()]
                super()._write(name, (p[: SIZE // 2] for p in pieces) if len(there) >= room else pieces)
                if len(there) >= room and pieces:
                    raise OSError(errno.ENOSPC, "No space left on device")

    said: list[str] = []
    feed = Small(data / FOLDER / FEED, Shelf().read, [segment(n) for n in range(3, 9)], SIZE, notify=said.append)
    async with running(feed):
        ready = data / FOLDER / FEED / "ready"
        async with asyncio.timeout(20):
            while len(list(ready.iterdir())) < room:
                await asyncio.sleep(0.01)
        # Not fetched ahead, so it has no room.
        assert await ask_feed(data, segment(12).name) == 0
        assert (data / PATH).read_bytes() == bytes([12]) * SIZE
        assert await ask_feed(data, segment(13).name) == 0
        assert not list((data / FOLDER / FEED / "stage").iterdir())
        room = 0
        assert await ask_feed(data, segment(14).name) == 200
        assert "No space left on device" in said[-1]
        assert isinstance(feed.failures[-1], OSError)


async def test_a_short_file_is_never_handed_over(data: Path) -> None:
    lay(data, "exit 44")

    class Short(Shelf):
        async def read(self, name: str) -> Buffer | None:
            return name.encode()

    async with feeding(data, Short(), [], []):
        assert await ask_feed(data, SEGMENT) == 200
    assert not (data / PATH).exists()
