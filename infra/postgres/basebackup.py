"""BASE_BACKUP over the replication protocol: a stream of messages, nothing on disk, no more memory than one message.

PostgreSQL 15 and later send everything in one COPY: ``n`` begins an archive, ``d`` is data of it, ``p`` is progress,
``m`` begins the manifest (documentation: "Streaming Replication Protocol", BASE_BACKUP).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from psycopg.pq import ExecStatus

from infra.pace import Pace
from infra.postgres.connect import RefusedError, connect
from infra.postgres.control import rows
from infra.postgres.damage import DATA_CORRUPTED, Damage, Warnings
from infra.postgres.replication import ReplicationConnection, Row, rows_of
from infra.settings import Settings
from pipeline.backup import (
    ArchiveBegan,
    ArchiveData,
    BackupMessage,
    BackupStarted,
    BackupStopped,
    ManifestData,
    Tablespace,
)
from pipeline.contracts import Buffer
from pipeline.errors import SourceError
from pipeline.wal import Lsn

#: The first version with this form of the stream.
OLDEST = 15
#: The first version whose BASE_BACKUP sends tablespaces that were made with allow_in_place_tablespaces.
IN_PLACE = 16
#: The first version with incremental backups.
INCREMENTAL = 17
_FULL = (
    "a full backup is possible at any time, and later ones can build on it: walship backup (wal_summary_keep_time has"
    " to be longer than the time between two backups)"
)
_T = TypeVar("_T")


async def stream(
    settings: Settings,
    *,
    label: str = "walship",
    fast: bool = True,
    pace: Pace | None = None,
    since: Buffer | None = None,
    damaged: Callable[[Damage], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> AsyncGenerator[BackupMessage, None]:
    """Take a base backup: see ``pipeline.backup`` for the order of messages. Data comes in pieces of up to 32 KB.

    Read it within ``contextlib.aclosing``: closing the generator closes the connection, and that ends the backup on the
    server. The server sends only as fast as messages are taken, ``pace`` at most. ``fast`` asks for an immediate
    checkpoint. ``since``: the manifest of an earlier backup; what changed since that comes, in files named
    ``INCREMENTAL.…`` (PostgreSQL 17 and later). ``damaged`` is told of pages whose checksum the server found wrong,
    ``tell`` of everything else that it warns of.

    Does not wait for WAL: the WAL from start to stop LSN must be safe before the backup counts. SourceError with the
    server's words if it fails at any point.
    """
    async with await ReplicationConnection.open(settings) as connection:
        await _refuse_unable(connection.server_version // 10000, settings)
        warnings = Warnings()
        connection.warned(warnings.hear)
        if since is not None:
            await _upload(connection, since)
        await connection.send(_command(label, fast=fast, incremental=since is not None))
        yield await (_started(connection) if since is None else _started_since(connection))
        result = await connection.result()
        if result is None or result.status != ExecStatus.COPY_OUT:
            raise SourceError("PostgreSQL did not begin to send the base backup", hint="see the server's log")
        in_manifest = False
        async for message in connection.copy_out():
            kind, body = message[0], message[1:]
            if kind == ord("d"):
                if pace is not None and (seconds := pace.take(len(body))) > 0:
                    await asyncio.sleep(seconds)
                yield ManifestData(bytes(body)) if in_manifest else ArchiveData(bytes(body))
            elif kind == ord("n"):
                yield ArchiveBegan(bytes(body).split(b"\0", 1)[0].decode().removesuffix(".tar"))
            elif kind == ord("m"):
                in_manifest = True
            elif kind != ord("p"):
                raise SourceError(
                    f"PostgreSQL sent a message {chr(kind)!r} in a base backup that walship does not know"
                )
        stopped = await _stopped(connection)
        for words in warnings.words:
            tell(f"PostgreSQL warns: {words}")
        for found in warnings.damaged():
            damaged(found)
        yield stopped


def refuse_too_old(major: int) -> None:
    """Raises SourceError for versions without incremental backups."""
    if major < INCREMENTAL:
        raise SourceError(
            f"PostgreSQL {major} makes no incremental backups: that begins with {INCREMENTAL}",
            hint="take full ones less often, for WAL bridges the time between them, and raise the 26 hours of the alert"
            " WalshipBackupTooOld where that is less than daily; or upgrade the server",
        )


async def _refuse_unable(major: int, settings: Settings) -> None:
    """Raises SourceError for a server that sends no backup, or one that lacks tables."""
    if major < OLDEST:
        raise SourceError(
            f"PostgreSQL {major} is too old: walship backs up {OLDEST} and later",
            hint="use another tool for this server until it is upgraded",
        )
    if major >= IN_PLACE:
        return
    async with await connect(settings) as connection:  # the other one speaks no SQL
        query = (
            "select spcname::text from pg_tablespace where pg_tablespace_location(oid) like 'pg_tblspc/%%' order by 1"
        )
        if names := [name for (name,) in await rows(connection, query)]:
            raise SourceError(
                f"the tablespace {names[0]} lies within the data directory (allow_in_place_tablespaces), and PostgreSQL"
                f" {OLDEST} sends no such tablespace in a base backup",
                hint="set WALSHIP_DATA_DIR, so that walship reads the files itself; or move its tables to another one",
            )


async def _upload(connection: ReplicationConnection, manifest: Buffer) -> None:
    """The manifest that the server compares its WAL summaries with."""
    refuse_too_old(connection.server_version // 10000)
    if await connection.show("summarize_wal") != "on":
        raise SourceError(
            "summarize_wal is off: without summaries of its WAL the server does not know what has changed",
            hint="in psql: ALTER SYSTEM SET summarize_wal = on; SELECT pg_reload_conf(); then take a full backup first:"
            " walship backup",
        )
    await connection.send("UPLOAD_MANIFEST")
    result = await connection.result()
    if result is None or result.status != ExecStatus.COPY_IN:
        raise SourceError("PostgreSQL did not take the manifest of the earlier backup", hint="see the server's log")
    await connection.copy_in(manifest)
    await _told_to_take_a_full_one(_end(connection))


async def _end(connection: ReplicationConnection) -> None:
    while await connection.result() is not None:
        pass


async def _told_to_take_a_full_one(answer: Awaitable[_T]) -> _T:
    """Whatever the server says against an incremental backup, this helps."""
    try:
        return await answer
    except RefusedError as error:
        error.hint = f"{error.hint}; {_FULL}" if error.hint else _FULL
        raise


def _command(label: str, *, fast: bool, incremental: bool) -> str:
    quoted = label.replace("'", "''")
    options = (
        *(["INCREMENTAL 'true'"] if incremental else []),
        f"LABEL '{quoted}'",
        "PROGRESS",
        f"CHECKPOINT '{'fast' if fast else 'spread'}'",
        "MANIFEST 'yes'",
        # Without it the stream lacks the map, and a restore could not know where tablespaces belong.
        "TABLESPACE_MAP 'true'",
        "WAL 'false'",
        # With WAIT the server itself waits for its archiver, for ever while that fails; we wait for the WAL to be
        # safe in the stores, which says more.
        "WAIT 'false'",
    )
    return f"BASE_BACKUP ({', '.join(options)})"


async def _started(connection: ReplicationConnection) -> BackupStarted:
    position = await _only_row(connection)
    result = await connection.result()
    rows = rows_of(result) if result is not None else []
    # oid, location, size in kB; the default tablespace has neither oid nor location.
    tablespaces = tuple(Tablespace(int(row[0]), row[1] or "") for row in rows if row[0] is not None)
    estimate = sum(int(row[2] or 0) for row in rows) * 1024
    return BackupStarted(Lsn.parse(position[0] or ""), int(position[1] or 0), tablespaces, estimate)


async def _started_since(connection: ReplicationConnection) -> BackupStarted:
    """Of an incremental backup. The server's estimate is that of a full one."""
    return replace(await _told_to_take_a_full_one(_started(connection)), estimate=0)


async def _stopped(connection: ReplicationConnection) -> BackupStopped:
    position = await _only_row(connection)
    try:
        while await connection.result() is not None:
            pass  # the end of the command: an error could still come
    except RefusedError as error:
        # Everything has been sent. A cluster with a damaged page needs its backups more than any other.
        if error.state != DATA_CORRUPTED:
            raise
    return BackupStopped(Lsn.parse(position[0] or ""), int(position[1] or 0))


async def _only_row(connection: ReplicationConnection) -> Row:
    """The start or the stop position: LSN and timeline."""
    result = await connection.result()
    rows = rows_of(result) if result is not None else []
    if len(rows) != 1:
        raise SourceError("PostgreSQL did not tell the position of the base backup", hint="see the server's log")
    return rows[0]
