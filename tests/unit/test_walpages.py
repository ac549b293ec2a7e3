"""What counts as a finished segment, on WAL made by hand; real servers' WAL is in the integration tests."""

from __future__ import annotations

import struct

import pytest

from pipeline.crc32c import crc32c
from pipeline.errors import IntegrityError
from pipeline.wal import WalFile
from pipeline.walpages import check_segment, check_segment_by, read_first_page
from tests.waldata import PAGE, SEGMENT_SIZE, SYSTEM_ID, Writer, full, switched

NAME = "000000020000000000000005"
START = 5 * SEGMENT_SIZE


def judge(data: bytes, name: str = NAME, *, segment_size: int = SEGMENT_SIZE) -> None:
    file = WalFile.parse(name)
    assert file
    check_segment(file, data, system_id=SYSTEM_ID, segment_size=segment_size)


def test_crc32c_is_the_one_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, the check value
    assert crc32c(b"1234", b"56789") == 0xE3069283


def test_a_segment_that_ends_in_a_switch() -> None:
    judge(switched(NAME))


def test_a_segment_whose_records_reach_its_end() -> None:
    judge(full(NAME))


def test_all_buffers_are_the_same() -> None:
    file = WalFile.parse(NAME)
    assert file
    for data in (bytearray(full(NAME)), memoryview(full(NAME))):
        check_segment(file, data, system_id=SYSTEM_ID, segment_size=SEGMENT_SIZE)


def test_a_record_that_ends_with_the_segment() -> None:
    writer = Writer(START, timeline=2)
    writer.fill(1000)
    writer.add(b"z" * (SEGMENT_SIZE - len(writer.bytes) - 24 - 5))
    assert len(writer.bytes) == SEGMENT_SIZE
    data = writer.segment()
    judge(data)
    with pytest.raises(IntegrityError, match="not a finished segment"):
        judge(data[:-300] + bytes(300))


def test_a_record_that_fills_the_whole_segment() -> None:
    writer = Writer(START - SEGMENT_SIZE, timeline=2)
    writer.add(b"z" * (3 * SEGMENT_SIZE))
    judge(writer.segment(1))
    with pytest.raises(IntegrityError, match="not a finished segment"):
        judge(writer.segment(1)[: -3 * PAGE] + bytes(3 * PAGE))


def test_a_record_from_before_that_ends_on_the_last_page() -> None:
    writer = Writer(START - SEGMENT_SIZE, timeline=2)
    writer.add(b"z" * (2 * SEGMENT_SIZE - 9000))
    while len(writer.bytes) < 2 * SEGMENT_SIZE:
        writer.add(b"y" * 900)
    judge(writer.segment(1))


@pytest.mark.parametrize("left", [8, 16])
def test_a_switch_that_began_in_the_segment_before(left: int) -> None:
    """PostgreSQL then gives up all of the next segment."""
    writer = Writer(START - SEGMENT_SIZE, timeline=2)
    writer.fill(900)
    writer.add(b"z" * (SEGMENT_SIZE - len(writer.bytes) - (24 - left) - 24 - 5))
    assert SEGMENT_SIZE - len(writer.bytes) == 24 - left
    writer.add(rmid=0, info=0x40)
    judge(writer.segment(0), "000000020000000000000004")
    judge(writer.segment(1))
    with pytest.raises(IntegrityError):
        judge(writer.segment(1)[:48] + bytes(SEGMENT_SIZE - 49) + b"x")


@pytest.mark.parametrize("left", [8, 16])
def test_a_switch_that_straddles_pages(left: int) -> None:
    writer = Writer(START, timeline=2)
    writer.add(b"z" * 5000)
    writer.add(b"z" * (PAGE - len(writer.bytes) - (24 - left) - 24 - 5))
    writer.add(rmid=0, info=0x40)
    assert len(writer.bytes) == PAGE + 24 + left
    judge(writer.segment())


def test_a_switch_at_the_very_end_of_a_page() -> None:
    writer = Writer(START, timeline=2)
    writer.add(b"z" * 5000)
    writer.add(b"z" * (PAGE - len(writer.bytes) - 24 - 24 - 5))
    writer.add(rmid=0, info=0x40)
    assert len(writer.bytes) == PAGE
    judge(writer.segment())


def test_a_lost_record_is_stepped_over() -> None:
    """After a crash the first page without its continuation begins with OVERWRITE_CONTRECORD."""
    writer = Writer(START, timeline=2)
    writer.add(b"z" * 5000)
    before = writer.last
    writer.add(b"lost" * 1500)
    del writer.bytes[PAGE:]
    writer.last = before
    writer.add(b"next")
    struct.pack_into("<H", writer.bytes, PAGE + 2, 0x08)
    writer.add(rmid=0, info=0x40)
    judge(writer.segment())


