"""A restore from end to end: plan, look, lay down, neutralise, start, feed. What ``infra/cli/restore.py`` calls."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from handlers.feed import Feed, Turns
from handlers.fetch import read_catalog
from handlers.plan import plan_restore
from handlers.restore import Laid, lay_down
from handlers.serve_wal import WalServer
from handlers.target_dir import Targets, folders, look
from handlers.target_lock import Hold
from infra.fetch_context import FetchContext
from infra.following import WalAsker, follow
from infra.keys import RepositoryKeys
from infra.postgres import programs as installed
from infra.postgres.bare_conf import furnish, left, to_be_put
from infra.postgres.neighbours import refuse_shared
from infra.postgres.recovery_files import (
    FORGET,
    Neutralised,
    forget_recovery,
    notices,
    remove_recovery_files,
    settings_for,
    write_recovery_files,
)
from infra.postgres.restored import Replay, Started, left_behind, standby_ended, start_restored
from infra.postgres.wal_script import FEED, FOLDER
from infra.settings import Settings
from infra.storage.reported import confirmed
from pipeline.contracts import Clock, Fetch, Store
from pipeline.errors import ConfigError, RecoveryError, WalshipError
from pipeline.recovery import RestorePlan
from pipeline.targets import Action, Target, TargetKind
from pipeline.wal import Lsn

#: Replay keeps restored segments until its next restart point; about max_wal_size, whose default is 1 GB.
_WAL_MARGIN = 1 << 30

#: How the server's sh script starts ``fetch-wal``: this Python, with nothing of the data directory on its path.
FETCH_WAL = (sys.executable, "-P", "-m", "infra.cli", "fetch-wal")

#: Beside what is said of the file with the context.
_HOLDS_RING = (
    "that file holds the opened key ring, for a standby has to read what is encrypted later: whoever has it reads all"
    " of the repository and can write to it; keep this host as safe as the service's"
)


@dataclass(frozen=True, slots=True)
class Repository:
    """Where to restore from: what a ``wiring.Site`` has, at the destinations that shall be read."""

    settings: Settings
    #: URLs of the destinations, and their stores rooted at the cluster's folder; same order.
    urls: tuple[str, ...]
    stores: tuple[Store, ...]
    system_id: str
    keys: RepositoryKeys
    fetch: Fetch
    clock: Clock
    allow_unencrypted: bool = False
    #: What ``fetch`` holds while it decodes, for the feed to hold while it writes.
    turns: Turns | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where to restore to, and what happens then."""

    directory: Path
    #: Tablespace location at the time of the backup → the new one.
    tablespaces: Mapping[str, str] = field(default_factory=dict)
    force: bool = False
    #: Keep what lies there already and is as the backup has it.
    delta: bool = False
    #: Go on following the archive, as a standby, in place of stopping at a target.
    standby: bool = False
    start: bool = False
    #: Where the started server will listen, as far as that can be told before its files are there; None: unknown.
    port: int | None = None
    #: WALSHIP_PG_BIN_DIR; None looks in the usual places. Used with ``start``, and checked whenever it is given.
    bin_dir: Path | None = None
    #: Log of the started server; None: beside the directory, or in it where none can be made beside it.
    log_file: Path | None = None
    #: For the started server's command line (a port and the like).
    options: Mapping[str, str] = field(default_factory=dict)
    #: Further lines for postgresql.auto.conf (a drill's).
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Restored:
    """The result."""

    directory: Path
    laid: Laid
    neutralised: tuple[Neutralised, ...]
    notices: tuple[str, ...]
    #: None unless the server was to be started.
    server: Started | None
    #: Seconds that it took to lay the backup down, and from there to the server being at its target.
    base_seconds: float = 0.0
    replay_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told how far it is."""

    #: Bytes of the base backup: done, in all.
    files: Callable[[int, int], None] = lambda _done, _all: None
    replay: Callable[[Replay], None] = lambda _: None
    #: Sentences, when they become known.
    say: Callable[[str], None] = lambda _: None
    #: A standby has caught up, and is fed from here on.
    following: Callable[[Restored], None] = lambda _: None


async def make_plan(
    repository: Repository,
    target: Target,
    *,
    backup: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> RestorePlan:
    """List the repository and decide. Touches nothing. Raises RecoveryError, StoreError, IntegrityError."""
    told = await confirmed(repository.stores)  # first: what was safe by then is listed, or is gone
    catalog = await read_catalog(repository.stores, repository.fetch, repository.system_id)
    plan = await plan_restore(
        catalog,
        target,
        fetch=repository.fetch,
        now=repository.clock.now(),
        backup=backup,
        progress=progress,
        confirmed=told,
    )
    await refuse_shared(plan, repository.fetch)
    return plan


async def check_place(plan: RestorePlan, place: Place) -> Targets:
    """All that can be refused before anything is touched: folders, room, programs, port. For ``--dry-run`` too."""
    with Hold(folders(plan.backup, place.directory, place.tablespaces), make=False):
        pass  # and let go: looking keeps no restore out that begins now
    return await _check_place(plan, place)


async def _check_place(plan: RestorePlan, place: Place) -> Targets:
    if place.start or place.bin_dir is not None:
        await asyncio.to_thread(installed.find, plan.backup.major, bin_dir=place.bin_dir)
    margin = min(plan.path.size, _WAL_MARGIN)
    targets = await asyncio.to_thread(
        look,
        plan.backup,
        place.directory,
        place.tablespaces,
        before=plan.before,
        force=place.force,
        delta=place.delta,
        wal_margin=margin,
    )
    if place.start and place.port is not None:
        await asyncio.to_thread(_check_port, place.port)  # last: a server that runs on the folder itself is told before
    return targets


def _check_port(port: int) -> None:
    """A server that finds its port taken ends, after everything was restored."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: what was closed is not in use
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {port} is in use here, and the restored server would listen there",
                    hint="end what uses it, or restore with --port N, a free one; nothing was touched",
                ) from None


