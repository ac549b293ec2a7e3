"""A base backup read from the data directory itself, by several workers, each making tar streams of its own.

    pg_backup_start ── list of tablespaces; these, then the data directory ── pg_backup_stop ── label, map, pg_control
                       worker 1 → base.1 ┐
                       worker 2 → base.2 ┴→ messages, mixed

The rules are those of PostgreSQL's documentation, "Making a Base Backup Using the Low Level API": the session that
began the backup stays until it ends; files may change, grow, shrink and vanish while they are read, for the WAL repairs
all of that; the control file comes last, so that no file is older than what it says of checkpoints.
"""

from __future__ import annotations

import asyncio
import os
import re
import struct
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from crc32c import crc32c

from handlers.pages import PAGE
from infra.pace import Pace
from infra.postgres.connect import BACKUP_NAME, Connection, connect, place
from infra.postgres.control import rows
from infra.postgres.copy_stream import Copy, Shared, Stream
from infra.postgres.damage import Damage
from infra.postgres.datadir import CONTROL, walk
from infra.settings import Settings
from pipeline.backup import (
    ArchiveBegan,
    ArchiveData,
    ArchiveEnded,
    BackupMessage,
    BackupStarted,
    BackupStopped,
    ManifestData,
    Tablespace,
)
from pipeline.errors import SourceError
from pipeline.make_manifest import ManifestMaker
from pipeline.manifest import WalRange
from pipeline.wal import Lsn

#: Seconds by which postmaster.pid and the server may tell different times of its start.
_SAME_START = 5
#: How often a control file is read that the server is writing.
_TRIES = 20
#: Seconds that the commit of a DROP TABLESPACE gets, and between two looks at it.
_DROPPED, _AGAIN = 2.0, 0.1
#: Seconds between looks at whether the session that began the backup is still there.
_LOOK = 2.0
_MANIFEST_PIECE = 1 << 20

_FACTS = """
select (select system_identifier from pg_control_system())::text,
       (select catalog_version_no from pg_control_system())::text,
       extract(epoch from pg_postmaster_start_time())::bigint,
       (select sum(pg_tablespace_size(oid))::bigint from pg_tablespace),
       current_setting('port')::int, current_setting('data_checksums') = 'on',
       (select setting::int from pg_settings where name = 'segment_size'),
       pg_is_in_recovery(),
       has_function_privilege('pg_backup_start(text, boolean)', 'execute')
           and has_function_privilege('pg_backup_stop(boolean)', 'execute'),
       current_setting('data_directory')
"""
#: What is looked at before a backup begins. Its own list is made as the server makes it: see ``linked_tablespaces``.
_TABLESPACES = """
select oid::bigint, pg_tablespace_location(oid) from pg_tablespace
where spcname not in ('pg_default', 'pg_global') order by oid
"""
#: The timeline that the server is on, as a primary or a standby.
_TIMELINE = """
select case when pg_is_in_recovery() then (select min_recovery_end_timeline from pg_control_recovery())
     else ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int end
"""


@dataclass(frozen=True, slots=True)
class DataDirectory:
    """What has to be known of a server before its files are read."""

    system_id: str
    major: int
    #: Name of its folder in a tablespace.
    version_folder: str
    tablespaces: tuple[Tablespace, ...]
    #: As the server calls itself.
    root: str
    #: Bytes of all tablespaces.
    estimate: int
    #: Whether pages have checksums, and how many make a segment file of a relation.
    checksums: bool
    blocks: int
    standby: bool


