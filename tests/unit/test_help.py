"""What ``--help`` prints."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from click.testing import CliRunner

from infra.cli import VERBS, cli


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_no_markup_is_printed(verb: str) -> None:
    done = CliRunner().invoke(cli, [*verb.split(), "--help"])
    assert done.exit_code == 0
    assert "\\" not in done.output
    assert "\b" not in done.output
    assert "``" not in done.output


def test_a_verb_that_was_loaded_is_in_nobodys_way() -> None:
    """Loading a submodule makes its name one of the package's: ``list`` is no builtin there any more."""
    for verb in VERBS:
        importlib.import_module(f"infra.cli.{verb.replace('-', '_')}")
    assert CliRunner().invoke(cli, ["--help"]).exit_code == 0


def test_examples_stand_on_lines_of_their_own() -> None:
    lines = [line.strip() for line in CliRunner().invoke(cli, ["restore", "--help"]).output.splitlines()]
    first = lines.index("Examples:") + 1
    assert all(line.startswith("walship restore --target-dir ") for line in lines[first : first + 4])


def test_without_a_word_it_prints_the_help_alone() -> None:
    done = subprocess.run([sys.executable, "-m", "infra.cli"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: walship")
    assert "hint:" not in done.stderr
