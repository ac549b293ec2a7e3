"""What people get wrong, and what breaks under them: message, exit code, and what was safe before still is."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import free_port, make_folder
from tests.acceptance.conftest import Copy
from tests.rig import Rig
from tests.servers import NEWEST


@pytest.fixture
def folder() -> Iterator[Path]:
    made = make_folder("walship-b-")
    yield made
    shutil.rmtree(made)


@pytest.fixture
def rig(folder: Path) -> Iterator[Rig]:
    """A server that runs, and a repository that was just made."""
    with Rig(folder, NEWEST, [f"file://{folder}/local"]) as made:
        made.server.start()
        made.run("init")
        made.sql("create table t (n int)")
        yield made


def archive_some(rig: Rig, count: int = 3) -> list[str]:
    """Let PostgreSQL archive that many segments into the spool, then stop it. Their names."""
    for _ in range(count):
        rig.sql("insert into t select generate_series(1, 100)")
        rig.sql("select pg_switch_wal()")
    rig.wait(lambda: len(rig.spooled()) >= count, "archived")
    rig.server.stop()
    return rig.spooled()


def stored(rig: Rig) -> set[str]:
    return {path.name for path in (rig.folder / "local").glob("*/wal/*/*")}


# -- settings


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"WALSHIP_DESTINATION": "file:///x"}, "there is no setting WALSHIP_DESTINATION"),
        ({"WALSHIP_DESTINATIONS": ""}, "WALSHIP_DESTINATIONS is not set"),
        ({"WALSHIP_DESTINATIONS": "ftp://x/y"}, "ftp://x/y is no destination"),
        ({"WALSHIP_DESTINATIONS": "s3://bucket/p?reigon=x"}, "reigon"),
        ({"WALSHIP_REQUIRED": "s3://other"}, "WALSHIP_REQUIRED names s3://other, which is no destination"),
        ({"WALSHIP_COMPRESSION": "rar"}, "WALSHIP_COMPRESSION"),
        ({"BACKUP_ENCRYPTION_ALGORITHM": "rot13"}, "BACKUP_ENCRYPTION_ALGORITHM"),
        ({"BACKUP_ENCRYPTION_PASSWORD": ""}, "BACKUP_ENCRYPTION_PASSWORD (or its _FILE) is empty"),
        ({"BACKUP_ENCRYPTION_PASSWORD_FILE": "/nowhere"}, "BACKUP_ENCRYPTION_PASSWORD"),
        ({"POSTGRES_PORT": "five"}, "POSTGRES_PORT"),
        ({"WALSHIP_SPOOL_DIR": ""}, "WALSHIP_SPOOL_DIR is not set"),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else None,
)
def test_a_wrong_setting_is_named(copy: Copy, changed: dict[str, str], said: str) -> None:
    environment = {**copy.rig.environment(), **changed}
    done = copy.rig.run("push", expect=2, environment=environment)
    assert said in done.stderr
    assert "hint:" in done.stderr
    assert "correct horse" not in done.stderr + done.stdout


def test_init_makes_no_repository_with_a_placeholder_for_its_passphrase(rig: Rig) -> None:
    """Before it, check misses the repository and nothing else, so it may come first."""
    second = f"file://{rig.folder}/second"
    (rig.folder / "second").mkdir()
    found = rig.run("check", expect=2, environment=rig.environment(WALSHIP_DESTINATIONS=second)).stdout
    assert [line for line in found.splitlines() if "ERROR" in line and "there is no repository" not in line] == []
    weak = rig.environment(WALSHIP_DESTINATIONS=second, BACKUP_ENCRYPTION_PASSWORD="...")
    assert "BACKUP_ENCRYPTION_PASSWORD is a placeholder" in rig.run("init", environment=weak, expect=2).stderr
    assert not [path for path in (rig.folder / "second").rglob("*") if path.is_file()]
    weak["BACKUP_ENCRYPTION_PASSWORD"] = "hunter2"
    assert "WARNING: the passphrase has 7 characters" in rig.run("init", environment=weak).stderr
    assert rig.run("init").stderr == "", "a good one is no matter"


def test_a_mistyped_command_is_a_wrong_setting_too(copy: Copy) -> None:
    assert "No such option" in copy.run("list", "--jsno", expect=2).stderr
    said = copy.run("backpu", expect=2).stderr
    assert "No such command 'backpu'. Did you mean 'backup'?" in said
    assert "Did you mean" not in copy.run("qqqq", expect=2).stderr


def test_settings_come_from_a_dotenv_file_as_well(copy: Copy, folder: Path) -> None:
    environment = copy.rig.environment(WALSHIP_DESTINATIONS=f"file://{copy.local}")
    lines = [f"{name}={environment.pop(name)}" for name in list(environment) if name.startswith(("WALSHIP", "BACKUP"))]
    (folder / ".env").write_text("\n".join(lines))
    assert copy.rig.run("list", environment=environment, expect=2).stderr, "without the file nothing is set"
    rig_folder, copy.rig.folder = copy.rig.folder, folder
    try:
        assert copy.shipped.backup in copy.rig.run("list", environment=environment).stdout
        (folder / ".env").write_text("\n".join([*lines, "WALSHIP_SPOLDIR=/x"]))
        assert "there is no setting WALSHIP_SPOLDIR" in copy.rig.run("list", environment=environment, expect=2).stderr
    finally:
        copy.rig.folder = rig_folder


# -- PostgreSQL


def test_postgresql_unreachable(rig: Rig) -> None:
    for words in (["init"], ["backup"], ["switch"]):
        environment = rig.environment(POSTGRES_PORT=str(free_port()))
        done = rig.run(*words, expect=10, environment=environment)
        assert "cannot be reached" in done.stderr
        assert "hint: is it running" in done.stderr
    assert rig.json("list")["backups"] == []


def test_a_role_without_replication(rig: Rig) -> None:
    rig.sql("create role plain login")
    environment = rig.environment(POSTGRES_USERNAME="plain")
    done = rig.run("backup", expect=10, environment=environment)
    assert "the role plain has no REPLICATION right" in done.stderr
    assert 'ALTER ROLE "plain" REPLICATION;' in done.stderr
    assert "REPLICATION" in rig.run("check", expect=10, environment=environment).stdout
    assert rig.json("list")["backups"] == []


def test_archiving_is_off(rig: Rig) -> None:
    rig.server.stop()
    rig.server.start({"archive_mode": "off"})
    for words in (["backup"], ["switch"], ["check"]):
        done = rig.run(*words, expect=10)
        assert "archive_mode is off: PostgreSQL hands over no WAL" in done.stderr + done.stdout
        assert "set archive_mode = on and restart the server" in done.stderr + done.stdout
    assert rig.json("list")["backups"] == []


def test_a_backup_whose_wal_never_comes_is_none(rig: Rig) -> None:
    """Archiving goes elsewhere: the backup must not be listed, and the message has to say what is missing."""
    elsewhere = rig.folder / "elsewhere"
    elsewhere.mkdir()
    give(elsewhere, run_as())
    rig.sql(f"alter system set basic_archive.archive_directory = '{elsewhere}'")
    rig.sql("select pg_reload_conf()")
    environment = rig.environment(WALSHIP_WAL_TIMEOUT="2", POSTGRES_CONNECTION_MODE="docker")
    done = rig.run("backup", expect=10, environment=environment)
    assert "has not arrived at" in done.stderr
    assert "no backup was made" in done.stderr
    assert rig.json("list")["backups"] == []


# -- stores


def test_a_bucket_that_is_missing_or_refuses(rig: Rig, seaweed: Seaweed) -> None:
    names = archive_some(rig)
    nowhere = free_port()
    for changed, fact, hint in (
        (
            {"WALSHIP_DESTINATIONS": seaweed.url("p", bucket="no-such-bucket")},
            "s3://no-such-bucket at",
            "create the bucket, or correct the destination",
        ),
        (
            {"WALSHIP_DESTINATIONS": seaweed.url("p"), "AWS_SECRET_ACCESS_KEY": "wrong"},
            "the secret key does not match the access key (SignatureDoesNotMatch)",
            "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
        (
            {"WALSHIP_DESTINATIONS": seaweed.url("p"), "AWS_ACCESS_KEY_ID": "nobody"},
            "it does not know this access key (InvalidAccessKeyId)",
            "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
        (
            {"WALSHIP_DESTINATIONS": f"s3://walship/p?endpoint=http://127.0.0.1:{nowhere}"},
            f"at http://127.0.0.1:{nowhere}: ",
            "check endpoint=… of the destination, the network, and that the store runs",
        ),
    ):
        environment = rig.environment(**{**seaweed.environment, **changed})
        done = rig.run("push", expect=11, environment=environment, timeout=180)
        assert fact in done.stderr
        assert f"hint: {hint}" in done.stderr
        assert seaweed.environment["AWS_SECRET_ACCESS_KEY"] not in done.stderr
    assert rig.spooled() == names, "nothing is removed that is not safe"


def test_a_required_destination_that_is_down_holds_everything_back(rig: Rig) -> None:
    """One store fills, the other is away: the spool keeps all until both have it."""
    names = archive_some(rig)
    local = rig.folder / "local"
    both = f"file://{local},file://{rig.folder}/second"
    (rig.folder / "second").mkdir()
    rig.server.start()
    rig.run("init", environment=rig.environment(WALSHIP_DESTINATIONS=both))
    rig.server.stop()
    (rig.folder / "second").rename(rig.folder / "unmounted")
    names = rig.spooled()
    done = rig.run("push", expect=11, environment=rig.environment(WALSHIP_DESTINATIONS=both), timeout=180)
    assert "second" in done.stderr
    assert rig.spooled() == names
    assert set(names) <= stored(rig), "the other destination was served all the same"
    # Not required: shipped where it can be, told where it cannot.
    environment = rig.environment(WALSHIP_DESTINATIONS=both, WALSHIP_REQUIRED=f"file://{local}")
    rig.run("push", environment=environment, timeout=180)
    assert rig.spooled() == []
    assert not (rig.folder / "second").exists(), "nobody but init makes the folder of a store"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root; stores are also tested without")
@pytest.mark.parametrize("what", ["store", "spool"])
def test_a_full_disk(folder: Path, what: str) -> None:
    place = folder / ("local" if what == "store" else "spool")
    rig = Rig(folder, NEWEST, [f"file://{folder}/local"])
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "walship-test", place], check=True)
    try:
        with rig:
            give(rig.spool, run_as())
            rig.server.start()
            rig.run("init")
            rig.sql("create table t (n int)")
            ballast = place / "ballast"
            subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=1M"], capture_output=True, check=False)
            rig.sql("insert into t select generate_series(1, 100)")
            rig.sql("select pg_switch_wal()")
            if what == "store":
                rig.wait(lambda: len(rig.spooled()) >= 1, "archived")
                names = rig.spooled()
                done = rig.run("push", expect=11, timeout=180)
                assert "No space left on device; " in done.stderr
                assert f"file://{place}: " in done.stderr
                assert "hint: the disk is full: make room, or expire backups" in done.stderr
                assert set(names) <= set(rig.spooled())
            else:
                rig.wait(
                    lambda: rig.sql("select failed_count > 0 from pg_stat_archiver") == [(True,)],
                    "archiving has failed",
                )
                assert "archiving fails" in rig.run("check", expect=10).stdout
                assert any("archiving fails" in reason for reason in rig.json("status")["reasons"])
            ballast.unlink()
            # PostgreSQL tries again by itself; what it archives is shipped, and nothing is missing.
            rig.json("switch", timeout=150)
            rig.server.stop()
            rig.run("push")
            listed = rig.json("list")
            assert listed["holes"] == []
            assert len(stored(rig)) >= 2
    finally:
        subprocess.run(["umount", "-l", place], check=True)


# -- the spool


def test_files_that_are_no_segments_are_refused_and_kept(rig: Rig) -> None:
    names = archive_some(rig)
    good = rig.spool / names[0]
    content = good.read_bytes()
    (system_id,) = (path.name for path in (rig.folder / "local").iterdir())
    foreign_id = int.from_bytes(content[24:32], "little") ^ 1
    strange = rig.spool / "0000000100000000000000F0"
    short = rig.spool / "0000000100000000000000F1"
    foreign = rig.spool / "0000000100000000000000F2"
    strange.write_bytes(b"not WAL " * (len(content) // 8))
    short.write_bytes(content[: 1 << 19])
    foreign.write_bytes(content[:24] + foreign_id.to_bytes(8, "little") + content[32:])
    os.utime(strange, (0, 0))
    done = rig.run("push", expect=10)
    refused = [line for line in done.stderr.splitlines() if line.startswith("error: refused ")]
    assert len(refused) == 3
    for path, fact, hint in (
        (strange, f"{strange.name} is no WAL segment", "something else was written under this name"),
        (short, f"{short.name} is 524288 bytes; a segment of this cluster is 1048576", "it is left where it is"),
        (foreign, f"{foreign.name} belongs to the cluster {foreign_id}, not to {system_id}", "two servers archive"),
    ):
        (said,) = (line for line in refused if f"path {path}" in line)
        assert fact in said
        assert hint in said
        assert path.exists()
    assert "3 files in" in done.stderr
    assert not good.exists(), "what is good was shipped"
    assert {strange.name, short.name, foreign.name}.isdisjoint(stored(rig))


def test_the_same_segment_with_other_bytes(rig: Rig) -> None:
    """A clone of the server archives into the same repository: a conflict, nothing overwritten, nothing forgotten."""
    rig.server.stop()
    shutil.copytree(rig.server.data_dir, rig.folder / "clone", symlinks=True)
    rig.server.start()
    for table in ("a", "b"):
        rig.sql(f"create table {table} as select generate_series(1, 100)")
    rig.json("switch")
    before = {path: path.read_bytes() for path in (rig.folder / "local").glob("*/wal/*/*")}
    rig.server.stop()
    rig.run("push")
    clone = rig.adopt(rig.folder / "clone")
    clone.start()
    clone.query("create table c as select generate_series(1, 5000)")
    clone.query("select pg_switch_wal()")
    rig.wait(lambda: len(rig.spooled()) >= 1, "the clone has archived")
    clone.stop()
    waiting = rig.spooled()
    done = rig.run("push", expect=11)
    assert "is stored at" in done.stderr
    assert "with other bytes" in done.stderr
    assert "two servers write to one repository" in done.stderr
    assert rig.spooled() == waiting
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_spool_that_is_missing(rig: Rig) -> None:
    environment = rig.environment(WALSHIP_SPOOL_DIR=str(rig.folder / "nowhere"))
    done = rig.run("push", expect=10, environment=environment)
    assert "nowhere is no folder" in done.stderr


# -- the target of a restore


def test_a_target_directory_that_is_not_empty(copy: Copy, folder: Path) -> None:
    keep = folder / "target" / "precious"
    keep.parent.mkdir()
    keep.write_text("do not touch")
    for words in ([], ["--force"]):
        done = copy.run("restore", "--target-dir", str(keep.parent), *words, expect=13)
        assert "is not empty" in done.stderr
        assert keep.read_text() == "do not touch"


def test_the_directory_of_a_running_server_is_never_touched(rig: Rig) -> None:
    rig.json("backup")
    rig.sql("insert into t values (42)")
    for words in ([], ["--force"]):
        done = rig.run("restore", "--target-dir", str(rig.server.data_dir), *words, expect=13)
        assert f"belongs to a running server, process {rig.server.pid}" in done.stderr
    assert rig.sql("select n from t where n = 42") == [(42,)]


def test_a_server_of_another_major_version(copy: Copy, folder: Path) -> None:
    from tests.servers import programs

    target = folder / "target"
    target.mkdir()
    done = copy.run("restore", "--target-dir", str(target), "--start", expect=10, WALSHIP_PG_BIN_DIR=str(programs(15)))
    assert f"the programs of PostgreSQL {NEWEST} were not found; there is 15." in done.stderr
    assert f"postgresql-{NEWEST} on Debian" in done.stderr
    assert list(target.iterdir()) == []
