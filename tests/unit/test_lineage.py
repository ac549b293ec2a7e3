"""Which bytes of which segment recovery gets: compared with a model of PostgreSQL that asks as the real one does."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.catalog import Catalog, wal_key
from pipeline.errors import RecoveryError
from pipeline.lineage import Leg, Lineage
from pipeline.listing import Listing
from pipeline.runs import Gathering, Runs
from pipeline.wal import Fork, Lsn, WalFile, history_name

SIZE = 1 << 20
#: Positions are counted in quarters of a segment.
QUARTER = SIZE // 4


def lsn(quarters: int) -> Lsn:
    return Lsn(quarters * QUARTER)


@dataclass(frozen=True)
class World:
    """A lineage, and what of all its timelines' segments happens to be stored."""

    catalog: Catalog
    lineage: Lineage


@st.composite
def worlds(draw: st.DrawFn) -> World:
    forks = sorted(draw(st.lists(st.integers(1, 40), max_size=3)))
    legs = [Fork(number, lsn(end)) for number, end in enumerate(forks, 1)]
    timeline = len(forks) + 1
    listing = Listing("7")
    for t in range(1, timeline + 1):
        for n in draw(st.sets(st.integers(0, 12))):
            listing.add(wal_key(WalFile.segment(t, n * SIZE, SIZE)))
        for n in draw(st.sets(st.integers(0, 12), max_size=2)):
            file = WalFile.segment(t, n * SIZE, SIZE)
            listing.add(f"{wal_key(file)}.partial")
    if legs:
        listing.add_history(timeline, tuple(legs))
    catalog = listing.catalog(SIZE)
    # As the listing does: only of what is not stored finished. Four quarters are a whole segment.
    tails = {
        t: {
            n: quarters * QUARTER
            for n, quarters in draw(st.dictionaries(st.integers(0, 12), st.integers(0, 4), max_size=3)).items()
            if not catalog.has_segment(t, n)
        }
        for t in range(1, timeline + 1)
    }
    catalog = replace(catalog, tails=tails)
    return World(catalog, Lineage(lineage_legs(legs, timeline), SIZE))


def lineage_legs(forks: list[Fork], timeline: int) -> tuple[Leg, ...]:
    legs, begin = [], Lsn(0)
    for fork in forks:
        legs.append(Leg(fork.timeline, begin, fork.lsn))
        begin = fork.lsn
    return (*legs, Leg(timeline, begin, None))


def owner(lineage: Lineage, position: int) -> int:
    """The timeline that wrote the byte, as the lineage has it."""
    for leg in lineage.legs:
        if leg.end is None or position < leg.end:
            return leg.timeline
    raise AssertionError


def truth(lineage: Lineage, timeline: int, position: int) -> tuple[int, int]:
    """The byte that the file of ``timeline`` has: its ancestors' bytes up to where it began, its own behind that."""
    begin = next(leg.begin for leg in lineage.legs if leg.timeline == timeline)
    return (owner(lineage, position) if position < begin else timeline), position


def answered(world: World, timeline: int, number: int) -> list[tuple[int, int] | None] | None:
    """What ``fetch-wal`` gives: four quarters of a segment (None is zeros), or None for absent."""
    serve = world.lineage.serve(WalFile.segment(timeline, number * SIZE, SIZE))
    if serve is None:
        return None
    for file in serve.files:
        stored = world.catalog.has_partial if file.name.endswith(".partial") else world.catalog.has_segment
        if stored(timeline, number):
            cut = SIZE if serve.cut is None else serve.cut
            if file.name.endswith(".partial") and timeline == world.lineage.timeline:
                cut = SIZE // 2  # nobody closed it: it holds what was written so far
            return [
                truth(world.lineage, timeline, number * SIZE + q * QUARTER) if q * QUARTER < cut else None
                for q in range(4)
            ]
    reach = world.catalog.tail_reach(timeline, number)
    if reach <= serve.begin:
        return None
    cut = min(reach, SIZE if serve.cut is None else serve.cut)
    return [
        truth(world.lineage, timeline, number * SIZE + q * QUARTER) if q * QUARTER < cut else None for q in range(4)
    ]


