"""A bucket that lost its keys is told of while another destination still has them: later is too late."""

from __future__ import annotations

import pytest

from tests.acceptance.conftest import Copy


@pytest.mark.parametrize("lost", ["ring-*", "data-*"])
def test_a_destination_without_keys_does_not_verify(copy: Copy, lost: str) -> None:
    gone = sorted((copy.root / "keys").glob(lost))
    assert gone
    for path in gone:
        path.unlink()
    good = f"file://{copy.shipped.local}"
    environment = copy.rig.environment(WALSHIP_DESTINATIONS=f"{good},file://{copy.local}")
    done = copy.rig.run("verify", expect=12, environment=environment)
    told = [line for line in done.stdout.splitlines() if line.startswith("missing: keys/")]
    assert {line.split()[1] for line in told} <= {f"keys/{path.name}" for path in gone}
    assert told
    assert all(f"at file://{copy.local}: " in line for line in told)
    assert f"file://{copy.shipped.local}: " not in done.stdout
