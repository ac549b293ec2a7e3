"""The report of a drill: what was restored and checked, how long it took, and what follows from it.

Filled by ``infra/drill.py`` as the drill goes on, so that one that failed half way has a report as well. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

from pipeline.contracts import Clock
from pipeline.errors import WalshipError
from pipeline.moments import show
from pipeline.recovery import RestorePlan

#: Bytes, powers of 1024.
_UNITS = ("B", "KB", "MB", "GB")
_HOW = (
    "The restored server ran on a private socket, with shared_buffers at {buffers} and huge pages off, so that a small"
    " machine is enough; a server with more memory may replay faster. Nothing of it is left, unless --keep was given."
)
_IDLE = (
    "RPO is the age of the newest recovered commit at the moment when the drill began. A server that writes nothing has"
    " no newer one, and loses nothing all the same."
)


class State(Enum):
    """Of a check."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check, done."""

    name: str
    state: State
    expected: str
    found: str
    seconds: float
    #: Empty: all of them.
    database: str = ""
    #: Whether it was left out because somebody said so.
    waived: bool = False


@dataclass(slots=True)
class Reading:
    """What came from one destination."""

    destination: str
    objects: int = 0
    #: Bytes as stored.
    size: int = 0

    def served(self, size: int) -> None:
        """One more object, or part of one."""
        self.objects += 1
        self.size += size