def test_pages_of_the_file_that_was_recycled_may_follow_a_switch() -> None:
    """The server died between the switch and zeroing what follows."""
    old = Writer(START - 3 * SEGMENT_SIZE, timeline=1)
    while len(old.bytes) < SEGMENT_SIZE:
        old.add(b"y" * 5000)
    data = switched(NAME)[: 3 * PAGE] + old.segment()[3 * PAGE :]
    judge(data)


def test_pages_of_an_older_timeline_come_before_the_fork() -> None:
    data = bytearray(full(NAME))
    struct.pack_into("<I", data, 4, 1)
    judge(bytes(data))
    struct.pack_into("<I", data, 4, 3)
    with pytest.raises(IntegrityError, match="timeline 3"):
        judge(bytes(data))


@pytest.mark.parametrize(
    "where", [100, PAGE - 4, PAGE, PAGE + 10, 3 * PAGE + 5000, SEGMENT_SIZE // 2, SEGMENT_SIZE - PAGE]
)
def test_a_padded_tail_is_refused(where: int) -> None:
    with pytest.raises(
        IntegrityError, match=r"not a finished segment: its WAL ends at 0/5\w+, the rest is padding"
    ) as caught:
        judge(full(NAME)[:where] + bytes(SEGMENT_SIZE - where))
    assert "archive_mode = always" in caught.value.hint


def test_every_cut_of_a_switched_segment_is_refused() -> None:
    data = switched(NAME, records=[b"a" * 100, b"b" * 9000, b"c" * 100])
    end = len(data.rstrip(b"\0"))
    for cut in [*range(40, end, 97), *range(end - 60, end)]:
        with pytest.raises(IntegrityError):
            judge(data[:cut] + bytes(SEGMENT_SIZE - cut))


def test_zeros_and_garbage() -> None:
    with pytest.raises(IntegrityError, match="begins with 0000"):
        judge(bytes(SEGMENT_SIZE))
    with pytest.raises(IntegrityError, match="begins with 6767"):
        judge(b"g" * SEGMENT_SIZE)
    with pytest.raises(IntegrityError, match="no WAL page"):
        judge(switched(NAME)[:-PAGE] + b"g" * PAGE)


def test_a_hole_between_valid_pages() -> None:
    """A copy under way need not be written in order."""
    data = bytearray(full(NAME))
    data[40 * PAGE : 44 * PAGE] = bytes(4 * PAGE)
    with pytest.raises(IntegrityError, match="has a hole"):
        judge(bytes(data))


def test_name_size_and_cluster() -> None:
    data = switched(NAME)
    with pytest.raises(IntegrityError, match="is 1048575 bytes"):
        judge(data[:-1])
    with pytest.raises(IntegrityError, match="by its name it should begin with 0/600000 of timeline 2"):
        judge(data, "000000020000000000000006")
    with pytest.raises(IntegrityError, match=r"should begin with .* timeline 1 or an older"):
        judge(data, "000000010000000000000005")
    with pytest.raises(IntegrityError, match=f"belongs to the cluster 5, not to {SYSTEM_ID}"):
        judge(switched(NAME, system_id=5))
    with pytest.raises(IntegrityError, match="is no name of a segment of 16777216 bytes"):
        judge(data, "000000020000000000000F05", segment_size=16 << 20)
    with pytest.raises(IntegrityError, match="says its segments are 1048576 bytes"):
        judge(data + bytes(15 << 20), segment_size=16 << 20)


def test_servers_that_are_too_old_or_newer_than_we_know() -> None:
    judge(switched(NAME, magic=0xD11F))
    with pytest.raises(IntegrityError, match="D106"):
        judge(switched(NAME, magic=0xD106))
    assert read_first_page("x", switched(NAME, magic=0xD11F)).major == 0
    assert read_first_page("x", switched(NAME, magic=0xD118)).major == 18


def test_a_partial_segment_is_judged_by_its_first_page() -> None:
    partial = full(NAME)[: 3 * PAGE + 100] + bytes(SEGMENT_SIZE - 3 * PAGE - 100)
    judge(partial, f"{NAME}.partial")
    with pytest.raises(IntegrityError, match="cluster"):
        judge(switched(NAME, system_id=5), f"{NAME}.partial")


def test_few_pages_are_read_of_a_file() -> None:
    file = WalFile.parse(NAME)
    assert file
    data, read = full(NAME), 0

    def at(offset: int, length: int) -> bytes:
        nonlocal read
        read += length
        return data[offset : offset + length]

    check_segment_by(file, len(data), at, system_id=SYSTEM_ID, segment_size=SEGMENT_SIZE)
    assert read < 8 * PAGE
