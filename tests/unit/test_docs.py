"""The documents: every link leads somewhere, every verb exists, and nothing in the tree belongs to one machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.cli import VERBS

_HOME = Path(__file__).resolve().parents[2]
_MADE = {".git", ".venv", ".cache", ".hypothesis", "__pycache__", "build", "dist"}
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

#: What a file of this project must not hold: a path in the home or the work folder of one machine.
_FOREIGN = re.compile(r"(?<![\w.*])/(?:root|work|home/\w+)/\w")


def _files() -> Iterator[Path]:
    """Text files of the checkout, without what the verbs of the Makefile have made."""
    folders = [_HOME]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir():
                if path.name not in _MADE and not path.name.endswith("_cache") and not path.name.endswith(".egg-info"):
                    folders.append(path)
            elif path.name != ".env":
                yield path


def _documents() -> list[Path]:
    return sorted(path for path in _files() if path.suffix == ".md")


@pytest.mark.parametrize("document", _documents(), ids=lambda path: path.relative_to(_HOME).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    text = _FENCE.sub("", document.read_text("utf-8"))
    targets = [target.partition("#")[0] for target in _LINK.findall(text) if "://" not in target]
    missing = [target for target in targets if target and not (document.parent / target).exists()]
    assert not missing


def test_the_readme_uses_verbs_that_exist() -> None:
    used = set(re.findall(r"^    walship ([a-z-]+)", (_HOME / "README.md").read_text("utf-8"), re.MULTILINE))
    assert {"init", "check", "run", "backup", "restore"} <= used
    assert used <= VERBS.keys()


def test_the_readme_begins_with_the_two_commands_that_the_makefile_has() -> None:
    makefile = (_HOME / "Makefile").read_text("utf-8")
    front = (_HOME / "README.md").read_text("utf-8").partition("\n## ")[0]
    for word in ("demo", "test"):
        assert f"make {word}" in front
        assert re.search(rf"^{word}:", makefile, re.MULTILINE)


def test_nothing_belongs_to_one_machine() -> None:
    found = []
    for path in _files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(_HOME)}: {match[0]}" for match in _FOREIGN.finditer(text)]
    assert not found


def test_the_lock_file_names_no_place_to_fetch_from() -> None:
    assert "//" not in (_HOME / "constraints.lock").read_text("utf-8")


def test_decisions_are_numbered_without_a_gap() -> None:
    numbers = sorted(int(path.name[:4]) for path in (_HOME / "docs" / "decisions").glob("*.md"))
    assert numbers == list(range(1, len(numbers) + 1))
