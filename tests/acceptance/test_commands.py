"""What the other tests run in the place of the installed command says and does the same."""

from __future__ import annotations

import re

import pytest

from tests import commands
from tests.acceptance.conftest import Copy


@pytest.mark.parametrize(
    ("words", "code", "changed"),
    [
        (["list"], 0, {}),
        (["list", "--json"], 0, {}),
        (["verify", "--all"], 0, {}),
        (["list", "--jsno"], 2, {}),
        (["list"], 2, {"BACKUP_ENCRYPTION_PASSWORD": "wrong"}),
        (["push"], 2, {"WALSHIP_SPOOL_DIR": ""}),
    ],
    ids=str,
)
def test_a_forked_command_is_the_installed_one(
    copy: Copy, words: list[str], code: int, changed: dict[str, str]
) -> None:
    environment = copy.rig.environment(WALSHIP_DESTINATIONS=f"file://{copy.local}", **changed)
    forked, installed = (
        commands.run(words, environment, copy.local, timeout=60, as_installed=as_installed)
        for as_installed in (False, True)
    )
    assert forked.returncode == code, forked.stderr
    assert (forked.stdout, forked.stderr, forked.returncode) == (
        installed.stdout, installed.stderr, installed.returncode,
    )  # fmt: skip


def test_key_rings_that_are_cheap_to_open_were_made_by_init(copy: Copy) -> None:
    """The cost stands in the ring."""
    (ring,) = (copy.root / "keys").glob("ring-*")
    assert re.findall(rb'"n": ?(\d+)', ring.read_bytes()) == [str(commands.SCRYPT_N).encode()]
