"""The index of a base backup: which file, or slice of a file, lies where in which part. JSON lines, made as data flows.

A file that crosses the end of a part has a line for each slice; an empty file has one line of length 0. Directories and
links have none: the archive itself says all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

from pipeline.backup import area_of
from pipeline.catalog import PART_SIZE
from pipeline.errors import IntegrityError
from pipeline.objects import check_members, strict_json
from pipeline.tar import Entry, EntryKind


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive bytes of one file within one part."""

    #: ``base``, or a tablespace's oid as digits; with ``.2`` behind it, what the second worker made of that.
    archive: str
    #: In the archive.
    path: str
    #: Bytes of the whole file.
    size: int
    #: Where the slice begins in the file.
    offset: int
    #: Number of the part, from 1.
    part: int
    #: Where the slice begins in the plaintext of the part.
    part_offset: int
    #: Bytes of the slice.
    length: int

    def encode(self) -> bytes:
        """One line, with its end. Names that are no UTF-8 keep their bytes as lone surrogates, escaped."""
        return _ENCODER.encode({name: getattr(self, name) for name in _MEMBERS}).encode() + b"\n"

    @classmethod
    def decode(cls, name: str, line: bytes | bytearray) -> Slice:
        """The opposite of ``encode``; ``name`` is that of the index object, for messages. Raises IntegrityError."""
        try:
            found = cls(**check_members(strict_json(bytes(line)), _MEMBERS))
            if (area := area_of(found.archive)) != "base" and not _OID.fullmatch(area):
                raise ValueError("archive is neither base nor an oid")
            if min(found.offset, found.length, found.part_offset, found.part - 1) < 0:
                raise ValueError("a number is too small")
            if found.offset + found.length > found.size or found.part_offset + found.length > PART_SIZE:
                raise ValueError("it leads out of the file or of the part")
        except ValueError as error:
            raise IntegrityError(f"{name} has a line that cannot be read: {error}") from None
        return found


_MEMBERS: dict[str, type] = {f.name: str if f.name in ("archive", "path") else int for f in fields(Slice)}
_OID = re.compile(r"[1-9][0-9]{0,9}")
#: Made once: a backup may have a million lines.
_ENCODER = json.JSONEncoder(separators=(",", ":"))


def slices(archive: str, entry: Entry, part_size: int = PART_SIZE) -> Iterator[Slice]:
    """The lines of one entry of an archive that is cut into parts of that many bytes."""
    if entry.kind is not EntryKind.FILE:
        return
    done = 0
    while True:
        part, part_offset = divmod(entry.offset + done, part_size)
        length = min(entry.size - done, part_size - part_offset)
        yield Slice(archive, entry.path, entry.size, done, part + 1, part_offset, length)
        done += length
        if done >= entry.size:
            return
