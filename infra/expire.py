"""Retention from end to end: look, decide, delete. What ``infra/cli/expire.py`` calls."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from handlers.expire import Expirer, Freed, Refusal, WalGoing, find_wal
from infra.expiry_look import Look, look, read_pin
from infra.records import listed
from infra.storage.in_use import TTL, Marks
from infra.wiring import Site
from pipeline.errors import IntegrityError, StoreError
from pipeline.operations import outdated
from pipeline.policy import Policy
from pipeline.retention import Decision, Holdings, decide, needed_by


@dataclass(slots=True)
class Plan:
    """What would go, and why the rest stays."""

    seen: Look
    held: Holdings
    decision: Decision
    #: Destination → the WAL that would go there.
    wal: dict[str, WalGoing]

    @property
    def size(self) -> int:
        """Bytes as stored that would go at all destinations, parts of unfinished backups not counted."""
        backups = sum(self.size_of(store.name) for store in self.seen.stores)
        return backups + sum(going.size for going in self.wal.values())

    def size_of(self, destination: str) -> int:
        """Bytes of backups that would go at one destination."""
        folders = self.seen.folders[destination]
        return sum(backup.stored_size for backup in self.decision.going if backup.name in folders)

    @property
    def empty(self) -> bool:
        """Nothing would go."""
        return not (self.decision.going or self.seen.leftovers or any(going.objects for going in self.wal.values()))


@dataclass(slots=True)
class Outcome:
    """What was done."""

    gone: list[str] = field(default_factory=list)
    #: Backups, and parts of unfinished ones, that stayed although they were to go, and why.
    stayed: dict[str, str] = field(default_factory=dict)
    #: Folders of backups that nobody listed.
    leftovers: list[str] = field(default_factory=list)
    #: Destination → what went there.
    freed: dict[str, Freed] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """For ``--json`` and the record."""
        return {
            "deleted": self.gone,
            "stayed": self.stayed,
            "unfinished_deleted": self.leftovers,
            "freed": {name: {"objects": freed.objects, "bytes": freed.size} for name, freed in self.freed.items()},
            "refused": [
                {"destination": each.destination, "what": each.what, "fact": each.fact} for each in self.refusals
            ],
        }


async def make_plan(site: Site, policy: Policy, marks: Marks, *, skip: bool = False, settle: bool = False) -> Plan:
    """Decide what goes; deletes nothing. See ``look`` for ``skip`` and ``settle``. Raises StoreError, Sealed."""
    seen = await look(site, marks, skip=skip, settle=settle)
    held, checked, broken = seen.held, set[str](), dict[str, str]()
    decision = decide(held, policy, site.clock.now())
    while unseen := decision.vital - checked:
        # What all else goes for has to be whole.
        for name in sorted(unseen):
            checked.add(name)
            for each in _chain(held, name):
                if each not in broken and (lacks := await seen.incomplete(each)):
                    broken[each] = lacks
        held = replace(held, broken=dict(broken))
        decision = decide(held, policy, site.clock.now())
    size = site.facts.segment_size
    wal = {store.name: await find_wal(store, decision.wal, size) for store in seen.stores}
    return Plan(seen, held, decision, wal)


def _chain(held: Holdings, name: str) -> list[str]:
    known = {backup.name: backup for backup in held.catalog.backups}
    names = [name]
    while (parent := known[names[-1]].parent) in known and parent not in names:
        names.append(parent)
    return names


async def expire(
    site: Site,
    plan: Plan,
    marks: Marks,
    *,
    tell: Callable[[str], None],
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Delete as planned. What is refused is in the outcome, not raised; run again, it finishes what was interrupted.

    Pins and marks are read again before each backup. ``progress`` is told of bytes that went.
    """
    seen, decision = plan.seen, plan.decision

    @contextlib.asynccontextmanager
    async def claim(name: str) -> AsyncIterator[str]:
        async with marks.claim(name, what="expire") as user:
            yield f"in use by {user}" if user else await _pinned(site, seen, name)

    expirer, outcome = Expirer(seen.stores, claim=claim, tell=tell, progress=progress), Outcome()
    outcome.freed, outcome.refusals = expirer.freed, expirer.refusals
    unburied = ""
    try:
        await marks.bury()
    except StoreError as error:
        unburied = f"marks of processes that are gone could not be removed: {error.fact}"
        tell(unburied)
    for backup in decision.going:
        above = next((b.name for b in decision.going if b.parent == backup.name and b.name in outcome.stayed), "")
        reason = f"{above} builds on it, and stays" if above else await expirer.backup(backup.name)
        if reason:
            outcome.stayed[backup.name] = reason
            tell(f"{backup.name} stays: {reason}")
        else:
            outcome.gone.append(backup.name)
    for name in seen.leftovers:
        # Who was only suspended must find its mark gone, or it would list what has lost its parts.
        if reason := unburied or await expirer.unlisted(name):
            outcome.stayed[name] = reason
        else:
            outcome.leftovers.append(name)
    needs = decision.wal
    if outcome.stayed:
        gone = set(outcome.gone)
        needs = needed_by(plan.held, [b for b in plan.held.catalog.backups if b.name not in gone])
    for store in seen.stores:
        try:
            going = plan.wal[store.name]
            if needs is not decision.wal:
                going = await find_wal(store, needs, site.facts.segment_size)
        except StoreError as error:
            outcome.refusals.append(Refusal(store.name, "WAL", error.fact))
        else:
            await expirer.wal(store, going)
    await expirer.loose([f"pin/{name}" for name in seen.idle_pins], "pins of backups that are gone")
    await _forget_records(site, seen, expirer)
    return outcome


async def _pinned(site: Site, seen: Look, name: str) -> str:
    """How the backup is pinned now; empty if it is not. A pin that the decision took for ended has ended."""
    ended = seen.held.pins.get(name, ())
    for store in seen.stores:
        try:
            pin = await read_pin(site, store, name)
        except IntegrityError:
            return "pinned, by a pin that cannot be read"
        if pin is not None and pin not in ended:
            return pin.words
    return ""


async def _forget_records(site: Site, seen: Look, expirer: Expirer) -> None:
    try:
        names = (await listed(seen.stores)).names
    except StoreError as error:
        expirer.refusals.append(Refusal("", "records", error.fact))
        return
    await expirer.loose([name.key for name in outdated(names, site.clock.now())], "records of more than a year ago")


def marks_of(site: Site, *, ttl: float = TTL) -> Marks:
    """The marks on backups of a site."""
    return Marks(site.stores, clock=site.clock, ttl=ttl)
