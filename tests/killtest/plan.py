"""What a round of the kill test is made of, drawn from its seed and number alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum
from typing import Self


class Pace(Enum):
    """How the clients of a round commit."""

    #: Again after at most 10 ms.
    BRISK = "brisk"
    #: Again after at most 100 ms.
    STEADY = "steady"
    #: Again after 0.1 to 1.5 s: the segment stays open for long.
    SPARSE = "sparse"
    #: All of them briskly for half a second, then nothing for 1.2 s.
    BURSTS = "bursts"


class Trouble(Enum):
    """What happens before the end."""

    NONE = "none"
    SERVICE_KILLED = "service killed"
    STORE_CUT = "store cut"
    STORE_BUSY = "store answers 503"
    STREAM_CUT = "stream cut"


@dataclass(frozen=True, slots=True)
class Plan:
    """One round. Times in seconds."""

    seed: int
    number: int
    synchronous: bool
    major: int
    segment_mb: int
    sources: str
    #: A local folder is a destination as well, and is lost with the host.
    local: bool
    encrypted: bool
    #: So much longer takes every request to the store.
    delay: float
    clients: int
    pace: Pace
    #: Longest row in bytes; one in twenty is longer than 400.
    longest: int
    #: Per second, on average, each.
    switches: float
    checkpoints: float
    #: The base backup is taken while the clients commit.
    backup_under_load: bool
    trouble: Trouble
    #: From the moment when all is well to the kill.
    until_kill: float

    @classmethod
    def draw(cls, seed: int, number: int, *, synchronous: bool) -> Self:
        """The same for the same seed and number; the mode changes nothing else."""
        from tests.servers import SERVER_VERSIONS  # not for the processes of ``load``: it brings pytest along

        dice = random.Random(f"walship/{seed}/{number}")
        clients = dice.choice((1, 1, 2, 4, 8, 16))
        segment_mb = dice.choice((1, 16))
        return cls(
            seed=seed,
            number=number,
            synchronous=synchronous,
            major=dice.choice(SERVER_VERSIONS),
            segment_mb=segment_mb,
            sources=dice.choice(("stream", "watch,stream")),
            local=dice.random() < 0.4,
            encrypted=dice.random() < 0.7,
            delay=dice.choice((0.0, dice.uniform(0.0, 0.05), 0.05)),
            clients=clients,
            pace=dice.choice(tuple(Pace)),
            longest=dice.choice((400, 60_000 if clients <= 4 else 10_000)),
            # A switch sends a whole segment, of zeros: two of 16 MB in a second measure the machine, not the promise.
            switches=dice.choice((0.0, 0.0, 0.3, 2.0 if segment_mb == 1 else 0.5)),
            checkpoints=dice.choice((0.0, 0.5)),
            backup_under_load=dice.random() < 0.3,
            trouble=dice.choice((Trouble.NONE, Trouble.NONE, *Trouble)),
            until_kill=dice.uniform(0.5, 5.0),
        )

    def __str__(self) -> str:
        words = [
            "sync" if self.synchronous else "async", f"PostgreSQL {self.major}", f"{self.segment_mb} MB", self.sources,
            "file+s3" if self.local else "s3", "encrypted" if self.encrypted else "plain",
            f"+{self.delay * 1e3:.0f} ms",
            f"{self.clients} clients {self.pace.value}", f"rows to {self.longest} B",
            *([f"{self.switches:g} switches/s"] if self.switches else []),
            *(["backup under load"] if self.backup_under_load else []),
            *([self.trouble.value] if self.trouble is not Trouble.NONE else []),
        ]  # fmt: skip
        return ", ".join(words)
