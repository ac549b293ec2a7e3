"""WAL made by hand: small segments with real pages, records and check sums. Real ones come from real servers."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from pipeline.crc32c import crc32c
from pipeline.wal import WalFile

SYSTEM_ID = 7500000000000000001
SEGMENT_SIZE = 1 << 20
PAGE = 8192


def record(data: bytes = b"", *, prev: int, xid: int = 0, rmid: int = 21, info: int = 0) -> bytes:
    """One record with ``data`` as main data (rmid 21: a message, that nobody has to understand)."""
    headers = b""
    if data:
        headers = bytes((255, len(data))) if len(data) < 256 else b"\xfe" + struct.pack("<I", len(data))
    body = headers + data
    head = struct.pack("<IIQBB2x", 24 + len(body), xid, prev, info, rmid)
    return head + struct.pack("<I", crc32c(body, head)) + body


def switch(prev: int) -> bytes:
    return record(prev=prev, rmid=0, info=0x40)


class Writer:
    """Puts records behind one another, with page headers between, from the start of a segment on."""

    def __init__(
        self, start: int, *, timeline: int = 1, magic: int = 0xD116, system_id: int = SYSTEM_ID,
        segment_size: int = SEGMENT_SIZE,
    ) -> None:  # fmt: skip
        self.start = start
        self.timeline = timeline
        self.magic = magic
        self.system_id = system_id
        self.segment_size = segment_size
        self.bytes = bytearray()
        self.last = start  # something before the first record, to be named as its predecessor

    @property
    def position(self) -> int:
        return self.start + len(self.bytes)

    @property
    def next_record(self) -> int:
        """Where the next record will begin."""
        return self.position + (self._header_size() if len(self.bytes) % PAGE == 0 else 0)

    def add(self, data: bytes = b"", *, xid: int = 0, rmid: int = 21, info: int = 0) -> int:
        """Write a record, over as many pages as it needs. Returns its position."""
        at = self.next_record
        prev = self.last if self.last != self.start else max(0, self.start - 64)
        self.raw(record(data, prev=prev, xid=xid, rmid=rmid, info=info))
        self.last = at
        return at

    def raw(self, content: bytes) -> None:
        left = content
        while left:
            if len(self.bytes) % PAGE == 0:
                self._begin_page(len(left) if left is not content else 0)
            room = PAGE - len(self.bytes) % PAGE
            self.bytes += left[:room]
            left = left[room:]
        self.bytes += bytes(-len(self.bytes) % 8)

    def fill(self, until: int) -> None:
        """Small records until fewer than ``until`` bytes are left in the segment."""
        while self.segment_size - len(self.bytes) % self.segment_size > until:
            left = self.segment_size - len(self.bytes)
            self.add(b"x" * min(3000, max(1, left - until - 64)))

    def segment(self, number: int = 0) -> bytes:
        """The bytes of one segment, padded with zeros."""
        part = bytes(self.bytes[number * self.segment_size : (number + 1) * self.segment_size])
        return part + bytes(self.segment_size - len(part))

    def _header_size(self) -> int:
        return 40 if len(self.bytes) % self.segment_size == 0 else 24

    def _begin_page(self, left: int) -> None:
        first = len(self.bytes) % self.segment_size == 0
        info = (1 if left else 0) | (2 if first else 0)
        self.bytes += struct.pack("<HHIQI4x", self.magic, info, self.timeline, self.position, left)
        if first:
            self.bytes += struct.pack("<QII", self.system_id, self.segment_size, PAGE)


def switched(name: str, *, records: Sequence[bytes] = (b"hello",), **more: int) -> bytes:
    """A finished segment of that name: a few records and a switch."""
    file = WalFile.parse(name)
    assert file
    writer = Writer(file.start(SEGMENT_SIZE), timeline=file.timeline, **more)
    for data in records:
        writer.add(data)
    writer.add(rmid=0, info=0x40)
    return writer.segment()


def full(name: str) -> bytes:
    """A finished segment whose last record goes on in the next one."""
    file = WalFile.parse(name)
    assert file
    writer = Writer(file.start(SEGMENT_SIZE), timeline=file.timeline)
    while len(writer.bytes) < SEGMENT_SIZE:
        writer.add(b"y" * 5000)
    return writer.segment()
