"""``walship key list``: which rings there are and where, who could open the newest one, and the data keys under them.

Nothing needs to be at hand for it: whoever has lost the passphrase wants to know who else could read. What a ring shows
unopened is not authenticated, which is said.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.at_hand import AtHand
from infra.key_objects import KeyListing, list_keys, openers, read_key_object
from infra.keyring import RepositoryKeys
from infra.keys import open_with
from infra.recipients import show_recipient
from infra.ring import Front, Ring, read_front, ring_name, unlisted_maker
from infra.sealing import public_of
from infra.wraps import unwrap
from pipeline.contracts import Store
from pipeline.errors import IntegrityError, StoreError
from pipeline.moments import in_json, moment_in, show


@dataclass(slots=True)
class RingSeen:
    """One ring, wherever it is."""

    number: int
    #: As it stands in the ring: nobody has proved that it is a time.
    created: str
    destinations: list[str] = field(default_factory=list)
    #: Destinations that have other bytes under that name than the first one.
    differs: list[str] = field(default_factory=list)
    #: The repository's public key, as hex: it changes only with a new repository key.
    public_key: str = ""


@dataclass(slots=True)
class KeyReport:
    """What was found."""

    system_id: str
    rings: list[RingSeen] = field(default_factory=list)
    #: What the newest ring shows; None if there is none that can be read.
    newest: Front | None = None
    #: Whether what is at hand opens it; a writer file opens nothing, and fits or does not.
    passphrase_opens: bool = False
    identity_opens: bool = False
    writer_fits: bool = False
    #: Public key of the identity at hand; empty if there is none.
    identity: bytes = b""
    #: Ring that was in force → genuine data keys; only where something at hand knows the writer secret.
    data_keys: dict[int, int] = field(default_factory=dict)
    #: Ids that are listed and not accepted; those of them that ``key accept`` would take.
    refused: list[str] = field(default_factory=list)
    acceptable: list[str] = field(default_factory=list)
    #: Former repository keys that the newest ring holds.
    former: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def opened(self) -> bool:
        """Only then it is known to be genuine."""
        return self.passphrase_opens or self.identity_opens

    def result(self) -> dict[str, Any]:
        """For ``--json``."""
        newest = self.newest
        return {
            "system_id": self.system_id,
            "rings": [
                {
                    "ring": r.number,
                    "created": in_json(moment_in(r.created) or r.created),
                    "destinations": r.destinations,
                    "differs": r.differs,
                }
                for r in self.rings
            ],
            "newest": newest
            and {
                "ring": newest.number,
                "passphrases": newest.passphrases,
                "recipients": [
                    {"public_key": show_recipient(public), "label": label, "at_hand": public == self.identity}
                    for public, label in newest.recipients.items()
                ],
                "unknown_wraps": newest.strange,
                "former_keys": self.former,
            },
            "opened": self.opened,
            "at_hand": {
                "passphrase": self.passphrase_opens,
                "identity": self.identity_opens,
                "writer": self.writer_fits,
            },
            "data_keys": {str(number): count for number, count in sorted(self.data_keys.items())},
            "refused_data_keys": self.refused,
            "acceptable_data_keys": self.acceptable,
            "problems": self.problems,
        }

    def lines(self) -> list[str]:
        """For people."""
        if not self.rings:
            return [f"cluster {self.system_id}: no key ring, nothing is encrypted", *self._problem_lines()]
        lines = [f"cluster {self.system_id}"]
        for before, ring in zip([None, *self.rings], self.rings, strict=False):
            mark = ", a new repository key" if before and before.public_key != ring.public_key else ""
            mark += ": in force" if ring is self.rings[-1] else ""
            created = show(moment) if (moment := moment_in(ring.created)) else ring.created
            lines.append(f"{ring_name(ring.number)}  {created}  at {', '.join(ring.destinations)}{mark}")
        if (newest := self.newest) is not None:
            held = " (the one at hand opens it)" if self.passphrase_opens else ""
            lines.append(f"  passphrases  {newest.passphrases}{held}")
            for public, label in newest.recipients.items():
                held = " (at hand)" if public == self.identity and self.identity_opens else ""
                lines.append(f"  recipient    {show_recipient(public)}{f'  {label}' if label else ''}{held}")
            if newest.strange:
                lines.append(f"  others       {newest.strange}, of a kind that a newer walship knows")
            if self.former:
                lines.append(f"  former keys  {self.former}, which open what was written before they were replaced")
            if self.writer_fits:
                lines.append("  the writer file at hand fits it: this host writes, and reads nothing")
            if not self.opened:
                lines.append("  nothing at hand opens it: nobody has proved that it is genuine")
        counts = [f"{count} made under ring {number}" for number, count in sorted(self.data_keys.items())]
        lines.append(
            f"data keys: {', '.join(counts) or 'none' if self.opened or self.writer_fits else 'not looked at'}"
        )
        return [*lines, *self._problem_lines()]

    def _problem_lines(self) -> list[str]:
        return [f"problem: {problem}" for problem in self.problems]


async def look_at_keys(stores: Sequence[Store], system_id: str, at_hand: AtHand) -> KeyReport:
    """Look at every destination. What is wrong at one is in the report; StoreError only if none answers."""
    report = KeyReport(system_id, identity=public_of(at_hand.identity) if at_hand.identity else b"")
    listings: dict[str, KeyListing] = {}
    failures: list[StoreError] = []
    for store in stores:
        try:
            listings[store.name] = await list_keys(store)
        except StoreError as error:
            failures.append(error)
            report.problems.append(f"{store.name} does not answer: {error.fact}")
    if failures and not listings:
        raise failures[0]
    answering = [store for store in stores if store.name in listings]
    contents = await _rings(answering, listings, report)
    highest = max((listing.newest for listing in listings.values()), default=0)
    for store in answering:
        if (newest := listings[store.name].newest) < highest:
            fact = f"{ring_name(newest)} is its newest ring" if newest else "it has no ring at all"
            report.problems.append(f"{store.name} lacks {ring_name(highest)}: {fact}; `walship run` copies it there")
    if (content := contents.get(highest)) is not None:
        await _open(report, content, at_hand, answering, listings)
    return report


async def _rings(stores: Sequence[Store], listings: dict[str, KeyListing], report: KeyReport) -> dict[int, bytes]:
    """Number → content of each ring, as the first destination that has it whole tells."""
    contents: dict[int, bytes] = {}
    for number in sorted(set().union(*(listing.rings for listing in listings.values()))):
        seen = RingSeen(number, "")
        for store in stores:
            if (info := listings[store.name].rings.get(number)) is None:
                continue
            try:
                content = await read_key_object(store, info, report.system_id)
                front = read_front(info.key, content)
            except (StoreError, IntegrityError) as error:
                report.problems.append(f"{info.key} at {store.name} cannot be read: {error.fact}")
                continue
            seen.destinations.append(store.name)
            if contents.setdefault(number, content) != content:
                seen.differs.append(store.name)
                report.problems.append(
                    f"{info.key} at {store.name} is another one than at {seen.destinations[0]}: the keys were changed"
                    " twice at one moment, or somebody put it there; any further change makes them one again"
                )
            seen.created = seen.created or front.created
            seen.public_key = seen.public_key or front.public_key.hex()
        report.rings.append(seen)
    return contents


async def _open(
    report: KeyReport, content: bytes, at_hand: AtHand, stores: Sequence[Store], listings: dict[str, KeyListing]
) -> None:
    number, system_id = report.rings[-1].number, report.system_id
    name = ring_name(number)
    front = report.newest = read_front(name, content)

    def opens(passphrase: str, identity: bytes) -> bool:
        return next(unwrap(name, system_id, front.wraps, front.public_key, passphrase, identity), None) is not None

    ring: Ring | None = None
    try:
        if at_hand.reads:
            ring = await asyncio.to_thread(open_with, name, number, system_id, content, at_hand)
    except IntegrityError as error:
        report.problems.append(error.fact)
    if ring is not None:
        if at_hand.passphrase:
            report.passphrase_opens = await asyncio.to_thread(opens, at_hand.passphrase, b"")
        report.identity_opens = bool(at_hand.identity) and opens("", at_hand.identity)
        report.former = len(ring.former)
    elif at_hand.reads:
        report.problems.append(f"{at_hand.names} {name}: it says that it opens with {openers(front)}")
    writer = at_hand.writer
    report.writer_fits = writer is not None and (writer.system_id, writer.public_key) == (system_id, front.public_key)
    if writer is not None and not report.writer_fits:
        report.problems.append(
            f"WALSHIP_WRITER_FILE, of {ring_name(writer.number)}, does not fit {name}: export it anew"
        )
    known = ring or (writer if report.writer_fits else None)
    if known is None:
        return
    keys = RepositoryKeys(system_id, known, known.policy, store=None, allow_unencrypted=False)
    for store in stores:
        try:
            await keys.refresh(store)
        except (StoreError, IntegrityError) as error:
            report.problems.append(f"{store.name}: {error.fact}")
    report.data_keys = dict(Counter(keys.data_keys.values()))
    if ring is not None:
        await _look_at_refused(report, ring, keys, stores, listings)


async def _look_at_refused(
    report: KeyReport, ring: Ring, keys: RepositoryKeys, stores: Sequence[Store], listings: dict[str, KeyListing]
) -> None:
    """Data keys that are there and do not count, and why."""
    for store in stores:
        for key_id, info in sorted(listings[store.name].data.items()):
            if key_id in keys.data_keys or key_id in report.refused:
                continue
            report.refused.append(key_id)
            try:
                content = await read_key_object(store, info, report.system_id)
                place = unlisted_maker(ring, key_id, content)
            except (StoreError, IntegrityError) as error:
                report.problems.append(f"{info.key} at {store.name} cannot be read: {error.fact}")
                continue
            fact = (
                f"{info.key} at {store.name} is not accepted: no writer of this repository made it, or it was changed"
            )
            if place is not None:
                report.acceptable.append(key_id)
                fact = (
                    f"{info.key} at {store.name} was made under a former key and is not listed: what lies under it"
                    " cannot be read. If a service of yours was started just as the key was replaced, take it:"
                    f" walship key accept {key_id}. If the former key has leaked, somebody else may have made it later"
                )
            report.problems.append(fact)
