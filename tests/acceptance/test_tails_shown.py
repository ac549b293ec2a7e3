"""Tails as people see them: what ``status``, ``list`` and ``verify`` say of an open segment that only tails hold."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.postgres.throwaway import make_folder
from infra.settings import Settings
from infra.standing import Status
from infra.status import GRACE, read_status
from infra.wiring import open_site
from pipeline.tail import TailName
from pipeline.wal import Lsn
from tests.clock import FastClock
from tests.rig import Load, Rig
from tests.servers import NEWEST

_INTERVAL = 0.1


@pytest.fixture
def rig() -> Iterator[Rig]:
    folder = make_folder("walship-t-")
    try:
        with Rig(
            folder, NEWEST, [f"file://{folder}/local"], segment_mb=16, sources="stream",
            settings={"WALSHIP_TAIL_INTERVAL": str(_INTERVAL)},
        ) as rig:  # fmt: skip
            rig.server.start()
            rig.run("init")
            yield rig
    finally:
        shutil.rmtree(folder)


def tails(rig: Rig) -> list[Path]:
    """Those of the newest segment that has any, by where they begin."""
    found = {TailName.parse("/".join(path.parts[-3:])): path for path in (rig.folder / "local").glob("*/tail/*/*")}
    return [path for name, path in sorted((name, path) for name, path in found.items() if name)]


class Meanwhile(FastClock):
    """A clock on which something happens while somebody sleeps for the first time."""

    def __init__(self, what: Callable[[], None]) -> None:
        super().__init__()
        self._what: Callable[[], None] | None = what

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds)
        what, self._what = self._what, None
        if what is not None:
            await asyncio.to_thread(what)


def look(rig: Rig, clock: FastClock, said: list[str]) -> Status:
    """``walship status`` here, where waiting takes no time."""
    names: dict[str, Any] = {n: v for n, v in rig.environment().items() if n.startswith(("WAL", "POST", "BACK"))}

    async def read() -> Status:
        async with open_site(Settings(_env_file=None, **names)) as site:
            return await read_status(replace(site, clock=clock), waits=said.append)

    return asyncio.run(read())


def test_what_is_only_in_tails_is_shown_and_read_back(rig: Rig) -> None:
    service = rig.serve()
    rig.sql("create table t (n int)")
    backup = rig.json("backup")["name"]
    rig.sql("insert into t values (1)")
    ((segment, end),) = rig.sql("select pg_walfile_name(pg_current_wal_lsn()), pg_current_wal_lsn()::text")
    rig.caught_up()
    with Load(rig.server):
        assert rig.json("status")["reasons"] == [], "under load something is always on its way"
    rig.caught_up()
    assert rig.stop(service) == 0

    (window,) = rig.json("list")["windows"]
    assert (window["backup"], window["missing"]) == (backup, None)
    assert window["tail_bytes"] > 0
    assert Lsn.parse(window["to_lsn"]) >= Lsn.parse(end)
    assert " of it in tails of the open segment" in rig.run("list").stdout

    assert tails(rig)[0].parent.name >= segment
    assert rig.json("verify")["ok"]
    damaged = tails(rig)[-1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.chmod(0o600)
    damaged.write_bytes(content)
    said = rig.run("verify", expect=12)
    assert f"damaged: {'/'.join(damaged.parts[-3:])} at " in said.stdout


def test_an_open_end_that_is_not_shipped_is_noticed(rig: Rig) -> None:
    service = rig.serve()
    rig.sql("create table t (n int)")
    rig.json("backup")
    rig.caught_up()
    said: list[str] = []
    assert look(rig, FastClock(), said).reasons == ()
    service.send_signal(signal.SIGSTOP)  # connected, and nothing comes of it: as where a store refuses every tail
    try:
        rig.sql("insert into t values (1)")
        ((end,),) = rig.sql("select pg_current_wal_flush_lsn()::text")
        said.clear()
        clock = FastClock()
        status = look(rig, clock, said)
        (reason,) = status.reasons
        (place,) = status.destinations
        assert reason == (
            f"{place.name}: the WAL is there up to LSN {place.durable_lsn}, and the server was at LSN {end} 5 s ago"
        )
        assert clock.passed == pytest.approx(_INTERVAL + GRACE)
        (word,) = said
        assert word == f"looking again, for up to 5.1 s: the newest WAL is not yet at {place.name}"
    finally:
        service.send_signal(signal.SIGCONT)
    rig.caught_up()

    service.send_signal(signal.SIGSTOP)
    rig.sql("insert into t values (2)")

    def go_on() -> None:
        service.send_signal(signal.SIGCONT)
        rig.caught_up()

    clock = Meanwhile(go_on)
    assert look(rig, clock, said).reasons == ()
    assert clock.passed == pytest.approx(_INTERVAL + 1), "it was shipped when it was looked at again"
