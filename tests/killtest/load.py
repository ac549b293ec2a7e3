"""Clients in processes of their own, as far from the host that dies as real ones: they commit and note each answer.

Run as a program: ``python -m tests.killtest.load DSN SEED FIRST COUNT PACE LONGEST FILE``.
"""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psycopg

from tests.killtest.plan import Pace, Plan

TABLE = "create table kept (client int, n int, filler bytea, primary key (client, n))"

_RECORD = struct.Struct("<IId")


@dataclass(frozen=True, slots=True)
class Commit:
    """One that was acknowledged."""

    client: int
    #: Counts the client's commits from 1.
    n: int
    #: Just after the answer, in monotonic seconds (the clock is the machine's: the same for all processes).
    acknowledged: float


def filler(seed: int, client: int, n: int, longest: int) -> bytes:
    """What that row holds: random, and known to whoever checks it."""
    dice = random.Random(f"{seed}/{client}/{n}")
    return dice.randbytes(dice.randint(20, longest if dice.random() < 0.05 else min(longest, 400)))


def digest(seed: int, client: int, n: int, longest: int) -> bytes:
    return hashlib.sha256(filler(seed, client, n, longest)).digest()


class Load:
    """The clients of a round, from ``__enter__`` on; they end when their server does."""

    def __init__(self, plan: Plan, dsn: str, folder: Path) -> None:
        """``folder``: for their notes; not one that is lost."""
        self._plan = plan
        self._dsn = dsn
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        half = -(-self._plan.clients // 2)
        for first, count in ((0, half), (half, self._plan.clients - half)):
            if count:
                words = [self._dsn, self._plan.seed, first, count, self._plan.pace.value, self._plan.longest]
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.killtest.load", *map(str, words), self._notes(first)],
                        cwd=Path(__file__).parents[2],
                    )
                )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def acknowledged(self) -> list[Commit]:
        """After the end of the server: what it had answered."""
        for process in self._processes:
            if process.wait(60) != 0:
                raise RuntimeError("a client failed otherwise than by the end of the server: see its words above")
        return [
            Commit(*_RECORD.unpack_from(notes, at))
            for notes in (path.read_bytes() for path in sorted(self._folder.glob("acknowledged-*")))
            for at in range(0, len(notes), _RECORD.size)
        ]

    def _notes(self, first: int) -> Path:
        return self._folder / f"acknowledged-{first}"


def _pauses(pace: Pace, dice: random.Random) -> Iterator[float]:
    while True:
        match pace:
            case Pace.BRISK:
                yield dice.uniform(0, 0.01)
            case Pace.STEADY:
                yield dice.uniform(0, 0.1)
            case Pace.SPARSE:
                yield dice.uniform(0.1, 1.5)
            case Pace.BURSTS:
                within = time.monotonic() % 1.7
                yield dice.uniform(0, 0.01) if within < 0.5 else 1.7 - within


def _commit(dsn: str, seed: int, client: int, pace: Pace, longest: int, notes: list[Commit]) -> None:
    pauses = _pauses(pace, random.Random(f"{seed}/{client}"))
    try:
        with psycopg.connect(dsn, autocommit=True) as connection:
            for n, pause in enumerate(pauses, 1):
                connection.execute(
                    "insert into kept values (%s, %s, %s)", (client, n, filler(seed, client, n, longest))
                )
                notes.append(Commit(client, n, time.monotonic()))
                time.sleep(pause)
    except psycopg.OperationalError:
        return  # the end: what is noted was acknowledged


def main(dsn: str, seed: str, first: str, count: str, pace: str, longest: str, file: str) -> None:
    notes: list[list[Commit]] = [[] for _ in range(int(count))]
    threads = [
        threading.Thread(target=_commit, args=(dsn, int(seed), int(first) + at, Pace(pace), int(longest), noted))
        for at, noted in enumerate(notes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = (_RECORD.pack(c.client, c.n, c.acknowledged) for noted in notes for c in noted)
    Path(file).write_bytes(b"".join(records))


if __name__ == "__main__":
    main(*sys.argv[1:])
