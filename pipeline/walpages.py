"""The pages of a WAL segment, and whether a file is a finished segment at all.

A segment is a row of pages (8 KiB unless the server was built otherwise). Each begins with a header that names its own
position, so a page that was never written, or was left over when the file was recycled, tells itself apart. The first
page of a segment has a long header, which names the cluster. Records follow one another across pages, 8-byte aligned,
and a page says how much of a record that began before is still to come (``xlp_rem_len``).

A segment is finished in one of two ways only: its records reach its last byte, or they end in XLOG_SWITCH and
PostgreSQL left the rest empty. A file that merely has the right size (a tail that was padded with zeros and archived
again by a standby with ``archive_mode = always``) is neither.

What cannot be seen in one segment: a cut inside its *last* record when that goes on in the next segment, because its
bytes may well be zeros and its check sum is over both halves. ``walrecords`` finds it once the next segment is there.

Sources: PostgreSQL's ``access/xlog_internal.h``, ``access/xlogrecord.h`` (layouts, magics) and the comments on the
switch record in ``xlog.c``. Little-endian servers only: a big-endian server's segments are refused by their magic.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from pipeline.contracts import Buffer
from pipeline.crc32c import crc32c
from pipeline.errors import IntegrityError
from pipeline.wal import SEGMENT_SIZES, Lsn, WalFile, WalKind

SHORT_HEADER = 24
LONG_HEADER = 40
RECORD_HEADER = 24

#: Page magic → major version of the server (XLOG_PAGE_MAGIC in ``xlog_internal.h``).
MAGICS = {0xD10D: 14, 0xD110: 15, 0xD113: 16, 0xD116: 17, 0xD118: 18}

#: xlp_info: the page begins in the middle of a record.
IS_CONTRECORD = 0x01
#: xlp_info: this is a long header.
IS_LONG = 0x02
#: xlp_info: the record that the page before began was lost in a crash; new ones begin right here.
IS_OVERWRITE_CONTRECORD = 0x08

_SHORT = struct.Struct("<HHIQI4x")
_LONG = struct.Struct("<HHIQI4xQII")
_U32 = struct.Struct("<I")

#: Gives ``(offset, length)`` bytes of a file; may give fewer at its end.
Read: TypeAlias = Callable[[int, int], bytes]

_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)
#: A record that ends exactly with its segment is check-summed up to this size: 64 KiB take 5 ms.
_MOST_SUMMED = 64 << 10


@dataclass(frozen=True, slots=True)
class PageHeader:
    """What stands at the front of a page; the last three are 0 in a short header."""

    magic: int
    info: int
    timeline: int
    #: Position of the page's first byte.
    address: Lsn
    #: Bytes still to come of the record that began on an earlier page.
    rem_len: int
    system_id: int = 0
    segment_size: int = 0
    block_size: int = 0

    @property
    def major(self) -> int:
        """Major version of the server that wrote the page; 0 for one newer than we know."""
        return MAGICS.get(self.magic, 0)

    @property
    def size(self) -> int:
        """Bytes of this header."""
        return LONG_HEADER if self.info & IS_LONG else SHORT_HEADER


def read_page_header(data: Buffer) -> PageHeader:
    """The header at the front of ``data`` (40 bytes are enough), not yet judged. IntegrityError if it is cut."""
    if len(data) < LONG_HEADER:
        raise IntegrityError(f"a WAL page is cut: {len(data)} bytes cannot hold its header")
    magic, info, timeline, address, rem_len = _SHORT.unpack_from(data)
    if not info & IS_LONG:
        return PageHeader(magic, info, timeline, Lsn(address), rem_len)
    _, _, _, _, _, system_id, segment_size, block_size = _LONG.unpack_from(data)
    return PageHeader(magic, info, timeline, Lsn(address), rem_len, system_id, segment_size, block_size)


def read_first_page(name: str, data: Buffer) -> PageHeader:
    """The long header of a segment's first page: server version, cluster, sizes. IntegrityError if it is none."""
    header = read_page_header(data)
    if header.magic not in MAGICS and not max(MAGICS) < header.magic <= 0xD1FF:
        raise IntegrityError(
            f"{name} is no WAL segment: its first page begins with {header.magic:04X}, and a server of version"
            f" {min(MAGICS.values())} or newer writes {min(MAGICS):04X} or more",
            hint="something else was written under this name, or the server is older than walship supports",
        )
    if not header.info & IS_LONG:
        raise IntegrityError(f"{name} is no WAL segment: its first page has no long header")
    if header.segment_size not in SEGMENT_SIZES:
        raise IntegrityError(
            f"{name} claims a segment size of {header.segment_size} bytes, which initdb does not allow"
        )
    block = header.block_size
    if not 1024 <= block <= 65536 or block & (block - 1):
        raise IntegrityError(f"{name} claims WAL pages of {block} bytes, which no server has")
    return header


