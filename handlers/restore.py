"""Lays a base backup down: parts are fetched a few ahead, compared with backup_info, unpacked, and made durable.

    prepare the folders, set the marker → parts in order → manifest → links → what makes it recover (``complete``)
    → fsync of everything, once → pg_control → the marker goes

Without global/pg_control no PostgreSQL starts, so a directory that is half restored cannot be started by accident: it
is the last file to appear, after all others are durable.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec

from handlers.target_dir import MARKER, Targets, clear, give, prepare, sync
from handlers.unpack import CONTROL, MAP, Unpacker
from pipeline.backup import ArchiveInfo, BackupInfo
from pipeline.catalog import manifest_key, part_key
from pipeline.contracts import Fetch
from pipeline.errors import IntegrityError, ObjectMissing, RecoveryError
from pipeline.objects import MAX_PLAIN

#: Parts that are fetched and decoded while one is unpacked.
_AHEAD = 3

P = ParamSpec("P")

#: Told (bytes done, bytes in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Laid:
    """What laying a backup down took; bytes are of plaintext."""

    files: int
    #: Bytes in the backup.
    size: int
    #: Bytes of the parts that were fetched.
    fetched: int
    #: Bytes that lay there already and were kept.
    kept: int
    #: Files that were removed because the backup has none of that name.
    removed: int


async def lay_down(
    backup: BackupInfo,
    targets: Targets,
    *,
    fetch: Fetch,
    complete: Callable[[Path], None],
    progress: Progress = lambda _done, _all: None,
) -> int:
    """Restore the files of a backup into folders that ``look`` approved of. Returns the number of files.

    ``complete`` is called with the data directory when all files are there but pg_control, to write what has to be in
    place before a server can start. Raises RecoveryError, IntegrityError, StoreError; then the marker stays, and the
    same restore can be run again as it is. (What a server has been started on can be replaced with ``force`` only.)
    """
    try:
        await _to_the_end(prepare, targets, backup)
        await _to_the_end(clear, targets)
        return await _lay_down(backup, targets, fetch, complete, progress)
    except OSError as error:
        raise RecoveryError(
            f"{error.filename or targets.directory} cannot be written: {error.strerror}",
            hint="what was restored so far is marked as incomplete: run the same restore again as it is",
        ) from error


async def _lay_down(
    backup: BackupInfo, targets: Targets, fetch: Fetch, complete: Callable[[Path], None], progress: Progress
) -> int:
    parts = _parts(backup, fetch)
    control, control_mode, files, done = bytearray(), 0o600, 0, 0
    try:
        for archive in backup.archives:
            unpacker = _unpacker(archive, targets)
            try:
                for _ in archive.parts:
                    plain = await anext(parts)
                    await _to_the_end(unpacker.feed, plain)
                    done += len(plain)
                    progress(done, backup.size)
                await _to_the_end(unpacker.finish)
            finally:
                unpacker.abandon()
            if unpacker.size != archive.size:
                raise IntegrityError(f"the archive {archive.name} of {backup.name} has {unpacker.size} bytes, not the"
                                     f" {archive.size} that its backup_info says")  # fmt: skip
            files += unpacker.files
            if unpacker.control:
                control, control_mode = unpacker.control, unpacker.control_mode
    finally:
        await parts.aclose()
    if not control:
        raise IntegrityError(f"backup {backup.name} has no {CONTROL}")
    manifest = await _manifest(backup, fetch)
    await _to_the_end(_finish, targets, manifest, complete, control, control_mode)
    return files + 1


async def _to_the_end(work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Run it in a thread. When we are cancelled the thread goes on: wait for it, because it writes to open files."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        await asyncio.shield(task)
    finally:
        if not task.done():
            await asyncio.wait([task])
            task.exception()  # whatever it was, we are cancelled


def _unpacker(archive: ArchiveInfo, targets: Targets) -> Unpacker:
    oids = {str(tablespace.oid): path for tablespace, path in targets.tablespaces}
    if archive.name == "base":
        links = frozenset(f"pg_tblspc/{oid}" for oid in oids)
        skip = frozenset({MAP}) if targets.moved else frozenset[str]()
        return Unpacker("base", targets.directory, links=links, skip=skip, owner=targets.owner)
    if archive.name not in oids:
        raise IntegrityError(f"the archive {archive.name} is neither base nor a tablespace of the backup")
    folder = oids[archive.name]
    if folder.is_relative_to(targets.directory):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        give(folder, targets.owner)
    return Unpacker(archive.name, folder, owner=targets.owner)


async def _parts(backup: BackupInfo, fetch: Fetch) -> AsyncGenerator[bytearray, None]:
    """The plaintext of all parts of all archives in order; a few are under way while one is unpacked."""
    wanted = deque(
        (part_key(backup.name, archive.name, number), digest)
        for archive in backup.archives
        for number, digest in enumerate(archive.parts, 1)
    )
    under_way: deque[asyncio.Task[bytearray]] = deque()
    try:
        while wanted or under_way:
            while wanted and len(under_way) < _AHEAD:
                under_way.append(asyncio.create_task(_checked(*wanted.popleft(), backup, fetch)))
            plain = await under_way[0]
            under_way.popleft()
            yield plain
    finally:
        for task in under_way:
            task.cancel()
        # Whatever they end with: the error that brought us here is the one to tell.
        await asyncio.gather(*under_way, return_exceptions=True)


async def _manifest(backup: BackupInfo, fetch: Fetch) -> bytearray | None:
    return await _checked(manifest_key(backup.name), backup.manifest, backup, fetch) if backup.manifest else None


async def _checked(name: str, digest: str, backup: BackupInfo, fetch: Fetch) -> bytearray:
    """An object of the backup, being the very one that its backup_info lists. Raises IntegrityError."""
    try:
        fetched = await fetch(name, backup=backup.id, most=MAX_PLAIN)
    except ObjectMissing as error:
        raise IntegrityError(
            f"{error.fact}: backup {backup.name} is not complete", hint="choose another one with --backup"
        ) from None
    if fetched.digest != digest:
        raise IntegrityError(
            f"{fetched.destination}: {name} is not the one that the backup_info of {backup.name} lists",
            hint="it was exchanged; read from another destination with --from, or choose another backup",
        )
    return fetched.plain


def _finish(
    targets: Targets,
    manifest: bytearray | None,
    complete: Callable[[Path], None],
    control: bytearray,
    control_mode: int,
) -> None:
    directory = targets.directory
    if manifest is not None:
        _create(directory / "backup_manifest", manifest, 0o600, targets)
    _link(targets)
    complete(directory)
    _sync_all([directory, *(path for _, path in targets.tablespaces if not path.is_relative_to(directory))])
    _create(directory / CONTROL, control, control_mode & 0o777, targets)
    sync(directory / CONTROL)
    sync((directory / CONTROL).parent)
    (directory / MARKER).unlink()
    sync((directory / MARKER).parent)


def _link(targets: Targets) -> None:
    """pg_tblspc/OID → its folder, and a tablespace_map that agrees: the server makes its links from that."""
    lines = []
    for tablespace, path in targets.tablespaces:
        if path.is_relative_to(targets.directory):
            continue
        link = targets.directory / "pg_tblspc" / str(tablespace.oid)
        link.symlink_to(path)
        give(link, targets.owner)
        escaped = "".join(f"\\{c}" if c in "\\\n\r" else c for c in str(path))
        lines.append(f"{tablespace.oid} {escaped}\n")
    if targets.moved and lines:
        _create(targets.directory / MAP, os.fsencode("".join(lines)), 0o600, targets)


def _create(path: Path, content: bytes | bytearray, mode: int, targets: Targets) -> None:
    with path.open("xb") as out:
        out.write(content)
    path.chmod(mode)
    give(path, targets.owner)


def _sync_all(folders: list[Path]) -> None:
    """Fsync each file and folder once, after all are written: the disk has had time to write most of it by then."""
    with ThreadPoolExecutor(4, thread_name_prefix="fsync") as pool:
        for folder in folders:
            for path, names, files in os.walk(folder):
                # exhausted at once: errors are raised, and a million futures are never held
                for _ in pool.map(_sync_file, [os.path.join(path, name) for name in files]):  # noqa: PTH118
                    pass
                sync(Path(path))
                names.sort()


def _sync_file(path: str) -> None:
    if not os.path.islink(path):  # noqa: PTH114 - a million files
        sync(Path(path))
