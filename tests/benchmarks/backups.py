"""The task ``backups``: base backups of the same server in each mode, beside pgBackRest and pg_basebackup, in turn.

    full, from the files     walship with WALSHIP_DATA_DIR      pgBackRest: two processes, bundling, block-incremental
    full, by the server      walship                            pg_basebackup, whose tar goes to /dev/null
    incremental              walship backup --incremental       pgBackRest's incr, after 1 % of the pages has changed

``--network-mbit N``: the second pair once more, through a network of that width (``tests.benchmarks.narrow``).
Both compress by zstd's level 1 and encrypt; pg_basebackup does neither. Before each run the files are in the
page cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from infra.postgres.programs import environment_for
from tests.benchmarks import pgbackrest
from tests.benchmarks.bench import Row, tell
from tests.benchmarks.ground import Ground
from tests.benchmarks.measured import Cost, measure
from tests.benchmarks.narrow import narrow
from tests.benchmarks.pgbackrest import PgBackRest
from tests.benchmarks.walship import Walship

#: With summaries of its WAL, and known to the pgBackRest of Debian 13.
MAJOR = 17
LEVEL = 1
#: As nice as ``walship backup`` makes itself: else a busy machine would slow walship alone.
NICE = 5
FILES, SERVER, INCREMENT = "full, from the files", "full, by the server", "incremental"
#: What issue 5 asks for: rates as a part of the peer's, and bytes of memory.
_OF_PGBACKREST, _OF_PG_BASEBACKUP, _MOST_MEMORY = 1.2, 0.95, 250_000_000


class PgBasebackup:
    """The client that comes with the server, throwing away what it gets: as fast as the server can send it."""

    name = "pg_basebackup"

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._log = ground.folder / "pg_basebackup.output"

    def backup(self, port: int | None = None) -> Cost:
        """``port``: of 127.0.0.1, by which the server is reached; else as it says itself."""
        server, program = self._ground.server, self._ground.bin_dir / "pg_basebackup"
        where = f"-h {server.host} -p {server.port}" if port is None else f"-h 127.0.0.1 -p {port}"
        where += f" -U {server.superuser}"
        words = f"exec {program} -D - -F t -X none --checkpoint=fast {where} > /dev/null"
        return measure([["/bin/sh", "-c", words]], environment_for(self._ground.bin_dir), self._log, nice=NICE)


def backups(
    *, megabytes: int, blank: bool, major: int, rounds: int, peer: bool, mbit: int, say: Callable[[str], None]
) -> list[Row]:
    """A server of its own, and everything in turn. ``blank``: see ``Ground.fill``; ``mbit``: of a network, or 0."""
    with Ground(say, major) as ground:
        ground.fill(megabytes, blank=blank)
        walship, plain = Walship(ground), PgBasebackup(ground)
        rival = _rival(ground, say) if peer else None
        settings = {"WALSHIP_COMPRESSION_LEVEL": str(LEVEL)}
        local = {**settings, "WALSHIP_DATA_DIR": str(ground.server.data_dir)}
        size = ground.size
        rows = [Row(FILES, walship.name, size), Row(SERVER, walship.name, size), Row(SERVER, plain.name, size)]
        runs: list[tuple[Row, Callable[[], Cost], Callable[[], int]]] = [
            (rows[0], lambda: walship.backup(**local), walship.stored_backups),
            (rows[1], lambda: walship.backup(**settings), walship.stored_backups),
            (rows[2], plain.backup, lambda: 0),
        ]
        if rival is not None:
            rows.insert(1, Row(FILES, rival.name, size))
            runs.insert(1, (rows[1], rival.backup, rival.stored))
        for number in range(rounds):
            for row, run, stored in runs:
                _run(ground, row, run, say)
                row.stored = stored()
            for task in (FILES, SERVER):
                tell([row for row in rows if row.task == task], number, say)
        if mbit:
            rows += _over_network(ground, walship, plain, settings, mbit, rounds, say)
        if major >= 17:
            rows += _increments(ground, walship, rival, settings, rounds, say)
        return rows


def _over_network(
    ground: Ground, walship: Walship, plain: PgBasebackup, settings: dict[str, str], mbit: int, rounds: int,
    say: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """By the server, where the network is the limit, as it is between two hosts."""
    task = f"by the server, {mbit} Mbit/s"
    rows = [Row(task, walship.name, ground.size), Row(task, plain.name, ground.size)]
    with narrow(ground.server.port, mbit) as port:
        there = {**settings, "POSTGRES_HOST": "127.0.0.1", "POSTGRES_PORT": str(port)}
        for number in range(rounds):
            _run(ground, rows[0], lambda: walship.backup(**there), say)
            rows[0].stored = walship.stored_backups()
            _run(ground, rows[1], lambda: plain.backup(port), say)
            tell(rows, number, say)
    return rows


def _increments(
    ground: Ground, walship: Walship, rival: PgBackRest | None, settings: dict[str, str], rounds: int,
    say: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """Each builds on the last backup of the same tool. ``Row.stored``: of the largest one."""
    rows = [Row(INCREMENT, walship.name, ground.size)]
    runs: list[tuple[Row, Callable[[], Cost], Callable[[], int]]] = [
        (rows[0], lambda: walship.increment(**settings), walship.stored_backups)
    ]
    if rival is not None:
        rows.append(Row(INCREMENT, rival.name, ground.size))
        runs.append((rows[1], rival.increment, rival.stored))
    for number in range(rounds):
        changed = ground.change(number + 1)
        say(f"{changed} pages have changed, {changed * 8192 / 1e6:.0f} MB")
        for row, run, stored in runs:
            before = stored()
            _run(ground, row, run, say)
            row.stored = max(row.stored, stored() - before)
        tell(rows, number, say)
    return rows


def _run(ground: Ground, row: Row, run: Callable[[], Cost], say: Callable[[str], None]) -> None:
    ground.warm_files()
    before = ground.server_cpu
    cost = run()
    server = ground.server_cpu - before
    row.costs.append(cost)
    row.server_cpu.append(server)
    load = Path("/proc/loadavg").read_text("ascii").split()[0]
    say(
        f"  {row.task}, {row.tool}: {cost.stored:.2f} s, CPU {cost.cpu:.2f} s, server {server:.2f} s,"
        f" all others {max(0.0, cost.machine - cost.cpu - server):.2f} s (load {load}),"
        f" {cost.together / 1e6:.0f} MB of memory"
    )


def _rival(ground: Ground, say: Callable[[str], None]) -> PgBackRest | None:
    if not pgbackrest.knows(ground.major):
        say(f"pgBackRest {pgbackrest.version()} does not know PostgreSQL {ground.major}: backups are taken without it")
        return None
    more = {"repo1-bundle": "y", "compress-level": str(LEVEL)}
    if pgbackrest.numbers() >= (2, 46):
        more["repo1-block"] = "y"
    else:
        say("this pgBackRest has no block-incremental backups yet: its incremental ones hold whole files")
    return PgBackRest(ground, more, nice=NICE)


@dataclass(frozen=True, slots=True)
class Goal:
    """What is to be reached, and what was."""

    what: str
    value: float
    bound: float
    #: Whether the value has to be at least the bound, else at most.
    least: bool

    @property
    def reached(self) -> bool:
        return self.value >= self.bound if self.least else self.value <= self.bound

    def __str__(self) -> str:
        verdict = "reached" if self.reached else "missed"
        return f"{self.what}: {self.value:.2f} ({'at least' if self.least else 'at most'} {self.bound:g}): {verdict}"


def goals(rows: Sequence[Row]) -> list[Goal]:
    """Of the rows of this task. Ratios are the medians of pairs."""
    found: list[Goal] = []
    by_name = {(row.task, row.tool): row for row in rows}
    for (task, tool), row in by_name.items():
        if tool != Walship.name or task not in (FILES, SERVER, INCREMENT):
            continue
        rival = by_name.get((task, PgBackRest.name))
        if task == FILES and rival:
            found.append(_at_least("from the files, of pgBackRest's rate", row.ratios(rival), _OF_PGBACKREST))
        if task == SERVER and (plain := by_name.get((task, PgBasebackup.name))):
            found.append(_at_least("by the server, of pg_basebackup's rate", row.ratios(plain), _OF_PG_BASEBACKUP))
        if task == INCREMENT and rival:
            seconds = [1 / ratio for ratio in row.ratios(rival)]
            found.append(Goal("incremental, of pgBackRest's seconds", median(seconds), 1, least=False))
            found.append(Goal("incremental, of pgBackRest's bytes", row.stored / rival.stored, 1, least=False))
        memory = max(cost.together for cost in row.costs)
        found.append(Goal(f"{task}, MB of memory", memory / 1e6, _MOST_MEMORY / 1e6, least=False))
    return found


def _at_least(what: str, ratios: Sequence[float], bound: float) -> Goal:
    return Goal(what, median(ratios), bound, least=True)
