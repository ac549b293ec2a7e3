"""The records inside WAL segments: walk them, search them, find the last one.

A segment's *payload* is its bytes without page headers; records lie in it one behind the other, 8-byte aligned, so
finding something is a search in one row of bytes. What transactions and restore points look like is in ``walmarks``.
A record that goes on in the next segment is handed over as a ``Carry``: feed segments in order, each with what the one
before left open.

    carry = None
    for start, data in segments:
        payload = Payload(data, start, carry)
        ...
        carry = payload.carry()

A segment that is padded with zeros (a tail) is read to its last complete record. Overwritten continuations (a crash
lost the second half of a record) are stepped over as PostgreSQL does.

Sources: PostgreSQL's ``access/xlogrecord.h``, ``xlogreader.c``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.contracts import Buffer
from pipeline.errors import IntegrityError
from pipeline.wal import Lsn
from pipeline.walpages import (
    IS_CONTRECORD,
    IS_OVERWRITE_CONTRECORD,
    LONG_HEADER,
    RECORD_HEADER,
    SHORT_HEADER,
    crc_is_right,
    read_first_page,
)

#: Resource manager, and the upper four bits of info (``access/rmgrlist.h``, ``catalog/pg_control.h``).
RM_XLOG = 0
XLOG_SWITCH = 0x40

_HEAD = struct.Struct("<IIQBB2xI")
_U32 = struct.Struct("<I")
#: A commit of many thousand subtransactions is longer than any plausible false find that is worth a check sum.
_MOST_SOUGHT = 4 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One WAL record."""

    #: Position of its first byte.
    lsn: Lsn
    #: Position behind it, as the server counts: 8-byte aligned; the segment's end for a switch.
    end: Lsn
    #: Bytes of the record: header, block references, data.
    length: int
    #: Transaction, 0 if none.
    xid: int
    #: Position of the record before it.
    prev: Lsn
    rmid: int
    #: The resource manager's bits and (low four) general flags.
    info: int
    #: All of it, header included; valid as long as the payload is.
    body: memoryview

    @property
    def main(self) -> memoryview:
        """The main data: what is left behind the headers of block references and their data. IntegrityError."""
        return self.body[self.length - _main_size(self) :]


@dataclass(frozen=True, slots=True)
class Carry:
    """The beginning of a record that goes on in the next segment."""

    lsn: Lsn
    #: Its bytes so far, at least eight; the first four are its length.
    data: bytes

    @property
    def length(self) -> int:
        """Bytes of the whole record."""
        return int(_U32.unpack_from(self.data)[0])


