"""Lays a base backup down: its parts are fetched, compared with backup_info and written at their places side by side.

    prepare the folders, set the marker → pg_control goes → what lies there: keep what is as in the backup, remove the
    rest → the parts that are needed → links, manifest, what makes it recover (``complete``) → fsync of everything, once
    → pg_control → the marker goes

Of a chain of backups the full one is laid down first, and each incremental one over it (``handlers/increment.py``).

At whatever moment that ends, no server can be started on the directory until it is whole; and because nothing of a file
is believed but its checksum, the same restore goes on with what is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from handlers.delta import Comparison, Present, remove_others, repair
from handlers.full_disk import cannot_write
from handlers.lay_over import LayOver, dropped, forget_dropped
from handlers.lay_parts import Parts
from handlers.lay_seal import seal
from handlers.target_dir import CONTROL, MAP, Targets, disarm, give, prepare
from handlers.to_the_end import in_thread
from handlers.unpack import NEVER, Unpacker
from pipeline.backup import BackupInfo, area_of
from pipeline.catalog import PART_SIZE, index_key, manifest_key
from pipeline.contracts import Buffer, Fetch
from pipeline.errors import IntegrityError, ObjectMissing
from pipeline.index import Slice
from pipeline.layout import Layout, prefix_of
from pipeline.manifest import FileLine, files_of, read_manifest, top_names
from pipeline.objects import MAX_PLAIN

#: The server makes links of it, to folders that may be a running server's: ``seal`` writes one of what was restored.
_NOT_LAID = frozenset({MAP})
#: Told (bytes done, bytes in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Laid:
    """What laying a backup down took; bytes are of plaintext."""

    #: Files of the backup that lie there, pg_control among them; not its manifest, and not what makes it recover.
    files: int
    #: Bytes in the backup.
    size: int
    #: Bytes of the parts that were fetched.
    fetched: int
    #: Bytes that lay there already and were kept.
    kept: int
    #: Files that were removed because the backup has none of that name.
    removed: int
    #: Names of configuration files that lay there, are not in the backup, and stay.
    spared: tuple[str, ...] = ()


async def lay_down(
    backup: BackupInfo,
    targets: Targets,
    *,
    fetch: Fetch,
    complete: Callable[[Path], None],
    progress: Progress = lambda _done, _all: None,
    part_size: int = PART_SIZE,
    before: Sequence[BackupInfo] = (),
) -> Laid:
    """Restore the files of a backup into folders that ``look`` approved of.

    ``before``: the backups that an incremental one builds on, the full one first.
    ``complete`` is called with the data directory when all files are there but pg_control, to write what has to be in
    place before a server can start. ``progress`` counts bytes of plaintext, kept ones too. ``part_size``: of this
    backup; the format knows one only.

    Raises RecoveryError, IntegrityError, StoreError; then the marker stays, and the same restore can be run again as it
    is. (What a server has been started on can be replaced with ``force`` or ``delta`` only.)
    """
    work = _LayDown((*before, backup), targets, fetch, complete, progress, part_size)
    try:
        return await work.run()
    except OSError as error:
        raise cannot_write(error, targets.directory, work.left()) from error


class _LayDown:
    """One restore under way."""

    def __init__(
        self,
        chain: Sequence[BackupInfo],
        targets: Targets,
        fetch: Fetch,
        complete: Callable[[Path], None],
        progress: Progress,
        part_size: int,
    ) -> None:
        self._chain = chain
        self._targets = targets
        self._fetch = fetch
        self._complete = complete
        self._progress = progress
        self._part_size = part_size
        #: Bytes of plaintext that lie where they belong, of how many.
        self._done, self._all = 0, sum(backup.size for backup in chain)
        #: Backup and archive → bytes of it that are still to be written.
        self._left = {(backup.name, archive.name): archive.size for backup in chain for archive in backup.archives}
        #: Bytes of plaintext of the parts that were fetched.
        self._fetched = 0

    async def run(self) -> Laid:
        (full, *later), targets = self._chain, self._targets
        manifest = await self._manifest(full)  # before anything is touched: the store answers
        await self._mark(manifest)
        await in_thread(partial(disarm, targets))
        present = Present()
        if targets.delta:
            present = await self._compare(manifest)
        layout = await self._layout(full, present)
        await in_thread(partial(remove_others, targets, present.kept.keys() | present.spared))
        for (name, _), size in layout.kept.items():
            self._left[full.name, name] -= size
        folders = {area_of(archive.name): self._folder(area_of(archive.name), full) for archive in full.archives}
        unpackers = await self._unpack(full, folders, layout, present.kept)
        control, mode = _control_of(full, unpackers)
        files = sum(unpacker.files for unpacker in unpackers) + len(present.kept) + 1
        if present.kept:
            await in_thread(partial(repair, targets, present.kept, mode))
        for backup in later:
            manifest, control, mode = await self._lay_over(backup, present.spared)
        if later:
            await in_thread(partial(forget_dropped, targets))
            files = manifest.count(b'"Path"') + manifest.count(b'"Encoded-Path"')
        await in_thread(partial(seal, targets, manifest, self._complete, control, mode))
        kept, removed = sum(present.kept.values()), len(layout.others)
        return Laid(files, self._all, self._fetched, kept, removed, tuple(sorted(present.spared)))

    async def _unpack(
        self, backup: BackupInfo, folders: Mapping[str, Path], layout: Layout, kept: Mapping[str, int]
    ) -> Sequence[Unpacker]:
        """Lay down the archives of one backup; ``folders``: where each area of it goes."""
        targets = self._targets
        links = frozenset(f"pg_tblspc/{tablespace.oid}" for tablespace in backup.tablespaces)
        async with AsyncExitStack() as stack:
            unpackers = {}
            for archive in backup.archives:
                area = area_of(archive.name)
                unpacker = Unpacker(
                    archive.name, folders[area], kept=kept, prefix=prefix_of(area), owner=targets.owner,
                    links=links if area == "base" else frozenset(), skip=_NOT_LAID if area == "base" else frozenset(),
                )  # fmt: skip
                unpackers[archive.name] = unpacker
                stack.callback(unpacker.abandon)
            laid = partial(self._laid, backup.name)
            parts = Parts(backup, self._fetch, unpackers, layout, part_size=self._part_size, progress=laid)
            await parts.lay()
        self._fetched += parts.fetched
        return list(unpackers.values())

    async def _lay_over(self, backup: BackupInfo, spared: Collection[str]) -> tuple[bytearray, bytearray, int]:
        """An incremental backup over the one before: the manifest of both together, pg_control and its mode."""
        manifest = await self._manifest(backup)
        layout = await self._layout(backup, Present())
        over = LayOver(self._targets, backup, spared)
        unpackers = await self._unpack(backup, over.stages, layout, {})
        control, mode = _control_of(backup, unpackers)
        await self._mark(manifest)
        await in_thread(over.apply)
        if backup is not self._chain[-1]:
            return manifest, control, mode
        return await in_thread(partial(over.manifest, manifest, control, left_out=NEVER)), control, mode

    async def _mark(self, manifest: bytearray) -> None:
        """Before anything of the backup that it is of is laid down: should it end half way, what is there is ours."""
        names = await asyncio.to_thread(top_names, manifest)
        await in_thread(partial(prepare, self._targets, self._chain[-1], names))

    def _folder(self, area: str, backup: BackupInfo) -> Path:
        """Where an area of the full backup goes, made if it is not there."""
        found = self._targets.folder(area)
        if found is not None:
            folder = found
        elif area in {str(tablespace.oid) for tablespace in backup.tablespaces} and len(self._chain) > 1:
            folder = dropped(self._targets, area)  # it was dropped before the last backup of the chain
        else:
            raise IntegrityError(f"the archive {area} is neither base nor a tablespace of the backup")
        if folder.is_relative_to(self._targets.directory):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            give(folder, self._targets.owner)
        return folder

    async def _compare(self, manifest: bytearray) -> Present:
        """What of the target is as the manifest says."""
        wanted = await asyncio.to_thread(_lines, manifest) if manifest else {}
        loop = asyncio.get_running_loop()

        def kept(size: int) -> None:
            if self._chain[0].index:  # without it they are in parts that are fetched, and counted then
                loop.call_soon_threadsafe(self._add, size)

        comparison = Comparison(self._targets, wanted, kept)
        await in_thread(comparison.run, stop=comparison.stop.set)
        return comparison.found

    async def _layout(self, backup: BackupInfo, present: Present) -> Layout:
        layout = Layout(backup.archives, kept=present.kept, others=set(present.others), part_size=self._part_size)
        for number, digest in enumerate(backup.index, 1):
            name = index_key(backup.name, number)
            content = await self._checked(backup, name, digest)
            await asyncio.to_thread(_read_index, name, content, layout)
        layout.end()
        return layout

    async def _manifest(self, backup: BackupInfo) -> bytearray:
        """PostgreSQL's own list of the files; empty if the backup has none."""
        if not backup.manifest:
            return bytearray()
        return await self._checked(backup, manifest_key(backup.name), backup.manifest)

    async def _checked(self, backup: BackupInfo, name: str, digest: str) -> bytearray:
        """An object of the backup, being the very one that its backup_info lists. Raises IntegrityError."""
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
        targets = self._targets
        return [
            (targets.folder(area_of(name)) or targets.directory, max(0, size)) for (_, name), size in self._left.items()
        ]

    def _laid(self, backup: str, archive: str, size: int) -> None:
        self._left[backup, archive] -= size
        self._add(size)

    def _add(self, size: int) -> None:
        self._done += size
        self._progress(self._done, self._all)


def _control_of(backup: BackupInfo, unpackers: Sequence[Unpacker]) -> tuple[bytearray, int]:
    """Content and mode of the one pg_control that the archives held."""
    controls = [unpacker for unpacker in unpackers if unpacker.control]
    if len(controls) != 1:
        raise IntegrityError(f"backup {backup.name} has {'more than one' if controls else 'no'} {CONTROL}")
    return controls[0].control, controls[0].control_mode


def _lines(manifest: bytearray) -> dict[str, FileLine]:
    """The files of a manifest that is whole: 310 bytes of memory for each, while they are compared with what is there,
    beside the manifest's own 150. So a million files take 460 MB, until the comparison is over.
    """
    read_manifest(manifest)
    return {line.path: line for line in files_of(manifest)}


def _read_index(name: str, content: bytearray, layout: Layout) -> None:
    for line in content.splitlines():
        layout.add(Slice.decode(name, line))
