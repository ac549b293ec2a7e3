"""What ``--help`` prints."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from infra.cli import VERBS
from infra.cli.group import cli


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


def test_push_and_switch_say_how_they_differ() -> None:
    for verb, other in (("push", "switch"), ("switch", "push")):
        words = " ".join(CliRunner().invoke(cli, [verb, "--help"]).output.split())
        assert f"`walship {other}`" in words
        assert "where no service runs" in words.lower()


def test_without_a_word_it_prints_the_help_alone() -> None:
    done = subprocess.run([sys.executable, "-m", "infra.cli"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: walship")
    assert "hint:" not in done.stderr


def parse(line: str) -> None:
    """As the command would, without doing anything. Raises click.UsageError, AssertionError for an unknown verb."""
    name, *words = shlex.split(line, comments=True)
    assert name == "walship"
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, word := words.pop(0))
        assert found is not None, word
        command = found
    with contextlib.suppress(click.exceptions.Exit):  # --help and --version are done when they are read
        command.make_context(name, words)


def _examples() -> list[tuple[str, str]]:
    """Verb, or group and verb, and a line that its help shows as an example."""
    helps = {verb: CliRunner().invoke(cli, [verb, "--help"]).output for verb in VERBS}
    group = cli.get_command(click.Context(cli), "key")
    assert isinstance(group, click.Group)
    helps |= {f"key {verb}": CliRunner().invoke(cli, ["key", verb, "--help"]).output for verb in group.commands}
    pattern = re.compile(r"^  (?:Example: | {2})(walship .*)$", re.MULTILINE)
    return [(verb, example) for verb, text in helps.items() for example in pattern.findall(text)]


def test_every_verb_has_examples() -> None:
    """But for what only restore_command calls, and a group, whose verbs have them."""
    verbs = {verb for verb, _ in _examples()}
    assert set(VERBS) - verbs == {"fetch-wal", "key"}


@pytest.mark.parametrize(("verb", "example"), _examples())
def test_an_example_can_be_typed(verb: str, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of that verb, and all its options and values are known."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checks.sql").touch()
    assert shlex.split(example)[1:][: len(verb.split())] == verb.split()
    parse(example)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_completion(shell: str) -> None:
    def ask(instruction: str, **more: str) -> str:
        environment = {**os.environ, "_WALSHIP_COMPLETE": instruction, **more}
        done = subprocess.run(
            [sys.executable, "-m", "infra.cli"], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    if shell == "bash" and not shutil.which("bash"):
        pytest.skip("click asks bash for its version")
    script = ask(f"{shell}_source")
    assert "_WALSHIP_COMPLETE=" in script
    assert f"{shell}_complete" in script
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=script, text=True, check=False).returncode == 0
    words = {"COMP_WORDS": "walship restore --to", "COMP_CWORD": "--to" if shell == "fish" else "2"}
    assert "--to-time" in ask(f"{shell}_complete", **words)


@pytest.mark.parametrize("words", ["restore --from", "drill --from", "copy --from", "copy --to"])
def test_destinations_are_completed(
    words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the names that messages have for them, for a URL may have a secret in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WALSHIP_DESTINATIONS", raising=False)

    def completed(typed: str, env: str) -> list[str]:
        Path(".env").write_text(env, "utf-8")
        found = BashComplete(cli, {}, "walship", "_WALSHIP_COMPLETE").get_completions(words.split(), typed)
        return [item.value for item in found]

    two = "WALSHIP_DESTINATIONS=file:///srv/near,s3://key:word@bucket/pg?region=eu-central-1\n"
    assert completed("", two) == ["file:///srv/near", "s3://bucket/pg"]
    assert completed("s3", two) == ["s3://bucket/pg"]
    assert completed("", "BACKUP_ENCRYPTION_ENABLED=true\n" + two) != [], "no passphrase is asked for"
    for wrong in ("", "three words here\n" + two, "WALSHIP_DESTINATION=x\n", "WALSHIP_DESTINATIONS=s3://[x\n"):
        assert completed("", wrong) == []
    assert capfd.readouterr() == ("", "")
