"""A drill: restore for real into a throw-away server on a private socket, look whether all is well, and measure.

The server that was backed up is never asked for anything: what is needed is in the repository. A drill's server differs
from a restored one in what would make it dangerous or fail on a small machine (``_options``), and in nothing else.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten

import psycopg

from handlers.check_file import Check
from handlers.drill import Outcome, Report, State
from infra.drill_room import Room, sweep
from infra.postgres import programs as installed
from infra.postgres.bare_conf import limits
from infra.postgres.examine import Door, Seen, Statements, amcheck, look
from infra.postgres.preloaded import acting, without_workers
from infra.postgres.programs import Programs
from infra.postgres.recovery_files import inherited_value, remove_recovery_files
from infra.postgres.restored import Started, start_restored
from infra.postgres.throwaway import free_port
from infra.restore import Place, Repository, Watch, cause, check_place, feeding, make_plan, restore
from infra.storage.in_use import using
from pipeline.errors import IntegrityError, RecoveryError, SourceError, WalshipError
from pipeline.recovery import RestorePlan
from pipeline.targets import Target, TargetKind

#: PostgreSQL's own default: what any machine has.
BUFFERS = "128MB"
#: Seconds between two lines about a check that takes long.
_EVERY = 5.0
#: Characters of a value that the report shows.
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be rehearsed."""

    target: Target
    #: Begin with this backup; None: the best one.
    backup: str | None = None
    checks: tuple[Check, ...] = ()
    amcheck: bool = True
    #: The folder below which the drill makes its own.
    work_dir: Path = Path()
    keep: bool = False
    #: WALSHIP_PG_BIN_DIR.
    bin_dir: Path | None = None
    #: A role that may log in.
    user: str = "postgres"


async def drill(repository: Repository, order: Order, report: Report, watch: Watch) -> Report:
    """Fill the report. Raises WalshipError when there is no restored server to check; the report holds it then.

    A check that fails is no error: see ``report.verdict``. Whatever happens, server and folder are gone in the end,
    unless ``order.keep``.
    """
    try:
        return await _drill(repository, order, report, watch)
    except WalshipError as error:
        report.failure = error
        raise


async def _drill(repository: Repository, order: Order, report: Report, watch: Watch) -> Report:
    clock = repository.clock
    for left in await asyncio.to_thread(sweep, order.work_dir):
        watch.say(f"removed what a drill that was killed has left: {left}")
    with report.step("make the plan", clock):
        plan = report.plan = await make_plan(repository, order.target, backup=order.backup)
        report.notices += plan.notices
        programs = await asyncio.to_thread(installed.find, plan.backup.major, bin_dir=order.bin_dir)
    async with using(repository.stores, plan.backup.name, clock=clock, tell=watch.say, what="drill"):
        return await _in_room(repository, order, plan, programs, report, watch)


async def _in_room(
    repository: Repository, order: Order, plan: RestorePlan, programs: Programs, report: Report, watch: Watch
) -> Report:
    clock = repository.clock
    with Room(order.work_dir, keep=order.keep) as room:
        if order.keep:
            watch.say(f"kept: {room.folder}")
        place = Place(
            room.data,
            {
                tablespace.location: str(room.folder / f"tablespace-{tablespace.oid}")
                for tablespace in plan.backup.tablespaces
                if Path(tablespace.location).is_absolute()
            },
        )
        await check_place(plan, place)
        with report.step("lay down the base backup", clock):
            try:
                # What it says is for people who go on with the directory.
                await restore(repository, plan, place, watch=replace(watch, say=lambda _: None))
            finally:
                # The feed serves a drill, and nothing else; so what opens the repository is not even there when the
                # server runs what is in the backup, nor left with --keep.
                await asyncio.to_thread(remove_recovery_files, room.data)
        port = free_port()
        report.buffers = BUFFERS
        with report.step("start the server and replay", clock):
            started = await _start(repository, plan, programs, room, port, report, watch)
            room.remember(started.pid)
            seen = await look(room.sockets, port, _users(order.user, room))
            report.answered(clock)
        report.server, report.newest_commit = seen.version, seen.newest_commit
        if started.stopped_at:
            report.notices.append(f"the server said: {started.stopped_at}")
        watch.say(f"the server is at {plan.target}, {report.rto:.1f} s after the start of the drill; checking")
        door = Door(room.sockets, port, seen.superuser)
        with report.step("check", clock):
            report.outcomes.append(await _amcheck(order, programs, door, seen, room, watch.say))
            report.outcomes += await _statements(order.checks, door, watch.say)
        if order.keep:
            ask = shlex.join(["psql", "-h", str(room.sockets), "-p", str(port), "-U", seen.superuser])
            end = shlex.join([str(programs.bin_dir / "pg_ctl"), "-D", str(room.data), "stop"])
            watch.say(f"the server goes on: {ask}; end it with {end}, as its owner, and remove {room.folder}")
    return report


