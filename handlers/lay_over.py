"""One incremental backup of a chain on its way into a restored directory: where it waits, and what both make together.

Its archives are unpacked into folders of their own beside what is there, on the same file systems, and then laid over
it. Whatever interrupts that, the marker stays and pg_control is not there; the same restore begins with the full backup
again, and keeps what of that was not changed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from crc32c import crc32c

from handlers.increment import apply, plain_path
from handlers.target_dir import CONTROL, MAP, MARKER, Targets, give
from pipeline.backup import BackupInfo, area_of
from pipeline.layout import prefix_of
from pipeline.make_manifest import ManifestMaker
from pipeline.manifest import files_of, read_manifest

#: Our folder: in the data directory, and in tablespaces for as long as something waits there.
_OURS = MARKER.partition("/")[0]
_STAGE, _DROPPED = f"{_OURS}/increment", f"{_OURS}/dropped"
_PIECE = 1 << 20


def dropped(targets: Targets, area: str) -> Path:
    """Where a tablespace of the full backup goes that the last one does not have any more."""
    return targets.directory / _DROPPED / area


def forget_dropped(targets: Targets) -> None:
    """Remove them. Blocking."""
    if (folder := targets.directory / _DROPPED).exists():
        shutil.rmtree(folder)


class LayOver:
    """Unpack into ``stages``, then ``apply``, then ``manifest``."""

    def __init__(self, targets: Targets, backup: BackupInfo, spared: Collection[str] = ()) -> None:
        """``spared``: files in the data directory that stay, unless the backup has files of that name."""
        self._targets = targets
        self._spared = set(spared)
        self._major = backup.major
        self._system_id = backup.system_id
        places = {str(tablespace.oid): path for tablespace, path in targets.tablespaces}
        #: Area of the backup → where it belongs.
        areas = dict.fromkeys(area_of(archive.name) for archive in backup.archives)
        self._places = {area: places.get(area, dropped(targets, area)) for area in areas}
        self._places["base"] = targets.directory
        #: Names in the data directory below which tablespaces lie: what is there is not the base archive's to remove.
        self._inside = {
            path.relative_to(targets.directory).parts[0]
            for path in places.values()
            if path.is_relative_to(targets.directory)
        }
        #: Area of the backup → the folder that its archive is unpacked into.
        self.stages = {area: self._stage(place / _STAGE) for area, place in self._places.items()}
        self._patched: set[str] = set()

    def _stage(self, folder: Path) -> Path:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700, parents=True)
        give(folder, self._targets.owner)
        return folder

    def apply(self) -> None:
        """Lay it over what is there. Blocking. Raises IntegrityError and OSError."""
        for area, stage in self.stages.items():
            place = self._places[area]
            spare = {_OURS, "lost+found"} | (self._inside | {"pg_tblspc"} if area == "base" else set())
            leave = frozenset(self._spared if area == "base" else ())
            patched = apply(
                stage, place, self._targets.owner, spare=frozenset(spare), leave=leave, prefix=prefix_of(area)
            )
            self._patched |= {prefix_of(area) + path for path in patched}
            if place != self._targets.directory and place.is_relative_to(self._targets.directory):
                (place / _OURS).rmdir()  # elsewhere the marker is in it

    def manifest(self, last: bytearray, control: bytearray, *, left_out: Collection[str] = ()) -> bytearray:
        """PostgreSQL's manifest of what is there now. Reads what was put together. Blocking.

        ``last``: of the backup that was laid over; empty if it has none. ``left_out``: files that no restore lays
        down, as the standby.signal of a backup that was taken from a standby.
        """
        if not last:
            return last
        made = ManifestMaker(self._system_id, self._major)
        for line in files_of(last):
            path = plain_path(line.path)
            if path in left_out:
                continue
            size, crc = line.size, int.from_bytes(bytes.fromhex(line.checksum), "little")
            mtime = 0
            if path == CONTROL:
                crc = crc32c(control)
            elif path != MAP:
                mtime, size, known = self._measured(path, read=path in self._patched or line.algorithm != "CRC32C")
                crc = crc if known is None else known
            made.add(os.fsencode(path), size, mtime, crc)
        return made.finish(read_manifest(last).ranges)

    def _measured(self, path: str, *, read: bool) -> tuple[int, int, int | None]:
        """Time of change, size, and if wanted the CRC-32C of a file."""
        with self._path(path).open("rb") as file:
            about = os.fstat(file.fileno())
            crc: int | None = None
            if read:
                crc = 0
                while piece := file.read(_PIECE):
                    crc = crc32c(piece, crc)
        return int(about.st_mtime), about.st_size, crc

    def _path(self, name: str) -> Path:
        for area, place in self._places.items():
            if area != "base" and name.startswith(prefix_of(area)):
                return place / name.removeprefix(prefix_of(area))
        return self._targets.directory / name
