"""What the demo claims in the end, each claim checked, and how it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from infra.demo.load import Books, Table


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence, and whether it was found to be true."""

    text: str
    holds: bool


@dataclass(slots=True)
class Summary:
    """Filled while the story goes on."""

    #: Name and value, for people, in order.
    facts: dict[str, str] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)

    @property
    def broken(self) -> list[Claim]:
        return [claim for claim in self.claims if not claim.holds]

    def claim(self, text: str, *, holds: bool) -> None:
        self.claims.append(Claim(text, holds))

    def compare(self, when: str, wanted: Books, found: Books) -> None:
        """Claim that all tables came back with the same content, and that the books balance."""
        for name, table in wanted.tables.items():
            back = found.tables.get(name)
            self.claim(_comparison(when, name, table, back), holds=back == table)
        self.claim(
            f"{when}: the books balance" if found.imbalance == 0 else f"{when}: the books are off by {found.imbalance}",
            holds=found.imbalance == 0,
        )

    def result(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "ok": bool(self.claims) and not self.broken,
            "facts": self.facts,
            "claims": [asdict(claim) for claim in self.claims],
        }

    def show(self) -> None:
        """On stdout, for a person."""
        console = Console(highlight=False, soft_wrap=True)
        width = max(map(len, self.facts), default=0)
        console.print()
        for name, value in self.facts.items():
            console.print(Text(f"  {name:{width}}  ", style="bold") + Text(value))
        console.print()
        for claim in self.claims:
            mark = Text("  ✓ " if claim.holds else "  ✗ ", style="green" if claim.holds else "bold red")
            console.print(mark + Text(claim.text))
        console.print()


def _comparison(when: str, name: str, wanted: Table, found: Table | None) -> str:
    if found is None:
        return f"{when}: the table {name} with its {wanted.rows:,} rows is not there"
    if found == wanted:
        return f"{when}: {wanted.rows:,} rows of {name}, the same content (SHA-256 {wanted.digest[:12]}…)"
    return (
        f"{when}: {name} has {found.rows:,} rows (SHA-256 {found.digest[:12]}…),"
        f" not {wanted.rows:,} ({wanted.digest[:12]}…)"
    )