async def restore(
    repository: Repository,
    plan: RestorePlan,
    place: Place,
    *,
    watch: Watch | None = None,
    fetch_wal: Sequence[str] = FETCH_WAL,
) -> Restored:
    """Restore as planned. With ``start`` it returns once the server is at its target, and the server goes on running.

    No other restore gets into the folders until it returns. Raises RecoveryError, StoreError, IntegrityError,
    SourceError, ConfigError.
    """
    watch = watch or Watch()
    with Hold(folders(plan.backup, place.directory, place.tablespaces)) as held:
        for remark in held.remarks:
            watch.say(remark)
        return await _restore(repository, plan, place, watch, fetch_wal)


async def _restore(
    repository: Repository, plan: RestorePlan, place: Place, watch: Watch, fetch_wal: Sequence[str]
) -> Restored:
    targets = await _check_place(plan, place)
    for remark in targets.notices:
        watch.say(remark)
    clock = repository.clock
    began = clock.monotonic()
    laid, neutralised = await _lay_down(repository, plan, place, targets, watch, fetch_wal)
    laid_after = clock.monotonic()
    said = _told(repository, plan, place, targets, neutralised)
    said = (*said, *await _configured(plan, place, targets, laid))
    for remark in said:
        watch.say(remark)

    def result(server: Started | None) -> Restored:
        return Restored(
            targets.directory,
            laid,
            neutralised,
            (*targets.notices, *said),
            server,
            base_seconds=laid_after - began,
            replay_seconds=clock.monotonic() - laid_after,
        )

    if not place.start:
        return result(None)
    return result(await _start(repository, plan, place, targets, watch, result))


async def _lay_down(
    repository: Repository, plan: RestorePlan, place: Place, targets: Targets, watch: Watch, fetch_wal: Sequence[str]
) -> tuple[Laid, tuple[Neutralised, ...]]:
    """The backup's files, and last those that make a recovery of it."""
    context = FetchContext.of(
        repository.settings,
        repository.urls,
        repository.system_id,
        plan.lineage,
        plan.path.stretches,
        repository.keys,
        allow_unencrypted=repository.allow_unencrypted,
        follow=place.standby,
    )
    neutralised: list[Neutralised] = []

    def complete(directory: Path) -> None:
        neutralised.extend(
            write_recovery_files(
                directory,
                settings_for(plan, extra=place.settings, standby=place.standby),
                segment_size=plan.lineage.segment_size,
                fetch=fetch_wal,
                context=context.encode(),
                owner=targets.owner,
                standby=place.standby,
            )
        )

    laid = await lay_down(
        plan.backup,
        targets,
        fetch=repository.fetch,
        complete=complete,
        progress=watch.files,
        before=plan.before,
    )
    return laid, tuple(neutralised)


