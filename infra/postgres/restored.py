"""Starts a restored server as the owner of its data directory, and waits until it is where the plan wants it.

No connection is made: pg_hba.conf and the passwords are the old server's. What is known comes from the process, its log
(in English, for the length of this run) and ``pg_controldata``. The server has a process group of its own and survives
us.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shlex
import signal
import stat
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.postgres.processes import run_as
from infra.postgres.programs import Programs
from infra.postgres.server_log import PORT_TAKEN, ServerLog
from infra.postgres.wal_script import FOLDER
from pipeline.errors import ConfigError, RecoveryError, SourceError
from pipeline.targets import Action
from pipeline.wal import Lsn, parse_history

_PAUSE = 0.1
#: Seconds that a server gets to stop when its restore is interrupted.
_GRACE = 30.0
#: How often a standby may ask for WAL in front of what is stored: it asks every 5 s.
_STUCK = 3
#: Servers that go on without us. Python takes a Popen that is dropped while its process runs for a mistake.
_SURVIVORS: list[subprocess.Popen[bytes]] = []
_HALF = "the directory holds half replayed data now"


@dataclass(frozen=True, slots=True)
class Replay:
    """How far recovery has come; what is not known is empty."""

    #: Position that was replayed, as the server reports it once a second.
    lsn: Lsn | None
    #: Name of the segment that was restored last.
    segment: str


@dataclass(frozen=True, slots=True)
class Started:
    """A server at its target."""

    #: Process id; 0 after the action shutdown.
    pid: int
    #: ``in production``, ``paused``, ``shut down`` or ``standby``.
    state: str
    #: From postmaster.pid; 0 and empty after shutdown.
    port: int
    socket_dir: str
    log_file: Path
    #: As the server said where it stopped and when its last transaction ended; empty if it did not say.
    stopped_at: str
    last_transaction: str


async def start_restored(
    directory: Path,
    programs: Programs,
    *,
    action: Action,
    log_file: Path | None = None,
    reaches: Lsn | None = None,
    standby: bool = False,
    options: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    progress: Callable[[Replay], None] = lambda _: None,
) -> Started:
    """Start the server and wait until it is promoted, paused or shut down at its target, as long as that takes.

    ``options`` go on the server's command line, ``environment`` to what it inherits of ours. ``log_file``: appended to;
    None: beside the directory, or in it where none can be made beside it. ``reaches``: where recovery to the latest
    ends at the earliest. Raises RecoveryError with the server's own words when recovery ends in an error, and when it
    ended before ``reaches``; SourceError when the program cannot be started at all, ConfigError when its log cannot.
    A ``standby`` has no target: it is there once clients may
    read in it and it waits for WAL behind ``reaches``, a position that whole records are stored behind. When it raises,
    or is cancelled, it stops the server first.
    """
    handle, log_file = _open_log(directory, log_file)
    follow = ServerLog(log_file)
    try:
        # Not in a thread, where nobody would know of the server that it starts while we are cancelled.
        process = _launch(directory, programs, handle, dict(options or {}), dict(environment or {}))
    finally:
        os.close(handle)
    try:
        while True:
            ended = process.poll() is not None
            if await asyncio.to_thread(follow.read):
                progress(Replay(follow.lsn, follow.segment))
            if ended:
                return await _after_the_end(directory, programs, action, follow, process.returncode)
            _check_settings(directory, follow)
            if standby:
                if _caught_up(follow, reaches):
                    _SURVIVORS.append(process)
                    return _started(directory, process.pid, "standby", follow)
            elif action is Action.PAUSE and follow.paused:
                _SURVIVORS.append(process)
                return _started(directory, process.pid, "paused", follow)
            elif follow.ready and not (directory / "recovery.signal").exists():
                state = await asyncio.to_thread(control_state, directory, programs)
                if state == "in production":  # also when it should pause or shut down, and somebody promoted it
                    if reaches is not None:
                        await asyncio.to_thread(_check_reached, directory, reaches, log_file)
                    _SURVIVORS.append(process)
                    return _started(directory, process.pid, state, follow)
            await asyncio.sleep(_PAUSE)
    except BaseException:
        stopping = asyncio.ensure_future(asyncio.to_thread(_stop, process))
        while not stopping.done():
            # However often we are cancelled meanwhile: nobody else knows of this server.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([stopping])
        stopping.result()
        raise


def _check_settings(directory: Path, follow: ServerLog) -> None:
    """The old server has raised a setting since the backup: recovery pauses there, until somebody ends it."""
    if follow.too_low:
        raise RecoveryError(f"the restored server has paused its recovery: {follow.too_low}", hint=_raise_it(directory))


def _caught_up(follow: ServerLog, reaches: Lsn | None) -> bool:
    """Whether a standby has replayed what is stored. Raises RecoveryError if it never will.

    What is missing in the middle is an error of restore_command, and ends the server; but what it cannot read it takes
    for the end of the WAL, and asks for it again and again.
    """
    if follow.waiting is None or not follow.consistent:
        return False
    if reaches is None or follow.waiting >= reaches:
        return True
    if follow.waited < _STUCK:
        return False
    raise RecoveryError(
        f"the standby waits for WAL at LSN {follow.waiting}, and the stored WAL goes on to LSN {reaches}: it cannot"
        " read what lies between",
        hint=f"{follow.path} says why; restore again --from another destination",
    )


async def standby_ended(started: Started, directory: Path, programs: Programs) -> bool:
    """Wait until a server that ``start_restored`` gave back as a standby is none any more. True if it was promoted.

    False if somebody has stopped it. Raises RecoveryError, with its own words, if it ended in another way, as it does
    over WAL that cannot be fetched. Cancel it to leave the server alone. A server that is being promoted removes its
    signal file first, and then asks for its timeline's history once more: whoever serves WAL has to stay until it is in
    production.
    """
    process = next((one for one in _SURVIVORS if one.pid == started.pid), None)
    log = ServerLog(started.log_file)
    while True:
        if process is not None and (code := process.poll()) is not None:
            if code == 0:
                return False
            await asyncio.to_thread(log.read)
            raise RecoveryError(
                f"the standby has ended: {_last_words(log, code)}",
                hint=f"the standby has ended over it: started again as its owner, with {_pg_ctl(directory)} -o"
                f" '-p {started.port}' start, it goes on where it was, and fetches WAL by itself, if its user can run"
                " walship",
            )
        left = not (directory / "standby.signal").exists()
        if left and await asyncio.to_thread(control_state, directory, programs) == "in production":
            return True
        await asyncio.sleep(_PAUSE)


def control_data(directory: Path, programs: Programs) -> dict[str, str]:
    """What pg_controldata prints of a data directory: ``Database cluster state`` → ``in production``. Blocking."""
    answer = subprocess.run(  # noqa: S603 - a program of the installation that was chosen
        [programs.path("pg_controldata"), "-D", str(directory)],
        env=programs.environment(), capture_output=True, text=True, check=False, cwd="/", **run_as(directory),
    )  # fmt: skip
    words = (line.partition(":") for line in answer.stdout.splitlines())
    return {word: value.strip() for word, _, value in words}


def control_state(directory: Path, programs: Programs) -> str:
    """The cluster state in pg_control: ``in production``, ``shut down in recovery`` …; empty if it cannot be read."""
    return control_data(directory, programs).get("Database cluster state", "")


def _open_log(directory: Path, log_file: Path | None) -> tuple[int, Path]:
    """For appending; a regular file, ours or the server's. Raises ConfigError.

    A new one is the server's and for nobody else, as PostgreSQL's own are: statements stand in it, and their data.
    """
    beside, inside = directory.with_name(f"{directory.name}.log"), directory / FOLDER / "server.log"
    who = run_as(directory)
    for path in (beside, inside) if log_file is None else (log_file,):
        try:
            # Neither through a link that others laid there, nor into a pipe that nobody reads.
            flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
            try:
                handle = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
                if who:
                    os.fchown(handle, who["user"], who["group"])
            except FileExistsError:
                handle = os.open(path, flags)
        except OSError as error:  # a folder that is not ours, a read-only one, a name that is too long with .log
            failed = error
            continue
        there = os.fstat(handle)
        if not stat.S_ISREG(there.st_mode):
            failed = OSError(errno.EINVAL, "it is no regular file")
        elif there.st_uid not in (os.geteuid(), who.get("user")):
            failed = OSError(errno.EPERM, "it is another user's, who could read what the server says")
        else:
            return handle, path
        os.close(handle)
    raise ConfigError(
        f"the server's log {path} cannot be written: {failed.strerror}",
        hint=f"{directory} is ready all the same: start its server as its owner, with {_pg_ctl(directory)} start",
    ) from None


def _launch(
    directory: Path, programs: Programs, log: int, options: dict[str, str], environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    own = {
        # In an inherited postgresql.conf, or a file that it includes, it beats -D and starts the original directory.
        "data_directory": str(directory),
        # Whatever the restored configuration says: its words come to our log, and in English.
        "logging_collector": "off",
        "log_destination": "stderr",
        "lc_messages": "C",
        "log_min_messages": "warning",
    }
    if programs.major >= 15:
        own["log_startup_progress_interval"] = "1s"
    arguments = [f"--{name}={value}" for name, value in {**own, **options}.items()]
    who = run_as(directory)
    try:
        return subprocess.Popen(  # noqa: S603 - as above
            [programs.path("postgres"), "-D", str(directory), *arguments],
            env={**programs.environment(), **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            # It outlives us, and a Ctrl-C on our terminal is for us.
            start_new_session=True, cwd="/", **who,
        )  # fmt: skip
    except PermissionError:
        raise SourceError(
            f"the user that owns {directory} (id {who.get('user', 'ours')}) cannot run {programs.bin_dir}/postgres",
            hint="its programs must lie where that user can reach them: then run the same restore again with"
            " --force, or start the server yourself, for the directory is ready",
        ) from None
    except OSError as error:
        raise SourceError(
            f"{programs.bin_dir}/postgres cannot be started: {error.strerror}",
            hint="start the server yourself, for the directory is ready",
        ) from None


async def _after_the_end(
    directory: Path, programs: Programs, action: Action, follow: ServerLog, code: int | None
) -> Started:
    state = await asyncio.to_thread(control_state, directory, programs)
    if action is Action.SHUTDOWN and state == "shut down in recovery":
        return Started(0, "shut down", 0, "", follow.path, follow.stopped_at, follow.last_transaction)
    words = _last_words(follow, code)
    raise RecoveryError(
        f"the restored server ended before it reached its target: {words}", hint=_what_to_do(directory, follow, words)
    )


def _pg_ctl(directory: Path) -> str:
    """The beginning of a command, to be pasted."""
    return f"pg_ctl -D {shlex.quote(str(directory))}"


def _last_words(log: ServerLog, code: int | None) -> str:
    # Before it has read its configuration a server speaks without FATAL in front.
    return "; ".join(log.loud[-3:]) or log.last_line or f"exit status {code}"


def _what_to_do(directory: Path, follow: ServerLog, words: str) -> str:
    # One address that is taken is no reason to end, as long as there is another.
    if PORT_TAKEN.search(words) or (follow.port_taken and "could not create any TCP/IP sockets" in words):
        return (
            "another server uses that port; the directory is ready all the same: start it on a free port N, as its"
            f" owner, with {_pg_ctl(directory)} -o '-p N' start"
        )
    if "insufficient parameter settings" in words:
        return _raise_it(directory)
    if not follow.looked_at_data:
        return (
            f"it had not looked at its data yet, and {follow.path} says why: its configuration, as a rule; mend that,"
            f" and start the server as its owner, with {_pg_ctl(directory)} start, for the directory is ready"
        )
    return f"see {follow.path}; {left_behind(directory)}"


def left_behind(directory: Path) -> str:
    """What a server that was stopped on its way to the target leaves, and what to do with it."""
    # Taken away when the replay begins; before that the WAL to begin with is fetched.
    replayed = "nothing is replayed yet" if (directory / "backup_label").exists() else _HALF
    return f"{replayed}: run the same restore again with --force"


def _raise_it(directory: Path) -> str:
    return (
        f"raise that setting, in {directory}/postgresql.conf if it is not set elsewhere, and start the server as its"
        f" owner, with {_pg_ctl(directory)} start: it goes on where it was"
    )


def _check_reached(directory: Path, reaches: Lsn, log_file: Path) -> None:
    """PostgreSQL takes the first record that it cannot read for the end of the WAL, whatever is behind, and promotes.

    Where that was stands in the history of the timeline that it began then, which is the newest.
    """
    ended: Lsn | None = None
    if paths := sorted((directory / "pg_wal").glob("????????.history")):
        ended = parse_history(paths[-1].name, paths[-1].read_bytes())[-1].lsn
    if ended is None or ended < reaches:
        raise RecoveryError(
            f"recovery ended at LSN {ended or 'unknown'}, and the stored WAL goes on to LSN {reaches}: the server was"
            " stopped again, for it lacks what lies between",
            hint=f"{log_file} says why it went no further; the directory holds replayed data now: run the same restore"
            " again with --force, and --from another destination or with an earlier target",
        )


def _started(directory: Path, pid: int, state: str, follow: ServerLog) -> Started:
    port, socket_dir = 0, ""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (directory / "postmaster.pid").read_text("utf-8").splitlines()
        port, socket_dir = int(lines[3]), lines[4].strip()
    return Started(pid, state, port, socket_dir, follow.path, follow.stopped_at, follow.last_transaction)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """A server whose restore was interrupted would wait for WAL that nobody serves. Blocking."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGQUIT)
        process.wait()