class Payload:
    """A segment without its page headers, and where its records begin.

    ``data`` is a whole segment or the beginning of one (at least the first page's header); what follows the last valid
    page is left out. ``carry`` is what the segment before left open; without it the record that this segment begins
    in the middle of is skipped. Raises IntegrityError if ``data`` does not begin as the segment at ``start``.
    """

    def __init__(self, data: Buffer, start: int, carry: Carry | None = None) -> None:
        view = memoryview(data).cast("B")
        first = read_first_page(f"the segment at {Lsn(start)}", view[:LONG_HEADER])
        if first.address != start:
            raise IntegrityError(f"the segment at {Lsn(start)} begins with the page {first.address}")
        self.start = Lsn(start)
        self.major = first.major
        self.segment_size = first.segment_size
        self._block = first.block_size
        pages = self._valid_pages(view, first.magic)
        self._carry = carry if first.info & IS_CONTRECORD else None
        if self._carry and self._carry.length != len(self._carry.data) + first.rem_len:
            self._carry = None
        #: Bytes in front of the payload that come from the segments before.
        self._lead = len(self._carry.data) if self._carry else 0
        pieces: list[Buffer] = [self._carry.data] if self._carry else []
        pieces.append(view[LONG_HEADER : min(self._block, len(view))])
        pieces += [
            view[at + SHORT_HEADER : at + self._block] for at in range(self._block, pages * self._block, self._block)
        ]
        self._bytes = b"".join(pieces)
        self._view = memoryview(self._bytes)
        self._whole = pages * self._block == self.segment_size
        flags = view[: len(view) & ~7].cast("H")[1 :: self._block // 2].tolist()[:pages]
        rests = view[: len(view) & ~7].cast("I")[4 :: self._block // 4].tolist()[:pages]
        #: Per page: where in the payload the first record begins that begins there (behind the page, if none does).
        self._entries = [
            self._offset(page) + ((rest + 7) & ~7 if flag & IS_CONTRECORD else 0)
            for page, (flag, rest) in enumerate(zip(flags, rests, strict=True))
        ]
        if self._carry:
            self._entries[0] = 0
        #: Where a lost record is given up and the next one begins.
        self._restarts = [
            self._offset(page) for page, flag in enumerate(flags) if page and flag & IS_OVERWRITE_CONTRECORD
        ]

    def _valid_pages(self, view: memoryview, magic: int) -> int:
        """How many pages, counted from the first, stand where they belong."""
        whole = len(view) // self._block * self._block
        words = view[:whole].cast("Q")[1 :: self._block // 8].tolist()
        magics = view[:whole].cast("H")[:: self._block // 2].tolist()
        pages = 0
        for address, mark in zip(words, magics, strict=True):
            if address != self.start + pages * self._block or mark != magic:
                return pages
            pages += 1
        # The last page may be cut, if its header is there.
        if len(view) - whole >= LONG_HEADER and _HEAD.unpack_from(view, whole)[2] == self.start + whole:
            pages += 1
        return pages

    def _offset(self, page: int) -> int:
        """Offset in the payload of the first byte of a page."""
        first = self._block - LONG_HEADER
        return self._lead + (0 if page == 0 else first + (page - 1) * (self._block - SHORT_HEADER))

    def lsn(self, offset: int, *, end: bool = False) -> Lsn:
        """Position of a byte of the payload; as an ``end``, the edge of a page is before the next page's header."""
        if offset < self._lead:
            assert self._carry
            return self._carry.lsn if offset == 0 else Lsn(self.start)
        offset -= self._lead
        first = self._block - LONG_HEADER
        if offset < first or (end and offset == first):
            return self.start + (offset + LONG_HEADER if offset or not end else 0)
        page, inside = divmod(offset - first, self._block - SHORT_HEADER)
        if end and inside == 0:
            return self.start + (page + 1) * self._block
        return self.start + (page + 1) * self._block + SHORT_HEADER + inside

    def records(self) -> Iterator[Record]:
        """All complete records, in order.

        A record is believed when the next one names it as its predecessor, the last one when its check sum is right.
        """
        return self._believed(self._entries[0])

    def _believed(self, offset: int) -> Iterator[Record]:
        held: Record | None = None
        for record in self._walk(offset):
            if held and (record.prev == held.lsn or crc_is_right(held.body)):
                yield held
            held = record
        if held and (self._is_named_behind(held) or crc_is_right(held.body)):
            yield held

    def _is_named_behind(self, record: Record) -> bool:
        """Whether a record that goes on in the next segment names this one as the one before it."""
        at = self._offset_of(record) + ((record.length + 7) & ~7) + 8
        return at + 8 <= len(self._bytes) and self._bytes[at : at + 8] == record.lsn.to_bytes(8, "little")

    def _walk(self, offset: int) -> Iterator[Record]:
        for stop in (*self._restarts, len(self._bytes)):
            while offset < stop and (record := self.record_at(offset, stop)):
                yield record
                if _is_switch(record):
                    return
                offset += (record.length + 7) & ~7
            offset = max(offset, stop)

    def record_at(self, offset: int, stop: int | None = None) -> Record | None:
        """The record at ``offset`` of the payload if it is whole by its length and can be one; not check-summed."""
        stop = len(self._bytes) if stop is None else stop
        if offset < 0 or offset + RECORD_HEADER > stop:
            return None
        length, xid, prev, info, rmid, _ = _HEAD.unpack_from(self._bytes, offset)
        if length < RECORD_HEADER or offset + length > stop:
            return None
        lsn = self.lsn(offset)
        if prev >= lsn:
            return None
        record = Record(
            lsn,
            self.lsn(offset + ((length + 7) & ~7), end=True),
            length,
            xid,
            Lsn(prev),
            rmid,
            info,
            self._view[offset : offset + length],
        )
        return replace(record, end=self.start + self.segment_size) if _is_switch(record) else record

    def _late_entries(self) -> Iterator[int]:
        """Offsets where the records can be entered, from the last page backwards."""
        for page in range(len(self._entries) - 1, -1, -1):
            entry = self._entries[page]
            behind = self._offset(page + 1)
            if entry < behind and entry < len(self._bytes):
                yield entry

    def last_record(self) -> Record | None:
        """The last complete record, or None if none ends in this segment. Looks at the last pages only."""
        for entry in self._late_entries():
            last = None
            for record in self._believed(entry):
                last = record
            if last:
                return last
        return None

    def carry(self) -> Carry | None:
        """The record that goes on in the next segment, or None; always None for a segment that is not whole."""
        if not self._whole:
            return None
        for entry in self._late_entries():
            offset = entry
            for record in self._walk(entry):
                if _is_switch(record):
                    return None
                offset = self._offset_of(record) + ((record.length + 7) & ~7)
            return self._open_at(offset)
        if self._carry:
            return Carry(self._carry.lsn, self._bytes)
        return None

    def _open_at(self, offset: int) -> Carry | None:
        if offset >= len(self._bytes):
            return None
        carry = Carry(self.lsn(offset), self._bytes[offset:])
        return carry if carry.length >= RECORD_HEADER else None

    def _offset_of(self, record: Record) -> int:
        """Where in the payload a record begins; the opposite of ``lsn``."""
        if record.lsn < self.start:
            return 0
        page, inside = divmod(record.lsn - self.start, self._block)
        return self._offset(page) + inside - (LONG_HEADER if page == 0 else SHORT_HEADER)

    def find(self, needle: bytes, back: int) -> Iterator[Record]:
        """Records (their check sum is right) whose ``back``-th byte is where ``needle`` is found, by a fast search."""
        at = self._bytes.find(needle)
        while at >= 0:
            if (at - back) % 8 == 0:
                record = self.record_at(at - back)
                if record and record.length <= _MOST_SOUGHT and crc_is_right(record.body):
                    yield record
            at = self._bytes.find(needle, at + 1)


def _is_switch(record: Record) -> bool:
    return record.rmid == RM_XLOG and record.info & 0xF0 == XLOG_SWITCH and record.length == RECORD_HEADER


def _main_size(record: Record) -> int:
    """Length of the main data, from the headers behind the record's own."""
    body, at, data = record.body, RECORD_HEADER, 0
    try:
        while at + data < record.length:
            block = body[at]
            if block == 255:
                return body[at + 1]
            if block == 254:
                return int(_U32.unpack_from(body, at + 1)[0])
            if block in (252, 253):
                at += 5 if block == 252 else 3
                continue
            if block > 32:
                break
            at, data = _skip_block(body, at, data)
    except (IndexError, struct.error):
        pass
    else:
        if at + data == record.length:
            return 0
    raise IntegrityError(f"the WAL record at {record.lsn} is damaged: its headers do not add up")


def _skip_block(body: memoryview, at: int, data: int) -> tuple[int, int]:
    """The header of one block reference: where the next header begins, and how much data all blocks so far have."""
    flags = body[at + 1]
    data += int.from_bytes(body[at + 2 : at + 4], "little")
    at += 4
    if flags & 0x10:  # BKPBLOCK_HAS_IMAGE
        data += int.from_bytes(body[at : at + 2], "little")
        image = body[at + 4]
        at += 5
        # BKPIMAGE_HAS_HOLE and any of the three compressions (15 and later): the hole's length is said as well.
        if image & 0x01 and image & 0x1C:
            at += 2
    if not flags & 0x80:  # BKPBLOCK_SAME_REL
        at += 12
    return at + 4, data
