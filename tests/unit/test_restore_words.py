"""What is typed behind ``restore`` and makes no sense is refused before anything is looked at."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from infra.cli.group import cli
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--target-dir", ""], "--target-dir is empty"),
        (
            ["--target-dir", "d", "--tablespace-map", "/a=/b", "--tablespace-map", "/a=/c"],
            "--tablespace-map puts /a at /b and at /c",
        ),
        (["--target-dir", "d", "--tablespace-map", "/a"], "--tablespace-map /a is not OLD=NEW"),
        (["--target-dir", "d", "--port", "5433"], "--port needs --start"),
    ],
)
def test_words_that_make_no_sense(words: list[str], fact: str) -> None:
    error = CliRunner().invoke(cli, ["restore", *words]).exception
    assert isinstance(error, ConfigError)
    assert error.fact == fact
    assert error.hint
