"""The tails of a destination, as verification sees them: each object for itself, and whether they chain from 0.

What is wrong with a tail matters only as far as nothing else has its bytes. Where a finished segment is stored, or
other tails reach as far, it is a warning; else it is a fault that says up to where recovery gets.
"""

from __future__ import annotations

import asyncio

from handlers.verify_objects import Differs, Inspector, Place, Wanted
from handlers.verify_report import Fault
from pipeline.catalog import Catalog
from pipeline.errors import IntegrityError, ObjectMissing, StoreError
from pipeline.tail import HASH_SIZE, TailName, TailPart, stitch
from pipeline.wal import Lsn, WalFile


async def check_tails(place: Place, catalog: Catalog, start: Lsn, inspector: Inspector) -> None:
    """All tails there of segments behind ``start``: they are few, and come and go, so none is remembered.

    With a chain what they hold is joined; without it the stored bytes are checked only.
    """
    found: dict[WalFile, list[TailName]] = {}
    async for info in inspector.listing(place, "tail/"):
        name = TailName.parse(info.key)
        if name is not None and name.file.end(catalog.segment_size) > start:
            found.setdefault(name.file, []).append(name)
    for file, names in sorted(found.items()):
        parts: list[TailPart] = []
        async with inspector.crew() as begin:
            for name in sorted(names):
                await begin(_check(place, name, catalog, inspector, parts))
        if inspector.chain is not None and _covered(catalog, file, catalog.segment_size):
            made = await asyncio.to_thread(stitch, file, parts, catalog.segment_size)
            inspector.tally.warnings += [
                f"{place.name}: {notice}; the finished segment is stored" for notice in made.notices
            ]


async def _check(place: Place, name: TailName, catalog: Catalog, inspector: Inspector, parts: list[TailPart]) -> None:
    kind, tally, length = "damaged", inspector.tally, name.end - name.start
    try:
        await inspector.pace(HASH_SIZE + length)
        judged, size = await inspector.judge(place.store, Wanted(name.key), keep=True)
        if judged.header.plain_size != HASH_SIZE + length or name.end > catalog.segment_size:
            held = judged.header.plain_size - HASH_SIZE
            raise Differs(f"{name.key} holds {held} bytes, which is not what its name says")
    except ObjectMissing:
        return  # removed since it was listed
    except StoreError as error:
        kind, fact = "unreadable", error.fact
    except Differs as error:
        kind, fact = "conflict", error.fact
    except IntegrityError as error:
        fact = error.fact
    else:
        if judged.header.key:
            place.memory.keys.setdefault(judged.header.key, name.key)
        if judged.plain is not None:
            plain = judged.plain
            parts.append(TailPart(name, bytes(plain[:HASH_SIZE]), memoryview(plain)[HASH_SIZE:]))
        inspector.count(size)
        return
    inspector.count(0)
    if not _covered(catalog, name.file, name.end):
        end = name.file.start(catalog.segment_size) + _reach(catalog, name.file)
        tally.fault(place, Wanted(name.key), kind, f"{fact}; recovery gets to LSN {end}")
        return
    tally.warnings.append(f"{place.name}: {fact}; its bytes are stored elsewhere as well")
    if not _finished(catalog, name.file):
        tally.spare.append(Fault(place.name, name.key, kind, fact))


def _covered(catalog: Catalog, file: WalFile, end: int) -> bool:
    """Whether the segment's bytes up to ``end`` are stored without this tail."""
    return _finished(catalog, file) or _reach(catalog, file) >= end


def _finished(catalog: Catalog, file: WalFile) -> bool:
    return catalog.has_segment(file.timeline, file.start(catalog.segment_size) // catalog.segment_size)


def _reach(catalog: Catalog, file: WalFile) -> int:
    return catalog.tail_reach(file.timeline, file.start(catalog.segment_size) // catalog.segment_size)
