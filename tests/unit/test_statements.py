"""Statements that hints show can be pasted to where the hint says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

_HOME = Path(__file__).resolve().parents[2]
#: Two statements, which ``psql -c`` takes for one transaction; ALTER SYSTEM does not run in one.
_TWO = re.compile(r"ALTER SYSTEM [^;]*; *(SELECT|ALTER)")


def _texts(path: Path) -> Iterator[str]:
    """Of all string literals, with holes for what is filled in."""
    inside: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            inside.update(node.values)
            yield "".join(str(each.value) if isinstance(each, ast.Constant) else "{}" for each in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.value


def test_hints_with_two_statements_say_that_they_are_for_psql() -> None:
    found = [
        text for room in ("infra", "handlers", "pipeline") for path in (_HOME / room).rglob("*.py")
        for text in _texts(path) if _TWO.search(text)
    ]  # fmt: skip
    assert len(found) >= 5
    assert [text for text in found if "in psql: " not in text[: _TWO.search(text).start()]] == []  # type: ignore[union-attr]
