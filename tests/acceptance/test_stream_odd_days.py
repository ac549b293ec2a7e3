"""The stream, where nothing is wrong and something is odd: a clock that jumps, a spool that was faster."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from infra.settings import Settings
from infra.stored import Stored, look_at_stored
from infra.streaming import Streaming
from infra.wiring import Site, open_shipping, open_site
from pipeline.catalog import wal_key
from pipeline.wal import WalFile
from tests.acceptance.test_stream_bad_days import folder, local, restored, stack
from tests.acceptance.test_two_writers import events
from tests.rig import Rig

__all__ = ["folder", "local", "stack"]  # fixtures


_CLOCK = """
import sys, time
from datetime import timedelta
from infra.clock import SystemClock
now, began = SystemClock.now, time.monotonic()
SystemClock.now = lambda self: now(self) - timedelta(hours=3 if time.monotonic() - began > 2 else 0)
from infra.cli import main
main()
"""


def test_a_clock_that_jumps_back_holds_up_nothing(local: Rig, folder: Path) -> None:
    """Three hours back, after two seconds: what is due is asked of the clock that never jumps."""
    rig = local
    program = folder / "jumping.py"
    program.write_text(_CLOCK)
    rig.server.start()
    rig.sql("create table t (n int)")
    rig.run("init")
    service = rig.serve(str(program))
    rig.synchronous()
    rig.json("backup")
    end = time.monotonic() + 2
    n = 0
    while time.monotonic() < end:
        n += 1
        began = time.monotonic()
        rig.sql(f"insert into t values ({n})")
        assert time.monotonic() - began < 30, "a commit waits for the jump"
    assert not events(rig, "stream_lost")
    rig.stop(service, signal.SIGKILL)
    rig.server.kill9()
    assert restored(rig, "select max(n) from t")[0] == [(n,)]


# -- a start at the wrong moment


async def test_what_the_spool_has_stored_while_the_stream_begins_is_not_waited_for(
    local: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored after the listing, and before anybody counts what is stored: neither may miss it."""
    rig = local
    rig.server.start()
    rig.run("init")
    rig.sql("select pg_create_physical_replication_slot('walship', true)")
    ((segment,),) = rig.sql("select pg_walfile_name(pg_current_wal_lsn())")
    rig.sql("select pg_logical_emit_message(true, 'walship', 'x')")
    rig.sql("select pg_switch_wal()")
    file = WalFile.parse(segment)
    assert file is not None
    values: dict[str, Any] = {**rig.extra, **rig.server.environment()}
    settings = Settings(**values)
    async with open_site(settings, writer=True) as site, open_shipping(site) as shipping:
        stream = Streaming(site, shipping, epoch=1)
        site.notify.append(stream.heard)

        async def look_and_be_late(site: Site) -> Stored:
            found = await look_at_stored(site)
            await shipping.service.ship(wal_key(file), (rig.server.data_dir / "pg_wal" / segment).read_bytes())
            return found

        monkeypatch.setattr("infra.streaming.look_at_stored", look_and_be_late)
        work = [asyncio.create_task(shipping.uploader.run()), asyncio.create_task(stream.run())]
        reached = 0
        deadline = time.monotonic() + 60
        while reached < file.end(1 << 20) and time.monotonic() < deadline:
            assert not any(task.done() for task in work)
            await asyncio.sleep(0.05)
            reached = min(stream.receiver.durable.reached().values()) if stream.receiver.durable else 0
        for task in work:
            task.cancel()
        await asyncio.wait(work)
    assert reached >= file.end(1 << 20)