async def _start(
    repository: Repository, plan: RestorePlan, programs: Programs, room: Room, port: int, report: Report, watch: Watch
) -> Started:
    """The server, promoted at the target. What goes wrong is told without hints about a directory that will be gone."""
    options = await asyncio.to_thread(_options, programs, room, port)
    libraries, left_out = without_workers(inherited_value(room.data, "shared_preload_libraries"))
    if silent := acting(libraries):
        report.notices.append(f"loaded, and none of its workers started: {', '.join(silent)}")
    if left_out:
        options["shared_preload_libraries"] = libraries
        report.notices.append(f"not loaded, for it acts by itself: {', '.join(left_out)}")
    owner = (room.who["user"], room.who["group"]) if room.who else None
    turns = repository.turns
    async with feeding(repository.fetch, plan, room.data, owner=owner, say=watch.say, turns=turns) as feed:
        try:
            return await start_restored(
                room.data,
                programs,
                action=plan.stop.action,
                reaches=plan.end if plan.stop.kind is TargetKind.LATEST else None,
                log_file=room.log,
                options=options,
                environment=room.environment,
                progress=watch.replay,
            )
        except (RecoveryError, SourceError) as error:
            report.log = "\n".join(room.log.read_text("utf-8", "replace").splitlines()[-20:])
            if (failure := cause(feed)) is not None:
                raise failure from error
            error.hint = (
                "the report holds the end of the server's log; with --keep the drill leaves everything where it is"
            )
            raise


def _options(programs: Programs, room: Room, port: int) -> dict[str, str]:
    """For the server's command line, which wins over all files."""
    options = {
        "port": str(port),
        "listen_addresses": "",
        "unix_socket_directories": str(room.sockets),
        "unix_socket_group": "",
        "unix_socket_permissions": "0700",
        "hba_file": str(room.folder / "pg_hba.conf"),
        "ident_file": str(room.folder / "pg_ident.conf"),
        "cluster_name": "walship_drill",
        # Files of the old machine: certificates are not in a backup.
        "ssl": "off",
        # Nothing acts by itself: no subscription, no scheduled job, and nobody tidies up what shall be looked at.
        "autovacuum": "off",
        # No library's worker can be started, whatever its name: no job, no connection to another server. A server in
        # recovery must not go below what it was, unless it lets nobody in meanwhile; and nobody needs to.
        "max_worker_processes": "0",
        "hot_standby": "off",
        # A large server's memory is not there; what may not be lower than it was is left alone.
        "shared_buffers": BUFFERS,
        "huge_pages": "off",
        "min_dynamic_shared_memory": "0",
        # In the folder of the drill, and so gone with it, however the server ends.
        "shared_memory_type": "mmap",
        "dynamic_shared_memory_type": "mmap",
    }
    if programs.major >= 17:
        options["event_triggers"] = "off"  # those at login would run, and may refuse us
    if programs.major >= 18:
        options["io_method"] = "worker"  # io_uring is closed in many containers
    if not (room.data / "postgresql.conf").exists():
        # Debian keeps it below /etc. PostgreSQL's defaults will do, but for what must not be lower than it was.
        bare = room.folder / "postgresql.conf"
        bare.write_text("", "utf-8")
        bare.chmod(0o644)
        options = {"config_file": str(bare), **limits(room.data, programs), **options}
    return options


