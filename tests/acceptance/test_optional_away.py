"""A destination that is away, and not required: what a person waits for is the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest

from infra.postgres.throwaway import free_port, make_folder
from tests.rig import Rig
from tests.servers import NEWEST


@pytest.fixture
def rig() -> Iterator[Rig]:
    folder = make_folder("walship-o-")
    with Rig(folder, NEWEST, [f"file://{folder}/near"]) as made:
        made.server.start()
        made.run("init")
        yield made
    shutil.rmtree(folder)


def test_a_switch_waits_for_what_is_required_alone_and_names_the_other(rig: Rig) -> None:
    """As the page for the worst days has it: where a disk fills, what does not answer is left out."""
    near, dead = rig.destinations[0], f"s3://dead/p?endpoint=http://127.0.0.1:{free_port()}"
    rig.extra |= {
        "WALSHIP_DESTINATIONS": f"{near},{dead}",
        "WALSHIP_REQUIRED": near,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }
    rig.serve()
    done = rig.run("switch", "--json")
    told = json.loads(done.stdout)
    assert told["destinations"] == [near]
    assert "cannot be reached" in told["missing"]["s3://dead/p"]
    assert "not yet at s3://dead/p, which is not required: " in done.stderr
    assert list(rig.folder.glob(f"near/*/wal/*/{told['segment']}"))