def _told(
    repository: Repository, plan: RestorePlan, place: Place, targets: Targets, neutralised: Sequence[Neutralised]
) -> tuple[str, ...]:
    """What there is to know of the recovery files."""
    said = notices(
        neutralised,
        targets.directory,
        archiving="watch" in repository.settings.sources,
        promoted=place.start and plan.stop.action is Action.PROMOTE and not place.standby,
    )
    return (*said, _HOLDS_RING) if place.standby and repository.keys.encrypted else said


async def _configured(plan: RestorePlan, place: Place, targets: Targets, laid: Laid) -> tuple[str, ...]:
    """Configuration that no backup has: written where the server is to start, else asked for. What is to be said."""
    kept = await asyncio.to_thread(left, targets.directory, laid.spared)
    if place.start:
        programs = await asyncio.to_thread(installed.find, plan.backup.major, bin_dir=place.bin_dir)
        conf = await asyncio.to_thread(furnish, targets.directory, programs, port=place.port, owner=targets.owner)
    else:
        conf = await asyncio.to_thread(to_be_put, targets.directory)
    return tuple(filter(None, (kept, conf)))


async def _start(
    repository: Repository,
    plan: RestorePlan,
    place: Place,
    targets: Targets,
    watch: Watch,
    result: Callable[[Started], Restored],
) -> Started:
    programs = await asyncio.to_thread(installed.find, plan.backup.major, bin_dir=place.bin_dir)
    directory = targets.directory
    reaches = plan.end if plan.stop.kind is TargetKind.LATEST else None
    if place.standby and plan.end is not None:
        # What the last segment ends with may be a part of a record, which a standby goes on waiting for.
        reaches = Lsn(max(0, plan.end - plan.lineage.segment_size))
    promoted = plan.stop.action is Action.PROMOTE
    asker = WalAsker(watch.say)
    async with feeding(
        repository.fetch, plan, directory, owner=targets.owner, say=watch.say, turns=repository.turns, asker=asker
    ) as feed:
        try:
            try:
                server = await start_restored(
                    directory,
                    programs,
                    action=plan.stop.action,
                    reaches=reaches,
                    standby=place.standby,
                    log_file=place.log_file,
                    options=place.options,
                    progress=watch.replay,
                )
            except asyncio.CancelledError:
                watch.say(f"the server is stopped again; {left_behind(directory)}")
                raise
            if place.standby:
                watch.following(result(server))
                asker.follows = True
                wal = WalServer(repository.fetch, plan.lineage)
                ended = standby_ended(server, directory, programs)
                promoted = await follow(server, ended, plan, wal, watch.say)
        except RecoveryError as error:
            if (failure := cause(feed)) is None:
                raise
            failure.hint = "; ".join(filter(None, (failure.hint, error.hint)))
            raise failure from error
    if promoted:
        await asyncio.to_thread(remove_recovery_files, directory)
        if not await asyncio.to_thread(forget_recovery, directory, owner=targets.owner):
            watch.say(FORGET)
    return server


def cause(feed: Feed) -> WalshipError | None:
    """Why the feed served something not: the server only knows that restore_command failed."""
    return next((failure for failure in reversed(feed.failures) if isinstance(failure, WalshipError)), None)


@contextlib.asynccontextmanager
async def feeding(
    fetch: Fetch, plan: RestorePlan, directory: Path, *, owner: tuple[int, int] | None, say: Callable[[str], None],
    turns: Turns | None = None, asker: WalAsker | None = None,
) -> AsyncIterator[Feed]:  # fmt: skip
    """Serve WAL to the server on a restored directory for as long as the block lasts."""
    server, ask = WalServer(fetch, plan.lineage, plan.path.stretches), (asker or WalAsker(say)).ask
    feed = Feed(
        directory / FOLDER / FEED, partial(ask, server.read), plan.path.finished(), plan.lineage.segment_size,
        owner=owner, pour=partial(ask, server.pour), turns=turns, notify=say,
    )  # fmt: skip
    feed.open()
    task = asyncio.create_task(feed.serve())
    try:
        yield feed
    finally:
        task.cancel()
        try:
            # However often we are cancelled meanwhile: while it is at work its folders stay open.
            while not task.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([task])
            if not task.cancelled():
                task.result()
        finally:
            feed.close()
