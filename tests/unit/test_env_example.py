"""``.env.example`` and the settings say the same, in both directions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infra.settings import SECRETS, Settings, known_names

_EXAMPLE = Path(__file__).resolve().parents[2] / ".env.example"
_SETTING = re.compile(r"^#?([A-Z][A-Z0-9_]*)=(.*)$", re.MULTILINE)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name in known_names():
        monkeypatch.delenv(name, raising=False)
    return dict(_SETTING.findall(_EXAMPLE.read_text("utf-8")))


def test_every_setting_is_in_the_example_and_nothing_else(example: dict[str, str]) -> None:
    assert set(example) == known_names()


def test_each_is_there_once() -> None:
    names = [name for name, _ in _SETTING.findall(_EXAMPLE.read_text("utf-8"))]
    assert sorted(names) == sorted(set(names))


def test_the_example_shows_the_defaults(example: dict[str, str], tmp_path: Path) -> None:
    """Uncomment every line: the settings are the same as without any file."""
    everything = tmp_path / "env"
    twins = {f"{name}_FILE" for name in SECRETS}
    everything.write_text("".join(f"{name}={value}\n" for name, value in example.items() if name not in twins))
    assert Settings(_env_file=everything) == Settings(_env_file=None)


def test_each_secret_has_its_file_twin_beside_it(example: dict[str, str]) -> None:
    names = list(example)
    for secret in SECRETS:
        assert names[names.index(secret) + 1] == f"{secret}_FILE"
