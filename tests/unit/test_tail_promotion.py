"""A timeline ends while a destination is away: its end still gets there."""

from __future__ import annotations

from pipeline.wal import Lsn, WalFile
from tests.tailing import FILE, SIZE, check_recoverable, passing, running, tails, until

#: The new timeline's first segment: the bytes before the fork are in it as well.
NEW = WalFile.segment(2, FILE.start(SIZE), SIZE)


async def test_the_end_of_a_timeline_is_shipped_after_its_memory_was_given_back() -> None:
    it, clock = await tails()
    async with running(it):
        old = it.begin()
        it.grow(old, b"safe")
        await clock.pass_by(1)
        await until(lambda: it.stored)
        it.store.down = {"put": passing(), "head": passing()}
        it.grow(old, b" up to the fork")
        await clock.pass_by(1)
        await until(lambda: it.outlet.down)
        # Another destination has it: the stream goes over, and ships whole segments of the new timeline there.
        old.ended = True
        it.wal.tell()
        new = it.begin(NEW)
        it.grow(new, b"safe up to the fork, and behind it")
        it.wal.drop(old)
        await clock.pass_by(300)
        it.store.down.clear()
        await clock.pass_by(31)
        start = FILE.start(SIZE)
        wanted = {(FILE, Lsn(start + 4), Lsn(start + 19)), (NEW, Lsn(start), Lsn(start + 34))}
        await until(lambda: wanted <= set(it.stored))
    await check_recoverable(it, old)
    await check_recoverable(it, new)
