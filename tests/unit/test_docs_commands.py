"""What the documents say can be typed: verbs and options that exist, whether or not a test runs the block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infra.settings import known_names
from tests.docs_blocks import HOME, blocks_of
from tests.unit.test_help import parse

_COMMAND = re.compile(r"(?:^|&& )(?:[A-Z_]+=\S* )*(walship [^|>&]*)")
_DOCUMENTS = sorted(path.relative_to(HOME).as_posix() for path in (HOME, HOME / "docs") for path in path.glob("*.md"))


def _commands(document: str) -> list[str]:
    """Without explanations and dots behind them; a line with brackets shows what there is, and is not typed."""
    lines = [line for block in blocks_of(document) for line in block.lines if " [" not in line]
    found = [re.sub(r"( {2,}\S| \.\.\.).*", "", word).strip() for line in lines for word in _COMMAND.findall(line)]
    return [command for command in found if command != "walship"]


@pytest.mark.parametrize("document", _DOCUMENTS)
def test_commands_can_be_typed(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("checks.sql", "drill.sql"):
        Path(name).touch()
    for line in _commands(document):
        try:
            parse(line.replace("/etc/walship/checks.sql", "checks.sql"))
        except Exception as error:
            raise AssertionError(f"{document}: {line}: {error!r}") from error


def test_there_are_commands_to_look_at() -> None:
    assert sum(len(_commands(document)) for document in _DOCUMENTS) > 100


@pytest.mark.parametrize("document", _DOCUMENTS)
def test_settings_exist(document: str) -> None:
    """Those of blocks; a name in a sentence may end in _ or stand for several."""
    lines = [line for block in blocks_of(document) for line in block.lines]
    named = {name for line in lines for name in re.findall(r"\b(WALSHIP_[A-Z_]+)=", line) if "_COMPLETE" not in name}
    assert named <= known_names()


def test_who_has_no_spool_is_told_what_to_do_in_the_place_of_a_push() -> None:
    sections = (HOME / "docs" / "procedures.md").read_text("utf-8").split("\n## ")
    pushing = [section for section in sections if "\n    walship push" in section]
    assert pushing
    assert [section.partition("\n")[0] for section in pushing if "`WALSHIP_SOURCES=stream`" not in section] == []
