"""Joining tails: any cut points, writers, overlaps, holes and forks; what comes out is some writer's true bytes."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.tail import TailName, TailPart, stitch
from pipeline.wal import WalFile

SIZE = 400
FILE = WalFile.segment(1, 3 << 20, 1 << 20)


def part(truth: bytes, start: int, end: int, epoch: int = 1) -> TailPart:
    return TailPart(TailName(FILE, epoch, start, end), hashlib.sha256(truth[:start]).digest(), truth[start:end])


@dataclass(frozen=True)
class World:
    """What several writers would have written to one segment, and the tails that are left of it."""

    #: By epoch.
    truths: dict[int, bytes]
    parts: tuple[TailPart, ...]


@st.composite
def worlds(draw: st.DrawFn, *, forks: bool) -> World:
    count = draw(st.integers(1, 3))
    truths = {1: random.Random(draw(st.integers(0, 9))).randbytes(SIZE)}
    for epoch in range(2, count + 1):
        truths[epoch] = truths[draw(st.integers(1, epoch - 1))]
        if forks and draw(st.booleans()):
            fork = draw(st.integers(0, SIZE - 1))
            behind = bytes(byte ^ 0xFF for byte in truths[epoch][fork:])
            truths[epoch] = truths[epoch][:fork] + behind
    parts: list[TailPart] = []
    for _ in range(draw(st.integers(0, 14))):
        epoch = draw(st.integers(1, count))
        # Where one ends another begins, often enough for long chains.
        start = draw(st.sampled_from([0, 0, *(p.name.end for p in parts)]) | st.integers(0, SIZE - 1))
        if start < SIZE:
            parts.append(part(truths[epoch], start, draw(st.integers(start + 1, SIZE)), epoch))
    parts += draw(st.lists(st.sampled_from(parts), max_size=3)) if parts else []
    return World(truths, tuple(draw(st.permutations(parts))))


@given(worlds(forks=False), st.randoms())
def test_of_one_truth_all_is_joined_that_is_there_from_the_beginning_on(world: World, order: random.Random) -> None:
    reach = 0
    for name in sorted((p.name.start, p.name.end) for p in world.parts):
        if name[0] <= reach:
            reach = max(reach, name[1])
    made = stitch(FILE, world.parts, SIZE)
    assert made.reach == reach
    assert made.content == world.truths[1][:reach] + bytes(SIZE - reach)
    assert bool(made.notices) == any(p.name.end > reach for p in world.parts)
    shuffled = list(world.parts)
    order.shuffle(shuffled)
    assert stitch(FILE, shuffled, SIZE) == made


def fits(p: TailPart, made: bytes) -> bool:
    """Whether a tail is attached: it begins within what was joined, and the same bytes come before it."""
    return p.name.start <= len(made) and p.before == hashlib.sha256(made[: p.name.start]).digest()


def difference(p: TailPart, made: bytes) -> int | None:
    """The first offset in which a tail and what was joined differ."""
    there = made[p.name.start : p.name.end]
    return next((p.name.start + n for n, (a, b) in enumerate(zip(there, p.data, strict=False)) if a != b), None)


@given(worlds(forks=True))
def test_with_forks_it_is_one_writers_truth_and_nothing_fits_any_more(world: World) -> None:
    made = stitch(FILE, world.parts, SIZE)
    joined = bytes(made.content[: made.reach])
    assert made.content[made.reach :] == bytes(SIZE - made.reach)
    assert any(truth.startswith(joined) for truth in world.truths.values())
    attached = [p for p in world.parts if fits(p, joined)]
    for p in attached:
        at = difference(p, joined)
        if at is None:
            assert p.name.end <= made.reach, "it would have reached further"
            continue
        # Somebody of no lower epoch has that byte as it is here.
        others = [o for o in attached if o.name.start <= at < o.name.end and difference(o, joined[: at + 1]) is None]
        assert max(o.name.epoch for o in others) >= p.name.epoch
    if any(p.name.end > made.reach for p in world.parts):
        assert made.notices


@given(worlds(forks=True), st.data())
def test_what_a_fork_or_a_loss_leaves_is_never_a_mixture(world: World, data: st.DataObject) -> None:
    """A mixture of two writers' bytes would be replayed as if it were WAL."""
    left = data.draw(st.lists(st.sampled_from(world.parts), unique_by=id)) if world.parts else []
    joined = stitch(FILE, left, SIZE)
    assert any(truth.startswith(joined.content[: joined.reach]) for truth in world.truths.values())


TRUTH = random.Random(1).randbytes(SIZE)
FORKED = TRUTH[:100] + bytes(byte ^ 1 for byte in TRUTH[100:])


def test_the_higher_epoch_counts_from_the_first_byte_that_differs() -> None:
    old = [part(TRUTH, 0, 80), part(TRUTH, 80, 200), part(TRUTH, 200, 400)]
    new = [part(FORKED, 0, 90, 2), part(FORKED, 90, 130, 2)]
    made = stitch(FILE, [*old, *new], SIZE)
    assert bytes(made.content[: made.reach]) == FORKED[:130]
    assert "1 tail of segment" in made.notices[0]
    assert "epoch 1, from offset 80 to 200, came from another fork than what was joined up to 130" in made.notices[0]
    # A newer writer that began in the middle overrules as well, and as much of the old one is kept as both have.
    made = stitch(FILE, [*old, part(FORKED, 90, 130, 2)], SIZE)
    assert bytes(made.content[: made.reach]) == FORKED[:130]
    assert "epochs 1 and 2 differ from offset 100 on, and epoch 2 counts" in made.notices[0]
    # The other way round nothing is lost.
    made = stitch(FILE, [part(TRUTH, 0, 200, 3), part(TRUTH, 200, 400, 3), *new], SIZE)
    assert made.reach == 400
    assert made.notices == ()


def test_a_hole_is_told_with_what_lies_behind_it() -> None:
    made = stitch(FILE, [part(TRUTH, 0, 80), part(TRUTH, 90, 200), part(TRUTH, 200, 300)], SIZE)
    assert made.reach == 80
    (notice,) = made.notices
    assert f"segment {FILE} has a hole: bytes 80 to 90 are in no tail that fits, and 2 tails behind it" in notice


@pytest.mark.parametrize("parts", [[], [part(TRUTH, 10, 400)]])
def test_without_the_beginning_there_is_nothing(parts: list[TailPart]) -> None:
    assert stitch(FILE, parts, SIZE).reach == 0


def test_of_another_segment_or_beyond_this_one_nothing_is_taken() -> None:
    other = TailPart(TailName(FILE.next(1 << 20), 1, 0, 50), hashlib.sha256().digest(), TRUTH[:50])
    assert stitch(FILE, [other, part(TRUTH * 2, 0, SIZE + 1)], SIZE).reach == 0


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 1 << 30), st.integers(1, 1 << 20))
@example(0, 0, 1)
def test_names_are_read_back(epoch: int, start: int, length: int) -> None:
    name = TailName(FILE, epoch, start, start + length)
    assert TailName.parse(name.key) == name


@pytest.mark.parametrize(
    "key",
    [
        f"tail/{FILE}/",
        f"tail/{FILE}/00000001-00000010-00000010",
        f"tail/{FILE}/00000001-00000010-0000000f",
        f"tail/{FILE}/0000000A-00000000-00000010",
        f"tail/{FILE}.partial/00000001-00000000-00000010",
        f"wal/{FILE}/00000001-00000000-00000010",
        f"tail/{FILE}/00000001-00000000-00000010/x",
    ],
)
def test_other_names_are_none(key: str) -> None:
    assert TailName.parse(key) is None
