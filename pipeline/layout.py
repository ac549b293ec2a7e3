"""What a restore has to know of a backup's index before it reads a part: where it may begin in the middle of an
archive, and which parts it can leave out because all that they hold lies there already. Filled as the index flows by.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from pipeline.backup import ArchiveInfo, area_of
from pipeline.catalog import PART_SIZE
from pipeline.errors import IntegrityError
from pipeline.index import Slice
from pipeline.tar import BLOCK, Inside

#: What ends a tar stream: two blocks of zeros.
_END = 2 * BLOCK


def prefix_of(archive: str) -> str:
    """What comes before a path of that archive in PostgreSQL's manifest, which names files of the whole cluster."""
    area = area_of(archive)
    return "" if area == "base" else f"pg_tblspc/{area}/"


class Layout:
    """Give it all lines of the index, in their order, then ``end`` it.

    ``kept``: files, as the manifest names them, that are not needed. ``others``: files that are there and are not kept;
    what the backup has of them is taken out. Raises IntegrityError for an index that does not fit the archives.
    """

    def __init__(
        self, archives: Sequence[ArchiveInfo], *, kept: Collection[str], others: set[str], part_size: int = PART_SIZE
    ) -> None:
        self._archives = {archive.name: archive for archive in archives}
        self._kept = kept
        self._part_size = part_size
        #: Bytes of each archive that the lines so far explain.
        self._reached = dict.fromkeys(self._archives, 0)
        #: Archive and part → where in a file the part begins; none if it begins with a header.
        self.inside: dict[tuple[str, int], Inside] = {}
        #: Archive and part → bytes of kept files in it.
        self.kept: defaultdict[tuple[str, int], int] = defaultdict(int)
        #: Archives and parts that hold anything else than kept files.
        self.needed: set[tuple[str, int]] = set()
        #: Files that are there, and not in the backup.
        self.others = others

    def add(self, line: Slice) -> None:
        """The next line."""
        archive = self._archives.get(line.archive)
        start = (line.part - 1) * self._part_size + line.part_offset
        if archive is None or start + line.length > archive.size:
            raise IntegrityError(f"the index lists {line.path!r} where the archive {line.archive} has nothing")
        name = prefix_of(line.archive) + line.path
        key = (line.archive, line.part)
        if line.length and not line.part_offset:  # also at offset 0, where its header ends the part before
            self.inside[key] = Inside(line.path, line.size, line.offset)
        header = start if line.offset else start - BLOCK
        if header > self._reached[line.archive]:
            self._need(line.archive, self._reached[line.archive], header)  # folders and links, which have no lines
        if name in self._kept:
            self.kept[key] += line.length
        else:
            self._need(line.archive, header, start + line.length)
        if not line.offset:
            self.others.discard(name)
        self._reached[line.archive] = start + line.length + -(start + line.length) % BLOCK

    def end(self) -> None:
        """That was the last line."""
        for archive in self._archives.values():
            reached = self._reached[archive.name]
            if archive.size - reached > _END:
                self._need(archive.name, reached, archive.size)

    def _need(self, archive: str, start: int, end: int) -> None:
        last = max(start, end - 1) // self._part_size
        self.needed.update((archive, number + 1) for number in range(start // self._part_size, last + 1))
