"""A tar stream read as it flows by: bytes in, entries and their contents out. Opens nothing, keeps at most one header.

What PostgreSQL sends is plain ustar: one 512-byte header per file, names of at most 99 bytes, sizes above 8 GiB in
base 256 (PostgreSQL source, ``src/port/tar.c``), ended by two blocks of zeros. Anything else is refused rather than
skipped, because a file that a reader does not understand is a file that a restore would not bring back.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from pipeline.errors import IntegrityError

BLOCK = 512

_ZEROS = bytes(BLOCK)
#: No file of PostgreSQL is as long: relations are cut at 1 GiB by default, and at 32 TiB at most.
_MAX_SIZE = 1 << 46


class EntryKind(Enum):
    """What an entry makes on disk."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"


_KINDS = {
    tarfile.REGTYPE: EntryKind.FILE,
    tarfile.AREGTYPE: EntryKind.FILE,
    tarfile.DIRTYPE: EntryKind.DIRECTORY,
    tarfile.SYMTYPE: EntryKind.SYMLINK,
}


_TYPES = {
    EntryKind.FILE: tarfile.REGTYPE,
    EntryKind.DIRECTORY: tarfile.DIRTYPE,
    EntryKind.SYMLINK: tarfile.SYMTYPE,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One header. Its content, if it has any, follows."""

    #: Relative, with ``/``, without a leading ``./`` or a trailing slash; never leads out of its folder. ``.`` is the
    #: folder itself.
    path: str
    kind: EntryKind
    #: Bytes of content.
    size: int
    #: Permission bits.
    mode: int
    #: Seconds since 1970.
    mtime: int
    uid: int
    gid: int
    uname: str
    gname: str
    #: Target of a symbolic link, as it stands in the archive.
    linkname: str
    #: Where the content begins in the archive; the header lies in the 512 bytes before it.
    offset: int


@dataclass(frozen=True, slots=True)
class Content:
    """The next bytes of the entry that came last. The view is valid until the reader is asked for more."""

    #: Position in the file.
    offset: int
    data: memoryview


Item: TypeAlias = Entry | Content


@dataclass(frozen=True, slots=True)
class Inside:
    """A place within the content of a file: where a reader stands between two pieces."""

    path: str
    #: Bytes of the whole file.
    size: int
    #: Bytes of it that came already; fewer than ``size``.
    done: int


class TarReader:
    """Feed it the archive in pieces of any size, and ``finish`` it. Raises IntegrityError at the first oddity.

    It may begin in the middle of the archive, at ``start`` (a multiple of 512 bytes): ``inside`` says of which file the
    content goes on there, None that a header comes next. Whoever tells it that has to compare it with where the reader
    of the bytes before ended.
    """

    def __init__(self, name: str, *, start: int = 0, inside: Inside | None = None) -> None:
        #: For messages.
        self._name = name
        #: Bytes of the archive so far.
        self.size = start
        self._header = bytearray()
        self._path = inside.path if inside else ""
        self._entry_size = inside.size if inside else 0
        self._entry_done = inside.done if inside else 0
        self._padding = -self._entry_size % BLOCK
        #: Whether any entry began.
        self.began = False
        #: Blocks of zeros so far, which end the archive.
        self.zero_blocks = 0

    @property
    def inside(self) -> Inside | None:
        """The file whose content goes on with the next byte; None where a header comes next."""
        if self._entry_done < self._entry_size:
            return Inside(self._path, self._entry_size, self._entry_done)
        return None

    @property
    def between_blocks(self) -> bool:
        """Whether the next byte begins a block: a reader that goes on from here needs to know no more."""
        return not self._header and self.size % BLOCK == 0

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Item]:
        """What the next bytes of the archive hold. Exhaust it before the next call."""
        view = memoryview(data)
        while view:
            if self._entry_done < self._entry_size:
                part = view[: self._entry_size - self._entry_done]
                start = self._entry_done
                self._take(part)
                self._entry_done += len(part)
                yield Content(start, part)
            elif self._padding:
                part = view[: self._padding]
                self._take(part)
                self._padding -= len(part)
            else:
                part = view[: BLOCK - len(self._header)]
                self._take(part)
                self._header += part
                if len(self._header) == BLOCK:
                    entry = self._decode(bytes(self._header))
                    self._header.clear()
                    if entry is not None:
                        yield entry
            view = view[len(part) :]

    def finish(self) -> None:
        """The archive has ended; it must have ended in order."""
        if self.zero_blocks < 2 or self._header:
            raise IntegrityError(f"the archive {self._name} is cut after {self.size} bytes")

    def _take(self, part: memoryview) -> None:
        self.size += len(part)

    def _decode(self, block: bytes) -> Entry | None:
        start = self.size - BLOCK
        if block == _ZEROS:
            self.zero_blocks += 1
            return None
        if self.zero_blocks:
            raise IntegrityError(f"the archive {self._name} goes on at byte {start}, behind its end")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise IntegrityError(f"the archive {self._name} has a damaged header at byte {start}: {error}") from None
        kind = _KINDS.get(info.type)
        if kind is None:
            raise IntegrityError(
                f"the archive {self._name} holds {info.name!r} of the tar type {info.type!r},"
                " which PostgreSQL does not write"
            )
        size = info.size if kind is EntryKind.FILE else 0
        if not 0 <= info.size <= _MAX_SIZE or size != info.size:
            raise IntegrityError(
                f"the archive {self._name} claims {info.size} bytes for the {kind.value} {info.name!r}"
            )
        self._path = self._checked(info.name)
        self._entry_size, self._entry_done, self._padding = size, 0, -size % BLOCK
        self.began = True
        return Entry(
            self._path, kind, size, info.mode & 0o7777, int(info.mtime), info.uid, info.gid,
            info.uname, info.gname, info.linkname, self.size,
        )  # fmt: skip

    def _checked(self, name: str) -> str:
        """A name that could lead anywhere else would let an archive overwrite any file of the machine."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts:
            raise IntegrityError(f"the archive {self._name} holds {name!r}, which leads out of its folder")
        return "/".join(parts) or "."


def header(
    path: str, kind: EntryKind, *, size: int, mode: int, mtime: int, uid: int = 0, gid: int = 0, linkname: str = ""
) -> bytes:
    """One entry's block, as PostgreSQL writes it. Content, padded to whole blocks, follows. Raises IntegrityError."""
    info = tarfile.TarInfo(path)
    info.type = _TYPES[kind]
    info.size, info.mode, info.mtime, info.uid, info.gid, info.linkname = size, mode, mtime, uid, gid, linkname
    info.uname = info.gname = "postgres"
    try:
        # Whatever does not fit in octal digits needs GNU's form of a number, as PostgreSQL has it: a size above 8 GiB,
        # an owner above 2097151 (of a directory service, or as OpenShift invents them), a time before 1970.
        ustar = size < 8 << 30 and 0 <= mtime < 8 << 30 and max(uid, gid) < 1 << 21
        block = info.tobuf(
            tarfile.USTAR_FORMAT if ustar else tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
        )
    except ValueError as error:
        raise IntegrityError(f"{path!r} does not fit into a tar header: {error}") from None
    if len(block) != BLOCK:
        raise IntegrityError(f"{path!r} does not fit into a tar header: the name is too long")
    return block
