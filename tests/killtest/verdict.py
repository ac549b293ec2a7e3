"""What a round has shown, and the table of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

from tests.killtest.load import Commit
from tests.killtest.plan import Plan

#: Of the service, in seconds: the default.
INTERVAL = 1.0


@dataclass(slots=True)
class Outcome:
    """One round. Times in seconds."""

    plan: Plan
    acknowledged: int = 0
    #: How long before the kill the commits that are missing were acknowledged.
    missing: list[float] = field(default_factory=list)
    #: Of every WAL object that was stored before the kill.
    puts: list[float] = field(default_factory=list)
    #: What "one PUT" was at the time of the kill: see ``longest_put``.
    put: float = 0.0
    restore: float = 0.0
    #: What must not be: one sentence each.
    violations: list[str] = field(default_factory=list)

    @property
    def allowed(self) -> float:
        """How long before the kill a commit that is missing may have been acknowledged."""
        return 0.0 if self.plan.synchronous else INTERVAL + self.put

    @property
    def worst(self) -> float:
        return max(self.missing, default=0.0)

    def judge(self, acknowledged: Sequence[Commit], found: set[tuple[int, int]], kill: float) -> None:
        """Compare what was acknowledged with the rows that are there after the restore."""
        self.acknowledged = len(acknowledged)
        self.missing = [kill - c.acknowledged for c in acknowledged if (c.client, c.n) not in found]
        if not acknowledged:
            self.violations.append("no commit was acknowledged: nothing is proven")
        if self.plan.synchronous and self.missing:
            self.violations.append(f"{len(self.missing)} acknowledged commits are missing in synchronous mode")
        if not self.plan.synchronous and self.worst > self.allowed:
            self.violations.append(
                f"a commit is missing that was acknowledged {self.worst:.3f} s before the kill,"
                f" and {self.allowed:.3f} s are allowed"
            )

    def __str__(self) -> str:
        lost = f"{len(self.missing)} missing" + (
            f" (worst {self.worst:.3f} s of {self.allowed:.3f})" if self.missing else ""
        )
        return (
            f"{self.acknowledged} acknowledged, {lost}, PUT p99 {p99(self.puts) * 1e3:.0f} ms,"
            f" restored in {self.restore:.1f} s"
        )


def p99(values: Sequence[float]) -> float:
    """Nearest; 0 where there are none."""
    if len(values) < 2:
        return max(values, default=0.0)
    return quantiles(values, n=100, method="inclusive")[98]


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: one line for each mode."""
    names = (
        "mode", "rounds", "commits acknowledged", "missing", "worst age of a missing commit",
        "least that was left to what is allowed", "PUT p50 / p99", "restore, median / longest", "violations",
    )  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for mode in (True, False):
        rounds = [each for each in outcomes if each.plan.synchronous is mode]
        if not rounds:
            continue
        puts = [seconds for each in rounds for seconds in each.puts]
        missing = sum(len(each.missing) for each in rounds)
        restores = [each.restore for each in rounds]
        cells = (
            "synchronous" if mode else f"asynchronous, {INTERVAL:g} s",
            len(rounds),
            f"{sum(each.acknowledged for each in rounds):,}",
            missing,
            f"{max(each.worst for each in rounds):.3f} s" if missing else "–",
            "–" if mode else f"{min(each.allowed - each.worst for each in rounds):.3f} s",
            f"{median(puts) * 1e3:.0f} / {p99(puts) * 1e3:.0f} ms" if puts else "–",
            f"{median(restores):.1f} / {max(restores):.1f} s",
            sum(len(each.violations) for each in rounds),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
