"""Restores that lose their store halfway.

    House    a repository over three timelines in a bucket, and the server that wrote it, which is stopped
    Ambush   the store as one restore sees it: a proxy before the bucket, which holds back one segment, and then fails
             as it is told to
    Attack   one restore of the house through an ambush of its own: begins it, waits until it is where it can be struck,
             and looks at what it has left and said

One house serves many attacks at a time.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import subprocess
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

import psycopg

from handlers.running import servers
from infra.demo.seaweed import Seaweed
from infra.postgres.processes import give
from infra.postgres.programs import Programs, find
from infra.postgres.restored import control_state
from infra.postgres.throwaway import ThrowawayServer, free_port
from infra.postgres.wal_script import FEED, FOLDER
from tests import commands
from tests.proxy import Mode, Proxy, _Connection
from tests.rig import Rig, stop_started

#: Segments of each timeline before the one that it is left in.
_EACH = 2
#: Timelines of the repository; the newest is followed.
_TIMELINES = (1, 2, 3)


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