def check_segment(file: WalFile, data: Buffer, *, system_id: int, segment_size: int) -> None:
    """Whether ``data`` is the finished segment that its name says, of this cluster; ``.partial`` by its first page.

    Looks at the first page, every page's address, and the records at the end: under a millisecond for 16 MiB.
    Raises IntegrityError.
    """
    view = memoryview(data)
    check_segment_by(
        file, len(data), lambda at, n: bytes(view[at : at + n]), system_id=system_id, segment_size=segment_size
    )
    if file.kind is WalKind.SEGMENT:
        _check_addresses(file, view, segment_size)


def check_segment_by(file: WalFile, size: int, read: Read, *, system_id: int, segment_size: int) -> None:
    """As ``check_segment``, for a file of ``size`` bytes of which only a few pages are read, by ``read``."""
    if file.seg >= (1 << 32) // segment_size:
        raise IntegrityError(
            f"{file} is no name of a segment of {segment_size} bytes",
            hint="it comes from a cluster with smaller segments",
        )
    if size != segment_size:
        raise IntegrityError(f"{file} is {size} bytes; a segment of this cluster is {segment_size}")
    first = read_first_page(file.name, read(0, LONG_HEADER))
    if first.system_id != system_id:
        raise IntegrityError(
            f"{file} belongs to the cluster {first.system_id}, not to {system_id}",
            hint="two servers archive into one place; give each its own",
        )
    if first.segment_size != segment_size:
        raise IntegrityError(
            f"{file} says its segments are {first.segment_size} bytes; this cluster's are {segment_size}"
        )
    pages = _Pages(file, read, first, segment_size)
    if not pages.is_valid(0):
        raise IntegrityError(
            f"{file} begins with the page {first.address} of timeline {first.timeline};"
            f" by its name it should begin with {pages.start} of timeline {file.timeline} or an older one",
            hint="the file was renamed, or is a recycled segment that was never finished",
        )
    if file.kind is WalKind.SEGMENT:
        pages.check_end()