@dataclass(slots=True)
class Report:
    """All that is known so far."""

    #: When the command began, and on the clock that never goes back.
    began: datetime
    start: float
    version: str
    target: str
    cluster: str = ""
    plan: RestorePlan | None = None
    #: ``18.6``; empty until the server has answered.
    server: str = ""
    buffers: str = ""
    #: The destinations that may be read, in their order.
    readings: list[Reading] = field(default_factory=list)
    #: Name and seconds.
    steps: list[tuple[str, float]] = field(default_factory=list)
    #: Seconds from the start of the command until the server answered at the target.
    rto: float | None = None
    #: None if the replayed WAL held no commit.
    newest_commit: datetime | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    failure: WalshipError | None = None
    #: The end of the server's log, if recovery failed.
    log: str = ""
    seconds: float = 0.0

    @contextmanager
    def step(self, name: str, clock: Clock) -> Iterator[None]:
        """Take the time of a step, also of one that fails."""
        began = clock.monotonic()
        try:
            yield
        finally:
            self.steps.append((name, clock.monotonic() - began))

    def answered(self, clock: Clock) -> None:
        """The server is at its target, and has answered a query."""
        self.rto = clock.monotonic() - self.start

    @property
    def rpo(self) -> float | None:
        """Seconds; None if there is no commit to go by. 0 for one that was made, and stored, since the drill began."""
        return max(0.0, (self.began - self.newest_commit).total_seconds()) if self.newest_commit else None

    @property
    def before_target(self) -> float | None:
        """Seconds from the newest recovered commit to the time that was asked for; None for other targets."""
        time = self.plan.target.time if self.plan else None
        return (time - self.newest_commit).total_seconds() if time and self.newest_commit else None

    def of(self, state: State) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.state is state]

    @property
    def lacking(self) -> list[Outcome]:
        """Checks that could not be run although they were wanted."""
        return [outcome for outcome in self.of(State.NOT_RUN) if not outcome.waived]

    @property
    def verdict(self) -> str:
        """``passed``, ``failed`` (also when the restore itself did), or ``incomplete``: a check could not be run."""
        if self.failure is not None or self.rto is None or self.of(State.FAILED):
            return "failed"
        return "incomplete" if self.lacking else "passed"

    @property
    def conclusion(self) -> str:
        """One sentence."""
        if self.rto is None:
            why = self.failure.fact if self.failure else "it was stopped before"
            return f"The cluster could NOT be brought back to {self.target}: {why}."
        said = f"The cluster came back to {self.target} in {_seconds(self.rto)}"
        if self.before_target is not None:
            said += f", its newest commit {_seconds(self.before_target)} before that time"
        elif self.rpo is not None:
            said += f", its newest commit {_seconds(self.rpo)} old"
        if self.failure is not None:
            return f"{said}, but the drill could not go on: {self.failure.fact}."
        failed, skipped, count = self.of(State.FAILED), self.of(State.NOT_RUN), len(self.outcomes)
        if failed:
            return f"{said}, but {len(failed)} of {_count(count, 'check')} FAILED: {_names(failed)}."
        passed = len(self.of(State.PASSED))
        if skipped:
            return f"{said}; {_count(passed, 'check')} passed, NOT RUN: {_names(skipped)}."
        return f"{said}, and {'all ' if passed > 1 else ''}{_count(passed, 'check')} passed."

    def summary(self) -> dict[str, object]:
        """For ``--json``, and the report's file of that kind."""
        return {
            "conclusion": self.conclusion,
            "verdict": self.verdict,
            "began": self.began.isoformat(),
            "seconds": round(self.seconds, 3),
            "rto_seconds": _rounded(self.rto),
            "rpo_seconds": _rounded(self.rpo),
            "newest_commit": self.newest_commit.isoformat() if self.newest_commit else None,
            "newest_commit_before_target_seconds": _rounded(self.before_target),
            "cluster": self.cluster,
            "target": self.target,
            "server_version": self.server or None,
            "walship_version": self.version,
            "plan": self.plan.summary() if self.plan else None,
            "read": [{"destination": r.destination, "objects": r.objects, "bytes": r.size} for r in self.readings],
            "steps": [{"name": name, "seconds": round(seconds, 3)} for name, seconds in self.steps],
            "checks": [
                {
                    "name": outcome.name,
                    "state": outcome.state.value,
                    "database": outcome.database or None,
                    "expected": outcome.expected,
                    "found": outcome.found,
                    "seconds": round(outcome.seconds, 3),
                }
                for outcome in self.outcomes
            ],
            "notices": list(self.notices),
            "error": {"fact": self.failure.fact, "hint": self.failure.hint} if self.failure else None,
            "server_log": self.log or None,
        }

    def markdown(self) -> str:
        """The report for people."""
        lines = [f"# Restore drill: {self.verdict}", "", f"**{self.conclusion}**", ""]
        if self.failure is not None and self.failure.hint:
            lines += [f"What to do: {self.failure.hint}", ""]
        lines += _table(("what", "value"), self._facts())
        lines += ["", "## Steps", "", *_table(("step", "seconds"), self._steps())]
        if self.outcomes:
            rows = [
                (o.name, o.state.value if o.state is State.PASSED else f"**{o.state.value}**", o.database or "all",
                 o.expected, o.found, f"{o.seconds:.2f}")
                for o in self.outcomes
            ]  # fmt: skip
            head = ("check", "result", "database", "expected", "found", "seconds")
            lines += ["", "## Checks", "", *_table(head, rows)]
        notes = [*self.notices, _IDLE, *([_HOW.format(buffers=self.buffers)] if self.buffers else [])]
        lines += ["", "## Notes", "", *(f"- {_plain(note)}" for note in notes)]
        if self.log:
            lines += ["", "## The end of the server's log", "", *(f"    {line}" for line in self.log.splitlines())]
        return "\n".join(lines) + "\n"

    def _facts(self) -> list[Sequence[str]]:
        plan = self.plan
        facts: list[Sequence[str]] = [("began", show(self.began.replace(microsecond=0))), ("target", self.target)]
        if self.cluster:
            facts.append(("cluster", self.cluster))
        if plan is not None:
            backup = f"{plan.backup.name}, ended {show(plan.backup.stopped.replace(microsecond=0))}, {_size(plan.size)}"
            wal = f"{_count(plan.path.count, 'segment')}, LSN {plan.path.start} to {plan.path.end}"
            tail = f", the last {_size(plan.path.tail)} from tails" if plan.path.tail else ""
            facts += [("base backup", backup), ("WAL", f"{wal}, timeline {plan.timeline}{tail}")]
        for reading in self.readings:
            facts.append(
                ("read from", f"{reading.destination}: {_count(reading.objects, 'object')}, {_size(reading.size)}")
            )
        if self.server:
            facts.append(("PostgreSQL", self.server))
        facts.append(("measured RTO", _seconds(self.rto) if self.rto is not None else "the target was not reached"))
        if self.rto is not None:
            commit = "no commit in the replayed WAL to go by: all are older than the end of the base backup"
            if self.newest_commit is not None and self.rpo is not None:
                commit = f"{_seconds(self.rpo)}: the newest recovered commit is of {show(self.newest_commit)}"
            facts.append(("measured RPO", commit))
        if self.before_target is not None:
            facts.append(("newest commit", f"{_seconds(self.before_target)} before the time that was asked for"))
        facts.append(("walship", self.version))
        return facts

    def _steps(self) -> list[Sequence[str]]:
        rows = [(name, f"{seconds:.2f}") for name, seconds in self.steps]
        return [*rows, ("**in all**", f"**{self.seconds:.2f}**")]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(_plain(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def _plain(text: str) -> str:
    """On one line, and nothing in it is taken for HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def _names(outcomes: Sequence[Outcome]) -> str:
    shown = ", ".join(outcome.name for outcome in outcomes[:3])
    return f"{shown} and {len(outcomes) - 3} more" if len(outcomes) > 3 else shown


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _seconds(seconds: float) -> str:
    """``4.2 s``; from two minutes on with minutes, from two hours on with hours beside it."""
    said = f"{seconds:.1f} s"
    if seconds >= 7200:
        return f"{said} ({seconds / 3600:.1f} h)"
    return f"{said} ({seconds / 60:.1f} min)" if seconds >= 120 else said


def _size(size: float) -> str:
    for unit in _UNITS:
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"
