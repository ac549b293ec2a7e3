"""Tails made by hand: any ranges of a segment's bytes, encoded and stored as the service does it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime

from pipeline.catalog import wal_key
from pipeline.chain import Chain
from pipeline.contracts import Store
from pipeline.objects import MemoryBody
from pipeline.tail import TailName
from pipeline.wal import WalFile
from tests.parts import Shelf

#: Offsets in a segment: from, to.
Range = tuple[int, int]


async def lay(
    store: Store, chain: Chain, file: WalFile, content: bytes, ranges: Iterable[Range], *, epoch: int = 1
) -> list[str]:
    """Store these ranges of the segment with that content; returns the keys."""
    keys = []
    for start, end in ranges:
        name = TailName(file, epoch, start, end)
        plain = hashlib.sha256(content[:start]).digest() + content[start:end]
        pieces = [bytes(piece) for piece in chain.encode(name.key, plain, created=datetime.now(UTC))]
        await store.put(name.key, MemoryBody(pieces))
        keys.append(name.key)
    return keys


async def change(store: Store, key: str, *, cut: int = 0, flip: int | None = None) -> None:
    """Damage a stored object: so many bytes less at its end, or one bit of that byte flipped."""
    content = bytearray(b"".join((await store.get(key)).chunks()))
    if flip is not None:
        content[flip] ^= 1
    await store.put(key, MemoryBody([bytes(content[: len(content) - cut])]), replace=True)


async def open_up(shelf: Shelf, file: WalFile, ranges: Iterable[Range], *, epoch: int = 1) -> bytes:
    """Replace a finished segment by tails of these ranges of it; returns its content."""
    content = await shelf.read(wal_key(file))
    await shelf.store.delete([wal_key(file)])
    await lay(shelf.store, shelf.chain, file, content, ranges, epoch=epoch)
    return content
