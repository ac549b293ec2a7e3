"""Lays a base backup down: its parts are fetched, compared with backup_info and written at their places side by side.

    prepare the folders, set the marker → pg_control goes → what lies there: keep what is as in the backup, remove the
    rest → the parts that are needed → links, manifest, what makes it recover (``complete``) → fsync of everything, once
    → pg_control → the marker goes

At whatever moment that ends, no server can be started on the directory until it is whole; and because nothing of a file
is believed but its checksum, the same restore goes on with what is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from handlers.delta import Comparison, Present, remove_others, repair
from handlers.full_disk import cannot_write
from handlers.lay_parts import Parts
from handlers.lay_seal import seal
from handlers.target_dir import CONTROL, MAP, Targets, clear, disarm, give, prepare
from handlers.unpack import Unpacker
from pipeline.backup import ArchiveInfo, BackupInfo, area_of
from pipeline.catalog import PART_SIZE, index_key, manifest_key
from pipeline.contracts import Buffer, Fetch
from pipeline.errors import IntegrityError, ObjectMissing
from pipeline.index import Slice
from pipeline.layout import Layout, prefix_of
from pipeline.manifest import FileLine, files_of, read_manifest
from pipeline.objects import MAX_PLAIN

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
    part_size: int = PART_SIZE,
) -> Laid:
    """Restore the files of a backup into folders that ``look`` approved of.

    ``complete`` is called with the data directory when all files are there but pg_control, to write what has to be in
    place before a server can start. ``progress`` counts bytes of plaintext, kept ones too. ``part_size``: of this
    backup; the format knows one only.

    Raises RecoveryError, IntegrityError, StoreError; then the marker stays, and the same restore can be run again as it
    is. (What a server has been started on can be replaced with ``force`` or ``delta`` only.)
    """
    work = _LayDown(backup, targets, fetch, complete, progress, part_size)
    try:
        return await work.run()
    except OSError as error:
        raise cannot_write(error, targets.directory, work.left()) from error


class _LayDown:
    """One restore under way."""

    def __init__(
        self,
        backup: BackupInfo,
        targets: Targets,
        fetch: Fetch,
        complete: Callable[[Path], None],
        progress: Progress,
        part_size: int,
    ) -> None:
        self._backup = backup
        self._targets = targets
        self._fetch = fetch
        self._complete = complete
        self._progress = progress
        self._part_size = part_size
        #: Bytes of plaintext that lie where they belong.
        self._done = 0
        #: Archive → bytes of it that are still to be written.
        self._left = {archive.name: archive.size for archive in backup.archives}

    async def run(self) -> Laid:
        backup, targets = self._backup, self._targets
        manifest = await self._manifest()  # before anything is touched: the store answers
        await _to_the_end(partial(prepare, targets, backup))
        await _to_the_end(partial(disarm, targets))
        present = Present()
        if targets.delta:
            present = await self._compare(manifest)
        layout = await self._layout(present)
        remove = partial(remove_others, targets, present.kept) if targets.delta else partial(clear, targets)
        await _to_the_end(remove)
        async with AsyncExitStack() as stack:
            unpackers = {archive.name: self._unpacker(archive, present) for archive in backup.archives}
            for unpacker in unpackers.values():
                stack.callback(unpacker.abandon)
            for (name, _), size in layout.kept.items():
                self._left[name] -= size
            parts = Parts(backup, self._fetch, unpackers, layout, part_size=self._part_size, progress=self._laid)
            await parts.lay()
        controls = [unpacker for unpacker in unpackers.values() if unpacker.control]
        if len(controls) != 1:
            raise IntegrityError(f"backup {backup.name} has {'more than one' if controls else 'no'} {CONTROL}")
        control, mode = controls[0].control, controls[0].control_mode
        if present.kept:
            await _to_the_end(partial(repair, targets, present.kept, mode))
        await _to_the_end(partial(seal, targets, manifest, self._complete, control, mode))
        files = sum(unpacker.files for unpacker in unpackers.values()) + len(present.kept) + 1
        return Laid(files, backup.size, parts.fetched, sum(present.kept.values()), len(layout.others))

    async def _compare(self, manifest: bytearray) -> Present:
        """What of the target is as the manifest says."""
        wanted = await asyncio.to_thread(_lines, manifest) if manifest else {}
        loop = asyncio.get_running_loop()

        def kept(size: int) -> None:
            loop.call_soon_threadsafe(self._add, size)

        comparison = Comparison(self._targets, wanted, kept)
        await _to_the_end(comparison.run, comparison.stop.set)
        return comparison.found

    async def _layout(self, present: Present) -> Layout:
        backup = self._backup
        layout = Layout(backup.archives, kept=present.kept, others=set(present.others), part_size=self._part_size)
        for number, digest in enumerate(backup.index, 1):
            name = index_key(backup.name, number)
            content = await self._checked(name, digest)
            await asyncio.to_thread(_read_index, name, content, layout)
        layout.end()
        return layout

    def _unpacker(self, archive: ArchiveInfo, present: Present) -> Unpacker:
        targets, area = self._targets, area_of(archive.name)
        oids = {str(tablespace.oid): path for tablespace, path in targets.tablespaces}
        if area == "base":
            links = frozenset(f"pg_tblspc/{oid}" for oid in oids)
            skip = frozenset({MAP}) if targets.moved else frozenset[str]()
            return Unpacker(
                archive.name, targets.directory, links=links, skip=skip, kept=present.kept, owner=targets.owner
            )
        if area not in oids:
            raise IntegrityError(f"the archive {archive.name} is neither base nor a tablespace of the backup")
        folder = oids[area]
        if folder.is_relative_to(targets.directory):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            give(folder, targets.owner)
        return Unpacker(archive.name, folder, kept=present.kept, prefix=prefix_of(area), owner=targets.owner)

    async def _manifest(self) -> bytearray:
        """PostgreSQL's own list of the files; empty if the backup has none."""
        if not self._backup.manifest:
            return bytearray()
        return await self._checked(manifest_key(self._backup.name), self._backup.manifest)

    async def _checked(self, name: str, digest: str) -> bytearray:
        """An object of the backup, being the very one that its backup_info lists. Raises IntegrityError."""
        backup = self._backup
        plain = bytearray()

        def use(pieces: Iterator[Buffer]) -> None:
            for piece in pieces:
                plain.extend(piece)

        try:
            await self._fetch.into(name, use, digest=digest, backup=backup.id, most=MAX_PLAIN)
        except ObjectMissing as error:
            raise IntegrityError(
                f"{error.fact}: backup {backup.name} is not complete", hint="choose another one with --backup"
            ) from None
        return plain

    def left(self) -> list[tuple[Path, int]]:
        """Folders, and the bytes that are still to be written there."""
        folders = {str(tablespace.oid): path for tablespace, path in self._targets.tablespaces}
        return [
            (folders.get(area_of(name), self._targets.directory), max(0, size)) for name, size in self._left.items()
        ]

    def _laid(self, archive: str, size: int) -> None:
        self._left[archive] -= size
        self._add(size)

    def _add(self, size: int) -> None:
        self._done += size
        self._progress(self._done, self._backup.size)


def _lines(manifest: bytearray) -> dict[str, FileLine]:
    """The files of a manifest that is whole."""
    read_manifest(manifest)
    return {line.path: line for line in files_of(manifest)}


def _read_index(name: str, content: bytearray, layout: Layout) -> None:
    for line in content.splitlines():
        layout.add(Slice.decode(name, line))


async def _to_the_end(work: Callable[[], None], stop: Callable[[], object] = lambda: None) -> None:
    """Run it in a thread. When we are cancelled the thread goes on: wait for it, because it writes to open files.

    ``stop`` asks it to end sooner.
    """
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(task)
    finally:
        if not task.done():
            stop()
            await asyncio.wait([task])
            task.exception()  # whatever it was, we are cancelled
