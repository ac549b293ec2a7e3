"""Whose WAL is streamed: the decisions at each connect, before anything is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from infra.postgres import slots
from infra.postgres.connect import Connection
from infra.postgres.control import rows
from infra.postgres.replication import ReplicationConnection
from infra.sources.assembly import ROLLED_BACK
from pipeline.errors import SourceError
from pipeline.lineage import Leg, Lineage
from pipeline.wal import Fork, Lsn, history_name, parse_history


@dataclass(frozen=True, slots=True)
class Primary:
    """A server that may be streamed from, as far as it tells of itself."""

    #: ``host:port``.
    place: str
    lineage: Lineage
    #: End of its WAL.
    lsn: Lsn
    #: The history file of its timeline; empty for timeline 1.
    history: bytes


async def look_at(
    replication: ReplicationConnection, control: Connection, *, system_id: str, segment_size: int
) -> Primary:
    """Who is there. Raises SourceError: another cluster, or a standby."""
    place = replication.place
    server = await replication.identify_system()
    if server.system_id != system_id:
        raise SourceError(
            f"PostgreSQL at {place} is the cluster {server.system_id}, not {system_id}, whose repository this is",
            hint="check POSTGRES_HOST and POSTGRES_PORT; a new cluster needs a repository of its own: `walship init`",
            lasting=True,
        )
    ((in_recovery,),) = await rows(control, "select pg_is_in_recovery()")
    if in_recovery:
        raise SourceError(
            f"PostgreSQL at {place} is a standby, and is not followed",
            hint="list the hosts of all nodes in POSTGRES_HOST: the one that is primary is found by itself",
        )
    forks: tuple[Fork, ...] = ()
    history = b""
    if server.timeline > 1:
        history = await replication.timeline_history(server.timeline)
        forks = parse_history(history_name(server.timeline), history)
    legs: list[Leg] = []
    begin = Lsn(0)
    for fork in forks:
        legs.append(Leg(fork.timeline, begin, fork.lsn))
        begin = fork.lsn
    legs.append(Leg(server.timeline, begin, None))
    return Primary(place, Lineage(tuple(legs), segment_size), server.lsn, history)


def refuse_old(primary: Primary, lineage: Lineage, timeline: int, received: Lsn) -> None:
    """Raise SourceError unless the server goes on with what was received: ``timeline`` up to ``received``.

    ``lineage`` is that of the server before. Behind a fork that the new primary does not know, the old one may run on
    for as long as somebody lets it: following it would put commits into the repository that nobody else has.
    """
    new = primary.lineage
    if new.timeline < lineage.timeline:
        raise SourceError(
            f"PostgreSQL at {primary.place} is on timeline {new.timeline}, and another server has gone over to timeline"
            f" {lineage.timeline} already: it was primary before, and is not followed",
            hint="connect walship to the node that was promoted, and rebuild this one from it (pg_rewind)",
            lasting=True,
        )
    leg = leg_of(new, timeline)
    known = leg_of(lineage, timeline)
    if leg is None or (known is not None and leg.begin != known.begin):
        raise SourceError(
            f"the history of PostgreSQL at {primary.place} on timeline {new.timeline} does not contain timeline"
            f" {timeline} as it is stored: it was promoted from another node",
            hint="connect walship to the node that went on with what is stored; this one is not followed",
            lasting=True,
        )
    if leg.end is None and primary.lsn < received:
        raise SourceError(
            f"the WAL of PostgreSQL at {primary.place} ends at {primary.lsn}, and it has sent up to {received}",
            hint=ROLLED_BACK,
            lasting=True,
        )


def parting(old: Lineage, new: Lineage) -> tuple[int, Lsn] | None:
    """Where the new lineage leaves the old one: the timeline on which, and the fork; None if it goes on with it."""
    timeline = 0
    for was, now in zip(old.legs, new.legs, strict=False):
        if was.timeline != now.timeline:
            return timeline, now.begin
        timeline = now.timeline
        if was.end != now.end:
            return timeline, min(end for end in (was.end, now.end) if end is not None)
    return None


def leg_of(lineage: Lineage, timeline: int) -> Leg | None:
    """The part of the lineage that is of this timeline."""
    return next((leg for leg in lineage.legs if leg.timeline == timeline), None)


def leg_after(lineage: Lineage, timeline: int) -> Leg:
    """The part behind this timeline's; it must have an end."""
    timelines = [leg.timeline for leg in lineage.legs]
    return lineage.legs[timelines.index(timeline) + 1]


def stretches(lineage: Lineage, timeline: int, begin: Lsn, end: Lsn) -> Iterator[tuple[Leg, Lsn, Lsn]]:
    """What lies from ``begin`` on ``timeline`` to ``end``, by timeline: the starts of its first and last segment.

    Both ``begin`` and ``end`` are borders of segments.
    """
    size = lineage.segment_size
    for leg in lineage.legs:
        first = max(begin, Lsn(leg.begin // size * size))
        stop = end if leg.end is None else min(end, Lsn(-(-leg.end // size) * size))
        if leg.timeline >= timeline and first < stop:
            yield leg, first, Lsn(stop - size)


async def prepare_slot(
    replication: ReplicationConnection, control: Connection, name: str, *, renew: bool = False
) -> Lsn:
    """Have a slot that keeps WAL; returns from where on.

    One that is lost keeps nothing, whatever it shows, and is made anew; so is any with ``renew``. Raises SourceError if
    somebody uses it.
    """
    slot = await slots.look(control, name)
    if slot is not None:
        slots.refuse_foreign(slot)
        if slot.active:
            raise slot.in_use
        if slot.lost or slot.restart_lsn is None or renew:
            await slots.drop(replication, name)
            slot = None
    if slot is None:
        await slots.create(replication, name)
        slot = await slots.look(control, name)
    if slot is None or slot.restart_lsn is None:
        raise SourceError(
            f"the replication slot {name} was made and is not there",
            hint="connections go to several servers: POSTGRES_HOST must lead to one primary",
        )
    return slot.restart_lsn
