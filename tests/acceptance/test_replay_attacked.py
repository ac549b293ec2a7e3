"""The store goes away, or the restore is killed, while a restored server replays across two changes of timeline.

What must never come of it is a server that is promoted with less than was asked for, or one that is left running
without anybody who knows of it. The store goes silent with the request for one chosen segment, so the server has
replayed the ones before it and waits: that is when it is struck.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

import psycopg
import pytest

from handlers.running import servers
from infra.demo.seaweed import Seaweed
from infra.postgres.processes import give
from infra.postgres.programs import Programs, find
from infra.postgres.restored import control_state
from infra.postgres.throwaway import ThrowawayServer, free_port, make_folder
from infra.postgres.wal_script import FEED, FOLDER
from tests import commands
from tests.acceptance.test_restore_bad_input import fingerprint
from tests.integration.test_recovery_rules import runnable_by_the_server
from tests.proxy import Mode, Proxy, _Connection
from tests.rig import Rig, stop_started
from tests.servers import NEWEST

#: Segments of each timeline before the one that it is left in.
_EACH = 2
#: Attacks at once.
_WIDTH = 4
#: Timelines of the repository; the newest is followed.
_TIMELINES = (1, 2, 3)
_REST = "the directory holds half replayed data now: run the same restore again with --force"


class Ambush(Proxy):
    """A store that is silent about one segment once a server is fed, and then meets whoever asks as it is told."""

    def __init__(self, port: int) -> None:
        super().__init__(port, http=True)
        self._segment = ""
        self._feed = Path()
        self._refusals: int | None = None

    def lie_in_wait(self, segment: str, target: Path) -> None:
        """From the moment on when ``target`` has a feed: to make a plan, segments are read as well."""
        self._segment, self._feed = segment, target / FOLDER / FEED

    def strike(self, mode: Mode, *, refusals: int | None = None) -> None:
        """What is open is lost, and who connects meets ``mode``; ``refusals``: so often, and then it passes."""
        self._segment = self.held = ""
        self._refusals = refusals
        if mode is Mode.STALL:
            self.cut()
        self.turn(mode)

    def relent(self) -> None:
        """It is back."""
        self.strike(Mode.PASS)
        self.cut()

    def _asked(self, connection: _Connection, data: bytes) -> None:
        super()._asked(connection, data)
        if self._segment and (self._feed / "pid").exists():
            self.held = self._segment

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusals is not None and self._mode is not Mode.PASS:
            self._refusals -= 1
            if self._refusals < 0:
                self._turn(Mode.PASS)
        await super()._accept(reader, writer)


@dataclass
class House:
    """A repository over three timelines, and the server that wrote it, which is stopped."""

    rig: Rig
    seaweed: Seaweed
    prefix: str
    #: Row → the segment that it was committed in, and the server's clock and position just after that.
    segments: dict[int, str] = field(default_factory=dict)
    times: dict[int, str] = field(default_factory=dict)
    lsns: dict[int, str] = field(default_factory=dict)
    #: Timeline → the last row that the next one has in common with it, and the rows that only it has.
    forks: dict[int, int] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)

    def commit(self, server: ThrowawayServer, row: int) -> None:
        server.query(f"insert into t values ({row}, md5('{row}'))")
        ((self.segments[row], self.times[row], self.lsns[row]),) = server.query(
            "select pg_walfile_name(pg_current_wal_lsn()), clock_timestamp()::text, pg_current_wal_flush_lsn()::text"
        )

    @cached_property
    def programs(self) -> Programs:
        return find(self.rig.major, bin_dir=self.rig.bin_dir)

    @property
    def path(self) -> set[str]:
        """Segments that a restore to the end reads, more or less."""
        return {segment for row, segment in self.segments.items() if row not in self.left.values()}

    @property
    def all(self) -> list[int]:
        """The rows of the newest timeline."""
        return self.up_to(len(self.segments) - len(self.left))

    def up_to(self, row: int) -> list[int]:
        return list(range(1, row + 1))


def made(rig: Rig, house: House) -> None:
    """Three timelines: each is left in the midst of a segment by a server that is killed, and goes on for a while."""
    server, row = rig.server, 1
    server.start()
    rig.run("init")
    rig.sql("create table t (n int primary key, filler text)")
    house.commit(server, row)
    rig.json("backup")
    for timeline in _TIMELINES:
        for _ in range(_EACH):
            row += 1
            house.commit(server, row)
            server.query("select pg_switch_wal()")
        row += 1
        house.commit(server, row)
        if timeline == _TIMELINES[-1]:
            break
        house.forks[timeline] = row
        server.kill9()
        old = rig.folder / f"left{timeline}"
        subprocess.run(["cp", "-a", "--reflink=auto", server.data_dir, old], check=True)
        server.configure({"restore_command": "false"})
        (server.data_dir / "recovery.signal").touch()
        give(server.data_dir, server.who)
        server.start()
        rig.wait(lambda: rig.sql("select pg_is_in_recovery()") == [(False,)], "it has a timeline of its own")
        other = rig.adopt(old)
        (old / "postmaster.pid").unlink(missing_ok=True)
        other.start()
        house.left[timeline] = 100 * timeline
        house.commit(other, house.left[timeline])
        other.stop()
    server.stop()
    rig.run("push")


class Attack:
    """One restore through a store of its own, which is about to go away."""

    def __init__(self, house: House, name: str) -> None:
        self.house = house
        self.rig = house.rig
        self.target = self.rig.target(name)
        self.port = free_port()
        self.store = Ambush(int(house.seaweed.endpoint.rpartition(":")[2]))
        self.out, self.err = (self.rig.folder / f"{self.target.name}.{what}" for what in ("out", "said"))
        self._begun: list[commands.Forked] = []

    def __enter__(self) -> Self:
        self.store.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._begun:
            process.kill()
            process.wait()
        stop_started(self.target)
        self.store.close()

    def environment(self) -> dict[str, str]:
        url = self.house.seaweed.url(self.house.prefix)
        there = url.replace(self.house.seaweed.endpoint, f"http://127.0.0.1:{self.store.port}")
        return self.rig.environment(WALSHIP_DESTINATIONS=there)

    def words(self, *more: str) -> tuple[str, ...]:
        return ("restore", "--target-dir", str(self.target), "--start", "--port", str(self.port), "--json", *more)

    def run(self, *more: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        return self.rig.run(*self.words(*more), expect=expect, environment=self.environment())

    def begin(self, *more: str) -> commands.Forked:
        process = commands.Forked(
            self.words(*more), self.environment(), self.rig.folder, out=self.out, err=self.err, hurry=True
        )
        self._begun.append(process)
        return process

    def struck_at(self, row: int, *more: str) -> commands.Forked:
        """Begin, and return when the server has got some segments and waits for that of ``row``."""
        self.store.lie_in_wait(self.house.segments[row], self.target)
        process = self.begin(*more)

        def waits() -> bool:
            assert process.poll() is None, self.said
            return bool(self.given) and (self.target / FOLDER / FEED / "want" / self.house.segments[row]).exists()

        self.rig.wait(waits, f"the server waits for row {row}")
        assert len(self.given) < len(self.house.path)
        return process

    @property
    def said(self) -> str:
        return self.err.read_text("utf-8", "replace") if self.err.exists() else ""

    @property
    def given(self) -> list[str]:
        """Segments that the server has got, as it says."""
        log = self.target.with_name(f"{self.target.name}.log")
        names = re.findall(r'restored log file "(\w{24})"', log.read_text("utf-8", "replace") if log.exists() else "")
        return list(names)

    def rows(self) -> list[int]:
        """Of table t; each is as it was written."""
        with psycopg.connect(f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres") as connection:
            found = connection.execute("select n, filler from t order by n").fetchall()
        assert all(filler == hashlib.md5(str(n).encode()).hexdigest() for n, filler in found)
        return [n for n, _ in found]

    def settled(self) -> None:
        """Wait until a server that nobody looks after has stopped, or is promoted."""
        ends = self.target / "postmaster.pid", self.target / "recovery.signal"
        self.rig.wait(lambda: not all(path.exists() for path in ends), "the server has stopped, or is promoted")

    def check_refused(self, *words: str, kind: str = "StoreError") -> None:
        """The command's last error, in JSON, says all of this, and so do the lines for people."""
        error = json.loads(self.out.read_text().splitlines()[-1])["error"]
        assert error["kind"] == kind
        for said in (
            f"{error['fact']}; {error['hint']}",
            self.said.partition("\nwalship: ")[2].replace("\nhint: ", "; "),
        ):
            assert [each for each in words if each not in said] == [], said

    def check_stopped(
        self, signal_file: str = "recovery.signal", *, state: str = "in archive recovery", fed: bool = False
    ) -> None:
        """Nothing was promoted, and nothing runs. ``fed``: the restore was killed, and could not tidy up."""
        assert (self.target / signal_file).exists()
        begun = {path.name for path in (self.target / "pg_wal").glob("*.history")}
        assert begun <= {"00000002.history", "00000003.history"}, "no timeline was begun"
        assert control_state(self.target, self.house.programs) == state
        assert not (self.target / "postmaster.pid").exists()
        assert [pid for pid, works_in in servers() if works_in.resolve() == self.target.resolve()] == []
        assert fed or not (self.target / FOLDER / FEED / "pid").exists()


