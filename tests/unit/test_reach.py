"""How far a destination goes, tails included, by names alone."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.reach import claimed, unbroken, with_claimed_tails
from pipeline.catalog import Catalog, wal_key
from pipeline.listing import Listing
from pipeline.tail import TailName
from pipeline.wal import Fork, Lsn, WalFile
from tests.keys import SYSTEM_ID

SIZE = 1 << 20


def segment(number: int, timeline: int = 1) -> WalFile:
    return WalFile.segment(timeline, number * SIZE, SIZE)


def tail(number: int, start: int, end: int, *, timeline: int = 1, epoch: int = 1) -> TailName:
    return TailName(segment(number, timeline), epoch, start, end)


def catalog(finished: Iterable[WalFile], tails: Iterable[TailName], *forks: Fork) -> Catalog:
    listing = Listing(SYSTEM_ID)
    for file in finished:
        listing.add(wal_key(file))
    if forks:
        listing.add_history(2, forks)
    return with_claimed_tails(listing.catalog(SIZE), list(tails))


@pytest.mark.parametrize(
    ("tails", "lsn", "in_tails"),
    [
        ([], 5 * SIZE, 0),
        ([tail(5, 0, 100)], 5 * SIZE + 100, 100),
        ([tail(5, 0, 100), tail(5, 100, 250), tail(5, 60, 120, epoch=2)], 5 * SIZE + 250, 250),
        # A hole, or no beginning: nothing behind it counts.
        ([tail(5, 0, 100), tail(5, 101, 250)], 5 * SIZE + 100, 100),
        ([tail(5, 8, 100)], 5 * SIZE, 0),
        # Left over beside the finished segment, of another timeline, behind a segment that is not there.
        ([tail(4, 0, 100), tail(5, 0, 7, timeline=3), tail(9, 0, 100)], 5 * SIZE, 0),
        # The whole segment and the next one.
        ([tail(5, 0, 100), tail(5, 100, SIZE), tail(6, 0, 50)], 6 * SIZE + 50, 50),
    ],
)
def test_tails_go_on_where_segments_end(tails: list[TailName], lsn: int, in_tails: int) -> None:
    reach = unbroken(catalog(map(segment, (3, 4)), tails), 1, None)
    assert (reach.lsn, reach.in_tails) == (lsn, in_tails)
    assert (reach.missing is not None) is any(t.file == segment(9) for t in tails)


def test_a_hole_that_tails_fill_is_none() -> None:
    finished = [segment(3), segment(5)]
    assert unbroken(catalog(finished, []), 1, None).missing == segment(4)
    assert unbroken(catalog(finished, [tail(4, 0, SIZE)]), 1, None).lsn == 6 * SIZE
    part = unbroken(catalog(finished, [tail(4, 0, 9)]), 1, None)
    assert (part.lsn, part.missing) == (4 * SIZE + 9, segment(4))


def test_tails_alone() -> None:
    assert unbroken(catalog([], [tail(3, 0, 9)]), 1, None).lsn == 3 * SIZE + 9
    assert unbroken(catalog([], [tail(3, 1, 9)]), 1, None).lsn is None


def test_a_timeline_that_has_only_tails() -> None:
    found = catalog([segment(3)], [tail(4, 0, 90), tail(4, 0, 70, timeline=2)], Fork(1, Lsn(4 * SIZE + 60)))
    assert unbroken(found, 2, None).lsn == 4 * SIZE + 70
    assert found.newest_timeline == 2


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=12))
def test_claimed_is_the_first_byte_that_nobody_has(ranges: list[tuple[int, int]]) -> None:
    names = [tail(1, start, start + length, epoch=n) for n, (start, length) in enumerate(ranges)]
    covered = {byte for start, length in ranges for byte in range(start, start + length)}
    assert claimed(names, segment(1)) == next(byte for byte in range(100) if byte not in covered)
