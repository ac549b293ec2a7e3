"""The sub-benchmarks. Each runs walship and its peer in turn, so that a busy machine slows both alike: ratios count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

from tests.benchmarks.ground import Ground
from tests.benchmarks.measured import Cost


class Tool(Protocol):
    """What is compared. Each call starts from a new repository or, for ``restore``, from the last ``backup``."""

    @property
    def name(self) -> str: ...
    def drain(self, segments: Sequence[Path], level: int) -> Cost: ...
    def backup(self) -> Cost: ...
    def restore(self) -> Cost: ...
    def stored(self) -> int: ...


@dataclass(slots=True)
class Row:
    """All runs of one tool at one task."""

    task: str
    tool: str
    #: Bytes of plaintext in each run.
    size: int
    costs: list[Cost] = field(default_factory=list)
    #: Bytes in the repository after a run; 0 where nothing is stored.
    stored: int = 0
    #: CPU seconds of the PostgreSQL server in each run, where it takes part.
    server_cpu: list[float] = field(default_factory=list)

    @property
    def speeds(self) -> list[float]:
        """MB of plaintext per second, of each run."""
        return [self.size / 1e6 / cost.stored for cost in self.costs]

    @property
    def seconds(self) -> float:
        return median(cost.stored for cost in self.costs)

    @property
    def cpu(self) -> float:
        return median(cost.cpu for cost in self.costs)

    @property
    def peak(self) -> int:
        """Bytes of the largest process in any run."""
        return max(cost.rss for cost in self.costs)

    @property
    def together(self) -> int:
        """Bytes of all processes in any run; 0 if that is not known."""
        return max(cost.together for cost in self.costs)

    def ratios(self, peer: Row) -> list[float]:
        """How many times as fast as the peer, pair by pair."""
        return [mine / theirs for mine, theirs in zip(self.speeds, peer.speeds, strict=True)]


def drain(
    ground: Ground, tools: Sequence[Tool], segments: Sequence[Path], *, level: int, rounds: int,
    say: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """The backlog into an empty repository: until all is stored."""
    size = sum(segment.stat().st_size for segment in segments)
    rows = [Row(f"drain, zstd {level}", tool.name, size) for tool in tools]
    for number in range(rounds):
        for tool, row in zip(tools, rows, strict=True):
            ground.warm(segments)
            row.costs.append(tool.drain(segments, level))
            row.stored = tool.stored()
        tell(rows, number, say)
    return rows


def base(ground: Ground, tools: Sequence[Tool], *, rounds: int, say: Callable[[str], None]) -> list[Row]:
    """A base backup into an empty repository, and its files restored (no server is started on them)."""
    size = ground.size
    backups = [Row("base backup", tool.name, size) for tool in tools]
    restores = [Row("restore", tool.name, size) for tool in tools]
    for number in range(rounds):
        for tool, backup, restore in zip(tools, backups, restores, strict=True):
            before = ground.server_cpu
            backup.costs.append(tool.backup())
            backup.server_cpu.append(ground.server_cpu - before)
            backup.stored = tool.stored()
            restore.costs.append(tool.restore())
        tell(backups, number, say)
        tell(restores, number, say)
    return [*backups, *restores]


def service(
    ground: Ground, serve: Callable[[Sequence[Path]], Cost], segments: Sequence[Path], *, rounds: int,
    say: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """The service while it drains the backlog, for its memory."""
    row = Row("walship run", "walship", sum(segment.stat().st_size for segment in segments))
    for number in range(rounds):
        ground.warm(segments)
        row.costs.append(serve(segments))
        tell([row], number, say)
    return [row]


def tell(rows: Sequence[Row], number: int, say: Callable[[str], None]) -> None:
    """How the last run of each went."""
    speeds = ", ".join(f"{row.tool} {row.speeds[-1]:.0f} MB/s" for row in rows)
    ratio = f" (ratio {rows[0].speeds[-1] / rows[1].speeds[-1]:.2f})" if len(rows) == 2 else ""
    say(f"{rows[0].task}, run {number + 1}: {speeds}{ratio}")
