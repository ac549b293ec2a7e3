"""The store goes away, or the restore is killed, while a restored server replays across two changes of timeline.

What must never come of it is a server that is promoted with less than was asked for, or one that is left running
without anybody who knows of it. The store goes silent with the request for one chosen segment, so the server has
replayed the ones before it and waits: that is when it is struck.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.throwaway import make_folder
from tests.acceptance.test_restore_bad_input import fingerprint
from tests.ambushed import Attack, House, made
from tests.integration.test_recovery_rules import runnable_by_the_server
from tests.proxy import Mode
from tests.rig import Rig, stop_started
from tests.servers import NEWEST

#: Attacks at once.
_WIDTH = 4
_REST = "the directory holds half replayed data now: run the same restore again with --force"


@pytest.fixture
def house(seaweed: Seaweed, s3_prefix: str) -> Iterator[House]:
    with ExitStack() as stack:
        folder = make_folder("walship-r-")
        stack.callback(shutil.rmtree, folder)
        # A standby asks every 5 s for what was not there.
        rig = stack.enter_context(
            Rig(
                folder, NEWEST, [seaweed.url(s3_prefix)], settings=seaweed.environment,
                server_settings={"wal_retrieve_retry_interval": "200ms"},
            )
        )  # fmt: skip
        house = House(rig, seaweed, s3_prefix)
        made(rig, house)
        yield house


def comes_back_in_time(house: House, mode: Mode) -> None:
    """The restore goes on as if nothing had been."""
    with Attack(house, f"back-{mode.value}") as attack:
        process = attack.struck_at(6, "--latest")
        if mode is Mode.STALL:
            attack.store.strike(mode)
            time.sleep(0.5)
            attack.store.relent()
        else:  # one attempt was cut, and four more fail, whosever they are: there are six
            attack.store.strike(mode, refusals=4)
        assert process.wait(60) == 0, attack.said
        assert attack.store.mode is Mode.PASS
        assert json.loads(attack.out.read_text())["state"] == "in production"
        assert attack.rows() == house.all


def does_not_come_back(house: House) -> None:
    """Recovery stops where it is, and the message says why and what to do; that works once the store is back."""
    with Attack(house, "gone") as attack:
        process = attack.struck_at(6, "--latest")
        attack.store.strike(Mode.DOWN)
        assert process.wait(60) == 11, attack.said
        attack.check_refused(house.segments[6], "the store cannot be reached", _REST)
        attack.check_stopped()
        left = fingerprint(attack.target)
        attack.run("--force", expect=11)
        assert fingerprint(attack.target) == left, "what cannot be replaced is left alone"
        attack.store.relent()
        attack.run("--force")
        assert attack.rows() == house.all


def gone_from_a_standby(house: House) -> None:
    """While it catches up, that ends it; once it follows, it waits, for others read there. That it ended is said."""
    with Attack(house, "standby") as attack:
        process = attack.struck_at(6, "--standby")
        attack.store.strike(Mode.BUSY)
        assert process.wait(60) == 11, attack.said
        attack.check_refused(house.segments[6], "answered 503 SlowDown", _REST)
        attack.check_stopped("standby.signal")
        attack.store.relent()
        process = attack.begin("--standby", "--delta")
        attack.rig.wait(lambda: "follows timeline 3" in attack.said or process.poll() is not None, "it follows")
        assert attack.rows() == house.all
        attack.store.strike(Mode.DOWN)
        attack.rig.wait(
            lambda: "the standby waits for 0000000" in attack.said, "it was asked for what is not there yet"
        )
        assert attack.rows() == house.all, "whoever reads there goes on reading"
        attack.store.relent()
        attack.rig.wait(lambda: "the standby goes on: the store has answered" in attack.said, "it has noticed")
        assert process.poll() is None
        os.kill(int((attack.target / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
        assert process.wait(60) == 13, attack.said
        again = f"started again as its owner, with pg_ctl -D {attack.target} -o '-p {attack.port}' start, it goes on"
        attack.check_refused("the standby has ended: ", again, kind="RecoveryError")


def interrupted(house: House) -> None:
    """Nobody else knows of the server, so it is stopped; and the person is told what lies there now."""
    with Attack(house, "interrupted") as attack:
        process = attack.struck_at(6, "--latest")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert f"note: the server is stopped again; {_REST}" in attack.said
        attack.check_stopped(state="shut down in recovery")
        attack.store.relent()
        attack.run("--delta")
        assert attack.rows() == house.all


def killed_with_the_store(house: House) -> None:
    """Neither the restore nor the store is there any more: the server cannot know what is behind, and ends."""
    with Attack(house, "lost") as attack:
        process = attack.struck_at(6)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        attack.store.strike(Mode.DOWN)
        attack.settled()
        attack.check_stopped(fed=True)
        attack.store.relent()
        assert "is not empty" in attack.run(expect=13).stderr
        attack.run("--force")
        assert attack.rows() == house.all


def killed_alone(house: House) -> None:
    """The store is there: the server gets the WAL by itself to the very end, or it stops if its user cannot."""
    with Attack(house, "alone") as attack:
        words, rows = ("--to-lsn", house.lsns[9]), house.up_to(9)
        process = attack.struck_at(8, *words)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        # It fetches for itself, and the store says nothing to that either.
        done = house.rig.run(*attack.words(*words), expect=13)
        if "is not empty" not in done.stderr:
            pid = int((attack.target / "postmaster.pid").read_text().split()[0])
            assert f"{attack.target} belongs to a running server, process {pid}\nhint: stop it first" in done.stderr
        assert (attack.target / "recovery.signal").exists()
        attack.store.relent()
        attack.settled()
        if (attack.target / "recovery.signal").exists():
            assert not runnable_by_the_server()
            attack.check_stopped(fed=True)
        else:
            assert attack.rows() == rows
            assert "belongs to a running server, process " in attack.run(*words, "--delta", expect=13).stderr
            stop_started(attack.target)
        attack.run(*words, "--delta")
        assert attack.rows() == rows


def undisturbed(house: House, name: str, rows: list[int], *words: str) -> None:
    with Attack(house, name) as attack:
        attack.run(*words)
        assert attack.rows() == rows


def test_a_restore_ends_whole_or_stops_unpromoted_whatever_is_done_to_it(house: House) -> None:
    """All attacks on one repository, some of them at a time: most of each is waiting for a store that is not there."""
    beyond = house.forks[2] + 1
    other = [*house.up_to(house.forks[2]), house.left[2]]
    attacks: dict[str, Callable[[], None]] = {
        "killed with the store": lambda: killed_with_the_store(house),
        "killed alone": lambda: killed_alone(house),
        "gone from a standby": lambda: gone_from_a_standby(house),
        "does not come back": lambda: does_not_come_back(house),
        "comes back after silence": lambda: comes_back_in_time(house, Mode.STALL),
        "comes back after resets": lambda: comes_back_in_time(house, Mode.DOWN),
        "interrupted": lambda: interrupted(house),
        "to a time": lambda: undisturbed(house, "time", house.up_to(beyond), "--to-time", house.times[beyond]),
        "another timeline": lambda: undisturbed(house, "other", other, "--latest", "--timeline", "2"),
    }
    with ThreadPoolExecutor(_WIDTH) as pool:
        under_way = {name: pool.submit(attack) for name, attack in attacks.items()}
    failed = []
    for name, attack in under_way.items():
        if (error := attack.exception()) is not None:
            error.add_note(f"in: {name}")
            failed.append(error)
    if failed:
        raise BaseExceptionGroup("attacks that did not end well", failed)