async def stream(
    settings: Settings,
    directory: Path,
    *,
    label: str = "walship",
    fast: bool = True,
    workers: int = 2,
    pace: Pace | None = None,
    damaged: Callable[[Damage], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> AsyncGenerator[BackupMessage, None]:
    """Take a base backup by reading ``directory``: see ``pipeline.backup`` for the messages.

    Read it within ``contextlib.aclosing``: closing it ends the session, and with it the backup on the server, without a
    trace. ``damaged`` is told of pages whose checksum is wrong, ``tell`` of links that are left out.

    Raises SourceError.
    """

    def passed(path: Path) -> None:
        tell(f"{path} is left out: it is a link or a special file, and PostgreSQL makes none there")

    async with await connect(settings, application_name=BACKUP_NAME) as connection:
        begun = await look(connection, directory)
        ((lsn,),) = await rows(connection, "select pg_backup_start(%s, %s)::text", (label, fast))
        ((timeline,),) = await rows(connection, _TIMELINE)
        start = Lsn.parse(lsn)
        # Not before: one that was created since, and before the start, is not made by replay, and its files would be
        # missing from the backup.
        tablespaces = await asyncio.to_thread(linked_tablespaces, directory)
        inside = _within(tablespaces, begun.root)
        copy = Copy(
            start, ManifestMaker(begun.system_id, begun.major), begun.checksums, begun.blocks, pieces=workers + 1
        )
        if pace is not None:
            copy.pace = pace.wait
            # With a low limit, pieces so small that there is something to tell several times a second.
            copy.piece = min(copy.piece, max(64 << 10, pace.rate // 4 // PAGE * PAGE))
        yield BackupStarted(start, timeline, tablespaces, begun.estimate)
        looked = time.monotonic()
        for tablespace in (*tablespaces, None):
            prefix = f"pg_tblspc/{tablespace.oid}/" if tablespace else ""
            version = begun.version_folder if tablespace else ""
            files = Shared(walk(directory / prefix, begun.major, tablespace=version, inside=inside, passed=passed))
            area = tablespace.oid if tablespace else "base"
            streams = [
                Stream(f"{area}.{n}", files, copy, prefix, large=n == 1 < workers, ends=tablespace is not None)
                for n in range(1, workers + 1)
            ]
            async with aclosing(_mixed(streams, copy)) as messages:
                async for message in messages:
                    yield message
                    if time.monotonic() - looked > _LOOK:  # or a server that is gone is noticed at the very end
                        await _look_again(connection, standby=begun.standby)
                        looked = time.monotonic()
        # Before the end: of a standby, it says up to where the WAL has to be replayed, which must not lie behind that.
        control = await asyncio.to_thread(_control, directory / CONTROL)
        stopped = await _stop(connection)
        _check_all_copied(tablespaces, stopped.map)
        last = await asyncio.to_thread(_last, streams[0], directory, stopped, control)
        try:
            for each in streams:
                pieces = each.end(last if each is streams[0] else b"")
                while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                    yield piece
                yield ArchiveEnded(each.archive)
        finally:
            copy.stop.set()  # a thread that waits for room ends too
        for found in copy.damaged:
            damaged(found)
        manifest = copy.manifest.finish(_ranges(start, timeline, stopped))
        for at in range(0, len(manifest), _MANIFEST_PIECE):
            yield ManifestData(bytes(manifest[at : at + _MANIFEST_PIECE]))
        yield BackupStopped(stopped.lsn, stopped.timeline)


async def _look_again(connection: Connection, *, standby: bool) -> None:
    """An hour is not spent on a backup that cannot be ended any more."""
    ((still,),) = await rows(connection, "select pg_is_in_recovery()")
    if still != standby:
        raise SourceError(
            f"the standby at {place(connection)} was promoted during the backup",
            hint="take it again: from a standby that is one still, or from the new primary",
        )


async def look(connection: Connection, directory: Path) -> DataDirectory:
    """Whether the server can be backed up by reading ``directory``. Begins nothing. Raises SourceError."""
    (found,) = await rows(connection, _FACTS)
    system_id, catalog, started, estimate, port, checksums, blocks, standby, allowed, root = found
    if not allowed:
        user = connection.info.user
        raise SourceError(
            f"the role {user} of PostgreSQL at {place(connection)} may not begin and end a backup by itself",
            hint="WALSHIP_DATA_DIR needs that: GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean),"
            f' pg_backup_stop(boolean) TO "{user}";',
        )
    tablespaces = await _settled(connection, directory)
    await asyncio.to_thread(_check_same, directory, system_id, int(started), port)
    major = connection.info.server_version // 10000
    return DataDirectory(
        system_id, major, f"PG_{major}_{catalog}", tablespaces, root, int(estimate or 0), checksums, blocks, standby
    )


async def _settled(connection: Connection, directory: Path) -> tuple[Tablespace, ...]:
    """The tablespaces, each with its folder there. DROP TABLESPACE removes its link before it commits, so for a moment
    one is listed that is gone already: only what stays so is refused. Raises SourceError.
    """
    deadline = time.monotonic() + _DROPPED
    while True:
        try:
            # The server itself looks at the link, and refuses to answer if there is none.
            found = tuple(Tablespace(int(oid), place) for oid, place in await rows(connection, _TABLESPACES))
            await asyncio.to_thread(_check_places, directory, found)
        except SourceError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_AGAIN)
        else:
            return found


def linked_tablespaces(directory: Path) -> tuple[Tablespace, ...]:
    """All that pg_tblspc leads to, as pg_backup_start makes its own list (``do_pg_backup_start``): of the folder, and
    not of pg_tablespace, which does not show one whose CREATE TABLESPACE is about to commit. Raises SourceError.

    One that is created later is not copied: replay of its WAL makes it.
    """
    found = []
    try:
        with os.scandir(directory / "pg_tblspc") as entries:
            for entry in entries:
                if re.fullmatch("[1-9][0-9]*", entry.name):
                    # No link: in place, with allow_in_place_tablespaces.
                    place = str(Path(entry).readlink()) if entry.is_symlink() else f"pg_tblspc/{entry.name}"
                    found.append(Tablespace(int(entry.name), place))
    except OSError as error:
        raise SourceError(
            f"{error.filename} cannot be read: {error.strerror}", hint="was a tablespace dropped just now? try again"
        ) from None
    _check_places(directory, found)
    return tuple(found)


def _within(tablespaces: Sequence[Tablespace], root: str) -> frozenset[str]:
    """Folders of the data directory that are tablespaces, and archives of their own: where nobody should have put
    them, and developers' in-place tablespaces.
    """
    return frozenset(
        found.location.removeprefix(f"{root}/")
        for found in tablespaces
        if found.location.startswith((f"{root}/", "pg_tblspc/"))
    )


def _check_all_copied(tablespaces: Sequence[Tablespace], places: str) -> None:
    """What the server says was there at the start is what was copied. ``places``: its tablespace_map."""
    copied = {str(found.oid) for found in tablespaces if not found.location.startswith("pg_tblspc/")}
    # The end of a line within a path is escaped by a backslash, and is no end of an entry.
    there = set(re.findall(r"^(\d+) (?:[^\\\n]|\\.)*$", places, re.MULTILINE | re.DOTALL))
    if copied != there:
        oids = ", ".join(sorted(copied ^ there, key=int))
        raise SourceError(
            f"tablespace {oids} was created or dropped in the very moment in which the backup began",
            hint="take the backup again",
        )


def _check_places(directory: Path, tablespaces: Sequence[Tablespace]) -> None:
    try:
        (directory / CONTROL).read_bytes()
        os.listdir(directory / "global")  # noqa: PTH208  the shortest way to see that it may be read
        for tablespace in tablespaces:
            place = directory / "pg_tblspc" / str(tablespace.oid)
            if not place.is_dir():
                raise SourceError(
                    f"tablespace {tablespace.oid} is at {tablespace.location} on the server, and {place} leads nowhere",
                    hint=f"mount {tablespace.location} here under the same path, or unset WALSHIP_DATA_DIR: the backup"
                    " is then taken through the server",
                )
            os.listdir(place)  # noqa: PTH208
    except OSError as error:
        raise SourceError(
            f"WALSHIP_DATA_DIR: {error.filename} cannot be read: {error.strerror}",
            hint="it is the server's data directory as walship sees it, and walship runs as the server's user",
        ) from None


def _check_same(directory: Path, system_id: str, started: int, port: int) -> None:
    """The directory is the very one that this server runs on, and not another's of the same cluster."""
    control = _control(directory / CONTROL)
    (found,) = struct.unpack_from("<Q", control)
    if str(found) != system_id:
        raise SourceError(
            f"WALSHIP_DATA_DIR: {directory} belongs to the cluster {found}, and the server to {system_id}",
            hint="POSTGRES_HOST and WALSHIP_DATA_DIR have to mean the same server",
        )
    try:
        lines = (directory / "postmaster.pid").read_text("latin-1").split("\n")
        same = abs(int(lines[2]) - started) <= _SAME_START and int(lines[3]) == port
    except (OSError, ValueError, IndexError):
        same = False
    if not same:
        raise SourceError(
            f"WALSHIP_DATA_DIR: the server at POSTGRES_HOST does not run on {directory}: its postmaster.pid tells of"
            " another start, or another port",
            hint="is it a standby's directory, or a copy? POSTGRES_HOST and WALSHIP_DATA_DIR must mean the same server",
        )


def _control(path: Path) -> bytes:
    """pg_control, read again while the server is writing it: until its own CRC is right.

    Where the CRC stands depends on the version, so it is looked for: somewhere in the first 512 bytes are the four that
    are the CRC-32C of all before them.
    """
    for _ in range(_TRIES):
        content = path.read_bytes()
        for at in range(64, min(512, len(content)) - 4, 4):
            if crc32c(content[:at]) == int.from_bytes(content[at : at + 4], "little"):
                return content
        time.sleep(0.01)
    raise SourceError(f"{path} is damaged: its checksum is wrong each time it is read", hint="see the server's log")


@dataclass(frozen=True, slots=True)
class _Stopped:
    lsn: Lsn
    timeline: int
    label: str
    map: str


async def _stop(connection: Connection) -> _Stopped:
    query = "select lsn::text, labelfile, spcmapfile from pg_backup_stop(wait_for_archive => false)"
    ((lsn, label, places),) = await rows(connection, query)
    ((timeline,),) = await rows(connection, _TIMELINE)
    return _Stopped(Lsn.parse(lsn), timeline, label, places or "")


def _last(stream: Stream, directory: Path, stopped: _Stopped, control: bytes) -> bytes:
    """What comes behind all other files: label and map as the server tells them, and the control file."""
    like = (directory / CONTROL).stat()
    now = int(time.time())
    pieces = [stream.content("backup_label", stopped.label.encode(), like, now)]
    if stopped.map:
        pieces.append(stream.content("tablespace_map", os.fsencode(stopped.map), like, now))
    pieces.append(stream.content(CONTROL, control, like, int(like.st_mtime)))
    return b"".join(pieces)


def _ranges(start: Lsn, timeline: int, stopped: _Stopped) -> list[WalRange]:
    match = re.search(r"^START TIMELINE: (\d+)$", stopped.label, re.MULTILINE)
    timeline = int(match[1]) if match else timeline
    if timeline != stopped.timeline:
        raise SourceError(
            f"the server changed from timeline {timeline} to {stopped.timeline} during the backup",
            hint="take the backup again",
        )
    return [WalRange(timeline, start, stopped.lsn)]


async def _mixed(streams: Sequence[Stream], copy: Copy) -> AsyncGenerator[BackupMessage, None]:
    """The pieces of all streams as they come."""
    queue: asyncio.Queue[ArchiveData | ArchiveEnded | Exception | None] = asyncio.Queue(len(streams))

    async def work(stream: Stream) -> None:
        try:
            while (message := await asyncio.to_thread(stream.next)) is not None:
                await queue.put(message)
            if stream.ends:
                await queue.put(ArchiveEnded(stream.archive))
        except Exception as error:  # noqa: BLE001 - raised by whoever reads, who would else wait for ever
            await queue.put(error)
        else:
            await queue.put(None)

    for stream in streams:
        yield ArchiveBegan(stream.archive)
    tasks = [asyncio.create_task(work(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            message = await queue.get()
            if isinstance(message, Exception):
                raise message
            if message is None:
                left -= 1
            else:
                yield message
    finally:
        if not all(task.done() for task in tasks):
            copy.stop.set()  # and what they read in their threads ends too
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
