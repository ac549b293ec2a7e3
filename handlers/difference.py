"""What one destination has and another lacks, by their listings alone: names here minus names there.

    keys ──> WAL ──> histories ──> conflicts, tails ──> each backup: parts, then backup_info ──> pins, records

A phase is copied before the next one begins: nothing lies there that cannot be read, no history without its WAL, no
backup_info before its parts. Of the target, names and sizes are kept (``pipeline.sizes``: four bytes an object), and
one kind, or one backup, at a time; the source is streamed. So a million objects cost a few megabytes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial

from pipeline import operations, pins
from pipeline.catalog import backup_of, info_key, is_piece, parse_wal_key, wal_key
from pipeline.contracts import ObjectInfo, Store
from pipeline.errors import ObjectMissing
from pipeline.sizes import Sizes
from pipeline.tail import TailName
from pipeline.wal import WalFile, WalKind

#: Names that nobody knows, of which so many are shown.
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Lack:
    """An object that is to be copied, or looked at."""

    name: str
    #: Bytes, as the source lists it.
    size: int
    #: Its size at the target, where it is there with another one; None: it is not there.
    theirs: int | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of a repository is compared. Keys always are."""

    #: Segments and what belongs to them; histories are asked for as well.
    wal: Callable[[WalFile], bool] = lambda _: True
    #: Complete backups by name.
    backups: Callable[[str], bool] = lambda _: True
    #: What the open end consists of (tails), and all that is ``aside``.
    beside: bool = False
    #: What was set aside (``conflict/``), pins of complete backups, and records: nobody makes them a second time.
    aside: bool = False
    #: Objects that are at both with different sizes are told of as well.
    sizes: bool = False


@dataclass(slots=True)
class Strange:
    """What lies at the source and no walship of this format names so: it is not copied."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(name)


@dataclass(frozen=True, slots=True)
class Phase:
    """Objects that may be copied at the same time. To be gone through once."""

    #: keys, wal, history, conflict, tail, part, backup, pin or record.
    kind: str
    lacking: AsyncGenerator[Lack, None]
    #: Name of the backup that they belong to; empty for all else.
    backup: str = ""
    #: For backup_info: what of the backup is still lacking, looked at anew.
    before: Callable[[], AsyncGenerator[Lack, None]] | None = None


async def phases(
    source: Store, target: Store, wanted: Wanted, strange: Strange | None = None
) -> AsyncGenerator[Phase, None]:
    """Each phase in its turn; the next one is looked for when it is asked for. StoreError if either does not answer.

    Both stores are rooted at the cluster's folder.
    """
    look = _Look(source, target, wanted, strange or Strange())
    yield Phase("keys", look.below("keys/"))
    histories: list[ObjectInfo] = []
    yield Phase("wal", look.wal(histories))
    yield Phase("history", look.these(histories, "wal/"))
    aside = wanted.aside or wanted.beside
    if aside:
        yield Phase("conflict", look.below("conflict/"))
    if wanted.beside:
        yield Phase("tail", look.tails())
    async for backup, info in look.backups():
        yield Phase("part", look.parts(backup), backup)
        yield Phase("backup", look.these([info], info.key), backup, partial(look.parts, backup))
        if aside:
            yield Phase("pin", look.below(pins.pin_key(backup), frozenset([pins.pin_key(backup)]).__contains__))
    if aside:
        yield Phase("record", look.below(operations.FOLDER, lambda name: operations.RecordName.parse(name) is not None))


class _Look:
    def __init__(self, source: Store, target: Store, wanted: Wanted, strange: Strange) -> None:
        self._source = source
        self._target = target
        self._wanted = wanted
        self._strange = strange

    async def _there(self, prefix: str) -> Sizes:
        sizes = Sizes()
        async for entry in self._target.list(prefix):
            sizes.add(entry.key, entry.size)
        return sizes

    def _lack(self, entry: ObjectInfo, there: Sizes) -> Lack | None:
        theirs = there.find(entry.key)
        if theirs is None:
            return Lack(entry.key, entry.size)
        return Lack(entry.key, entry.size, theirs) if self._wanted.sizes and theirs != entry.size else None

    async def below(self, prefix: str, known: Callable[[str], bool] = lambda _: True) -> AsyncGenerator[Lack, None]:
        """Everything below a prefix, as far as its name is known."""
        there = await self._there(prefix)
        async for entry in self._source.list(prefix):
            if not entry.key.endswith("/") and known(entry.key) and (lack := self._lack(entry, there)):
                yield lack

    async def these(self, entries: list[ObjectInfo], prefix: str) -> AsyncGenerator[Lack, None]:
        """Of objects that are known already those that are lacking; the target has them below the prefix."""
        if not entries:
            return
        there = Sizes()
        async for entry in self._target.list(prefix, shallow=True):
            there.add(entry.key, entry.size)
        for entry in entries:
            if lack := self._lack(entry, there):
                yield lack

    async def wal(self, histories: list[ObjectInfo]) -> AsyncGenerator[Lack, None]:
        """Segments and what lies beside them; histories are only collected."""
        there = await self._there("wal/")
        async for entry in self._source.list("wal/"):
            if entry.key.endswith("/"):
                continue
            file = parse_wal_key(entry.key)
            if file is None:
                self._strange.add(entry.key)
            elif not self._wanted.wal(file):
                continue
            elif file.kind is WalKind.HISTORY:
                histories.append(entry)
            elif lack := self._lack(entry, there):
                yield lack

    async def tails(self) -> AsyncGenerator[Lack, None]:
        """Those of segments that are finished nowhere: all others are only waiting to be removed."""
        there = await self._there("tail/")
        open_segments: dict[WalFile, bool] = {}
        async for entry in self._source.list("tail/"):
            tail = TailName.parse(entry.key)
            if tail is None or not self._wanted.wal(tail.file):
                continue
            if tail.file not in open_segments:
                open_segments[tail.file] = await self._is_open(tail.file)
            if open_segments[tail.file] and (lack := self._lack(entry, there)):
                yield lack

    async def _is_open(self, file: WalFile) -> bool:
        for store in (self._source, self._target):
            try:
                await store.head(wal_key(file))
            except ObjectMissing:
                continue
            return False
        return True

    async def backups(self) -> AsyncIterator[tuple[str, ObjectInfo]]:
        """Complete ones and their backup_info, the oldest first: an incremental one comes after what it builds on."""
        folders = [entry.key async for entry in self._source.list("base/", shallow=True)]
        for name in sorted({folder.removeprefix("base/").rstrip("/") for folder in folders}):
            if backup_of(info_key(name)) is None or not self._wanted.backups(name):
                continue
            try:
                info = await self._source.head(info_key(name))
            except ObjectMissing:
                continue  # being taken, or never finished, or being deleted
            yield name, info

    async def parts(self, backup: str) -> AsyncGenerator[Lack, None]:
        """All of a backup but what makes it one."""
        folder = f"base/{backup}/"
        there = await self._there(folder)
        async for entry in self._source.list(folder):
            if is_piece(entry.key, backup):
                if lack := self._lack(entry, there):
                    yield lack
            elif not entry.key.endswith("/") and entry.key != info_key(backup):
                self._strange.add(entry.key)
