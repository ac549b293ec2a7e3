"""What a verification has found: for people, for ``--json``, and for whoever mends it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline.runs import Hole


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with one object at one destination."""

    destination: str
    name: str
    #: ``missing``, ``damaged``, ``conflict`` (whole, and not the one that belongs there) or ``unreadable`` (the store
    #: failed: nothing is known of the object).
    kind: str
    fact: str


@dataclass(frozen=True, slots=True)
class BackupVerdict:
    """What can be made of one backup."""

    name: str
    #: Objects that belong to it, and how many of them are good at one destination at least.
    objects: int
    good: int
    #: The first missing segment between its start and its end, by name; empty if it can become consistent.
    needs: str
    #: The first missing segment on the way from it to the end of its timeline, or to that of the newest timeline that
    #: descends from it, which ``latest`` follows; by name, empty if there is none.
    hole: str
    #: The backup that it builds on and that cannot be used; empty if there is none.
    broken: str = ""
    #: How its files differ from its backup_manifest, in a sentence; empty if they do not, or were not compared.
    differs: str = ""

    @property
    def usable(self) -> bool:
        return self.objects == self.good and not (self.needs or self.broken or self.differs)


@dataclass(frozen=True, slots=True)
class Healing:
    """What became of one fault."""

    fault: Fault
    #: ``healed``, ``would`` (it was only looked), ``good`` (it is whole by now) or ``cannot``.
    outcome: str
    #: Where the good bytes came from, and how many.
    source: str = ""
    size: int = 0
    #: Why it cannot be healed.
    fact: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a verification."""

    #: Objects and stored bytes that were read.
    objects: int
    size: int
    faults: tuple[Fault, ...]
    backups: tuple[BackupVerdict, ...]
    #: Gaps that a recovery from one of the backups would come to, on its own timeline or on the newest that descends
    #: from it: also the missing first segment of a timeline. What no backup reaches across does not count.
    holes: tuple[Hole, ...]
    #: As the catalog says: backup_info that cannot be read, tails that cannot be joined, and the like.
    problems: tuple[str, ...]
    #: What is wrong and does no harm.
    warnings: tuple[str, ...] = ()
    #: Objects that were listed and not read: they were good a short while ago, and have not changed since.
    trusted: int = 0
    #: Backups whose files were compared with their backup_manifest.
    compared: int = 0
    healings: tuple[Healing, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing is damaged or missing anywhere, and each backup reaches the ends of the timelines it leads to."""
        broken = any(not b.usable or b.hole for b in self.backups)
        return not (self.faults or broken or self.problems)

    @property
    def kinds(self) -> dict[str, int]:
        """Faults by kind."""
        return dict(sorted(Counter(fault.kind for fault in self.faults).items()))

    def summary(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "ok": self.ok,
            "objects": self.objects,
            "bytes": self.size,
            "trusted": self.trusted,
            "compared_backups": self.compared,
            "faults": [
                {"destination": f.destination, "name": f.name, "kind": f.kind, "fact": f.fact} for f in self.faults
            ],
            "backups": [
                {
                    "name": b.name, "usable": b.usable, "objects": b.objects, "good": b.good,
                    "missing_to_start": b.needs, "missing_behind": b.hole, "broken_parent": b.broken,
                    "differs": b.differs,
                }
                for b in self.backups
            ],
            "holes": [{"first": str(h.first), "last": str(h.last), "segments": h.count} for h in self.holes],
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "healings": [
                {
                    "destination": h.fault.destination, "name": h.fault.name, "kind": h.fault.kind,
                    "outcome": h.outcome, "source": h.source, "bytes": h.size, "fact": h.fact,
                }
                for h in self.healings
            ],
        }  # fmt: skip
