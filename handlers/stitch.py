"""Reads the tails of one segment at all destinations, and joins what fits: ``pipeline.tail`` decides, this reads.

Destinations have tails of different cuts, and one may have a part that another lacks; whatever is whole anywhere is
used. Tails go as soon as the finished segment is there, or a longer tail that holds them: one that is listed, and gone
when it is read, means that one has to look again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from pipeline.contracts import Fetched, Store
from pipeline.errors import IntegrityError, ObjectMissing, Sealed, StoreError
from pipeline.tail import HASH_SIZE, Stitched, TailName, TailPart, stitch, tail_folder
from pipeline.wal import WalFile

#: Tails that are read at the same time.
_WIDTH = 8

#: Reads an object of at most so many bytes of plaintext at one destination, as ``Fetcher`` does.
Read = Callable[[Store, str, int], Awaitable[Fetched]]


async def read_tail(
    destinations: Sequence[Store],
    read: Read,
    file: WalFile,
    segment_size: int,
    *,
    lenient: bool = False,
    passed_over: Callable[[Store, str], None] = lambda _store, _sentence: None,
) -> Stitched | None:
    """The segment as far as its tails go; None if every destination answered and none has any tail of it.

    In memory is at most the segment for each destination and each writer. What is damaged and would have reached
    further is a notice. Raises ObjectMissing if a tail was listed, is gone now and would have reached further: look for
    the finished segment, then here again. Raises StoreError for a destination that does not answer; ``lenient``: that
    is a notice, unless none answers. ``passed_over`` is told of a copy that another destination's stood in for.
    """
    reading = _Reading(read, file, segment_size, passed_over)
    failures: list[StoreError] = []
    for store in destinations:
        try:
            async for info in store.list(tail_folder(file)):
                reading.add(info.key, store)
        except StoreError as error:
            failures.append(error)
            reading.notices.append(f"the tails of segment {file} at {store.name} are not known: {error.fact}")
    if failures and (not lenient or len(failures) == len(destinations)):
        raise failures[0]
    if not reading.copies:
        return None
    while names := reading.next():
        await reading.all(names)
    made = await asyncio.to_thread(stitch, file, reading.parts, segment_size)
    while names := reading.further(made.reach):
        await reading.all(names)
        made = await asyncio.to_thread(stitch, file, reading.parts, segment_size)
    if reading.failed and not lenient:
        raise reading.failed[0]
    if gone := [name for name in reading.gone if name.end > made.reach]:
        raise ObjectMissing(f"{gone[0].key} was listed and is gone", hint="the segment may be finished by now")
    lost = [fact for name, fact in sorted(reading.damaged.items()) if name.end > made.reach]
    return replace(made, notices=(*reading.notices, *lost, *made.notices))


def outermost(names: Iterable[TailName]) -> list[TailName]:
    """Without those whose bytes the same writer has stored in another one of them as well: a fold, most often."""
    found: list[TailName] = []
    for name in sorted(names, key=lambda n: (n.epoch, n.start, -n.end)):
        if not (found and found[-1].epoch == name.epoch and name.end <= found[-1].end):
            found.append(name)
    return found


@dataclass(slots=True)
class _Reading:
    """What is known of the tails of one segment."""

    read: Read
    file: WalFile
    segment_size: int
    passed_over: Callable[[Store, str], None]
    #: Who has it.
    copies: dict[TailName, list[Store]] = field(default_factory=dict)
    tried: set[TailName] = field(default_factory=set)
    parts: list[TailPart] = field(default_factory=list)
    gone: list[TailName] = field(default_factory=list)
    #: Name → what is wrong with it, at each destination that has it.
    damaged: dict[TailName, str] = field(default_factory=dict)
    failed: list[StoreError] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def add(self, key: str, store: Store) -> None:
        name = TailName.parse(key)
        if name is None:
            return  # a folder, or somebody else's
        if name.end > self.segment_size:
            self.notices.append(f"{store.name}: {key} claims to go on behind the end of its segment")
            return
        self.copies.setdefault(name, []).append(store)

    def next(self) -> list[TailName]:
        """What to read next: what no tail covers that was read, nor another one that will be."""
        have = [part.name for part in self.parts]
        kept = set(outermost([*have, *(name for name in self.copies if name not in self.tried)]))
        return [name for name in kept if name not in self.tried]

    def further(self, reach: int) -> list[TailName]:
        """What was not read because another one holds it, which then did not fit: of a clone with the same epoch."""
        return [name for name in self.copies if name not in self.tried and name.end > reach]

    async def all(self, names: Sequence[TailName]) -> None:
        self.tried.update(names)
        gate = asyncio.Semaphore(_WIDTH)
        sealed: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for name in names:
                    group.create_task(self.one(name, gate))
        except* Sealed as found:
            sealed = found.exceptions[0]
        if sealed is not None:
            raise sealed

    async def one(self, name: TailName, gate: asyncio.Semaphore) -> None:
        """Read it from the first destination that has it whole."""
        facts: list[str] = []
        failures: list[StoreError] = []
        wrong: list[tuple[Store, str]] = []
        async with gate:
            for store in self.copies[name]:
                try:
                    self.parts.append(await self._from(store, name))
                except ObjectMissing:
                    continue
                except Sealed:
                    raise  # nothing is wrong with it, and nobody here can read any of them
                except StoreError as error:
                    failures.append(error)
                    wrong.append((store, error.fact))
                except IntegrityError as error:
                    facts.append(error.fact)
                    wrong.append((store, error.fact))
                else:
                    for other, fact in wrong:
                        self.passed_over(other, f"{fact}; {store.name} served {name.key} instead")
                    return
        if failures:
            self.failed += failures
            self.notices.append(f"{name.key} cannot be read: {failures[0].fact}")
        elif facts:
            self.damaged[name] = "; ".join(facts)
        else:
            self.gone.append(name)

    async def _from(self, store: Store, name: TailName) -> TailPart:
        length = name.end - name.start
        plain = (await self.read(store, name.key, HASH_SIZE + length)).plain
        if len(plain) != HASH_SIZE + length:
            raise IntegrityError(f"{store.name}: {name.key} holds {len(plain) - HASH_SIZE} bytes, not {length}")
        return TailPart(name, bytes(plain[:HASH_SIZE]), memoryview(plain)[HASH_SIZE:])
