"""``python -m tests.benchmarks`` (``make bench``): time and memory, beside pgBackRest where it is installed.

Makes a PostgreSQL server, a pgbench database and a backlog of WAL in a temporary folder, and removes all of it.
Progress goes to stderr, the result to stdout. ``docs/benchmarks.md`` says how to read it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from typing import NoReturn

from tests.benchmarks import backups, bench, pgbackrest, replay, report
from tests.benchmarks.ground import MAJOR, Ground
from tests.benchmarks.pgbackrest import PgBackRest
from tests.benchmarks.walship import Walship

_TASKS = ("drain", "base", "service", "replay", "backups")


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, _interrupt)
    peer = pgbackrest.installed() is not None and not options.alone
    about = {"postgresql": MAJOR, "pgbackrest": pgbackrest.version() if peer else None, "rounds": options.rounds}
    if not peer:
        _say("pgBackRest is not installed or not wanted: walship runs alone")
    rows: list[bench.Row] = []
    if options.tasks - {"backups"}:
        rows += _with_pgbench(options, peer=peer)
    if "backups" in options.tasks:
        rows += backups.backups(
            megabytes=options.size_mb,
            blank=options.blank,
            major=options.major,
            rounds=options.rounds,
            peer=peer,
            mbit=options.network_mbit,
            say=_say,
        )
    goals = backups.goals(rows)
    if options.json:
        print(json.dumps(report.result(rows, goals, about), indent=2))
    else:
        print("\n".join([*report.table(rows), *map(str, goals)]))


def _with_pgbench(options: argparse.Namespace, *, peer: bool) -> list[bench.Row]:
    """The tasks that share one server."""
    rows: list[bench.Row] = []
    with Ground(_say) as ground:
        ground.build(scale=options.scale, segment_mb=options.segment_mb)
        segments = ground.backlog(options.segments) if {"drain", "service"} & options.tasks else []
        walship = Walship(ground)
        tools: list[bench.Tool] = [walship, *([PgBackRest(ground)] if peer else [])]
        if "drain" in options.tasks:
            for level in options.levels:
                rows += bench.drain(ground, tools, segments, level=level, rounds=options.rounds, say=_say)
        if "service" in options.tasks:
            rows += bench.service(ground, walship.serve, segments, rounds=options.rounds, say=_say)
        if "base" in options.tasks:
            rows += bench.base(ground, tools, rounds=options.rounds, say=_say)
        if "replay" in options.tasks:
            rival = next((tool for tool in tools if isinstance(tool, PgBackRest)), None)
            rows += replay.replay(
                ground, walship, rival, segments=options.segments, segment_mb=options.segment_mb, rounds=options.rounds,
                say=_say,
            )  # fmt: skip
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--segments", type=int, default=64, help="backlog (default 64)")
    parser.add_argument("--segment-mb", type=int, default=16, help="size of a segment (default 16)")
    parser.add_argument("--scale", type=int, default=65, help="pgbench's, about 15 MB each (default 65)")
    parser.add_argument("--size-mb", type=int, default=2000, help="database of the task backups (default 2000)")
    parser.add_argument(
        "--network-mbit", type=int, default=0, help="backups by the server once more, over such a network", metavar="N"
    )
    parser.add_argument("--blank", action="store_true", help="its rows are mostly filler, as pgbench's are")
    parser.add_argument(
        "--major", type=int, default=backups.MAJOR, help=f"its PostgreSQL (default {backups.MAJOR})", metavar="N"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool, in turn (default 3)")
    parser.add_argument(
        "--levels", type=_numbers, default=(3, 1), help="of zstd, for the backlog (default 3,1)", metavar="N,N"
    )
    parser.add_argument("--tasks", type=_tasks, default=set(_TASKS), help=f"some of {','.join(_TASKS)}", metavar="T,T")
    parser.add_argument("--alone", action="store_true", help="without pgBackRest")
    parser.add_argument("--json", action="store_true", help="every run, as JSON")
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _tasks(text: str) -> set[str]:
    chosen = set(text.split(","))
    if unknown := chosen - set(_TASKS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(_TASKS)}")
    return chosen


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    """SIGTERM removes everything, as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
