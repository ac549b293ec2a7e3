"""Each call that a restore makes to a store goes wrong, one after the other: it succeeds, or it stops and says why.

What must never happen is a recovery that ends early: a status 1 of restore_command for WAL that is stored is a server
that promotes without it. So the repository is made by hand, over two timelines, and what PostgreSQL would ask is asked
through the very script that it calls; with real servers at the end. How a store's client tells a cut or reset
connection is what the contract tests of the stores look at: here both are an error that may pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import pytest

from handlers.body import joined
from handlers.fetch import Fetcher
from infra.postgres import neighbours
from infra.postgres.wal_script import RESTORE_COMMAND
from infra.restore import Place, feeding, make_plan, restore
from infra.storage.memory import MemoryStore
from infra.storage.retry import AT_ONCE, Retrying
from pipeline.catalog import wal_key
from pipeline.contracts import Body, Span, Store
from pipeline.errors import IntegrityError, ObjectMissing, RecoveryError, StoreError, WalshipError
from pipeline.objects import MemoryBody
from pipeline.recovery import RestorePlan
from pipeline.targets import Target
from pipeline.wal import WalFile
from tests.acceptance.made_repository import NO_FETCH, OPEN, Made, build
from tests.clock import FastClock
from tests.integration.test_recovery_rules import small_history
from tests.integration.test_restore import rows, stopped_after
from tests.servers import StartServer, server_folder, start_server
from tests.stores import Faulty

__all__ = ["server_folder", "start_server"]

#: Recoveries that are played at once: each waits for its script most of the time.
_WIDTH = 6
_BUSY = "answered 503 SlowDown"


class Blow(Enum):
    """What happens to a call."""

    BUSY_ONCE = "503, then fine"
    #: That call, and the two that come next, wherever they go.
    RESET = "the connection is reset three times"
    #: That call, and all that come after it.
    DOWN = "503 for ever"
    #: Of the object, from then on.
    CUT = "cut in half"
    FLIP = "one bit flipped"
    GONE = "404, although it was listed"


#: They strike an object, so a listing cannot have them.
_OF_OBJECTS = (Blow.CUT, Blow.FLIP, Blow.GONE)


@dataclass
class Struck(Faulty):
    """Strikes the call of that number, of all that are made to it; or the first one of the object ``aim``."""

    blow: Blow = Blow.BUSY_ONCE
    number: int = 0
    aim: str = ""
    #: The object or prefix that was struck.
    key: str = ""

    async def get(self, key: str, span: Span | None = None) -> Body:
        body = await super().get(key, span)
        if key != self.key or self.blow not in (Blow.CUT, Blow.FLIP):
            return body
        content = bytearray(joined(body))
        if self.blow is Blow.CUT:
            return MemoryBody((bytes(content[: len(content) // 2]),))
        content[len(content) // 2] ^= 4
        return MemoryBody((bytes(content),))

    async def _begin(self, operation: str, key: str) -> int:
        if key == self.aim and not self.number:
            self.number = len(self.calls) + 1
        late = len(self.calls) + 1 - self.number
        if late == 0:
            self.key = key
        number = await super()._begin(operation, key)
        if self.number and (
            (self.blow is Blow.BUSY_ONCE and late == 0)
            or (self.blow is Blow.RESET and 0 <= late < 3)
            or (self.blow is Blow.DOWN and late >= 0)
        ):
            what = "the connection was reset" if self.blow is Blow.RESET else _BUSY
            raise StoreError(f"{self.name}: {operation} {key}: {what}", passing=True)
        if self.blow is Blow.GONE and key == self.key:
            raise ObjectMissing(f"{key} is missing from {self.name}")
        return number


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a plan reads all WAL wherever another test's server with a tablespace runs at the same time."""
    monkeypatch.setattr(neighbours, "servers", list)


@pytest.fixture
async def made() -> Made:
    return await build()


def blows(clean: Struck) -> Iterator[Struck]:
    """A store for each call that a clean run made, and each blow that can strike it.

    Where a call is made again, only what lasts can make a difference.
    """
    for number, call in enumerate(clean.calls, 1):
        again = call in clean.calls[: number - 1]
        for blow in Blow:
            if again and blow not in (Blow.DOWN, Blow.GONE):
                continue
            if call[0] == "get" or blow not in _OF_OBJECTS:
                yield Struck(clean.store, blow=blow, number=number)


