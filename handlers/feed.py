"""Hands WAL files to a recovering server through a folder, while the restore that laid it down waits for it.

No program is started per segment but ``mv``, and the server's user needs no right to run this Python or to read any
key: the sh script behind restore_command finds the next segments in ``ready/`` already and renames them away. What is
not there it asks for with an empty file in ``want/``, and waits for the answer:

    pid              process id and start time of the feed; the script asks nobody who is dead
    want/NAME        made by the script; removed by it before it takes the file, or by the feed before it answers
    ready/NAME       the whole file, renamed in from stage/; the script renames it to where PostgreSQL wants it
    absent/NAME      it is stored nowhere, or the server has it in its pg_wal already
    failed/NAME      a store or the data failed: recovery has to stop

Recovery ends by asking again for the last files (N+1, N, N+1). A finished segment that was handed over is answered
absent at once when it is asked for again, and the server takes the one in its pg_wal: no store that fails by then can
spoil the end. It has it there for certain once it has asked for any file behind it; until then it is served again, as
tails always are: they grow.

Disk: ready/ and stage/ together hold at most 128 MiB of what was fetched ahead (two segments, if those are larger),
and the one file that was asked for. The folder belongs to the server's user, so as root nothing in it is followed:
every name is used below an open folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline.contracts import Buffer
from pipeline.errors import IntegrityError, RecoveryError, WalshipError
from pipeline.wal import WalFile, WalKind

FOLDERS = ("want", "ready", "absent", "failed", "stage")

#: How long the feed looks away from want/. The script looks every 10 ms.
_PAUSE = 0.01
#: Bytes of segments that are kept ready, as far as at least two of them fit.
_AHEAD = 128 << 20
#: Segments that are fetched at the same time, as far as they are not larger than this together.
_WIDTH = 3
_WIDTH_BYTES = 64 << 20
#: Bytes that are written at a time, at most. Linux looks for one block of memory for all of a write, up to 2 MiB
#: (large folios), and a virtual machine has given those to its host: 16 MB took 4 ms of CPU like this, and 40 at once.
_WRITTEN = 512 << 10
#: How many of the last segments that the server has are remembered.
_KEPT = 4096

T = TypeVar("T")

#: Answers a name with the file's bytes, or None for absent.
Read = Callable[[str], Awaitable[Buffer | None]]
#: Hands the bytes of a file over, piece by piece in a thread, as often as it takes until they are right: True. False,
#: and nothing that counts was handed over: whether there is such a file, ``Read`` knows.
Pour = Callable[[str, Callable[[Iterator[Buffer]], None]], Awaitable[bool]]


async def _pour_nothing(_name: str, _use: Callable[[Iterator[Buffer]], None]) -> bool:
    return False


#: Entered once for each file that is decoded or written, and left.
Turns = AbstractAsyncContextManager[object]


def turns_beside() -> asyncio.Semaphore:
    """For decoding and writing WAL beside a server that replays it: on all processors but one, or on the one there is.

    Replay is one process, and its pace is what a restore waits for. With two processors and no turns it stood in line
    for one of them a fifth of the time, although eight segments were ready for it.
    """
    processors = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return asyncio.Semaphore(max(1, processors - 1))


class Feed:
    """Serves one recovery from ``folder``, which is made if it is not there. Run ``serve`` until the server is up.

    ``order``: the files that recovery will need, for reading ahead. ``owner``: user and group id that everything is
    given to (as root), or None. ``pour`` is asked before ``read``: what is written as it is decoded is never in
    memory as a whole. ``turns`` is held while what was read is copied to the disk's cache: see ``turns_beside``.
    ``notify`` is told why a file could not be served.
    """

    def __init__(
        self,
        folder: Path,
        read: Read,
        order: Iterable[WalFile],
        segment_size: int,
        *,
        owner: tuple[int, int] | None = None,
        pour: Pour = _pour_nothing,
        turns: Turns | None = None,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._folder = folder
        self._read = read
        self._pour = pour
        self._order = deque(file.name for file in order)
        self._finished = frozenset(self._order)
        self._segment_size = segment_size
        self._ahead = max(2, min(16, _AHEAD // segment_size))
        self._width = max(1, min(_WIDTH, _WIDTH_BYTES // segment_size))
        self._owner = owner
        self._turns: Turns = turns or contextlib.nullcontext()
        self._notify = notify
        self._folders: dict[str, int] = {}
        self._root = -1
        self._working: set[str] = set()
        #: Set whenever one that was read ahead is in ready/, or is given up.
        self._prepared = asyncio.Event()
        #: Own threads, so that ``close`` can wait for a write that goes on after its task was cancelled.
        self._writers = ThreadPoolExecutor(_WIDTH, thread_name_prefix="feed")
        #: Files handed to ready/ ahead of being asked for.
        self._laid: set[str] = set()
        #: Files that were put into ready/ and not seen to be gone yet.
        self._given: set[str] = set()
        #: Finished segments that the server took, and of those the ones that it has put into its pg_wal since.
        self._taken: set[str] = set()
        self._kept: dict[str, None] = {}
        self.served = 0
        self.failures: list[WalshipError | OSError] = []

    def open(self) -> None:
        """Make the folders and announce the feed. Call it before the server starts; ``close`` undoes it."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._root = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        self._give(self._root)
        for name in FOLDERS:
            with contextlib.suppress(FileExistsError):  # from a restore that was killed; it is emptied next
                os.mkdir(name, 0o700, dir_fd=self._root)
            self._folders[name] = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._root)
            self._give(self._folders[name])
            self._empty(name)
        _remove("pid", self._root)
        self._write("pid", (f"{os.getpid()} {_start_time()}\n".encode(),))
        os.rename("pid", "pid", src_dir_fd=self._folders["stage"], dst_dir_fd=self._root)

    def close(self) -> None:
        """Tell the script that nobody is here any more, and take away what was not fetched. Idempotent."""
        self._writers.shutdown(wait=True)
        if self._root < 0:
            return
        _remove("pid", self._root)
        for name in FOLDERS:
            if name in self._folders:
                self._empty(name)
                os.close(self._folders.pop(name))
        os.close(self._root)
        self._root = -1

    async def serve(self) -> None:
        """Answer until cancelled. Errors of single files are answered as failed, told, and kept in ``failures``.

        Where not even that can be answered (a full disk) it ends, told and kept in the same way.
        """
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    self._look()
                    for name in self._listed("want"):
                        if name not in self._working:
                            group.create_task(self._answer(name))
                            self._working.add(name)
                    self._read_ahead(group)
                    await asyncio.sleep(_PAUSE)
        except BaseExceptionGroup as group:
            broken, others = group.split(OSError)
            if others is not None or broken is None:
                raise
            ended = RecoveryError(
                f"WAL can no longer be handed to the server through {self._folder}: {_first(broken)}",
                hint="from now on the server fetches it by itself, if its user can run walship",
            )
            self.failures.append(ended)
            self._notify(ended.fact)
        finally:
            # However it ends: nobody may wait for an answer that will not come.
            _remove("pid", self._root)

    def _look(self) -> None:
        """Notice what the server took out of ready/ since the last look."""
        taken = self._given - set(self._listed("ready"))
        self._given -= taken
        self._laid -= taken
        for name in sorted(taken & self._finished, key=_place):
            self._came_to(name)
            self._taken.add(name)

    def _came_to(self, name: str) -> None:
        """The server asks for ``name``: what it took in front of that is in its pg_wal by now."""
        done = {before for before in self._taken if _place(before) < _place(name)}
        self._taken -= done
        for again in self._given & done:  # given twice, to a script that was killed: nobody comes for it now
            self._given.discard(again)
            _remove(again, self._folders["ready"])
        self._kept |= dict.fromkeys(sorted(done, key=_place))
        while len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]

    def _read_ahead(self, group: asyncio.TaskGroup) -> None:
        """Keep the next segments in ready/."""
        while self._order and len(self._laid) < self._ahead and len(self._working) < self._width:
            name = self._order.popleft()
            if name in self._working or name in self._kept:
                continue
            self._laid.add(name)
            self._working.add(name)
            group.create_task(self._prepare(name, group))

    async def _prepare(self, name: str, group: asyncio.TaskGroup) -> None:
        """Read ahead. A failure is not told: recovery may stop before it needs this file, and asks if it does."""
        try:
            if await self._stage(name):
                await self._hand_over("ready", name, sync=True)
            else:
                self._laid.discard(name)
        except (WalshipError, OSError):
            self._laid.discard(name)
            _remove(name, self._folders["stage"])  # it may be the disk that is full
        finally:
            self._working.discard(name)
            self._prepared.set()
        self._read_ahead(group)

    async def _answer(self, name: str) -> None:
        """Serve a file that the script waits for."""
        want = self._folders["want"]
        try:
            file = WalFile.parse(name)
            if file is not None and file.kind is WalKind.SEGMENT:
                self._skip_to(name)
                self._came_to(name)
            # It was read ahead meanwhile, and the script sees it, or has taken it already: then it took back its
            # request before. In this order; and a request that is removed here could be the next one.
            if name in self._listed("ready") or name not in self._listed("want"):
                return
            there = name not in self._kept and await self._with_room(name, partial(self._stage, name))
            # Before the answer can be seen: what is asked for behind it is a new request, and not ours to remove.
            _remove(name, want)
            if there:
                await self._with_room(name, partial(self._hand_over, "ready", name))
                self.served += 1
            else:
                await self._mark("absent", name)
        except (WalshipError, OSError) as error:
            self.failures.append(error)
            self._notify(f"{name} cannot be given to the server: {error}")
            _remove(name, want)
            await self._mark("failed", name)
        finally:
            self._working.discard(name)

    async def _stage(self, name: str) -> bool:
        """Have the file in stage/, whole and right: the script does not look any more. False: it is absent.

        What lies there before this returns True was perhaps not compared with its checksum yet. Raises StoreError,
        OSError and IntegrityError; then nothing is left there.
        """
        stage = self._folders["stage"]
        try:
            if not await self._pour(name, partial(self._write, name)):
                content = await self._read(name)
                if content is None:
                    _remove(name, stage)
                    return False
                async with self._turns:
                    await self._in_thread(self._write, name, (content,))
            size = os.stat(name, dir_fd=stage, follow_symlinks=False).st_size
            file = WalFile.parse(name)
            if size != self._segment_size if file is not None and file.kind is WalKind.SEGMENT else not size:
                raise IntegrityError(f"{name} has {size} bytes, which is not all of it")
        except (WalshipError, OSError):
            _remove(name, stage)
            raise
        return True

    async def _with_room(self, name: str, work: Callable[[], Awaitable[T]]) -> T:
        """On a full disk what was fetched ahead makes room: it is asked for if it is needed."""
        try:
            return await work()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._order.clear()
            under_way = bool(self._being_prepared(name))
            while self._being_prepared(name):  # it lands in ready/, or its half goes
                self._prepared.clear()
                await self._prepared.wait()
            ahead = [other for other in self._listed("ready") if other != name]
            if not (ahead or under_way):
                raise
            for other in ahead:
                self._given.discard(other)
                self._laid.discard(other)
                _remove(other, self._folders["ready"])
            return await work()

    def _being_prepared(self, asked: str) -> set[str]:
        return (self._working & self._laid) - {asked}

    def _skip_to(self, name: str) -> None:
        """Recovery has come this far: reading ahead goes on behind it."""
        if name in self._order:
            while self._order.popleft() != name:
                pass

    async def _mark(self, folder: str, name: str) -> None:
        """An empty file, as an answer."""
        try:
            await self._in_thread(self._write, name, ())
            await self._hand_over(folder, name)
        except OSError:
            _remove(name, self._folders["stage"])
            raise

    async def _hand_over(self, folder: str, name: str, *, sync: bool = False) -> None:
        """Rename from stage/, where it is whole: the script never sees a part.

        ``sync``: the server does so before it goes on, and waits for the disk; better that nobody waits here.
        """
        await self._in_thread(self._show, folder, name, sync)
        if folder == "ready":
            self._given.add(name)

    async def _in_thread(self, work: Callable[..., None], *arguments: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writers, work, *arguments)

    def _write(self, name: str, pieces: Iterable[Buffer]) -> None:
        """Into stage/, from its beginning on however often that was tried. Each piece is written as it comes."""
        stage = self._folders["stage"]
        _remove(name, stage)
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=stage)
        with os.fdopen(handle, "wb", buffering=0) as out:
            self._give(handle)
            for piece in pieces:
                rest = memoryview(piece)
                while rest:  # a raw file may take only a part, on a full disk for one
                    rest = rest[out.write(rest[:_WRITTEN]) :]

    def _show(self, folder: str, name: str, sync: bool) -> None:  # noqa: FBT001 - an executor passes no names
        stage = self._folders["stage"]
        if sync:
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=stage)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        os.rename(name, name, src_dir_fd=stage, dst_dir_fd=self._folders[folder])

    def _give(self, handle: int) -> None:
        if self._owner is not None:
            os.fchown(handle, *self._owner)

    def _listed(self, folder: str) -> list[str]:
        """Names of WAL files only: whatever else someone puts there is none of ours."""
        names = os.listdir(self._folders[folder])  # noqa: PTH208 - pathlib knows no open folders
        return [name for name in names if WalFile.parse(name)]

    def _empty(self, folder: str) -> None:
        handle = self._folders[folder]
        for name in os.listdir(handle):  # noqa: PTH208 - pathlib knows no open folders
            if not stat.S_ISDIR(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode):
                _remove(name, handle)


def _place(name: str) -> tuple[int, int]:
    """Where a segment lies in the WAL, for comparing those of any timelines."""
    return int(name[8:16], 16), int(name[16:24], 16)


def _remove(name: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _first(group: BaseExceptionGroup[OSError]) -> OSError:
    """An error that is in there, however deep."""
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _start_time() -> str:
    """Field 22 of /proc/self/stat: tells a process id that was given out again from the one that was meant."""
    try:
        return Path("/proc/self/stat").read_text("latin-1").rpartition(") ")[2].split()[19]
    except OSError:
        return "-"