def _users(wanted: str, room: Room) -> Sequence[str]:
    """Roles to try, until one tells who is superuser."""
    uid = room.who["user"] if room.who else os.geteuid()
    try:
        return wanted, "postgres", pwd.getpwuid(uid).pw_name
    except KeyError:
        return wanted, "postgres"


async def _amcheck(
    order: Order, programs: Programs, door: Door, seen: Seen, room: Room, say: Callable[[str], None]
) -> Outcome:
    expected = "tables and indexes of all databases are sound, and every row is in its indexes"

    def outcome(state: State, found: str, seconds: float = 0.0) -> Outcome:
        return Outcome("pg_amcheck", state, expected, found, seconds, waived=not order.amcheck)

    if not order.amcheck:
        return outcome(State.NOT_RUN, "left out with --skip-amcheck")
    if not seen.amcheck:
        return outcome(State.NOT_RUN, f"PostgreSQL {programs.version} is installed without the extension amcheck")
    began = said = time.monotonic()

    def progress(line: str) -> None:
        nonlocal said
        if time.monotonic() - said > _EVERY:
            said = time.monotonic()
            say(f"pg_amcheck: {line}")

    try:
        done = await amcheck(programs, door, who=room.who, jobs=min(4, os.cpu_count() or 1), progress=progress)
    except SourceError as error:
        return outcome(State.NOT_RUN, error.fact)
    seconds = time.monotonic() - began
    if done.exit_code == 0:
        return outcome(State.PASSED, f"{done.relations:,} relations, {done.pages:,} pages: nothing found", seconds)
    words = " / ".join(done.lines) + (f" / and {done.more} more lines" if done.more else "")
    return outcome(State.FAILED, words or f"it ended with exit status {done.exit_code}", seconds)


async def _statements(checks: Sequence[Check], door: Door, say: Callable[[str], None]) -> list[Outcome]:
    outcomes = []
    async with Statements(door) as statements:
        for check in checks:
            say(f"check {check.name}")
            began = time.monotonic()
            expected = str(check.expected) if check.expected else "runs without an error"
            state = State.FAILED
            try:
                answer = await statements.ask(check.database, check.sql, check.timeout)
            except psycopg.Error as error:
                found = error.diag.message_primary or str(error).strip() or "the connection was lost"
            except TimeoutError:
                found = f"no answer within {check.timeout:g} s"
                await statements.close()
            else:
                if check.expected is None:
                    state, found = State.PASSED, f"it ran: {answer}" if answer.columns else "it ran"
                else:
                    state, found = State.PASSED if check.expected.met_by(answer) else State.FAILED, str(answer)
            found = f"{found[:_SHOWN]} …" if len(found) > _SHOWN else found
            outcomes.append(Outcome(check.name, state, expected, found, time.monotonic() - began, check.database))
    return outcomes


def judge(report: Report) -> WalshipError | None:
    """What a drill whose restore succeeded ends with: an error that gives the exit code, or None."""
    if report.verdict == "failed":
        failed = report.of(State.FAILED)[0]
        return IntegrityError(
            f"{len(report.of(State.FAILED))} of {len(report.outcomes)} checks failed; {failed.name}: expected"
            f" {failed.expected}, found {shorten(failed.found, _SHOWN)}",
            hint="`walship verify` tells whether the stored bytes are good; if they are, look at the server itself",
        )
    if report.lacking:
        lack = report.lacking[0]
        return SourceError(
            f"{lack.name} was not run: {lack.found}",
            hint="install what is missing (on Debian the server's package has both), or leave it out with"
            " --skip-amcheck",
        )
    return None
