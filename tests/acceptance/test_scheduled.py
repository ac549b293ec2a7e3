"""A service with a schedule: it backs up and verifies by itself, and ends what it has started when it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator

import pytest

from infra.postgres import processes
from infra.postgres.throwaway import make_folder
from tests.rig import Rig
from tests.servers import NEWEST

#: So far away that only what has to be caught up runs.
FAR = {"WALSHIP_SCHEDULE_FULL": "0 0 29 2 *"}
#: Whether a base backup is being taken; and whether somebody is about to.
TAKEN = "select pid from pg_stat_progress_basebackup"
CLAIMED = "select pid from pg_stat_activity where application_name = 'walship_backup'"


@pytest.fixture
def rig() -> Iterator[Rig]:
    folder = make_folder("walship-s-")
    with Rig(folder, NEWEST, [f"file://{folder}/a"]) as made:
        yield made
    shutil.rmtree(folder)


def events(rig: Rig, name: str) -> list[dict[str, object]]:
    """Lines of the service's log with that event."""
    lines = [json.loads(line) for line in rig.service_log().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == name]


def test_a_schedule_is_kept_over_stops_and_kills(rig: Rig) -> None:
    rig.server.start()
    rig.run("init")
    rig.sql("create table t as select n from generate_series(1, 300000) n")

    # The first backup does not wait for February; stopped with the service, it is not over.
    service = rig.serve(**FAR, WALSHIP_BACKUP_RATE="500000")
    rig.wait(lambda: rig.sql(TAKEN) != [], "the first backup has begun")
    assert rig.stop(service) == 0
    assert rig.sql(TAKEN) + rig.sql(CLAIMED) == []
    (stopped,) = rig.json("history")
    assert (stopped["verb"], stopped["ok"], stopped["stopped"]) == ("backup", False, True)

    # Killed with what it had started, it leaves no word.
    service = rig.serve(**FAR, WALSHIP_BACKUP_RATE="500000")
    rig.wait(lambda: rig.sql(TAKEN) != [], "it has begun again")
    for pid in (service.pid, *processes._descendants(service.pid)):
        os.kill(pid, signal.SIGKILL)
    service.wait()
    rig.wait(lambda: rig.sql(CLAIMED) == [], "nothing of it is left")

    rig.extra |= {**FAR, "WALSHIP_SCHEDULE_VERIFY": "*/2 * * * * *", "WALSHIP_SCHEDULE_DRILL": "0 0 29 2 *"}
    service = rig.serve()
    rig.wait(lambda: bool(events(rig, "scheduled_done")), "something is done")
    rig.wait(lambda: any(e["verb"] == "verify" for e in events(rig, "scheduled_done")), "it is verified", 90)
    rig.wait(lambda: any(e["verb"] == "backup" for e in events(rig, "scheduled_done")), "it is backed up", 90)
    # It says when which is next, and so does a command.
    jobs = {each["job"]: each["next"] for each in rig.json("status")["schedule"]}
    assert [*jobs] == ["full", "verify", "drill"]
    assert jobs["full"] == jobs["drill"] == "2028-02-29T00:00:00+00:00"
    assert "next     full backup: 2028-02-29 00:00:00 UTC\n" in rig.run("status").stdout
    assert rig.stop(service) == 0
    done = {entry["verb"] for entry in rig.json("history") if entry["ok"]}
    assert done == {"backup", "verify"}
    assert len(rig.json("list")["backups"]) == 1


def test_a_schedule_that_makes_no_sense_is_refused_at_the_start(rig: Rig) -> None:
    for verb in ("run", "check"):
        environment = rig.environment(WALSHIP_SCHEDULE_DRILL="0 0 30 2 *")
        told = rig.run(verb, expect=2, environment=environment).stderr
        assert "WALSHIP_SCHEDULE_DRILL: '0 0 30 2 *' never runs" in told
        assert "hint: " in told
