"""The command blocks of the documents: where they stand, what is in them, and of what kind they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
_DRAWN = re.compile(r"[─▶└├│]")
_COMMENT = re.compile(r"(?:^|\s+)(?:#|--) .*$")


@dataclass(frozen=True)
class Block:
    """Consecutive indented or fenced lines of a document."""

    document: str
    #: Heading above it, without signs.
    heading: str
    line: int
    lines: tuple[str, ...]

    @property
    def first(self) -> str:
        """What it begins with, without comment."""
        return _COMMENT.sub("", self.lines[0]).strip()

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)

    @property
    def kind(self) -> str:
        """``sh``, ``env`` (settings of walship), ``conf`` (of the server), ``hba``, ``sql``, or ``drawing``."""
        first = self.first
        for kind, pattern in (
            ("drawing", _DRAWN), ("env", r"[A-Z][A-Z_]+=\S*$|WALSHIP_SCHEDULE"), ("hba", r"(host|local) +\w"),
            ("sql", r"(SELECT|ALTER SYSTEM|CREATE ROLE|GRANT) "), ("conf", r"[a-z_.]+ = "),
        ):  # fmt: skip
            if (re.search if kind == "drawing" else re.match)(pattern, self.text if kind == "drawing" else first):
                return kind
        return "sh"

    def __str__(self) -> str:
        return f"{self.document}:{self.line} ({self.heading})"


def blocks_of(document: str) -> list[Block]:
    """All of a document's blocks, in order."""
    found: list[Block] = []
    heading, fenced, begun, lines = "", False, 0, list[str]()

    def end() -> None:
        while lines and not lines[-1]:
            lines.pop()
        if lines:
            found.append(Block(document, heading, begun, tuple(lines)))
        lines.clear()

    before = ""
    for number, line in enumerate((HOME / document).read_text("utf-8").splitlines(), 1):
        if line.startswith("```"):
            end()
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (lines or not before.strip())):
            if not lines:
                begun = number
            lines.append(line if fenced else line[4:])
        elif lines and not line.strip() and not fenced:
            end()
        else:
            end()
            if line.startswith("#"):
                heading = line.lstrip("# ")
        before = line
    end()
    return found


def bare(block: Block) -> list[str]:
    """Its lines without comments and drawings: what has to be the same in every language."""
    return [stripped for line in block.lines if (stripped := _COMMENT.sub("", line).rstrip())]