def replay(world: World, start: int) -> int:
    """Recovery as ``XLogFileReadAnyTLI`` does it; where it ends. Every byte on the way must be the lineage's own."""
    number, position = start // SIZE, start // SIZE * SIZE
    current = 0
    while True:
        content = None
        for leg in reversed(world.lineage.legs):
            if leg.timeline < current:
                break
            if leg.begin // SIZE > number:
                continue
            content = answered(world, leg.timeline, number)
            if content is not None:
                current = leg.timeline
                break
        if content is None:
            return position
        for byte in content:
            if byte is None:
                return position
            assert byte == (owner(world.lineage, position), position), "bytes of another history were replayed"
            position += QUARTER
        number += 1
        assert number < 20


@given(worlds(), st.integers(0, 40))
def test_recovery_never_sees_another_history_and_ends_where_the_plan_says(world: World, start: int) -> None:
    path = world.catalog.wal_path(world.lineage, lsn(start))
    last = path.stretches[-1] if path.stretches else None
    half_written = last is not None and last.partial and last.timeline == world.lineage.timeline
    assert replay(world, lsn(start)) == path.end - (SIZE // 2 if half_written else 0)
    assert path.count == len([*path.files()]) == len([*path.backwards()])
    assert [*path.files()] == [*path.backwards()][::-1]
    assert sum(1 for file in path.stored() if file.name.endswith(".partial")) == sum(s.partial for s in path.stretches)
    assert len([*path.stored()]) == len([*path.finished()]) == path.count - sum(1 for s in path.stretches if s.tail)


@given(worlds(), st.integers(0, 40))
def test_what_is_missing_is_named_exactly(world: World, start: int) -> None:
    path = world.catalog.wal_path(world.lineage, lsn(start))
    end = world.catalog.known_end(world.lineage)
    if path.missing is None:
        assert path.end >= end
    else:
        number = path.missing.start(SIZE) // SIZE
        assert not world.catalog.has_segment(path.missing.timeline, number)
        assert path.missing.timeline == world.lineage.newest(number).timeline
        assert path.missing.start(SIZE) <= path.end <= path.missing.end(SIZE)


@given(st.sets(st.integers(0, 200)))
def test_runs_are_the_set(numbers: set[int]) -> None:
    runs = Runs.of(numbers)
    assert set(runs) == numbers
    assert len(runs) == len(numbers)
    assert bool(runs) == bool(numbers)
    for number in range(201):
        assert (number in runs) == (number in numbers)
        assert runs.reach(number) == next(n for n in range(number, 300) if n not in numbers)
    holes = {n for first, end in runs.holes() for n in range(first, end)}
    assert holes == (set(range(min(numbers), max(numbers))) - numbers if numbers else set())


def test_a_hundred_thousand_segments_are_one_run() -> None:
    listing = Listing("7")
    for number in range(100_000):
        listing.add(wal_key(WalFile.segment(1, number << 24, 16 << 20)))
    catalog = listing.catalog(16 << 20)
    assert catalog.segments[1].ranges == ((0, 100_000),)
    path = catalog.wal_path(catalog.lineage(1), Lsn(5 << 24))
    assert (path.count, path.missing, path.end) == (99_995, None, Lsn(100_000 << 24))


def test_names_are_parsed_strictly() -> None:
    listing = Listing("7")
    segment = WalFile.segment(1, 3 * SIZE, SIZE)
    for key in (
        wal_key(segment),
        f"{wal_key(segment)}.partial",
        f"{wal_key(segment)}.00000028.backup",
        "wal/00000002.history",
        "wal/0000000100000000/",
    ):
        listing.add(key)
    strange = (
        "wal/0000000100000000/00000001000000000000000g",
        "wal/0000000100000001/000000010000000000000003",
        "wal/000000010000000000000003",
        "wal/0000000100000000/000000010000000000000003.tmp",
        "wal/note.txt",
        # With segments of 1 MB the last eight digits end at FFF.
        "wal/0000000100000000/000000010000000000001000",
    )
    for key in strange:
        listing.add(key)
    catalog = listing.catalog(SIZE)
    assert catalog.segments == {1: Runs(((3, 4),))}
    assert catalog.partials == {1: Runs(((3, 4),))}
    assert catalog.labels == 1
    assert catalog.unknown == len(strange)
    assert {file.name for file in listing.history_files} == {history_name(2)}


def test_a_segment_with_a_fork_comes_from_the_new_timeline() -> None:
    lineage = Lineage((Leg(1, Lsn(0), lsn(10)), Leg(2, lsn(10), None)), SIZE)
    old, new = WalFile.segment(1, lsn(10), SIZE), WalFile.segment(2, lsn(10), SIZE)
    assert lineage.newest(2).timeline == 2
    served = lineage.serve(new)
    assert served is not None
    assert served.cut is None
    served = lineage.serve(old)
    assert served is not None
    assert served.cut == 2 * QUARTER
    assert lineage.serve(old.next(SIZE)) is None
    assert lineage.serve(WalFile.segment(2, lsn(4), SIZE)) is None
    assert lineage.serve(WalFile.segment(3, lsn(20), SIZE)) is None


def test_a_history_that_contradicts_itself_is_refused() -> None:
    listing = Listing("7")
    listing.add_history(3, (Fork(1, lsn(9)), Fork(2, lsn(4))))
    with pytest.raises(RecoveryError, match="contradicts itself"):
        listing.catalog(SIZE).lineage(3)
    with pytest.raises(RecoveryError, match="nothing of timeline 9"):
        listing.catalog(SIZE).lineage(9)


class Asked:
    """A month of one timeline without a hole, that counts what it is asked."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.questions = 0

    def has_segment(self, timeline: int, number: int) -> bool:
        self.questions += 1
        return timeline == 1 and number < self.end

    def run_end(self, timeline: int, number: int) -> int:
        self.questions += 1
        return self.end if self.has_segment(timeline, number) else number

    def has_partial(self, _timeline: int, _number: int) -> bool:
        return False

    def tail_reach(self, _timeline: int, _number: int) -> int:
        return 0


def test_a_month_without_a_hole_is_one_step() -> None:
    """The service goes through it for each backup at each listing, and commits wait for its answers meanwhile."""
    stored, lineage = Asked(43_200), Lineage((Leg(1, Lsn(0), None),), SIZE)
    path = lineage.path(stored, Lsn(7 * SIZE + 40), Lsn(43_200 * SIZE))
    assert (path.end, path.missing, len(list(path.files()))) == (43_200 * SIZE, None, 43_193)
    path = lineage.path(stored, Lsn(7 * SIZE + 40), Lsn(9 * SIZE + 1))
    assert (path.end, [file.start(SIZE) // SIZE for file in path.files()]) == (10 * SIZE, [7, 8, 9])
    assert stored.questions < 20


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 9))))
def test_numbers_that_are_gathered_in_any_order_are_the_same_set(stretches: list[tuple[int, int]]) -> None:
    gathering = Gathering()
    gathering._MOST = 3  # join often
    for first, count in stretches:
        gathering.add(first, first + count)
        gathering.add(first)
    assert gathering.runs() == Runs.of(n for first, count in stretches for n in range(first, first + count))


def test_listings_are_merged() -> None:
    one, other = Listing("7"), Listing("7")
    for number in range(0, 40, 2):
        one.add(wal_key(WalFile.segment(1, number * SIZE, SIZE)))
        other.add(wal_key(WalFile.segment(1, (number + 1) * SIZE, SIZE)))
    # With segments of 1 MB the last eight digits end at FFF, and the next log follows without a gap.
    for number in (4095, 4096):
        other.add(wal_key(WalFile.segment(1, number * SIZE, SIZE)))
    other.add("wal/00000002.history")
    one.merge(other)
    assert one.catalog(SIZE).segments == {1: Runs(((0, 40), (4095, 4097)))}
    assert one.history_files
