"""Page checksums: a flipped bit is found wherever it is, and what the WAL replaces is left alone."""

from __future__ import annotations

import functools
import operator
import random
import struct

import pytest

from handlers.pages import _OFFSETS, PAGE, bad_pages
from pipeline.wal import Lsn

START = Lsn(1 << 33)


def page(number: int, *, lsn: int = 1 << 32, seed: int = 0) -> bytearray:
    """A used page with its checksum, by the letter of ``checksum_impl.h``: one word after the other."""
    content = bytearray(random.Random(seed).randbytes(PAGE))
    content[:16] = struct.pack("<IIHHHH", lsn >> 32, lsn & 0xFFFFFFFF, 0, 0, 64, 4096)
    words = [*struct.unpack("<2048I", content), *[0] * 64]
    sums = list(_OFFSETS)
    for position, word in enumerate(words):
        mixed = sums[position % 32] ^ word
        sums[position % 32] = (mixed * 16777619 & 0xFFFFFFFF) ^ mixed >> 17
    checksum = (functools.reduce(operator.xor, sums) ^ number) % 65535 + 1
    struct.pack_into("<H", content, 8, checksum)
    return content


@pytest.fixture(scope="module")
def good() -> bytearray:
    return page(7)


def test_a_flipped_bit_is_found_in_the_words_of_every_lane(good: bytearray) -> None:
    for position in (9, 12, 20, 100, 4095, 8191):
        damaged = bytearray(good)
        damaged[position] ^= 0x10
        assert bad_pages(damaged, 7, START) == [7], position


def test_a_page_that_lies_in_the_place_of_another_is_found(good: bytearray) -> None:
    assert bad_pages(good, 7, START) == []
    assert bad_pages(good, 8, START) == [8]


def test_what_was_written_behind_the_start_is_left_to_the_wal(good: bytearray) -> None:
    damaged = bytearray(good)
    damaged[100] ^= 1
    assert bad_pages(damaged, 7, START) == [7]
    assert bad_pages(damaged, 7, Lsn(1 << 32)) == []


def test_pages_that_were_never_used_have_no_checksum() -> None:
    assert bad_pages(bytes(3 * PAGE), 0, START) == []


def test_many_pages_are_told_apart(good: bytearray) -> None:
    many = bytearray().join([bytes(PAGE)] * 7 + [good] + [bytes(PAGE)] * 600)
    many[600 * PAGE + 14] = 1  # in use, and wrong
    assert bad_pages(many, 0, START) == [600]
