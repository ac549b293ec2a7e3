"""The tails of a destination, as verification sees them: each object for itself, and whether they chain from 0.

What is wrong with a tail matters only as far as nothing else has its bytes. Where a finished segment is stored, or
other tails reach as far, it is a warning; else it is a fault that says up to where recovery gets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from handlers.checksum import check_stored  # a leaf: plain bytes in, verdict out
from pipeline.catalog import Catalog
from pipeline.chain import Chain, Expected
from pipeline.contracts import Body, Store
from pipeline.errors import IntegrityError, ObjectMissing, StoreError
from pipeline.tail import HASH_SIZE, TailName, TailPart, stitch
from pipeline.wal import Lsn, WalFile


@dataclass(frozen=True, slots=True)
class TailFault:
    """A tail that is needed and not good."""

    name: str
    #: ``damaged`` or ``unreadable``.
    kind: str
    fact: str


@dataclass(slots=True)
class TailReport:
    """What was found at one destination."""

    faults: list[TailFault] = field(default_factory=list)
    #: Sentences about what does no harm, because something else has the bytes.
    warnings: list[str] = field(default_factory=list)
    #: Ids of the data keys that tails name, each with one that does.
    used: dict[str, str] = field(default_factory=dict)


async def check_tails(
    store: Store, catalog: Catalog, start: Lsn, *, chain: Chain | None, progress: Callable[[int, int], None]
) -> TailReport:
    """All tails at ``store`` of segments behind ``start``.

    ``chain`` decodes them, and what they hold is joined; without it the stored bytes are checked only. ``progress`` is
    told (objects, bytes) of each one. Raises StoreError if they cannot be listed.
    """
    found: dict[WalFile, list[TailName]] = {}
    async for info in store.list("tail/"):
        name = TailName.parse(info.key)
        if name is not None and name.file.end(catalog.segment_size) > start:
            found.setdefault(name.file, []).append(name)
    report = TailReport()
    for file, names in sorted(found.items()):
        parts: list[TailPart] = []
        for name in sorted(names):
            await _check(store, name, catalog, chain, parts, report, progress)
        if chain is not None and _covered(catalog, file, catalog.segment_size):
            made = await asyncio.to_thread(stitch, file, parts, catalog.segment_size)
            report.warnings += [f"{store.name}: {notice}; the finished segment is stored" for notice in made.notices]
    return report


async def _check(
    store: Store,
    name: TailName,
    catalog: Catalog,
    chain: Chain | None,
    parts: list[TailPart],
    report: TailReport,
    progress: Callable[[int, int], None],
) -> None:
    kind = "damaged"
    try:
        body = await store.get(name.key)
        try:
            key = await asyncio.to_thread(_judge, body, name, catalog, chain, parts)
        finally:
            body.close()
    except ObjectMissing:
        return  # removed since it was listed
    except StoreError as error:
        kind, fact = "unreadable", error.fact
    except IntegrityError as error:
        fact = error.fact
    else:
        if key:
            report.used.setdefault(key, name.key)
        progress(1, body.size)
        return
    progress(1, 0)
    if _covered(catalog, name.file, name.end):
        report.warnings.append(f"{store.name}: {fact}; its bytes are stored elsewhere as well")
    else:
        end = name.file.start(catalog.segment_size) + _reach(catalog, name.file)
        report.faults.append(TailFault(name.key, kind, f"{fact}; recovery gets to LSN {end}"))


def _judge(body: Body, name: TailName, catalog: Catalog, chain: Chain | None, parts: list[TailPart]) -> str:
    """Adds what was decoded to ``parts``; returns the id of the data key. Runs in a thread. Raises IntegrityError."""
    header, _ = check_stored(name.key, body.chunks())
    length = name.end - name.start
    if header.system_id != catalog.system_id:
        raise IntegrityError(f"{name.key} belongs to the cluster {header.system_id}, not to {catalog.system_id}")
    if header.plain_size != HASH_SIZE + length or name.end > catalog.segment_size:
        raise IntegrityError(f"{name.key} holds {header.plain_size - HASH_SIZE} bytes, which is not what its name says")
    if chain is not None:
        plain = chain.decode(Expected(name.key, catalog.system_id), body.chunks())[1]
        parts.append(TailPart(name, bytes(plain[:HASH_SIZE]), memoryview(plain)[HASH_SIZE:]))
    return header.key


def _covered(catalog: Catalog, file: WalFile, end: int) -> bool:
    """Whether the segment's bytes up to ``end`` are stored without this tail."""
    finished = catalog.has_segment(file.timeline, file.start(catalog.segment_size) // catalog.segment_size)
    return finished or _reach(catalog, file) >= end


def _reach(catalog: Catalog, file: WalFile) -> int:
    return catalog.tail_reach(file.timeline, file.start(catalog.segment_size) // catalog.segment_size)
