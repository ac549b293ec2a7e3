"""The book-keeping of one segment: what may be deleted, and what must never be."""

from __future__ import annotations

import hashlib
import random

from handlers.tail_course import Course, Cut
from pipeline.openwal import OpenSegment, OpenWal
from pipeline.tail import HASH_SIZE, TailName
from pipeline.wal import WalFile

SIZE = 1 << 20
FILE = WalFile.segment(1, 3 * SIZE, SIZE)


def begin() -> tuple[OpenSegment, Course]:
    segment = OpenWal().begin(FILE, SIZE)
    return segment, Course(segment, 7)


def send(course: Course, end: int) -> Cut:
    made = course.cut(end)
    course.hash_on()
    return made


def cut(course: Course, segment: OpenSegment, size: int) -> TailName:
    """A tail of so many bytes that is durable at once."""
    segment.append(random.Random(segment.filled).randbytes(size), 1.0)
    made = send(course, segment.filled)
    (name,) = course.landed(made)
    return name


def test_the_plaintext_is_the_hash_of_what_comes_before_and_the_bytes() -> None:
    segment, course = begin()
    for size in (100, 1, 70_000):
        start = segment.filled
        segment.append(random.Random(size).randbytes(size), 1.0)
        made = send(course, segment.filled)
        plain = course.plain(made.tail)
        assert plain[:HASH_SIZE] == hashlib.sha256(segment.data[:start]).digest()
        assert plain[HASH_SIZE:] == segment.data[start : start + size]
        assert made.tail.name == TailName(FILE, 7, start, start + size)


def test_answers_in_any_order_make_it_durable_in_order() -> None:
    segment, course = begin()
    cuts = []
    for _ in range(6):
        segment.append(bytes(10), 1.0)
        cuts.append(send(course, segment.filled))
    said: list[TailName] = []
    for at in (3, 1, 0, 2, 5, 4):
        said += course.landed(cuts[at])
        assert course.durable == 10 * len(said)
    assert said == [each.tail.name for each in cuts]


def test_what_was_given_up_is_cut_again_with_the_same_hash() -> None:
    segment, course = begin()
    cut(course, segment, 50)
    segment.append(b"given up", 1.0)
    lost = send(course, segment.filled)
    before = course.plain(lost.tail)
    segment.append(b" twice", 1.0)
    send(course, segment.filled)
    course.roll_back()
    assert (course.sent, course.durable, course.waiting) == (50, 50, 14)
    again = send(course, lost.tail.name.end)
    assert (again.tail, course.plain(again.tail)) == (lost.tail, before)
    course.roll_back()
    course.roll_back()
    assert course.sent == 50


def test_a_late_answer_to_what_was_given_up_changes_nothing() -> None:
    segment, course = begin()
    segment.append(bytes(10), 1.0)
    lost = send(course, 10)
    course.roll_back()
    assert list(course.landed(lost)) == []
    assert (course.durable, course.sent) == (0, 0)


def test_a_fold_never_deletes_what_lies_behind_it() -> None:
    """What was given up behind it may be cut again under the same name, and be what the durable position rests on."""
    segment, course = begin()
    first, second = cut(course, segment, 10), cut(course, segment, 10)
    segment.append(bytes(10), 1.0)
    send(course, 25)
    course.roll_back()
    send(course, 30)
    members = course.foldable(2)
    course.roll_back()
    joint = course.joint(members)
    assert joint.name == TailName(FILE, 7, 0, 20)
    assert course.folded(members, joint) == {first, second}


def test_nothing_is_folded_that_the_finished_segment_replaces() -> None:
    segment, course = begin()
    for _ in range(3):
        cut(course, segment, 10)
    assert len(course.foldable(3)) == 3
    course.closed = True
    assert course.foldable(3) == []
    course.closed = False
    cut(course, segment, SIZE - 30)
    assert course.foldable(3) == []


def test_tails_that_come_while_a_fold_is_stored_wait_for_the_next() -> None:
    segment, course = begin()
    for _ in range(3):
        cut(course, segment, 10)
    members = course.foldable(3)
    later = cut(course, segment, 10)
    course.folded(members, course.joint(members))
    assert [[tail.name for tail in level] for level in course.levels] == [[later], [TailName(FILE, 7, 0, 30)]]
    segment.ended = True
    assert course.joint(course.foldable(3)).name == TailName(FILE, 7, 0, 40)