@pytest.fixture
def house(seaweed: Seaweed, s3_prefix: str) -> Iterator[House]:
    with ExitStack() as stack:
        folder = make_folder("walship-r-")
        stack.callback(shutil.rmtree, folder)
        # A standby asks every 5 s for what was not there.
        rig = stack.enter_context(
            Rig(
                folder, NEWEST, [seaweed.url(s3_prefix)], settings=seaweed.environment,
                server_settings={"wal_retrieve_retry_interval": "200ms"},
            )
        )  # fmt: skip
        house = House(rig, seaweed, s3_prefix)
        made(rig, house)
        yield house


def comes_back_in_time(house: House, mode: Mode) -> None:
    """The restore goes on as if nothing had been."""
    with Attack(house, f"back-{mode.value}") as attack:
        process = attack.struck_at(6, "--latest")
        if mode is Mode.STALL:
            attack.store.strike(mode)
            time.sleep(0.5)
            attack.store.relent()
        else:  # one attempt was cut, and four more fail, whosever they are: there are six
            attack.store.strike(mode, refusals=4)
        assert process.wait(60) == 0, attack.said
        assert attack.store.mode is Mode.PASS
        assert json.loads(attack.out.read_text())["state"] == "in production"
        assert attack.rows() == house.all


def does_not_come_back(house: House) -> None:
    """Recovery stops where it is, and the message says why and what to do; that works once the store is back."""
    with Attack(house, "gone") as attack:
        process = attack.struck_at(6, "--latest")
        attack.store.strike(Mode.DOWN)
        assert process.wait(60) == 11, attack.said
        attack.check_refused(house.segments[6], "the store cannot be reached", _REST)
        attack.check_stopped()
        left = fingerprint(attack.target)
        attack.run("--force", expect=11)
        assert fingerprint(attack.target) == left, "what cannot be replaced is left alone"
        attack.store.relent()
        attack.run("--force")
        assert attack.rows() == house.all


