"""One round: a host with a server, a service and clients; its end; what S3 alone brings back."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psycopg

from infra.demo.seaweed import Seaweed
from infra.postgres.throwaway import free_port, make_folder
from tests.commands import Process
from tests.killtest.load import TABLE, Load, digest
from tests.killtest.plan import Plan, Trouble
from tests.killtest.verdict import Outcome
from tests.proxy import Mode, Proxy, Request
from tests.rig import Rig, WrongExitError, stop_started

#: Seconds before the kill whose PUTs say how long "one PUT" took then.
_RECENT = 5.0


def play(plan: Plan, seaweed: Seaweed, prefix: str, *, keep: bool = False) -> Outcome:
    """Play the round; what is wrong is in the outcome, and nothing is left but the bucket.

    ``keep``: leave the folder with the service's log and the restored cluster if something is wrong, and name it.
    """
    outcome = Outcome(plan)
    folder = make_folder("walship-kill-")
    try:
        with ExitStack() as stack:
            try:
                _Round(plan, seaweed, prefix, folder, stack, outcome).play()
            except (AssertionError, WrongExitError, psycopg.Error, subprocess.TimeoutExpired) as error:
                outcome.violations.append(f"{type(error).__name__}: {error}")
    finally:
        if keep and outcome.violations:
            outcome.violations.append(f"see {folder}")
        else:
            shutil.rmtree(folder)
    return outcome


class _Round:
    def __init__(
        self, plan: Plan, seaweed: Seaweed, prefix: str, folder: Path, stack: ExitStack, outcome: Outcome
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.outcome = outcome
        self.dice = random.Random(f"walship/{plan.seed}/{plan.number}/moments")
        self.store = stack.enter_context(Proxy(int(seaweed.endpoint.rpartition(":")[2]), http=True))
        self.direct = seaweed.url(prefix)
        through = self.direct.replace(seaweed.endpoint, f"http://127.0.0.1:{self.store.port}")
        encrypted = {"BACKUP_ENCRYPTION_ENABLED": "false", "BACKUP_ENCRYPTION_PASSWORD": ""}
        self.rig = stack.enter_context(
            Rig(
                folder, plan.major, [*([f"file://{folder}/local"] if plan.local else []), through],
                settings={**seaweed.environment, **({} if plan.encrypted else encrypted)},
                segment_mb=plan.segment_mb, sources=plan.sources,
            )
        )  # fmt: skip
        self.rig.server.start()
        self.postgres = stack.enter_context(Proxy(self.rig.server.port))
        self.load = Load(plan, self.rig.server.dsn(), folder)
        self.stack = stack

    def play(self) -> None:
        plan, rig = self.plan, self.rig
        rig.sql(TABLE)
        rig.run("init")
        self.store.to_client = plan.delay
        service = self._serve()
        if plan.synchronous:
            rig.synchronous()
        if not plan.backup_under_load:
            rig.json("backup")
        self.stack.enter_context(self.load)
        rig.wait(lambda: rig.sql("select count(*) > 0 from kept") == [(True,)], "clients commit")
        if plan.backup_under_load:
            rig.json("backup")
        service = self._trouble(service)
        if not plan.synchronous:
            rig.caught_up()  # the promise of one second is one for a service that runs, and a store that answers
        self._until_kill()
        kill = rig.destroy(service, first=lambda: self.store.turn(Mode.DOWN))
        acknowledged = self.load.acknowledged()
        self.outcome.puts = [put.seconds for put in _puts(self.store.requests) if put.seconds is not None]
        self.outcome.put = longest_put(self.store.requests, kill)
        self.outcome.judge(acknowledged, self._restored(), kill)
        if self.outcome.violations:
            self._note_requests(kill)

    def _serve(self) -> Process:
        service = self.rig.serve(POSTGRES_PORT=str(self.postgres.port))
        self.rig.wait(self.rig.streams, "the service streams")
        return service

    def _trouble(self, service: Process) -> Process:
        time.sleep(self.dice.uniform(0, 1))
        match self.plan.trouble:
            case Trouble.SERVICE_KILLED:
                service.kill()
                service.wait()
                service = self._serve()
            case Trouble.STORE_CUT:
                self.store.cut()
            case Trouble.STORE_BUSY:
                self.store.turn(Mode.BUSY)
                time.sleep(self.dice.uniform(0, 2))
                self.store.turn(Mode.PASS)
            case Trouble.STREAM_CUT:
                self.postgres.cut()
            case Trouble.NONE:
                pass
        return service

    def _until_kill(self) -> None:
        """Switches and checkpoints at random moments, up to the moment of the kill."""
        kill = time.monotonic() + self.plan.until_kill
        rates = {"select pg_switch_wal()": self.plan.switches, "checkpoint": self.plan.checkpoints}
        due = [
            (moment, statement)
            for statement, rate in rates.items()
            for moment in [
                self.dice.uniform(0, self.plan.until_kill) for _ in range(round(rate * self.plan.until_kill))
            ]
        ]
        for moment, statement in sorted(due):
            time.sleep(max(0.0, kill - self.plan.until_kill + moment - time.monotonic()))
            self.rig.sql(statement)
        time.sleep(max(0.0, kill - time.monotonic()))

    def _note_requests(self, kill: float) -> None:
        """For whoever looks what went wrong: what the store was asked, with the time in seconds to the kill."""
        lines = [
            f"{each.began - kill:9.3f} {each.seconds or 0:7.3f} {each.method} {each.path}{' cut' * each.failed}\n"
            for each in self.store.requests
        ]
        (self.folder / "requests").write_text("".join(lines), "utf-8")

    def _restored(self) -> set[tuple[int, int]]:
        """The rows that come back from S3 alone; what is wrong with them is noted."""
        rig, plan = self.rig, self.plan
        target, port = rig.target(), free_port()
        environment = rig.environment(WALSHIP_DESTINATIONS=self.direct)
        for name in ("WALSHIP_SOURCES", "WALSHIP_SPOOL_DIR"):
            environment.pop(name, None)
        words = ("restore", "--latest", "--from", self.direct, "--target-dir", str(target), "--start")
        began = time.monotonic()
        rig.run(*words, "--port", str(port), environment=environment)
        self.outcome.restore = time.monotonic() - began
        with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
            rows = connection.execute("select client, n, sha256(filler) from kept").fetchall()
            connection.execute("create extension amcheck")
            connection.execute("select bt_index_check('kept_pkey', true)")
        stop_started(target)
        wrong = [(client, n) for client, n, sha in rows if sha != digest(plan.seed, client, n, plan.longest)]
        if wrong:
            self.outcome.violations.append(f"{len(wrong)} rows are not what was written: {wrong[:5]}")
        return {(client, n) for client, n, _ in rows}


def _puts(requests: Sequence[Request]) -> list[Request]:
    """Those that carry WAL, finished or not."""
    return [each for each in requests if each.method == "PUT" and ("/tail/" in each.path or "/wal/" in each.path)]


def longest_put(requests: Sequence[Request], kill: float) -> float:
    """Seconds that "one PUT" took at the time of the kill, seen by the proxy before the store.

    From the first byte of the request to the last of the answer: the longest of those that were answered in the last
    five seconds, and of those that the kill has cut, with the time that they had taken by then.
    """
    seconds = [0.0]
    for put in _puts(requests):
        ended = kill if put.ended is None else min(put.ended, kill)
        if put.began < kill and (ended == kill or (ended > kill - _RECENT and not put.failed)):
            seconds.append(ended - put.began)
    return max(seconds)
