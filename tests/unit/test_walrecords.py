"""Records and what recovery targets name, on WAL made by hand; pg_waldump is the judge in the integration tests."""

from __future__ import annotations

import itertools
import struct
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import IntegrityError
from pipeline.walmarks import find_restore_point, find_xid, last_transaction, transactions
from pipeline.walrecords import Carry, Payload, Record
from tests.waldata import PAGE, SEGMENT_SIZE, Writer

START = 5 * SEGMENT_SIZE
NOON = datetime(2026, 1, 14, 12, tzinfo=UTC)


def stamp(moment: datetime) -> bytes:
    return struct.pack("<q", (moment - datetime(2000, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1))


def read(writer: Writer, segments: int = 1) -> list[Record]:
    carry: Carry | None = None
    found: list[Record] = []
    for number in range(segments):
        payload = Payload(writer.segment(number), writer.start + number * SEGMENT_SIZE, carry)
        found += payload.records()
        carry = payload.carry()
    return found


@given(st.lists(st.integers(0, 3 * PAGE), min_size=1, max_size=40))
def test_records_come_back_where_they_were_put(sizes: list[int]) -> None:
    writer = Writer(START)
    places = [writer.add(bytes([n % 251]) * size, xid=n) for n, size in enumerate(sizes)]
    found = read(writer)
    assert [int(r.lsn) for r in found] == places
    assert [r.xid for r in found] == list(range(len(sizes)))
    assert [bytes(r.main) for r in found] == [bytes([n % 251]) * size for n, size in enumerate(sizes)]
    assert all(left.end <= right.lsn for left, right in itertools.pairwise(found))


def test_a_record_over_three_segments() -> None:
    writer = Writer(START)
    first = writer.add(b"first")
    long = writer.add(b"abcdefg" * (SEGMENT_SIZE // 3))
    last = writer.add(b"last")
    assert [int(r.lsn) for r in read(writer, 3)] == [first, long, last]
    # Without its beginning it is skipped.
    middle = Payload(writer.segment(1), START + SEGMENT_SIZE)
    assert list(middle.records()) == []
    assert middle.last_record() is None
    end = Payload(writer.segment(2), START + 2 * SEGMENT_SIZE)
    assert [int(r.lsn) for r in end.records()] == [last]


@pytest.mark.parametrize("left", [8, 16])
def test_a_record_header_that_is_split_between_segments(left: int) -> None:
    writer = Writer(START)
    writer.fill(900)
    writer.add(b"z" * (SEGMENT_SIZE - len(writer.bytes) - (24 - left) - 24 - 5))
    split = writer.add(b"split")
    assert split == START + SEGMENT_SIZE - 24 + left
    assert int(read(writer, 2)[-1].lsn) == split


def test_the_end_of_a_page_is_before_the_next_header() -> None:
    """As pg_current_wal_lsn counts; and a switch ends with its segment."""
    writer = Writer(START)
    writer.add(b"z" * (PAGE - 40 - 24 - 5))
    writer.add(rmid=0, info=0x40)
    first, switch = read(writer)
    assert (first.end, switch.lsn, switch.end) == (START + PAGE, START + PAGE + 24, START + SEGMENT_SIZE)


@pytest.mark.parametrize("cut", [1, 9, 24, 50, 4000])
def test_the_last_record_of_a_padded_tail(cut: int) -> None:
    """What was cut is not taken for a record, wherever the cut is."""
    writer = Writer(START)
    writer.add(b"one")
    kept = writer.add(b"two")
    writer.add(b"three" * 2000)
    data = writer.segment()[: kept - START + 32 + cut]
    padded = data + bytes(SEGMENT_SIZE - len(data))
    last = Payload(padded, START).last_record()
    assert last
    assert last.lsn == kept
    assert bytes(last.main) == b"two"
    assert Payload(padded, START).carry() is None
    assert [r.lsn for r in Payload(data, START).records()][-1] == kept


def test_a_lost_record_is_stepped_over() -> None:
    writer = Writer(START)
    first = writer.add(b"z" * 5000)
    writer.add(b"lost" * 1500)
    del writer.bytes[PAGE:]
    writer.last = first
    following = writer.add(b"next")
    struct.pack_into("<H", writer.bytes, PAGE + 2, 0x08)
    assert [int(r.lsn) for r in read(writer)] == [first, following]


def test_what_is_no_such_segment() -> None:
    with pytest.raises(IntegrityError, match=r"segment at 0/600000 begins with the page 0/500000"):
        Payload(_one(), 6 * SEGMENT_SIZE)


def _one() -> bytes:
    writer = Writer(START)
    writer.add(b"x")
    return writer.segment()


def test_transactions_and_their_times() -> None:
    writer = Writer(START)
    writer.add(b"noise", xid=7)
    commit = writer.add(stamp(NOON), xid=7, rmid=1, info=0x00)
    abort = writer.add(stamp(NOON + timedelta(seconds=1)), xid=8, rmid=1, info=0x20)
    writer.add(b"\0" * 40, xid=9, rmid=1, info=0x50)
    prepared = stamp(NOON + timedelta(seconds=2)) + struct.pack("<IIIII", 0x12, 2, 70, 71, 77)
    writer.add(prepared, rmid=1, info=0x30 | 0x80)
    payload = Payload(writer.segment(), START)
    found = list(transactions(payload))
    assert [(t.xid, t.committed, (t.time - NOON).seconds) for t in found] == [
        (7, True, 0),
        (8, False, 1),
        (77, True, 2),
    ]
    assert [int(t.lsn) for t in found[:2]] == [commit, abort]
    assert last_transaction(payload) == found[2]
    for transaction in found:
        assert find_xid(payload, transaction.xid) == transaction
    assert find_xid(payload, 9) is None
    assert find_xid(payload, 70) is None


def test_an_abort_can_be_the_last() -> None:
    writer = Writer(START)
    writer.add(stamp(NOON), xid=7, rmid=1, info=0x00)
    writer.add(stamp(NOON), xid=8, rmid=1, info=0x20)
    payload = Payload(writer.segment(), START)
    commit, either = last_transaction(payload), last_transaction(payload, committed=False)
    assert commit
    assert either
    assert (commit.xid, either.xid) == (7, 8)


def test_restore_points_are_found_by_their_whole_name() -> None:
    writer = Writer(START)
    writer.add(b"a message that says before_drop")
    at = writer.add(stamp(NOON) + b"before_drop_2".ljust(64, b"\0"), rmid=0, info=0x70)
    payload = Payload(writer.segment(), START)
    found = find_restore_point(payload, "before_drop_2")
    assert found
    assert (int(found.lsn), found.time) == (at, NOON)
    assert find_restore_point(payload, "before_drop") is None
    assert find_restore_point(payload, "drop_2") is None


def test_a_commit_that_crosses_segments_is_found_with_its_carry() -> None:
    writer = Writer(START)
    writer.fill(900)
    writer.add(b"z" * (SEGMENT_SIZE - len(writer.bytes) - 16 - 24 - 5))
    writer.add(stamp(NOON), xid=7, rmid=1)
    carry = Payload(writer.segment(0), START).carry()
    assert carry
    second = Payload(writer.segment(1), START + SEGMENT_SIZE, carry)
    found = find_xid(second, 7)
    assert found
    assert found.lsn == START + SEGMENT_SIZE - 16
    assert find_xid(Payload(writer.segment(1), START + SEGMENT_SIZE), 7) is None
