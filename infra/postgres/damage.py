"""Pages that were damaged before a backup: it holds them as they are, and people have to be told."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: SQLSTATE with which a BASE_BACKUP ends that has sent everything, and found a checksum wrong.
DATA_CORRUPTED = "XX001"
_BLOCK = re.compile(r'"(?:\./)?(?P<path>[^"]+)", block (?P<block>\d+)')


@dataclass(frozen=True, slots=True)
class Damage:
    """Pages of one file whose checksum is wrong."""

    path: str
    #: Numbers of the blocks in the relation's fork.
    blocks: tuple[int, ...]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.blocks[:5])) + (", …" if len(self.blocks) > 5 else "")
        blocks = f"blocks {shown}" if len(self.blocks) > 1 else f"block {shown}"
        return f"{self.path}: the checksum of {blocks} is wrong: damaged before the backup, which holds it as it is"


class Warnings:
    """What BASE_BACKUP warns of. The server names the first five blocks of a file, and says how many there are."""

    def __init__(self) -> None:
        self._blocks: dict[str, list[int]] = {}
        #: In the server's words, whatever they are about.
        self.words: list[str] = []

    def hear(self, words: str) -> None:
        """One warning. In another language than English no block is found in it."""
        if (match := _BLOCK.search(words)) and words.startswith("checksum verification failed"):
            self._blocks.setdefault(match["path"], []).append(int(match["block"]))
        else:
            self.words.append(words)

    def damaged(self) -> list[Damage]:
        return [Damage(path, tuple(blocks)) for path, blocks in self._blocks.items()]