def check(store: Struck, error: WalshipError) -> None:
    """It is an error of the right kind, and says what is the matter with what."""
    assert store.blow not in (Blow.BUSY_ONCE, Blow.RESET), f"patience would have helped: {error}"
    said = f"{error.fact}; {error.hint}"
    if store.blow is Blow.DOWN:
        # A backup or a history that could not be read is told, and that nothing can be done without it.
        assert isinstance(error, StoreError | RecoveryError), repr(error)
        assert _BUSY in said
        assert "(6 attempts in " in said
        return
    if store.key.startswith("tail/"):
        assert OPEN.name in said
        return
    assert isinstance(error, IntegrityError | RecoveryError), repr(error)
    if store.blow is Blow.GONE and store.key.endswith("/backup_info"):
        assert "no complete base backup" in said  # without it there is none; only its folder was listed
        return
    assert store.key.rpartition("/")[2] in said, f"{store.key}: {said}"


async def each(stores: Iterator[Struck], work: Callable[[Struck], Awaitable[None]]) -> list[Struck]:
    """``work`` on all of them, a few at once; those that were struck."""
    turns = asyncio.Semaphore(_WIDTH)
    done: list[Struck] = []

    async def turn(store: Struck) -> None:
        async with turns:
            try:
                await work(store)
            except AssertionError as error:
                error.add_note(f"call {store.number}, {store.blow.value}, key {store.key}: {store.calls}")
                raise
            done.append(store)

    async with asyncio.TaskGroup() as group:
        for store in stores:
            group.create_task(turn(store))
    return done


# -- one call after the other


async def test_each_call_of_the_plan(made: Made) -> None:
    """The plan is the same as ever, or there is none: never a shorter one, nor one of another timeline."""
    clean = Struck(made.shelf.store)
    clean_plan = await make_plan(made.repository(clean), Target())
    wanted = clean_plan.summary()
    assert wanted["timeline"] == 2
    assert wanted["wal_segments"] == 5
    assert wanted["wal_tail_bytes"]

    async def one(store: Struck) -> None:
        try:
            plan = await make_plan(made.repository(store), Target())
        except WalshipError as error:
            check(store, error)
            return
        if store.key.startswith("tail/") and store.blow in _OF_OBJECTS:
            # Bytes at the very end that nobody can read are no reason to give up all before them. It is said; or they
            # went between two looks, and are still planned: then the feed refuses to do without them.
            shorter = plan.path.end < clean_plan.path.end
            assert shorter == any(OPEN.name in notice for notice in plan.notices)
            assert shorter or plan.path == clean_plan.path
        else:
            assert plan.summary() == wanted

    done = await each(blows(clean), one)
    assert {operation for operation, _ in clean.calls} >= {"get", "list"}
    assert all(store.key for store in done), "each blow has struck"


async def test_each_call_while_the_base_is_laid_down(made: Made, tmp_path: Path) -> None:
    """Whole, or no server can be started on it; and run again once the store is well it is whole."""
    plan = await make_plan(made.repository(made.shelf.store), Target())
    clean = Struck(made.shelf.store)

    async def laid(store: Store, name: str) -> Path:
        place = Place(tmp_path / name)
        await restore(made.repository(store), plan, place, fetch_wal=NO_FETCH)
        return place.directory

    def whole(folder: Path) -> bool:
        return all((folder / path).read_bytes() == content for path, content in made.files.items())

    assert whole(await laid(clean, "clean"))
    assert len(clean.calls) >= 6, "five archives and the manifest"

    async def one(store: Struck) -> None:
        name = f"{store.number}-{store.blow.name}"
        try:
            await laid(store, name)
        except WalshipError as error:
            check(store, error)
            assert not (tmp_path / name / "global/pg_control").exists(), "PostgreSQL refuses to start without it"
            assert whole(await laid(made.shelf.store, name))
        else:
            assert store.blow not in (Blow.DOWN, *_OF_OBJECTS)
            assert whole(tmp_path / name)

    await each(blows(clean), one)


async def test_each_call_with_a_second_destination(made: Made, tmp_path: Path) -> None:
    """Whatever becomes of the first one, the restore goes on; where it matters it says so."""
    good = MemoryStore("second")
    async for info in made.shelf.store.list(""):
        await good.put(info.key, await made.shelf.store.get(info.key))
    clean = Struck(made.shelf.store)
    plan = await make_plan(made.repository(clean, good), Target())
    await restore(made.repository(clean, good), plan, Place(tmp_path / "clean"), fetch_wal=NO_FETCH)

    async def one(store: Struck) -> None:
        repository, place = made.repository(store, good), Place(tmp_path / f"{store.number}-{store.blow.name}")
        try:
            same = await make_plan(repository, Target())
        except StoreError as error:
            # Whether the open segment is finished there cannot be known, and "no" would leave out what follows: asked
            # anew, a destination that does not answer is left out from the start.
            said = error.fact
            assert store.blow is Blow.DOWN, said
            assert OPEN.name in said, said
            return
        assert (same.path, same.lineage, same.backup) == (plan.path, plan.lineage, plan.backup)
        await restore(repository, same, place, fetch_wal=NO_FETCH)
        assert all((place.directory / path).read_bytes() == content for path, content in made.files.items())

    await each(blows(clean), one)


