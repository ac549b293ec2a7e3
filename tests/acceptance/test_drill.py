"""``walship drill``: what it proves, what it refuses, and that nothing of it is left however it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.cli.answering import repository_of
from infra.drill import Order, drill
from infra.drill_room import end_server, sweep
from infra.postgres.processes import _alive, give, run_as
from infra.postgres.throwaway import make_folder
from infra.postgres.wal_script import CONTEXT, FOLDER
from infra.restore import Watch
from infra.settings import Settings
from infra.wiring import open_site
from pipeline.errors import RecoveryError
from pipeline.targets import Target
from tests.acceptance.conftest import Shipped
from tests.drills import new_report
from tests.rig import PASSPHRASE, Rig
from tests.servers import SERVER_VERSIONS

OLDEST = SERVER_VERSIONS[0]


@pytest.fixture
def work() -> Iterator[Path]:
    """An empty folder for drills, which has to be empty in the end as well."""
    folder = make_folder("walship-d-")
    yield folder
    left = [path.name for path in folder.iterdir() if path.name.startswith("walship-drill-")]
    shutil.rmtree(folder)
    assert not left, "the drill has left something"


def write(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


def rehearse(rig: Rig, work: Path, *words: str, expect: int = 0) -> tuple[dict[str, Any], str, str]:
    """The report as JSON and as Markdown, and what was said meanwhile."""
    reports = work / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    done = rig.run("drill", "--work-dir", str(work), "--report", str(reports), "--json", *words, expect=expect)
    (path,) = reports.glob("*.json")
    report = json.loads(path.read_text("utf-8"))
    if report["error"] is None:
        assert json.loads(done.stdout) == report
    else:
        assert json.loads(done.stdout)["error"]["fact"] == report["error"]["fact"]
    return report, path.with_suffix(".md").read_text("utf-8"), done.stderr


def test_a_drill_needs_nothing_but_the_repository(shipped: Shipped, work: Path) -> None:
    """The server that was backed up is not even running."""
    checks = write(
        work / "checks.sql",
        f"-- name: rows\n-- expect: {shipped.rows}\nSELECT count(*) FROM t;\n"
        "-- name: nothing is doubled\n-- expect: true\nSELECT count(*) = count(DISTINCT n) FROM t;\n"
        "-- name: it can be written to\nINSERT INTO t VALUES (-1, 'drill; ok');\n",
    )
    report, markdown, _ = rehearse(shipped.rig, work, "--check", checks)
    assert report["verdict"] == "passed"
    assert [check["state"] for check in report["checks"]] == ["passed"] * 4
    assert report["plan"]["backup"] == shipped.backup
    assert report["server_version"].startswith("18")
    # The last commit was just before ``end``, and the report says how long that was before the drill.
    assert report["newest_commit"] < shipped.end.isoformat()
    assert 0 < report["rpo_seconds"] < 3600
    steps = {step["name"]: step["seconds"] for step in report["steps"]}
    assert 0 < report["rto_seconds"] <= sum(steps.values()) - steps["check"] + 1
    assert report["read"][0]["objects"] > 5
    assert report["conclusion"].endswith("and all 4 checks passed.")
    assert f"**{report['conclusion']}**" in markdown
    assert "| rows | passed | postgres |" in markdown


def test_a_wrong_expectation_fails_and_says_what_was_found(shipped: Shipped, work: Path) -> None:
    checks = write(
        work / "checks.sql",
        "-- name: none\n-- expect: 0\nSELECT count(*) FROM t;\n"
        "-- name: no such table\nSELECT 1 FROM nowhere;\n"
        "-- name: slow\n-- timeout: 0.1\nSELECT pg_sleep(60);\n"
        "-- name: elsewhere\n-- database: shop\nSELECT 1;\n"
        "-- database: postgres\n-- expect: 1\nSELECT 1;\n",
    )
    report, markdown, said = rehearse(shipped.rig, work, "--check", checks, "--skip-amcheck", expect=12)
    assert report["verdict"] == "failed"
    assert [check["state"] for check in report["checks"]] == ["not run", *["failed"] * 4, "passed"]
    assert [check["found"] for check in report["checks"][1:4]] == [
        str(shipped.rows),
        'relation "nowhere" does not exist',
        "canceling statement due to statement timeout",
    ]
    assert 'database "shop" does not exist' in report["checks"][4]["found"]
    assert f"walship: 4 of 6 checks failed; none: expected 0, found {shipped.rows}" in said
    assert f"| none | **failed** | postgres | 0 | {shipped.rows} |" in markdown


def test_a_target_that_cannot_be_reached(shipped: Shipped, work: Path) -> None:
    report, markdown, said = rehearse(shipped.rig, work, "--to-time", "2020-01-01 00:00:00+00", expect=13)
    assert report["verdict"] == "failed"
    assert report["rto_seconds"] is None
    assert "could NOT be brought back to time 2020-01-01" in report["conclusion"]
    assert "the earliest that can be reached is" in markdown
    assert "report: " in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--check", "bad.sql"), "bad.sql:2: expects: is not known"),
        (("--from", "file:///nowhere"), "--from file:///nowhere is no destination"),
        (("--work-dir", "missing"), "a drill cannot make a folder in"),
        (("--backup", "base_20200101_000000"), "base_20200101_000000"),
    ],
)
def test_bad_input(shipped: Shipped, work: Path, words: tuple[str, ...], said: str) -> None:
    write(work / "bad.sql", "-- name: a\n-- expects: 1\nSELECT 1;\n")
    changed = [str(work / word) if word in ("bad.sql", "missing") else word for word in words]
    done = shipped.rig.run(
        "drill", "--work-dir", str(work), "--report", str(work), *changed, expect=13 if "--backup" in words else 2
    )
    assert said in done.stderr


async def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(
    shipped: Shipped, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def small(path: Any) -> os.statvfs_result:
        values = list(real(path))
        values[4] = 100  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", small)
    wanted = Settings(
        WALSHIP_DESTINATIONS=f"file://{shipped.local}", BACKUP_ENCRYPTION_ENABLED=True,
        BACKUP_ENCRYPTION_PASSWORD=PASSPHRASE, _env_file=None,
    )  # fmt: skip
    report = new_report()
    order = Order(Target(), work_dir=work, bin_dir=shipped.rig.bin_dir)
    async with open_site(wanted) as site:
        with pytest.raises(RecoveryError, match="of room, and the restore needs about"):
            await drill(repository_of(site, allow_unencrypted=False), order, report, Watch())
    assert [name for name, _ in report.steps] == ["make the plan"]


class Sleeping:
    """A drill that has come as far as a check which takes minutes."""

    def __init__(self, rig: Rig, work: Path, *words: str) -> None:
        checks = write(work / "sleep.sql", "SELECT pg_sleep(600);")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "infra.cli", "drill", "--skip-amcheck", "--work-dir", str(work), "--report",
             str(work), "--check", checks, *words],
            env=rig.environment(), cwd=rig.folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            self.said = self._until_it_sleeps()
            (self.folder,) = (path for path in work.glob("walship-drill-*") if self._ours(path))
            self.server = int((self.folder / "data" / "postmaster.pid").read_text("utf-8").splitlines()[0])
            assert _alive(self.server)
        except BaseException:
            self.end(signal.SIGKILL)
            raise

    def _until_it_sleeps(self) -> list[str]:
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if line.startswith("check line 1"):
                return said
        pytest.fail("".join(said))

    def _ours(self, folder: Path) -> bool:
        marker = folder / "drill.json"
        return marker.exists() and json.loads(marker.read_text("utf-8"))["pid"] == self.process.pid

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(30)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


def test_after_an_interrupt_nothing_is_left(shipped: Shipped, work: Path) -> None:
    sleeping = Sleeping(shipped.rig, work)
    assert sleeping.end(signal.SIGINT) == 130
    assert not _alive(sleeping.server)
    assert not sleeping.folder.exists()


def test_what_a_killed_drill_has_left_is_removed_by_the_next_one_and_nothing_else(shipped: Shipped, work: Path) -> None:
    others = [work / "walship-drill-mine0000", work / "walship-drill-mine", work / "walship-drill-mine1111"]
    for folder in others:
        folder.mkdir()
    write(others[1] / "drill.json", '{"walship_drill": 1, "pid": 1, "started": "0"}')
    write(others[2] / "drill.json", '{"walship_drill": 2, "pid": 1, "started": "0"}')
    killed = Sleeping(shipped.rig, work)
    killed.end(signal.SIGKILL)
    shipped.rig.wait(lambda: not _alive(killed.server), "the server has ended with its drill")
    assert killed.folder.exists()
    living = Sleeping(shipped.rig, work)
    assert not killed.folder.exists()
    assert sweep(work) == [], "a drill that still runs keeps its own"
    assert living.end(signal.SIGTERM) == 143
    assert all(folder.exists() for folder in others)
    assert str(killed.folder) in "".join(living.said)
    for folder in others:
        shutil.rmtree(folder)


def test_a_kept_drill_says_where_it_is(shipped: Shipped, work: Path) -> None:
    _, _, said = rehearse(shipped.rig, work, "--skip-amcheck", "--keep")
    (folder,) = work.glob("walship-drill-*")
    try:
        assert f"kept: {folder}" in said
        assert f"psql -h {folder}/sockets -p " in said
        assert not (folder / "data" / FOLDER / CONTEXT).exists(), "nothing that opens the repository is left there"
        assert sweep(work) == [], "the next drill leaves it alone"
    finally:
        end_server(folder / "data")
        shutil.rmtree(folder)


def test_a_missing_pg_amcheck_is_no_pass(shipped: Shipped, work: Path) -> None:
    installation = work / "installation"
    (installation / "bin").mkdir(parents=True)
    for program in shipped.rig.bin_dir.iterdir():
        if program.name != "pg_amcheck":
            (installation / "bin" / program.name).symlink_to(program)
    (installation / "lib").symlink_to(shipped.rig.bin_dir.parent / "lib")
    installation.chmod(0o755)
    environment = shipped.rig.environment(WALSHIP_PG_BIN_DIR=str(installation / "bin"))
    words = ("drill", "--work-dir", str(work), "--report", str(work), "--json")
    done = shipped.rig.run(*words, expect=10, environment=environment)
    report = json.loads(done.stdout)
    assert report["verdict"] == "incomplete"
    assert report["conclusion"].endswith("0 checks passed, NOT RUN: pg_amcheck.")
    assert "has no pg_amcheck" in report["checks"][0]["found"]
    assert "--skip-amcheck" in done.stderr


def test_another_machine_and_pages_that_were_damaged_at_the_source(work: Path) -> None:
    """On the oldest version. Without checksums a base backup holds such pages as they are, and a restore too.

    The source has more memory than the drill's machine, and its settings lie outside its data directory, as on Debian.
    """
    settings = write(
        work / "settings.sql",
        "-- expect: 137\nSELECT current_setting('max_connections')::int;\n"
        "-- expect: ''\nSELECT current_setting('listen_addresses');\n"
        "-- expect: off\nSELECT current_setting('archive_mode');\n"
        "-- expect: 0\nSELECT current_setting('max_logical_replication_workers')::int;\n"
        "-- database: shop\n-- expect: 500\nSELECT count(*) FROM t;\n"
        "-- expect: 3\nSELECT count(*) FROM in_tablespace;\n"
        '-- name: libraries\n-- expect: \'"pg_stat_statements", "pg_prewarm"\'\n'
        "SELECT current_setting('shared_preload_libraries');\n"
        # pg_prewarm's runs in every server that loads it.
        "-- name: workers\n"
        "COPY (SELECT 1) TO PROGRAM 'for one in /proc/[0-9]*; do"
        ' [ "$(readlink $one/cwd)" = "$PWD" ] && grep -q autoprewar[m] $one/cmdline && exit 1; done; exit 0\';\n',
    )
    folder = make_folder("walship-a-")
    # Above the default, or its absence would not be noticed; and who connects is told in the log.
    limits = {"max_connections": "137", "log_connections": "on"}
    try:
        with Rig(folder, OLDEST, [f"file://{folder}/local"], server_settings=limits) as rig:
            server, conf = rig.server, folder / "postgresql.conf"
            server.run("pg_checksums", "--disable", "-D", str(server.data_dir))
            server.start()
            rig.sql("create database shop")
            rig.sql("create table t as select n, repeat('x', 200) as x from generate_series(1, 500) n", dbname="shop")
            place = folder / "tablespace"
            place.mkdir()
            give(place, run_as())
            rig.sql(f"create tablespace elsewhere location '{place}'")
            rig.sql("create table in_tablespace tablespace elsewhere as values (1), (2), (3)", dbname="shop")
            ((path,),) = rig.sql("select pg_relation_filepath('t')", dbname="shop")
            rig.run("init")
            rig.sql("alter system set shared_buffers = '300GB'")
            rig.sql("alter system set shared_preload_libraries = 'pg_cron', 'pg_stat_statements', 'pg_prewarm'")
            rig.json("backup")
            rig.json("switch")
            connections = server.log(1 << 20).count("connection received")
            report, _, _ = rehearse(rig, work, "--check", settings)
            assert report["server_version"].startswith(str(OLDEST))
            assert server.log(1 << 20).count("connection received") == connections, "nobody asks the source"
            rig.sql("alter system set shared_preload_libraries = 'not_installed_here'")
            rig.json("backup")
            report, markdown, _ = rehearse(rig, work, "--keep", expect=13)
            (kept,) = work.glob("walship-drill-*")
            assert (kept / "server.log").exists()
            assert not (kept / "data" / FOLDER / CONTEXT).exists(), "nothing that opens the repository is left there"
            shutil.rmtree(kept)
            assert 'could not access file "not_installed_here"' in report["server_log"]
            assert "--force" not in report["error"]["hint"], "its directory is gone"
            assert "    " + report["server_log"].splitlines()[-1] in markdown
            rig.sql("alter system reset all")
            server.stop()
            with (server.data_dir / path).open("r+b") as relation:
                relation.seek(8192 + 8192 - 232)  # the header of the first row in the second page
                relation.write(b"\xff" * 24)
            (server.data_dir / "postgresql.conf").rename(conf)
            server.start({"config_file": str(conf)})
            rig.json("backup")
            rig.json("switch")
            server.stop()
            report, markdown, said = rehearse(rig, work, "--check", settings, expect=12)
            assert [check["state"] for check in report["checks"][:5]] == ["failed", *["passed"] * 4]
            assert "shop" in report["checks"][0]["found"]
            assert "of 9 checks FAILED: pg_amcheck" in markdown
            assert "of 9 checks failed; pg_amcheck: expected" in said
    finally:
        shutil.rmtree(folder)
