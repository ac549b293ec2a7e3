"""README.zh-TW.md says what README.md says: the same commands, headings, tables and links, in another language."""

from __future__ import annotations

import re

import pytest

from tests.docs_blocks import HOME, bare, blocks_of

_ENGLISH, _CHINESE = "README.md", "README.zh-TW.md"
_FOLLOW = f"{_CHINESE} has to follow {_ENGLISH}: the same change there, in the same commit"


def _text(document: str) -> str:
    return (HOME / document).read_text("utf-8")


def _prose(document: str) -> str:
    return "\n".join(line for line in _text(document).splitlines() if not line.startswith("    "))


def test_the_command_blocks_are_the_same() -> None:
    """Comments in them are for readers, and so are drawings."""
    english, chinese = (
        [block for block in blocks_of(name) if block.kind != "drawing"] for name in (_ENGLISH, _CHINESE)
    )
    assert len(english) >= 15
    assert [bare(block) for block in chinese] == [bare(block) for block in english], _FOLLOW


def test_the_drawings_are_there() -> None:
    assert [block.kind for block in blocks_of(_CHINESE)] == [block.kind for block in blocks_of(_ENGLISH)]


@pytest.mark.parametrize(
    "pattern",
    [r"^#+(?= )", r"^\|", r"(?<=\]\()(?!README)[^)\s]+", r"(?<!`)`[^`\n]+`(?!`)"],
    ids=["headings", "table rows", "links", "words of the command line"],
)
def test_what_can_be_compared_is_the_same(pattern: str) -> None:
    """In number, and where order does not depend on the language in content."""
    english, chinese = (re.findall(pattern, _prose(name), re.MULTILINE) for name in (_ENGLISH, _CHINESE))
    assert sorted(chinese) == sorted(english), _FOLLOW


def test_each_leads_to_the_other() -> None:
    assert f"]({_CHINESE})" in _text(_ENGLISH)
    assert f"]({_ENGLISH})" in _text(_CHINESE)


def test_a_block_is_found_whatever_surrounds_it() -> None:
    """Of what the other tests rest on."""
    kinds = [block.kind for block in blocks_of(_ENGLISH)]
    assert {"sh", "env", "conf", "hba", "sql", "drawing"} == set(kinds)
    lines = {line for block in blocks_of(_ENGLISH) for line in block.lines if line}
    indented = {line[4:] for line in _text(_ENGLISH).splitlines() if line.startswith("    ")}
    assert lines == indented
