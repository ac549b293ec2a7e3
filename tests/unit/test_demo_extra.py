"""What the demo says where its servers are not installed."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from infra.cli.group import cli
from infra.demo import premises
from infra.demo.seaweed import find_program
from pipeline.errors import ConfigError


def test_it_says_how_they_are_installed_from_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And of no index: who has the name there need not be this project."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(metadata, "files", lambda _name: None)
    with pytest.raises(ConfigError, match="SeaweedFS is not installed") as raised:
        find_program()
    hints = [raised.value.hint]
    monkeypatch.setattr(premises, "embedded", lambda: None)
    done = CliRunner().invoke(cli, ["demo"])
    assert isinstance(done.exception, ConfigError)
    hints.append(done.exception.hint)
    for hint in hints:
        assert "`make demo`" in hint
        assert f"{sys.executable} -m pip install '.[demo]'" in hint
        assert "'walship[demo]'" not in hint
