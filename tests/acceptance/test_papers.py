"""Every command block of README, docs/procedures.md and docs/runbook.md is executed as it stands.

On a throw-away machine (``tests.docs_commands``); what the blocks promise is looked at behind them.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import psycopg

from infra.demo.seaweed import Seaweed
from infra.postgres.processes import kill_tree
from infra.postgres.throwaway import free_port
from tests.docs_blocks import Block, bare, blocks_of
from tests.docs_commands import Machine
from tests.servers import NEWEST, programs

#: Blocks that are not run here, by their first line, and why.
NOT_RUN = {
    "make demo": "the demo has a test of its own (test_demo), and `make test` is what runs this",
    "/usr/bin/python3 -m venv /opt/walship && /opt/walship/bin/pip install -c constraints.lock .":
        "test_installed runs it, with other folders for /opt and /usr/local and without the network",
    "docker compose up --build --detach --wait":
        "needs a container engine; test_compose_runs plays it, with plain processes",
}  # fmt: skip
_LOST = ("Host lost", "Table dropped", "Bucket lost", "Disk filling", "Passphrase lost")
_PLANNED = (
    "Failover", "Clone", "Moving house: another bucket", "Moving house: another host", "Upgrade to a new major version",
)  # fmt: skip
_SETTINGS = """\
POSTGRES_HOST=127.0.0.1
WALSHIP_SPOOL_DIR=/var/spool/walship
WALSHIP_SOURCES=watch,stream
WALSHIP_DESTINATIONS=file:///var/backups/walship,s3://my-bucket/pg?region=eu-central-1
AWS_ACCESS_KEY_ID=...
AWS_SECRET_ACCESS_KEY=...
BACKUP_ENCRYPTION_ENABLED=true
BACKUP_ENCRYPTION_PASSWORD=...
"""
_SYNCHRONOUS = "ALTER SYSTEM SET synchronous_standby_names = 'walship'"
#: First line of a block, and what is done in its place.
Steps = Sequence[tuple[str, Callable[[Block], object]]]


class Reader:
    """Somebody who follows a document on a machine."""

    def __init__(self, it: Machine) -> None:
        self.it = it

    def walk(self, document: str, steps: Steps, headings: tuple[str, ...] = ()) -> None:
        """Every block (below those headings) in order: as it stands, or by the step that names its first line."""
        left = deque(steps)
        for block in blocks_of(document):
            if block.kind == "drawing" or block.first in NOT_RUN or (headings and block.heading not in headings):
                continue
            step = left.popleft()[1] if left and left[0][0] == block.first else self.it.play
            step(block)
        assert not left, f"{document} has no block that begins so: {left[0][0]}"

    def ship(self) -> None:
        """A cluster that is backed up, as README sets it up."""
        self.it.set(self.it.translate(_SETTINGS))
        self.it.sql("create table orders as select n, now() ordered_at from generate_series(1, 1000) n")
        self.it.sh("walship init; systemctl start walship; walship backup")

    def insert(self, number: int) -> None:
        self.it.sql(f"insert into orders values ({number}, now())")

    def now(self) -> str:
        ((moment,),) = self.it.sql("select clock_timestamp()::text")
        return str(moment)

    def count(self, port: int = 0) -> int:
        ((found,),) = self.it.sql("select count(*) from orders", port)
        return int(found)

    def answers(self, port: int) -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            return self.it.sql("select 1", port) == [(1,)]
        return False

    def healthy(self) -> bool:
        return bool(json.loads(self.it.sh("walship status --json 2>/dev/null"))["healthy"])

    def commits_wait(self) -> None:
        self.it.wait(lambda: self.it.sql("select sync_state from pg_stat_replication") == [("sync",)], "commits wait")


class Newcomer(Reader):
    """From an empty machine to drills; and then each command of the runbook."""

    def first_steps(self, block: Block) -> None:
        said = self.it.play(block)
        assert self.it.log().count('"event": "started"') == 1
        assert "safe" in said
        self.insert(1001)
        self.it.map |= dict.fromkeys(("10 minutes ago", "2026-11-23 12:00:00+00"), self.now())
        self.it.sql("delete from orders")
        self.it.sh("walship switch")

    def restored(self, block: Block) -> None:
        self.it.play(block)
        assert self.count(self.it.other_port) == 1001
        self.it.map["base_20260114_120000"] = self.it.backups()[-1]

    def streamed(self, block: Block) -> None:
        self.it.play(block)
        self.it.sh("systemctl restart walship")
        self.it.wait(lambda: self.it.sql("select 1 from pg_stat_replication where state = 'streaming'"), "it streams")

    def limited(self, block: Block) -> None:
        assert "max_slot_wal_keep_size" in self.it.sh("walship check")
        self.it.play(block)
        assert "max_slot_wal_keep_size" not in self.it.sh("walship check")

    def synchronous(self, block: Block) -> None:
        self.it.play(block)
        self.commits_wait()
        self.insert(1)

    def scheduled(self, block: Block) -> None:
        self.it.play(block)
        assert "Europe/Berlin" in self.it.sh("walship check")

    def look_up(self, done: set[str]) -> None:
        """Each command of the runbook that was not run before."""
        for block in blocks_of("docs/runbook.md"):
            for line in bare(block):
                if line not in done:
                    done.add(line)
                    # Nothing found is no failure.
                    self.it.sh(self.it.translate(line) + (" || test $? = 1" if "grep" in line else ""), what=str(block))


def test_readme_and_runbook(seaweed: Seaweed, s3_prefix: str) -> None:
    with Machine(seaweed, s3_prefix, NEWEST) as it:
        reader = Newcomer(it)
        it.sql("create table orders as select n, now() ordered_at from generate_series(1, 1000) n")
        steps = (
            ("walship init", reader.first_steps),
            ("install -d -o postgres -g postgres -m 700 /srv/restored", reader.restored),
            ("WALSHIP_SOURCES=watch,stream", reader.streamed),
            ("ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf();", reader.limited),
            (f"{_SYNCHRONOUS}; SELECT pg_reload_conf();", reader.synchronous),
            ("WALSHIP_SCHEDULE_FULL='30 2 * * *'", reader.scheduled),
            ("WALSHIP_SCHEDULE_FULL='30 2 * * 0'", reader.scheduled),
        )
        reader.walk("README.md", steps)
        reader.look_up({line for block in blocks_of("README.md") for line in bare(block)})


def test_what_is_not_run_is_there_and_all_else_is_run() -> None:
    assert NOT_RUN.keys() <= {block.first for block in blocks_of("README.md")}
    assert {block.heading for block in blocks_of("docs/procedures.md")} == {*_LOST, *_PLANNED}


class Sufferer(Reader):
    """Loses one thing after the other."""

    def host(self, block: Block) -> None:
        self.insert(1001)
        self.it.sh("walship switch")
        self.it.lose_host()
        self.it.play(block)
        assert self.count() == 1001

    def synchronous(self, block: Block) -> None:
        self.it.wait(self.healthy, "what the host had is copied back")
        self.it.play(block)
        self.commits_wait()
        self.it.map["2026-11-23 11:59:00+00"] = self.now()
        self.insert(1002)
        self.it.map["2026-11-23 11:59:30+00"] = self.now()
        self.it.sql("drop table orders")

    def too_early(self, block: Block) -> None:
        self.it.play(block)
        assert self.count(self.it.other_port) == 1001

    def in_time(self, block: Block) -> None:
        self.it.play(block)
        assert self.count(self.it.other_port) == 1002

    def brought_over(self, block: Block) -> None:
        self.it.play(block)
        assert self.count() == 1002
        assert not [path for path in self.it.folder.glob("srv/*") if path.name.startswith(("before", "orders"))]

    def bucket(self, block: Block) -> None:
        self.it.empty_bucket()
        self.it.wait(lambda: not self.healthy(), "it is noticed")
        self.it.play(block)

    def copied(self, block: Block) -> None:
        *first, verify = block.lines
        self.it.sh("\n".join(first))
        self.it.wait(self.healthy, "the bucket has been filled again")
        self.it.wait(lambda: len(set(self.it.records())) == 1, "so have the records of what was done")
        self.it.sh(verify)

    def everything(self, block: Block) -> None:
        self.it.empty_bucket()
        for path in (self.it.folder / "backups" / "walship").iterdir():
            shutil.rmtree(path)
        self.it.play(block)
        assert len(self.it.backups()) == 1

    def disk(self, block: Block) -> None:
        assert "reserved" in self.it.play(block)

    def passphrase(self, block: Block) -> None:
        self.it.sh("walship key new-identity restore.key >public; walship key add --recipient $(cat public)")
        self.it.set("BACKUP_ENCRYPTION_PASSWORD='nobody knows this one'")
        self.it.play(block)

    def begun_anew(self, block: Block) -> None:
        before = len(self.it.backups())
        self.it.play(block)
        assert len(self.it.backups()) == before + 1


def test_what_was_lost_comes_back(seaweed: Seaweed, s3_prefix: str) -> None:
    with Machine(seaweed, s3_prefix, NEWEST, archiving=True) as it:
        reader = Sufferer(it)
        reader.ship()
        steps = (
            ("walship list", reader.host),
            (f"psql -c \"{_SYNCHRONOUS}\" -c 'select pg_reload_conf()'", reader.synchronous),
            ("walship switch", reader.too_early),
            ("pg_ctl -D /srv/before stop", reader.in_time),
            ("pg_dump -p 5433 -t orders -f /srv/orders.sql", reader.brought_over),
            ("walship status", reader.bucket),
            ("walship init", reader.copied),
            ("walship init", reader.everything),
            ("walship status", reader.disk),
            ("walship key list", reader.passphrase),
            ("install -d -o postgres -g postgres -m 700 /var/backups/second", reader.begun_anew),
        )
        reader.walk("docs/procedures.md", steps, _LOST)


class Planner(Reader):
    """A failover, a clone, another bucket, another host, another version: one after the other."""

    def __init__(self, it: Machine, stack: ExitStack) -> None:
        super().__init__(it)
        self.second, self.port = it.folder / "srv" / "pg2", free_port()
        self.moved = it.folder / "srv" / "new"
        #: Where the old server has ended.
        self.checkpoint = ""
        self.stack = stack

    def two_servers(self, block: Block) -> None:
        self.it.sh(f"pg_basebackup -D {self.second} -R -c fast")
        self.it.configure(self.second, port=str(self.port))
        self.it.sh(f"pg_ctl -D {self.second} -w -l {self.second}.log start")
        self.it.environment["POSTGRES_PORT"] = f"{self.it.port},{self.port}"
        self.it.map |= {"=pg1,pg2": "=127.0.0.1,127.0.0.1", "psql -h pg2": f"psql -p {self.port}"}
        self.it.play(block)
        self.it.sh("systemctl restart walship")

    def promoted(self, block: Block) -> None:
        self.insert(1001)
        ((end,),) = self.it.sql("select pg_current_wal_lsn()::text")
        replayed = f"select pg_last_wal_replay_lsn() >= '{end}'"
        self.it.wait(lambda: self.it.sql(replayed, self.port) == [(True,)], "it is replayed")
        kill_tree(int((self.it.data_dir / "postmaster.pid").read_text("ascii").split()[0]))
        self.it.play(block)
        self.it.move(self.second, self.port)

    def cloned(self, block: Block) -> None:
        assert re.search(r"archive_mode *\| off", self.it.play(block))

    def another_bucket(self, block: Block) -> None:
        restart, *rest = block.lines
        self.it.sh(restart)
        self.it.wait(self.healthy, "the new destination has all")
        assert "Safe on this host only:" in self.it.sh("\n".join(rest))

    def standby(self, block: Block) -> None:
        """In a terminal of its own, on another machine: another directory here, and another port while both run."""
        self.on_machine(self.moved)
        self.it.map["--standby --start"] = f"--standby --start --port {self.it.other_port}"
        line = self.it.translate(block.text)
        words = self.it.translate(block.first).removeprefix("walship ")
        # Its own /var/backups is empty.
        there = self.it.translate("file:///var/backups/none,s3://my-bucket/new?region=eu-central-1")
        thread = threading.Thread(target=self.it.sh, args=(line,), kwargs={"WALSHIP_DESTINATIONS": there})
        thread.start()

        def end() -> None:
            """It has ended with the promotion, unless the test has failed before."""
            self.it.interrupt(words)
            thread.join(60)

        self.stack.callback(end)
        self.it.wait(lambda: self.answers(self.it.other_port), "the standby takes connections")
        self.insert(1002)

    def stopped(self, block: Block) -> None:
        self.on_machine(self.second)
        said = self.it.play(block)
        self.checkpoint = said.rpartition(" ")[2].strip()
        for place in (self.it.spool, self.it.folder / "backups" / "walship"):
            shutil.rmtree(place)  # the new machine has none of it

    def caught_up(self, block: Block) -> None:
        self.on_machine(self.moved)
        self.it.move(self.moved, self.it.other_port)
        past = f"select pg_last_wal_replay_lsn() > '{self.checkpoint}'"
        self.it.wait(lambda: self.it.sql(past) == [(True,)], "all that the old server wrote is there")
        self.it.play(block)
        assert self.count() == 1002

    def taken_over(self, block: Block) -> None:
        self.it.play(block)
        self.stack.close()
        self.it.move(self.moved, self.port)  # where the old one was: that of the restore was only for a time
        ((identifier,),) = self.it.sql("select system_identifier::text from pg_control_system()")
        self.it.map["7400000000000000000"] = identifier
        self.it.set("POSTGRES_HOST=127.0.0.1")
        self.it.environment["POSTGRES_PORT"] = str(self.port)

    def on_machine(self, data_dir: Path) -> None:
        """From now on that one's data directory is meant."""
        self.it.map["/var/lib/postgresql/18/main"] = str(data_dir)

    def upgraded(self, block: Block) -> None:
        self.it.map |= {
            "/usr/lib/postgresql/17/bin": str(programs(17)),
            "/usr/lib/postgresql/18/bin": str(programs(18)),
            "initdb -D": "initdb --wal-segsize=1 --no-sync -D",
            "/var/lib/postgresql/17/main": str(self.moved),
        }
        new = self.it.folder / "srv" / "18"
        self.on_machine(new)
        self.it.use(programs(18))
        self.it.play(block)
        self.it.configure(
            new, port=str(self.port), fsync="off", listen_addresses="127.0.0.1", archive_mode="on",
            unix_socket_directories=str(self.it.folder), archive_library="basic_archive",
            basic_archive__archive_directory=str(self.it.spool),
        )  # fmt: skip
        self.it.move(new, self.it.port)  # where the old one was

    def both(self, block: Block) -> None:
        ((identifier,),) = self.it.sql("select system_identifier::text from pg_control_system()")
        self.it.map["7500000000000000000"] = identifier
        self.it.use(programs(17))
        self.it.play(block)


def test_what_is_planned_goes_well(seaweed: Seaweed, s3_prefix: str) -> None:
    with Machine(seaweed, s3_prefix, 17, archiving=True) as it, ExitStack() as stack:
        reader = Planner(it, stack)
        reader.ship()
        steps = (
            ("POSTGRES_HOST=pg1,pg2", reader.two_servers),
            ("psql -h pg2 -c 'select pg_promote()'", reader.promoted),
            ("walship restore --target-dir /srv/staging --latest --start --port 5433", reader.cloned),
            ("systemctl restart walship", reader.another_bucket),
            ("walship restore --target-dir /var/lib/postgresql/18/main --standby --start", reader.standby),
            ("systemctl stop postgresql", reader.stopped),
            ("psql -c 'select pg_last_wal_replay_lsn()'", reader.caught_up),
            ("psql -c 'select pg_promote()'", reader.taken_over),
            ("cd /srv/", reader.upgraded),
            ("walship status --cluster 7500000000000000000", reader.both),
        )
        reader.walk("docs/procedures.md", steps, _PLANNED)
        assert reader.count() == 1002
        assert not list(it.folder.glob("srv/staging*"))
