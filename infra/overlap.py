"""Is the server the one whose WAL is stored? Its bytes are compared with the stored ones where both have some.

System identifier and timeline do not tell: a server that was rolled back to a snapshot has the same ones, and once it
has written past the stored position nothing else would ever notice.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress

import structlog

from infra.postgres.connect import RefusedError
from infra.postgres.walstream import fetch_part
from infra.wiring import Site
from pipeline.catalog import wal_key
from pipeline.contracts import Store
from pipeline.errors import IntegrityError, ObjectMissing, Sealed, SourceError, StoreError
from pipeline.lineage import Lineage
from pipeline.objects import MAX_HEAD, read_header
from pipeline.resume import GoOn
from pipeline.runs import Runs
from pipeline.tail import TailName, tail_folder
from pipeline.wal import Lsn, WalFile

log = structlog.get_logger()

#: SQLSTATE of "requested WAL segment has already been removed".
_REMOVED = "58P01"


async def check_overlap(site: Site, lineage: Lineage, stored: dict[int, Runs], where: GoOn) -> None:
    """Compare the last finished segment before ``where``, and the tail that is stored from there on.

    Raises SourceError (lasting) if the server has other bytes; what it no longer has cannot be compared.
    """
    size = lineage.segment_size
    number = where.lsn // size
    timeline = lineage.newest(number - 1).timeline
    if number and number - 1 in stored.get(timeline, Runs()):
        await _compare_segment(site, WalFile.segment(timeline, where.lsn - size, size))
    leg = next(leg for leg in lineage.legs if leg.timeline == where.timeline)
    await _compare_tail(site, WalFile.segment(where.timeline, where.lsn, size), leg.end)


def refuse_demoted(timeline: int, stored: int) -> None:
    """SourceError (lasting) if the repository has gone over to a later timeline than the server's.

    Commits that it acknowledged would be none for whoever restores the latest state.
    """
    if timeline < stored:
        raise SourceError(
            f"the server is on timeline {timeline}, and another one has gone over to timeline {stored} in this"
            " repository: it was primary before, and is not followed",
            hint="connect walship to the node that was promoted. If there is none, and a clone has shipped here by"
            " mistake, let this server ship to a new repository (another prefix, then walship init): what is stored"
            " here stays, and walship restore --timeline brings back any of it",
            lasting=True,
        )


async def _compare_segment(site: Site, file: WalFile) -> None:
    server = await _from_server(site, file, site.facts.segment_size)
    if server is None:
        return
    name = wal_key(file)
    for store in site.stores:
        try:
            fingerprint = await _fingerprint_at(store, name)
        except (StoreError, IntegrityError):
            continue  # away, absent or damaged there: whoever reads or stores it tells; another one can be compared
        if fingerprint != site.keys.fingerprint(name, server):
            raise _other_bytes(file, store.name, file.start(site.facts.segment_size))
        return


async def _compare_tail(site: Site, file: WalFile, fork: Lsn | None) -> None:
    size = site.facts.segment_size
    try:
        tail = await site.fetch.tail(file, size, lenient=True)
    except Sealed:
        await _compare_sealed_tail(site, file, fork)
        return
    except ObjectMissing:
        return  # being removed: the finished segment is stored by now
    except StoreError:
        return  # nobody answers: what cannot be compared is not
    if tail is None:
        return
    for notice in tail.notices:
        # What they held is not compared, and a restore ends before it: only a finished segment makes up for them.
        log.warning("tails_passed_over", segment=file.name, error=notice, hint="`walship verify` looks at all of them")
    if not tail.reach:
        return
    reach = tail.reach if fork is None else min(tail.reach, fork - file.start(size))
    server = await _from_server(site, file, reach)
    if server is not None and server != tail.content[:reach]:
        at = next(n for n, (ours, theirs) in enumerate(zip(tail.content, server, strict=False)) if ours != theirs)
        raise _other_bytes(file, "the repository", file.start(size) + at)


async def _compare_sealed_tail(site: Site, file: WalFile, fork: Lsn | None) -> None:
    """The same where tails cannot be read: what the server has gives the fingerprint of the newest one, or does not.

    It covers the bytes before the tail as well, since a tail begins with their hash.
    """
    most = site.facts.segment_size if fork is None else fork - file.start(site.facts.segment_size)
    found: dict[TailName, Store] = {}
    for store in site.stores:
        with suppress(StoreError):  # what cannot be compared is not
            async for info in store.list(tail_folder(file)):
                if (name := TailName.parse(info.key)) is not None and name.end <= most:
                    found.setdefault(name, store)
    for name in sorted(found, key=lambda name: (name.epoch, name.end), reverse=True):
        try:
            theirs = await _fingerprint_at(found[name], name.key)
        except (StoreError, IntegrityError):
            continue  # damaged, or removed since: the one before it tells as much but for a few bytes
        server = await _from_server(site, file, name.end)
        if server is None:
            return
        plain = hashlib.sha256(memoryview(server)[: name.start]).digest() + server[name.start :]
        if theirs != site.keys.fingerprint(name.key, plain):
            raise _other_bytes(file, found[name].name, file.start(site.facts.segment_size))
        return


async def _fingerprint_at(store: Store, name: str) -> str:
    """As the header of an object says. Raises StoreError, IntegrityError."""
    body = await store.get(name, (0, MAX_HEAD))
    try:
        return read_header(name, b"".join(body.chunks()))[0].fingerprint
    finally:
        body.close()


async def _from_server(site: Site, file: WalFile, length: int) -> bytearray | None:
    """The beginning of the segment; None if the server has removed it."""
    try:
        return await fetch_part(site.settings, file, site.facts.segment_size, length)
    except RefusedError as error:
        if error.state == _REMOVED:
            return None
        raise


def _other_bytes(file: WalFile, place: str, lsn: Lsn) -> SourceError:
    return SourceError(
        f"the server's WAL is not the one that is stored: segment {file} at {place} has other bytes at or behind {lsn}",
        hint="was the server rolled back to a snapshot, or is it a clone? what is stored stays as it is and can be"
        " restored; to go on with this server, let it ship to a new repository (another prefix, then walship init)",
        lasting=True,
    )
