"""What a switch waits for: all WAL so far, at what is required; and what it does not: a destination that is away."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.throwaway import free_port, make_folder
from tests.proxy import Proxy
from tests.rig import Rig
from tests.servers import NEWEST


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

    # And so does a backup; what it tells last is where it is not. (A folder says at once that it is away.)
    gone = f"file://{rig.folder}/gone"
    began = time.monotonic()
    done = rig.run("backup", environment=rig.environment(WALSHIP_DESTINATIONS=f"{near},{gone}"))
    waited = time.monotonic() - began
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"not yet at {gone}, which is not required: ")
    assert last.endswith("`walship run` copies it there once it can")
    words = re.match(r"base_\S+: .* \(stored .*\) in (\d\.\d|\d{2,}) s\n", done.stdout)
    assert words
    assert waited / 10 < float(words[1]) < waited + 0.6, "it is what somebody has waited for, not the copying alone"


@pytest.mark.parametrize(("sources", "patience"), [("watch", ""), ("stream", ""), ("stream", "600")])
def test_a_switch_waits_for_what_its_segment_has_overtaken(
    sources: str, patience: str, seaweed: Seaweed, s3_prefix: str
) -> None:
    """``patience``: in which case the slot may be ahead of a destination that counts no more, and listings tell."""
    folder = make_folder("walship-o-")
    try:
        with (
            Proxy(int(seaweed.endpoint.rpartition(":")[2]), http=True) as store,
            Rig(
                folder, NEWEST, [seaweed.url(s3_prefix).replace(seaweed.endpoint, f"http://127.0.0.1:{store.port}")],
                settings=seaweed.environment | {"WALSHIP_WAL_TIMEOUT": "3", "WALSHIP_SYNC_TIMEOUT": patience},
                segment_mb=1, sources=sources,
            ) as rig,
        ):  # fmt: skip
            rig.server.start()
            rig.run("init")
            rig.serve()
            if sources == "stream":
                rig.wait(rig.streams, "the service streams")
            rig.json("switch")
            ((slow,),) = rig.sql("select pg_walfile_name(pg_current_wal_lsn())")
            store.held = f"/{slow}"
            rig.sql("create table t (n int); select pg_switch_wal()")
            rig.sql("create table u (n int)")
            done = rig.run("switch", expect=10)
            waits = f"{slow} is in the spool" if sources == "watch" else "the slot walship is at LSN "
            assert f" is safe, and earlier WAL is not: {waits}" in done.stderr
            store.held = ""  # first: who asks again behind the cut must not be held once more
            store.cut()
            rig.run("switch")
    finally:
        shutil.rmtree(folder)