def gone_from_a_standby(house: House) -> None:
    """While it catches up, that ends it; once it follows, it waits, for others read there. That it ended is said."""
    with Attack(house, "standby") as attack:
        process = attack.struck_at(6, "--standby")
        attack.store.strike(Mode.BUSY)
        assert process.wait(60) == 11, attack.said
        attack.check_refused(house.segments[6], "answered 503 SlowDown", _REST)
        attack.check_stopped("standby.signal")
        attack.store.relent()
        process = attack.begin("--standby", "--delta")
        attack.rig.wait(lambda: "follows timeline 3" in attack.said or process.poll() is not None, "it follows")
        assert attack.rows() == house.all
        attack.store.strike(Mode.DOWN)
        attack.rig.wait(
            lambda: "the standby waits for 0000000" in attack.said, "it was asked for what is not there yet"
        )
        assert attack.rows() == house.all, "whoever reads there goes on reading"
        attack.store.relent()
        attack.rig.wait(lambda: "the standby goes on: the store has answered" in attack.said, "it has noticed")
        assert process.poll() is None
        os.kill(int((attack.target / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        assert process.wait(60) == 13, attack.said
        again = f"started again as its owner, with pg_ctl -D {attack.target} -o '-p {attack.port}' start, it goes on"
        attack.check_refused("the standby has ended: ", again, kind="RecoveryError")


def interrupted(house: House) -> None:
    """Nobody else knows of the server, so it is stopped; and the person is told what lies there now."""
    with Attack(house, "interrupted") as attack:
        process = attack.struck_at(6, "--latest")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert f"note: the server is stopped again; {_REST}" in attack.said
        attack.check_stopped(state="shut down in recovery")
        attack.store.relent()
        attack.run("--delta")
        assert attack.rows() == house.all


def killed_with_the_store(house: House) -> None:
    """Neither the restore nor the store is there any more: the server cannot know what is behind, and ends."""
    with Attack(house, "lost") as attack:
        process = attack.struck_at(6)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        attack.store.strike(Mode.DOWN)
        attack.settled()
        attack.check_stopped(fed=True)
        attack.store.relent()
        assert "is not empty" in attack.run(expect=13).stderr
        attack.run("--force")
        assert attack.rows() == house.all


def killed_alone(house: House) -> None:
    """The store is there: the server gets the WAL by itself to the very end, or it stops if its user cannot."""
    with Attack(house, "alone") as attack:
        words, rows = ("--to-lsn", house.lsns[9]), house.up_to(9)
        process = attack.struck_at(8, *words)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        # It fetches for itself, and the store says nothing to that either.
        done = house.rig.run(*attack.words(*words), expect=13)
        if "is not empty" not in done.stderr:
            pid = int((attack.target / "postmaster.pid").read_text().split()[0])
            assert f"{attack.target} belongs to a running server, process {pid}\nhint: stop it first" in done.stderr
        assert (attack.target / "recovery.signal").exists()
        attack.store.relent()
        attack.settled()
        if (attack.target / "recovery.signal").exists():
            assert not runnable_by_the_server()
            attack.check_stopped(fed=True)
        else:
            assert attack.rows() == rows
            assert "belongs to a running server, process " in attack.run(*words, "--delta", expect=13).stderr
            stop_started(attack.target)
        attack.run(*words, "--delta")
        assert attack.rows() == rows


def undisturbed(house: House, name: str, rows: list[int], *words: str) -> None:
    with Attack(house, name) as attack:
        attack.run(*words)
        assert attack.rows() == rows


def test_a_restore_ends_whole_or_stops_unpromoted_whatever_is_done_to_it(house: House) -> None:
    """All attacks on one repository, some of them at a time: most of each is waiting for a store that is not there."""
    beyond = house.forks[2] + 1
    other = [*house.up_to(house.forks[2]), house.left[2]]
    attacks: dict[str, Callable[[], None]] = {
        "killed with the store": lambda: killed_with_the_store(house),
        "killed alone": lambda: killed_alone(house),
        "gone from a standby": lambda: gone_from_a_standby(house),
        "does not come back": lambda: does_not_come_back(house),
        "comes back after silence": lambda: comes_back_in_time(house, Mode.STALL),
        "comes back after resets": lambda: comes_back_in_time(house, Mode.DOWN),
        "interrupted": lambda: interrupted(house),
        "to a time": lambda: undisturbed(house, "time", house.up_to(beyond), "--to-time", house.times[beyond]),
        "another timeline": lambda: undisturbed(house, "other", other, "--latest", "--timeline", "2"),
    }
    with ThreadPoolExecutor(_WIDTH) as pool:
        under_way = {name: pool.submit(attack) for name, attack in attacks.items()}
    failed = []
    for name, attack in under_way.items():
        if (error := attack.exception()) is not None:
            error.add_note(f"in: {name}")
            failed.append(error)
    if failed:
        raise BaseExceptionGroup("attacks that did not end well", failed)
