"""Whatever walship makes people install, it uses."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Distributions whose modules are called otherwise.
MODULES = {
    "backports-zstd": "backports",
    "prometheus-client": "prometheus_client",
    "pydantic-settings": "pydantic_settings",
}
#: Data that the standard library looks for by itself: time zones, where the system has none.
DATA = {"tzdata"}


def imported() -> set[str]:
    """Top names of all modules that the three packages import, wherever in a file."""
    names: set[str] = set()
    for room in ("pipeline", "handlers", "infra"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_every_dependency_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [re.split(r"[^A-Za-z0-9-.]", line)[0].replace(".", "-") for line in project["dependencies"]]
    used = imported()
    assert "watchdog" in wanted
    assert {name for name in wanted if MODULES.get(name, name) not in used} == DATA
