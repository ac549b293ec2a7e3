"""How far one open segment has come at one destination. Book-keeping only: nothing here waits or stores.

    0 ........ durable ........ sent ........ filled ........ segment size
      tails       flight          not cut yet

What was cut and is not durable is in flight; its cuts become durable in order, whatever the order of their answers.
``roll_back`` makes all that is in flight uncut again. Such cuts may be stored all the same, now or later: their names
are kept as doubtful, to be deleted with what is folded over them. ``restart`` does the same with what was durable, when
a destination has come back without it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.openwal import OpenSegment
from pipeline.tail import TailName

if TYPE_CHECKING:
    from hashlib import _Hash


@dataclass(frozen=True, slots=True)
class Tail:
    """A tail that is durable, or is to be."""

    name: TailName
    #: SHA-256 of the segment's bytes before ``name.start``.
    before: bytes


@dataclass(slots=True, eq=False)
class Cut:
    """A tail under way."""

    tail: Tail
    #: The running hash at the tail's start: where to begin again if it fails.
    hasher: _Hash
    #: The destination has confirmed it.
    landed: bool = False


@dataclass(slots=True, eq=False)
class Course:
    """One segment."""

    segment: OpenSegment
    epoch: int
    #: Nothing more of it is cut: the finished segment is here, or will be copied here.
    closed: bool = False
    #: Bytes that were cut, and those that are durable here.
    sent: int = 0
    durable: int = 0
    flight: deque[Cut] = field(default_factory=deque)
    #: A joint tail is being stored.
    folding: bool = False
    #: Durable tails without a hole, by how often they were folded; a higher level lies before the lower ones.
    levels: list[list[Tail]] = field(default_factory=lambda: [[]])
    #: Keys of cuts that were given up and may be stored all the same.
    doubtful: set[TailName] = field(default_factory=set)
    #: Keys under which something damaged lies here, or that are being deleted: not used again.
    spoiled: set[TailName] = field(default_factory=set)
    #: SHA-256 of the first ``hashed`` bytes: all that was sent, but for the newest cut until ``hash_on``.
    _hasher: _Hash = field(default_factory=hashlib.sha256)
    hashed: int = 0

    @property
    def waiting(self) -> int:
        """Bytes that have arrived and are not cut yet."""
        return self.segment.filled - self.sent

    @property
    def quiet(self) -> bool:
        """Nothing of it is on its way to the destination."""
        return not self.flight and not self.folding

    @property
    def over(self) -> bool:
        """Its timeline ended in it, and all of it is durable here as one tail."""
        ended = self.segment.ended and not self.segment.whole and self.durable == self.segment.filled
        return ended and sum(map(len, self.levels)) <= 1

    @property
    def last(self) -> TailName | None:
        """The durable tail that goes furthest."""
        return next((level[-1].name for level in self.levels if level), None)

    def cut(self, end: int) -> Cut:
        """The bytes from ``sent`` to ``end`` as a tail in flight; less where that key is spoiled."""
        assert self.hashed == self.sent, "hash_on comes between two cuts"
        start = self.sent
        # On an idle server the same bytes would have the same key for ever. (A single byte has no other one.)
        while end - start > 1 and TailName(self.segment.file, self.epoch, start, end) in self.spoiled:
            end = start + (end - start) // 2
        name = TailName(self.segment.file, self.epoch, start, end)
        cut = Cut(Tail(name, self._hasher.digest()), self._hasher)
        self.sent = end
        self.flight.append(cut)
        return cut

    def hash_on(self) -> None:
        """Hash what was cut last: what the next cut begins with. It need not be done before that one is on its way.

        About 1 GB/s with the GIL released: call it from a thread when it is much, and nothing else until it returns.
        """
        after = self._hasher.copy()  # the old one is where to begin again
        after.update(self.segment.view(self.hashed, self.sent))
        self._hasher, self.hashed = after, self.sent

    def landed(self, cut: Cut) -> Iterator[TailName]:
        """The destination has confirmed it: yields what is durable by that, in order."""
        cut.landed = True
        self.doubtful.discard(cut.tail.name)  # an earlier attempt under the same name, with the same bytes
        while self.flight and self.flight[0].landed:
            tail = self.flight.popleft().tail
            self.levels[0].append(tail)
            self.durable = tail.name.end
            yield tail.name

    def roll_back(self) -> None:
        """What is in flight was given up: it is cut anew, from the first byte that is not durable."""
        if self.flight:
            self.doubtful.update(cut.tail.name for cut in self.flight)
            self._hasher = self.flight[0].hasher
            self.sent = self.hashed = self.durable
            self.flight.clear()

    def restart(self) -> None:
        """What was durable is gone: all of it is cut anew. Nothing may be in flight."""
        assert not self.flight
        self.doubtful.update(tail.name for level in self.levels for tail in level)
        self.levels = [[]]
        self.sent = self.hashed = self.durable = 0
        self._hasher = hashlib.sha256()

    def holds(self, members: list[Tail]) -> bool:
        """Whether these are durable still."""
        return all(any(tail in level for level in self.levels) for tail in members)

    def foldable(self, fold_at: int) -> list[Tail]:
        """The tails to be folded into one now, in order and without a hole; none if there is nothing to fold."""
        if self.closed or self.segment.whole:
            return []  # the finished segment replaces them all
        if self.segment.ended and self.durable == self.segment.filled:
            members = [tail for level in reversed(self.levels) for tail in level]
        else:
            members = next((list(level) for level in self.levels if len(level) >= fold_at), [])
        while len(members) > 1 and self.joint(members).name in self.spoiled:
            members.pop()
        return members if len(members) > 1 else []

    def joint(self, members: list[Tail]) -> Tail:
        """The tail that covers all of them."""
        first, last = members[0], members[-1]
        return Tail(TailName(self.segment.file, self.epoch, first.name.start, last.name.end), first.before)

    def plain(self, tail: Tail) -> bytes:
        """The plaintext of a tail: a copy, so make it when it is its turn to be encoded."""
        return tail.before + self.segment.view(tail.name.start, tail.name.end)

    def folded(self, members: list[Tail], joint: Tail) -> set[TailName]:
        """The joint tail is durable in their place: returns what may be deleted for it."""
        gone = {tail.name for tail in members}
        height = max(at for at, level in enumerate(self.levels) if any(tail.name in gone for tail in level))
        for at, level in enumerate(self.levels):
            self.levels[at] = [tail for tail in level if tail.name not in gone]
        if height + 1 == len(self.levels):
            self.levels.append([])
        self.levels[height + 1].append(joint)
        covered = {name for name in self.doubtful if joint.name.start <= name.start and name.end <= joint.name.end}
        self.doubtful -= covered
        return (gone | covered) - {joint.name}
