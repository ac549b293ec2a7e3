"""The settings of a restored server, as text."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.postgres.recovery_files import (
    forget_recovery,
    inherited,
    notices,
    parse_conf,
    quoted,
    settings_for,
    write_recovery_files,
)
from pipeline.backup import BackupInfo
from pipeline.lineage import Leg, Lineage, WalPath
from pipeline.recovery import RestorePlan
from pipeline.targets import Action, Target, TargetKind
from pipeline.wal import Lsn

NOON = datetime(2026, 1, 14, 12, 0, 0, 123456, tzinfo=UTC)
SIZE = 1 << 20


def plan(stop: Target, version: int = 170000) -> RestorePlan:
    backup = BackupInfo("b", "id", "full", "7", version, SIZE, 1, Lsn(1), Lsn(2), NOON, NOON, (), (), (), "", 0)
    lineage = Lineage((Leg(1, Lsn(0), None),), SIZE)
    return RestorePlan(backup, stop, stop, lineage, "1", WalPath((), Lsn(1), Lsn(2), None, SIZE), None)


@pytest.mark.parametrize(
    ("stop", "name", "value"),
    [
        (Target().to_time(NOON), "recovery_target_time", "2026-01-14 12:00:00.123456+00:00"),
        (Target().to_lsn(Lsn(0x1600000028)), "recovery_target_lsn", "16/28"),
        (Target(TargetKind.XID, xid=777), "recovery_target_xid", "777"),
        (Target(TargetKind.NAME, name="it's"), "recovery_target_name", "it's"),
        (Target(TargetKind.IMMEDIATE), "recovery_target", "immediate"),
    ],
)
def test_exactly_one_target_is_set_and_comes_last(stop: Target, name: str, value: str) -> None:
    settings = settings_for(plan(stop))
    assert list(settings.items())[-1] == (name, value)
    kinds = [n for n in settings if n.startswith("recovery_target") and n.rpartition("_")[2] not in (
        "timeline", "inclusive", "action",
    )]  # fmt: skip
    assert len(kinds) == 5
    assert [n for n in kinds if settings[n]] == [name]
    assert settings["recovery_target_timeline"] == "1"


def test_the_latest_has_no_target_and_sides_and_actions_are_said() -> None:
    settings = settings_for(plan(Target()))
    assert not any(settings[n] for n in settings if n.startswith("recovery_target_") and n.endswith(("time", "lsn")))
    stop = replace(Target().to_time(NOON), inclusive=False, action=Action.PAUSE)
    settings = settings_for(plan(stop))
    assert (settings["recovery_target_inclusive"], settings["recovery_target_action"]) == ("off", "pause")


def test_a_version_gets_no_setting_that_it_does_not_know() -> None:
    assert "archive_library" in settings_for(plan(Target(), 150004))
    assert "archive_library" not in settings_for(plan(Target(), 140013))


def test_a_drill_may_add_but_not_change() -> None:
    assert list(settings_for(plan(Target()), extra={"port": "6000"}).items())[-1] == ("port", "6000")
    with pytest.raises(ValueError, match="archive_mode is the restore's own"):
        settings_for(plan(Target()), extra={"archive_mode": "on"})


@given(st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"])))
def test_what_is_quoted_is_read_back(value: str) -> None:
    assert parse_conf(f"x = {quoted(value)}  # why") == {"x": value}


def test_no_setting_can_end_its_line() -> None:
    with pytest.raises(ValueError, match="line break"):
        quoted("a\narchive_mode = on")


def test_what_was_inherited_is_told_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "postgresql.conf").write_text(
        "archive_mode = on\narchive_command = 'curl -u me:hunter2 %p'\n#primary_slot_name = 'no'\nhot_standby on\n"
        "synchronous_standby_names='a'\n"
    )
    (tmp_path / "postgresql.auto.conf").write_text("synchronous_standby_names = 'b, c'\nprimary_conninfo='password=x'")
    found = inherited(tmp_path)
    assert {str(n) for n in found} == {
        "archive_mode (was 'on')", "archive_command", "synchronous_standby_names (was 'b, c')", "primary_conninfo",
    }  # fmt: skip
    said = " ".join(notices(found, tmp_path))
    assert "ALTER SYSTEM SET synchronous_standby_names = 'b, c'; SELECT pg_reload_conf();" in said
    assert "RESET archive_mode" in said
    assert "RESET archive_mode" not in " ".join(notices(found, tmp_path, archiving=False))
    assert "ALTER SYSTEM RESET restore_command;" in said
    assert "RESET restore_command" not in " ".join(notices(found, tmp_path, promoted=True))
    assert "hunter2" not in said
    assert "password" not in said


def test_a_data_directory_of_its_own_is_taken_from_the_configuration(tmp_path: Path) -> None:
    """It beats -D: a start by hand would start the original."""
    conf = tmp_path / "postgresql.conf"
    conf.write_text(
        "port = 1\n  Data_Directory = '/old'\ninclude_dir 'conf.d'\n#data_directory='x'\nhba_file = '/etc/hba'\n"
        "data_directory '/older'\nexternal_pid_file = '/old.pid'\n"
    )
    (tmp_path / "postgresql.auto.conf").write_text("external_pid_file = '/pid'\n")
    conf.chmod(0o640)
    found = write_recovery_files(tmp_path, {}, segment_size=SIZE, fetch=("x",), context=b"", owner=None)
    assert [str(n) for n in found] == ["data_directory (was '/older')", "external_pid_file (was '/pid')"]
    assert "external_pid_file" not in parse_conf((tmp_path / "postgresql.auto.conf").read_text())
    assert parse_conf(conf.read_text()) == {"port": "1", "include_dir": "conf.d", "hba_file": "/etc/hba"}
    assert conf.stat().st_mode & 0o777 == 0o640
    said = notices(found, tmp_path)
    assert said[0] == f"commented out in {conf}: data_directory (was '/older')"
    assert said[1] == f"commented out in {conf}: external_pid_file (was '/pid')"
    assert any("include_dir conf.d: what those files set was not looked at" in line for line in said)
    assert any("still names the old server's hba_file (/etc/hba)" in line for line in said)
    assert any("command line" in line for line in notices((), tmp_path))


def test_the_words_of_the_restore_come_last(tmp_path: Path) -> None:
    conf = tmp_path / "postgresql.auto.conf"
    conf.write_text("archive_mode = on")
    settings = settings_for(plan(Target(TargetKind.NAME, name="a 'b' \\ c")))
    write_recovery_files(tmp_path, settings, segment_size=SIZE, fetch=("x y",), context=b"", owner=None)
    assert parse_conf(conf.read_text()) == settings
    assert conf.read_text().startswith("archive_mode = on\n# walship restore\n")
    assert "'x y' --context" in (tmp_path / "pgsql_tmp.walship/restore_wal.sh").read_text()


def test_a_promoted_server_forgets_its_recovery(tmp_path: Path) -> None:
    """But what its own postgresql.conf says of a target stays switched off: the next standby would follow that."""
    (tmp_path / "postgresql.conf").write_text("recovery_target_name = 'old'\n")
    conf = tmp_path / "postgresql.auto.conf"
    conf.write_text("work_mem = 1\nrestore_command = 'of an earlier restore'\nrecovery_target_xid=7\n")
    settings = settings_for(plan(Target().to_time(NOON)))
    write_recovery_files(tmp_path, settings, segment_size=SIZE, fetch=("x",), context=b"", owner=None)
    assert forget_recovery(tmp_path, owner=None)
    assert not (tmp_path / "postgresql.auto.conf.tmp").exists(), "or no ALTER SYSTEM would ever work again"
    left = parse_conf(conf.read_text())
    assert {name: value for name, value in left.items() if name.startswith(("rec", "res"))} == {
        "recovery_end_command": "", "recovery_min_apply_delay": "0", "recovery_target_name": "",
    }  # fmt: skip
    assert (left["work_mem"], left["archive_mode"], left["synchronous_standby_names"]) == ("1", "off", "")


def test_an_alter_system_at_the_same_moment_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server replaces the file as well: it reads it, writes another one, and renames that."""
    conf, beside = tmp_path / "postgresql.auto.conf", tmp_path / "postgresql.auto.conf.tmp"
    done = 0

    def alter_system() -> None:
        nonlocal done
        while done < 200:
            lines = conf.read_text()
            try:
                beside.write_text(f"{lines}their.own{done} = 1\nrestore_command = 'x'\n")
            except IsADirectoryError:
                continue  # an error for whoever has typed it, and no more than that
            beside.replace(conf)
            done += 1

    monkeypatch.setattr("infra.postgres.recovery_files._AGAIN", 0.0)
    conf.write_text("")
    with ThreadPoolExecutor(1) as pool:
        altering = pool.submit(alter_system)
        while not altering.done():
            assert forget_recovery(tmp_path, owner=None)
        altering.result()
    assert forget_recovery(tmp_path, owner=None)
    assert "restore_command" not in conf.read_text()
    assert [name for name in parse_conf(conf.read_text()) if "own" in name] == [f"their.own{n}" for n in range(200)]
    monkeypatch.setattr("infra.postgres.recovery_files._PATIENCE", 0.05)
    conf.write_text("restore_command = 'x'\n")
    beside.touch()
    assert not forget_recovery(tmp_path, owner=None)
    assert conf.read_text() == "restore_command = 'x'\n"


def test_a_standby_has_no_target_and_stays_on_the_planned_timeline(tmp_path: Path) -> None:
    settings = settings_for(plan(Target(TargetKind.NAME, name="a")), standby=True)
    assert {name for name in settings if name.startswith("recovery_target") and settings[name]} == {
        "recovery_target_timeline", "recovery_target_inclusive", "recovery_target_action",
    }  # fmt: skip
    assert settings["recovery_target_timeline"].isdecimal()
    assert settings["archive_mode"] == "off"
    (tmp_path / "recovery.signal").touch()
    write_recovery_files(tmp_path, settings, segment_size=SIZE, fetch=("x",), context=b"", owner=None, standby=True)
    assert (tmp_path / "standby.signal").exists()
    assert not (tmp_path / "recovery.signal").exists()