async def recover(made: Made, plan: RestorePlan, directory: Path) -> bool:
    """Ask as a recovering PostgreSQL does, and check what comes. True if it would promote, False if it stops."""
    size = plan.lineage.segment_size
    files = [file.name for file in plan.path.files()]
    last = list(plan.path.files())[-1]
    beyond = WalFile.segment(last.timeline, last.end(size), size).name
    for name in ("00000002.history", *files, beyond, files[-1], "00000003.history"):
        command = RESTORE_COMMAND.replace("%f", name).replace("%p", "pg_wal/RECOVERYXLOG")
        asked = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", command, cwd=directory, stderr=asyncio.subprocess.DEVNULL
        )
        status = await asked.wait()
        if status > 125:
            return False
        assert status == (0 if name in made.wal else 1), f"{name}: {status}, the recovery would end here"
        if status == 0:
            assert (directory / "pg_wal/RECOVERYXLOG").read_bytes() == made.wal[name], name
            (directory / "pg_wal/RECOVERYXLOG").unlink()
    return True


async def test_each_call_of_the_feed(made: Made, tmp_path: Path) -> None:
    """All of the WAL, byte by byte, or a status that stops recovery: never one that ends it."""
    plan = await make_plan(made.repository(made.shelf.store), Target())
    clean = Struck(made.shelf.store)

    async def replay(store: Struck) -> tuple[bool, list[WalshipError | OSError]]:
        directory = tmp_path / f"{store.number}-{store.blow.name}"
        repository = made.repository(made.shelf.store)
        await restore(repository, plan, Place(directory), fetch_wal=NO_FETCH)
        (directory / "pg_wal").mkdir(exist_ok=True)
        async with feeding(made.repository(store).fetch, plan, directory, owner=None, say=lambda _: None) as feed:
            return await recover(made, plan, directory), feed.failures

    assert await replay(clean) == (True, [])
    assert len([key for operation, key in clean.calls if operation == "get"]) >= 5

    async def one(store: Struck) -> None:
        promotes, failures = await replay(store)
        if promotes:
            return
        (error, *_) = failures
        assert isinstance(error, WalshipError)
        check(store, error)

    done = await each(blows(clean), one)
    # What is beyond the end is asked for as well, and may fail without harm; the segments may not.
    assert sum(store.key.startswith("wal/") for store in done) > 20


# -- real servers


async def test_a_real_server_gets_all_of_the_wal_or_stops(start_server: StartServer, server_folder: Path) -> None:
    """Each object that recovery needs, struck while the server replays; the others that it asks for are not there."""
    bank = await small_history(start_server, server_folder)
    plan = await make_plan(bank.repository(), Target())
    needed = [wal_key(file) for file in plan.path.files()]
    turns = asyncio.Semaphore(3)

    async def one(key: str, blow: Blow) -> None:
        store = Struck(bank.shelf.store, blow=blow, aim=key)
        patient = Retrying(store, FastClock(), AT_ONCE)
        repository = replace(
            bank.repository(), stores=(patient,), fetch=Fetcher([patient], bank.shelf.chain, bank.shelf.system_id)
        )
        place = bank.place(f"{needed.index(key)}-{blow.name}")
        async with turns:
            try:
                restored = await restore(repository, plan, place, fetch_wal=NO_FETCH)
            except WalshipError as error:
                check(store, error)
                said = error.hint
                assert "run the same restore again" in said
                assert (place.directory / "recovery.signal").exists(), "nothing was promoted"
                assert not list((place.directory / "pg_wal").glob("*.history")), "no timeline was begun"
                assert not (place.directory / "postmaster.pid").exists()
            else:
                with stopped_after(restored.server):
                    assert rows(place) == [1, 2, 3]
        assert store.key == key

    async with asyncio.TaskGroup() as group:
        for key in (needed[0], needed[-1]):
            for blow in (Blow.RESET, Blow.DOWN, Blow.CUT):
                group.create_task(one(key, blow))
