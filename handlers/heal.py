"""Mends what a verification has found: good bytes from a destination that has them, to the one that lacks them.

Nothing is deleted, ever. A missing object is created; a damaged one is replaced in one step, once its good bytes are at
hand and were checked as verification checks them. What is whole and another one than belongs there is left to people.
Whatever interrupts it, each object is what it was or good. Keys come first, backup_info last, and only where all else
of its backup is there: no destination lists what cannot be restored from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from itertools import groupby

from handlers.verify_objects import Differs, Inspector, Judged, Place, Wanted
from handlers.verify_report import Fault, Healing
from pipeline.catalog import backup_of, data_key_name
from pipeline.contracts import Body, ObjectInfo
from pipeline.errors import IntegrityError, ObjectConflict, ObjectMissing, StoreError
from pipeline.objects import read_header

#: Keeps a backup from being deleted while the block lasts. Yields why it must be left alone; empty: it need not be.
Hold = Callable[[str], AbstractAsyncContextManager[str]]

#: Digits by which two fingerprints differ if they are of two contents, and not of one with a flipped bit in it.
_OTHER = 16


@dataclass(slots=True)
class _Copy:
    """A good one."""

    place: Place
    body: Body
    judged: Judged


class Healer:
    """Works through the faults that ``inspector`` has tallied; those that are mended are taken out."""

    def __init__(
        self,
        inspector: Inspector,
        places: Sequence[Place],
        *,
        hold: Hold,
        dry_run: bool = False,
        tell: Callable[[Healing], None] = lambda _: None,
    ) -> None:
        self._inspector = inspector
        self._places = places
        self._hold = hold
        self._dry_run = dry_run
        self._tell = tell
        self.healings: list[Healing] = []
        self._mended: set[Fault] = set()

    async def heal(self) -> None:
        """All that can be. What cannot is in ``healings``, and why."""
        tally = self._inspector.tally
        for backup, group in groupby(sorted([*tally.faults, *tally.spare], key=_order), key=_backup):
            faults = list(group)
            if not backup:
                for fault in faults:
                    self._done(await self._one(fault))
                continue
            async with self._hold(backup) as reason:
                for fault in faults:
                    self._done(self._cannot(fault, reason) if reason else await self._one(fault))
        tally.faults = [fault for fault in tally.faults if fault not in self._mended]

    def _done(self, healing: Healing) -> None:
        self.healings.append(healing)
        self._tell(healing)
        if healing.outcome in ("healed", "good"):
            self._mended.add(healing.fault)

    @staticmethod
    def _cannot(fault: Fault, fact: str) -> Healing:
        return Healing(fault, "cannot", fact=fact)

    async def _one(self, fault: Fault) -> Healing:
        place = next(place for place in self._places if place.name == fault.destination)
        wanted = self._inspector.tally.wanted.get((place.name, fault.name)) or Wanted(fault.name)
        if fault.kind == "conflict":
            return self._cannot(fault, "it is whole, and another one: which of them is right, a person has to find out")
        if fault.kind == "unreadable":
            return self._cannot(fault, "nothing is known of it, for its destination failed")
        if (backup := backup_of(fault.name)) is not None:
            faults = {f for f in self._inspector.tally.faults if f.destination == place.name and f != fault}
            if lacks := [f.name for f in faults - self._mended if f.name.startswith(f"base/{backup}/")]:
                return self._cannot(fault, f"its backup is not whole there: {min(lacks)} comes first")
        try:
            return await self._mend(fault, place, wanted)
        except (StoreError, IntegrityError) as error:
            return self._cannot(fault, error.fact)

    async def _mend(self, fault: Fault, place: Place, wanted: Wanted) -> Healing:
        """Raises StoreError, IntegrityError."""
        damaged, there = False, b""
        try:
            judged, there = await self._look_again(place, wanted)
        except ObjectMissing:
            judged = None
        else:
            damaged = judged is None
        if judged is not None:
            await self._learn(place, wanted, judged)
            return Healing(fault, "good")
        copies, facts = await self._copies(place, wanted)
        try:
            if not copies:
                return self._cannot(fault, "; ".join(facts) or "there is no other destination")
            chosen = copies[0]
            if fact := _odd(copies, there):
                return self._cannot(fault, fact)
            if self._dry_run:
                return Healing(fault, "would", chosen.place.name, chosen.body.size)
            await self._bring_key(place, chosen)
            with suppress(ObjectConflict):  # somebody else has stored it just now: that is looked at like our own
                await place.store.put(wanted.name, chosen.body, replace=damaged)
            judged, _ = await self._inspector.judge(place.store, wanted)
            if _content(judged) != _content(chosen.judged):
                return self._cannot(
                    fault, f"it was stored by somebody else meanwhile, and differs from {chosen.place.name}"
                )
            await self._learn(place, wanted, judged)
            return Healing(fault, "healed", chosen.place.name, chosen.body.size)
        finally:
            for copy in copies:
                copy.body.close()

    async def _look_again(self, place: Place, wanted: Wanted) -> tuple[Judged | None, bytes]:
        """As it is now, hours later perhaps. None if it is damaged, and its first bytes. Raises Differs, StoreError."""
        body = await place.store.get(wanted.name)
        try:
            return await self._inspector.judge_body(body, wanted), b""
        except Differs:
            raise
        except IntegrityError:
            return None, next(body.chunks(), b"")
        finally:
            body.close()

    async def _copies(self, lacking: Place, wanted: Wanted) -> tuple[list[_Copy], list[str]]:
        """The good ones of the other destinations, and what is wrong with the rest."""
        copies, facts = list[_Copy](), list[str]()
        for place in self._places:
            if place is lacking:
                continue
            try:
                body = await place.store.get(wanted.name)
            except ObjectMissing:
                facts.append(f"{place.name} lacks it")
                continue
            except StoreError as error:
                facts.append(f"{place.name}: {error.fact}")
                continue
            try:
                await self._inspector.pace(body.size)
                copies.append(_Copy(place, body, await self._inspector.judge_body(body, wanted)))
            except IntegrityError as error:
                body.close()
                facts.append(f"{place.name}: {error.fact}")
            except BaseException:
                body.close()
                raise
        return copies, facts

    async def _bring_key(self, place: Place, chosen: _Copy) -> None:
        """The data key goes before what is encrypted under it. Raises StoreError, IntegrityError."""
        if not chosen.judged.header.key:
            return
        wanted = Wanted(data_key_name(chosen.judged.header.key))
        try:
            await place.store.head(wanted.name)
        except ObjectMissing:
            copies, facts = await self._copies(place, wanted)
            try:
                if not copies:
                    raise IntegrityError(f"{wanted.name}, which it is encrypted under: {'; '.join(facts)}") from None
                await place.store.put(wanted.name, copies[0].body)
            finally:
                for copy in copies:
                    copy.body.close()

    async def _learn(self, place: Place, wanted: Wanted, judged: Judged) -> None:
        """It is good now, and is remembered as a listing shows it."""
        info: ObjectInfo | None = None
        if not wanted.name.startswith("tail/"):
            async for entry in place.store.list(wanted.name):
                if entry.key == wanted.name:
                    info = entry
        self._inspector.learn(place, wanted, judged, info)


def _backup(fault: Fault) -> str:
    """The backup that it belongs to; empty for all else."""
    return fault.name.split("/")[1] if fault.name.startswith("base/") and fault.name.count("/") > 1 else ""


def _order(fault: Fault) -> tuple[int, str, bool, str, str]:
    """Rings, then data keys, then WAL, then backup by backup, each with its backup_info last."""
    for rank, prefix in enumerate(("keys/ring-", "keys/")):
        if fault.name.startswith(prefix):
            return rank, "", False, fault.name, fault.destination
    return 2, _backup(fault), backup_of(fault.name) is not None, fault.name, fault.destination


def _odd(copies: Sequence[_Copy], damaged: bytes) -> str:
    """Why none of the copies may be taken, although all are whole; empty if one may."""
    if len({_content(copy.judged) for copy in copies}) > 1:
        return f"{' and '.join(copy.place.name for copy in copies)} have it whole, and differ"
    if damaged:
        try:
            header, _ = read_header("it", damaged)
        except IntegrityError:
            return ""
        if sum(_differing(header.fingerprint, copies[0].judged.header.fingerprint)) > _OTHER:
            return f"the damaged one was never the same as the one at {copies[0].place.name}: two servers, most likely"
    return ""


def _content(judged: Judged) -> str:
    """Equal for copies of one content: objects of backups have no fingerprint, and are never encoded twice."""
    return judged.header.fingerprint or judged.digest


def _differing(one: str, other: str) -> Iterator[bool]:
    """For each digit."""
    return (a != b for a, b in zip(one, other, strict=False))