def _check_addresses(file: WalFile, view: memoryview, segment_size: int) -> None:
    """No page may be missing before the last one that is there: a copy under way may have holes (NFS)."""
    block = read_page_header(view[:LONG_HEADER]).block_size
    start = file.start(segment_size)
    found = view.cast("B").cast("Q")[1 :: block // 8].tolist()
    expected = list(range(start, start + segment_size, block))
    if found == expected:
        return
    count = next(page for page, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
    for page in range(count, len(found)):
        if found[page] == expected[page]:
            raise IntegrityError(f"{file} has a hole: the page {Lsn(expected[count])} is missing, later ones are there")


class _Pages:
    """The pages of one segment, read as needed."""

    def __init__(self, file: WalFile, read: Read, first: PageHeader, segment_size: int) -> None:
        self.file = file
        self.read = read
        self.first = first
        self.size = segment_size
        self.block = first.block_size
        self.start = file.start(segment_size)
        self._page = (-1, b"")

    def page(self, number: int) -> bytes:
        if self._page[0] != number:
            self._page = (number, self.read(number * self.block, self.block))
        return self._page[1]

    def header(self, number: int) -> PageHeader:
        return read_page_header(self.page(number))

    def is_valid(self, number: int) -> bool:
        """Whether the page was written at this place by the same server version, on this timeline or one before."""
        header = self.header(number)
        return (
            header.magic == self.first.magic
            and header.address == self.start + number * self.block
            and 1 <= header.timeline <= self.file.timeline
        )

    def first_record(self, number: int) -> int:
        """Offset of the first record that begins on this page; at or behind the page's end if none does."""
        header = self.header(number)
        offset = number * self.block + header.size
        return offset + _aligned(header.rem_len) if header.info & IS_CONTRECORD else offset

    def bytes_from(self, offset: int, length: int) -> bytes:
        """``length`` bytes of records from ``offset`` on, page headers left out; fewer at the segment's end."""
        pieces = []
        while length > 0 and offset < self.size:
            number, inside = divmod(offset, self.block)
            if inside == 0:
                inside = self.header(number).size
            piece = self.page(number)[inside : inside + length]
            pieces.append(piece)
            length -= len(piece)
            offset = (number + 1) * self.block
        return b"".join(pieces)

    def check_end(self) -> None:
        """The records reach the last byte, or end in a switch."""
        last = self._last_page()
        number = last
        # Enter the records on a page where one begins, and not on one that only finishes a record: that record may be
        # the switch.
        if self.header(number).info & IS_CONTRECORD:
            number -= 1
        while number >= 0 and self.first_record(number) >= (number + 1) * self.block:
            number -= 1
        if number >= 0:
            self._walk(self.first_record(number), last)
        elif not self._is_end_of_switch(last):
            # The first record here began in the segment before: it may fill all of this one, or end on the last page.
            offset = self.first_record(last)
            behind = (last + 1) * self.block
            if offset < behind:
                self._walk(offset, last)
            elif behind < self.size:
                raise self._unfinished(behind)

    def _last_page(self) -> int:
        """The last page that was written; behind it only zeros, or what a recycled file held before."""
        final = self.size // self.block - 1
        if self.is_valid(final):
            return final
        for end in range(self.size, 0, -_CHUNK):
            begin = end - _CHUNK
            if self.read(begin, _CHUNK) == _ZEROS:
                continue
            for number in range(end // self.block - 1, begin // self.block - 1, -1):
                if self.is_valid(number):
                    return number
                self._check_left_over(number)
        raise AssertionError("the first page is valid")  # pragma: no cover

    def _check_left_over(self, number: int) -> None:
        """A page behind the last written one is empty, or stems from the segment's former life.

        PostgreSQL zeroes what follows a switch. If it dies right then, the recycled file keeps older pages there, and
        is archived so after recovery.
        """
        page = self.page(number)
        header = read_page_header(page)
        stale = header.magic >> 8 == 0xD1 and header.address % self.block == 0 and header.address < self.start
        if not stale and page.count(0) != len(page):
            raise IntegrityError(
                f"{self.file} is damaged: the page {Lsn(self.start + number * self.block)} is no WAL page"
            )

    def _walk(self, offset: int, last: int) -> None:
        """Follow the records from ``offset``, where one begins, to the end of the segment."""
        previous = -1
        while offset < self.size:
            if offset % self.block == 0:
                if offset // self.block > last:
                    raise self._unfinished(offset)
                offset = self.first_record(offset // self.block)
            (length,) = _U32.unpack(self.bytes_from(offset, 4))
            if length == 0:
                raise self._unfinished(offset)
            head = self.bytes_from(offset, RECORD_HEADER)
            if length < RECORD_HEADER or not self._follows(head, offset, previous) or head[16:] == bytes(8):
                if any(self.bytes_from(offset + RECORD_HEADER, self.block)):
                    raise IntegrityError(f"{self.file} is damaged: there is no record at {Lsn(self.start + offset)}")
                raise self._unfinished(offset)
            end, whole = self._record_end(offset, length, last)
            if whole and _is_switch(head) and length == RECORD_HEADER:
                self._check_behind_switch(head, end, last)
                return
            if whole and end == self.size and length <= _MOST_SUMMED:
                self._check_sum(offset, length)
            # An abandoned record is nobody's predecessor.
            previous, offset = (offset if whole else -1), end

    def _follows(self, head: bytes, offset: int, previous: int) -> bool:
        """Whether the record names the one before it as such (as far as its header is in this segment)."""
        if len(head) < 16:
            return True
        (pointer,) = struct.unpack_from("<Q", head, 8)
        if previous >= 0:
            return bool(pointer == self.start + previous)
        return bool(pointer < self.start + offset)

    def _record_end(self, offset: int, length: int, last: int) -> tuple[int, bool]:
        """Where the record ends (aligned), and whether all of it is there.

        It is not if it goes on in the next segment, or was abandoned after a crash (then the offset is where the next
        one begins).
        """
        number = offset // self.block
        left = length - ((number + 1) * self.block - offset)
        if left <= 0:
            return offset + _aligned(length), True
        while True:
            number += 1
            if number * self.block == self.size:
                return self.size, False
            if number > last:
                raise self._unfinished(offset)
            header = self.header(number)
            begin = number * self.block + header.size
            if header.info & IS_OVERWRITE_CONTRECORD:
                return begin, False
            if not header.info & IS_CONTRECORD or header.rem_len != left:
                raise IntegrityError(
                    f"{self.file} is damaged: the record at {Lsn(self.start + offset)} does not go on as it should on"
                    f" page {header.address}"
                )
            if left <= (number + 1) * self.block - begin:
                return begin + _aligned(left), True
            left -= (number + 1) * self.block - begin

    def _check_sum(self, offset: int, length: int) -> None:
        record = self.bytes_from(offset, length)
        if not crc_is_right(record):
            raise self._unfinished(offset)

    def _is_end_of_switch(self, last: int) -> bool:
        """Whether all there is, is the end of a switch record that began in the segment before."""
        header = self.header(0)
        if last > 0 or not header.info & IS_CONTRECORD or header.rem_len not in (8, 16):
            return False
        rest = self.page(0)[LONG_HEADER : LONG_HEADER + header.rem_len]
        if not _is_switch(bytes(RECORD_HEADER - len(rest)) + rest):
            return False
        self._check_behind_switch(b"", LONG_HEADER + header.rem_len, last)
        return True

    def _check_behind_switch(self, head: bytes, end: int, last: int) -> None:
        if head and not crc_is_right(head):
            raise IntegrityError(f"{self.file} is damaged: the check sum of its switch record is wrong")
        number, inside = divmod(end - 1, self.block)
        if number < last or any(self.page(number)[inside + 1 :]):
            raise IntegrityError(f"{self.file} is damaged: there are bytes behind its switch record")

    def _unfinished(self, offset: int) -> IntegrityError:
        return IntegrityError(
            f"{self.file} is not a finished segment: its WAL ends at {Lsn(self.start + offset)}, the rest is padding,"
            f" and no switch record says so",
            hint="a restored or cut file was archived as if it were whole (archive_mode = always does that);"
            " take this segment from the primary",
        )


def crc_is_right(record: Buffer) -> bool:
    """Whether the check sum of a whole record (header and all) is right: over the body first, then the header."""
    (stored,) = _U32.unpack_from(record, 20)
    return bool(crc32c(record[RECORD_HEADER:], record[:20]) == stored)


def _is_switch(head: bytes) -> bool:
    """XLOG_SWITCH (info 0x40) of resource manager 0; the low four bits of info are flags."""
    return bool(head[17] == 0 and head[16] & 0xF0 == 0x40)


def _aligned(length: int) -> int:
    """Records begin at multiples of eight (MAXALIGN on every platform in use)."""
    return (length + 7) & ~7
