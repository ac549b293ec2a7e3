"""Ctrl-C, and again: what a thread reads and writes stays open until the thread has ended."""

from __future__ import annotations

import asyncio
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from handlers.fetch import Fetcher
from handlers.restore import lay_down
from handlers.target_dir import look
from handlers.to_the_end import ended, in_thread
from pipeline.contracts import Buffer
from tests.laying import PART, cluster, store
from tests.parts import Shelf


class Slow(Fetcher):
    """Hands a part over only once it may."""

    def __init__(self, shelf: Shelf) -> None:
        super().__init__([shelf.store], shelf.chain, shelf.system_id)
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.running = 0

    async def into(
        self, name: str, use: Callable[[Iterator[Buffer]], None], *, digest: str, backup: str | None = "",
        most: int = 1 << 30,
    ) -> None:  # fmt: skip
        def slow(pieces: Iterator[Buffer]) -> None:
            self.running += 1
            self.begun.set()
            assert self.go_on.wait(30)
            try:
                use(pieces)
            finally:
                self.running -= 1

        await super().into(name, slow if "/data/" in name else use, digest=digest, backup=backup, most=most)


async def rounds() -> None:
    """Let everybody who can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_restore_that_is_cancelled_again_and_again_waits_for_its_threads(tmp_path: Path) -> None:
    shelf = Shelf()
    info = await store(shelf, {"base": cluster()})
    slow = Slow(shelf)
    targets = look(info, tmp_path / "data", {}, force=False, wal_margin=0)
    me = asyncio.current_task()
    task = asyncio.create_task(lay_down(info, targets, fetch=slow, complete=lambda _: None, part_size=PART))
    assert await asyncio.to_thread(slow.begun.wait, 30)
    for _ in range(3):
        task.cancel()
        await rounds()
        for other in asyncio.all_tasks() - {task, me}:  # as a loop that closes does
            other.cancel()
        await rounds()
        assert not task.done()
    assert slow.running
    slow.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not slow.running


async def test_an_error_is_told_once_all_have_ended() -> None:
    go_on = threading.Event()

    def work() -> None:
        assert go_on.wait(30)
        raise tarfile.TarError

    task = asyncio.create_task(in_thread(work))
    await rounds()
    go_on.set()
    with pytest.raises(tarfile.TarError):
        await task


async def test_a_cancellation_while_others_end_is_not_lost() -> None:
    go_on = asyncio.Event()
    other = asyncio.create_task(go_on.wait())
    task = asyncio.create_task(ended([other]))
    await rounds()
    task.cancel()
    await rounds()
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_whoever_waits_may_ask_it_to_end() -> None:
    stopped = threading.Event()
    task = asyncio.create_task(in_thread(lambda: stopped.wait(30), stop=stopped.set))
    await rounds()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stopped.is_set()
