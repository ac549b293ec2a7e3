"""Each thing is broken for real under a real Prometheus: its alert reaches the Alertmanager, and is mended there."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import free_port, make_folder
from tests.alerting import RULES, Watch, rules, scrape, unknown_series
from tests.integration.alert_cases import CASES, STALLED, WELL
from tests.proxy import Mode, Proxy
from tests.rig import Rig
from tests.servers import NEWEST

#: What is changed in a copy of the rules, so that nobody waits for hours: (alert, expression, the shorter one).
_SHORTER = (
    ("WalshipArchiveLagHigh", "> 300", "> 3"),
    ("WalshipArchiveStalled", "> 600", "> 4"),
    ("WalshipArchiveStalled", "[10m]", "[3s]"),
    ("WalshipSpoolNearFull", "< 0.15", "< 0.5"),
    ("WalshipBackupTooOld", "> 93600", "> 12"),
)


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[Proxy]:
    with Proxy(int(seaweed.endpoint.rpartition(":")[2])) as made:
        yield made


@pytest.fixture
def listen() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def rig(seaweed: Seaweed, s3_prefix: str, proxy: Proxy, listen: str) -> Iterator[Rig]:
    folder = make_folder("walship-w-")
    remote = f"s3://{seaweed.bucket}/{s3_prefix}?endpoint=http://127.0.0.1:{proxy.port}&region=us-east-1"
    settings = {
        **seaweed.environment,
        "WALSHIP_LISTEN": listen,
        "WALSHIP_SURVEY_INTERVAL": "1",
        "WALSHIP_SYNC_TIMEOUT": "1",
    }
    # Room for one slot: whoever takes it keeps walship from making its own anew.
    slots = {
        "max_replication_slots": "1", "max_slot_wal_keep_size": "200MB", "synchronous_standby_names": "walship",
    }  # fmt: skip
    made = Rig(
        folder, NEWEST, [f"file://{folder}/local", remote], settings=settings, sources="watch,stream",
        server_settings=slots,
    )  # fmt: skip
    with _small(made.spool), made:
        yield made
    shutil.rmtree(folder)


@contextlib.contextmanager
def _small(spool: Path) -> Iterator[None]:
    """A file system of 16 MB under the spool, where we may mount one; else it is never near full."""
    made = os.getuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "walship-test", spool], capture_output=True, check=False
    ).returncode  # fmt: skip
    if made:
        give(spool, run_as())
    try:
        yield
    finally:
        if made:
            subprocess.run(["umount", "-l", spool], capture_output=True, check=True)


def _shorter() -> str:
    """The project's own rules, with the numbers of ``_SHORTER`` and no patience."""
    text = re.sub(r"for: \w+", "for: 1s", RULES.read_text("utf-8"))
    for alert, old, new in _SHORTER:
        front, mark, rest = text.partition(f"- alert: {alert}\n")
        assert mark, alert
        rule, end, others = rest.partition("- alert: ")
        assert rule.count(old) == 1, (alert, old)
        text = front + mark + rule.replace(old, new) + end + others
    return text


def _steal_the_slot(rig: Rig) -> None:
    """End the stream, drop its slot, and make another one in its place before the service is back."""
    with psycopg.connect(rig.server.dsn(), autocommit=True) as connection:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            connection.execute("select pg_terminate_backend(active_pid) from pg_replication_slots where active")
            with contextlib.suppress(psycopg.errors.ObjectInUse, psycopg.errors.UndefinedObject):
                connection.execute("select pg_drop_replication_slot('walship')")
                connection.execute("select pg_create_physical_replication_slot('thief', true)")
                return
    raise AssertionError("the slot is always in use")


def _drop_what_is_no_backup(rig: Rig) -> Path:
    """As a ``pg_basebackup`` into the spool would, whose disk lost half of it. Found when the service starts."""
    made = rig.spool / "nightly"
    made.mkdir()
    (made / "base.tar").write_bytes(b"half of it")
    (made / "backup_manifest").write_text("{}", "utf-8")
    for path in (*made.iterdir(), made):
        give(path, run_as())
    return made


def test_what_is_broken_is_told_and_what_is_mended_is_told_no_more(
    rig: Rig, proxy: Proxy, listen: str, tmp_path: Path
) -> None:
    local, remote = rig.destinations[0], rig.destinations[1].partition("?")[0]
    limited = subprocess.run(["mountpoint", "-q", rig.spool], check=False).returncode == 0
    rig.server.start()
    rig.run("init")
    dropped = _drop_what_is_no_backup(rig)
    service = rig.serve()
    with Watch(tmp_path / "watch", listen, _shorter()) as watch:
        failed = [("WalshipBackupFailed", local), ("WalshipBackupFailed", remote)]
        watch.fires(*failed)
        shutil.rmtree(dropped)
        rig.json("backup")
        rig.wait(rig.streams, "the service streams")
        watch.resolves(("WalshipBackupTooOld", local), ("WalshipBackupTooOld", remote), *failed)
        # Names and labels of the rules, and of what they are tested with, are those of a service that runs.
        live = scrape(listen)
        tested = [selector for case in (*CASES, STALLED) for selector in case.series]
        assert unknown_series([*(rule["expr"] for rule in rules()), *tested, *WELL], live) == []

        rig.sql("select pg_switch_wal()")
        rig.wait(lambda: watch.query("walship_wal_lag_seconds == 0") != [], "something is known, and nothing lags")
        # (Nothing was ever verified; before its first look, Prometheus knew no service at all; what else runs here
        # fills the same disk.)
        usual = {"WalshipVerifyOverdue", "WalshipDrillOverdue", "WalshipBackupTooOld", "WalshipWalVolumeFilling"}
        watch.quiet(usual)

        # The store is away: its WAL waits, and fills the spool; commits no longer wait. Somebody deletes a segment.
        proxy.turn(Mode.DOWN)
        segment = max(path for path in (rig.folder / "local").glob("*/wal/*/*") if len(path.name) == 24)
        kept = tmp_path / segment.name
        shutil.copy2(segment, kept)
        for _ in range(12):
            rig.sql("select pg_logical_emit_message(false, 'walship', repeat('x', 100)), pg_switch_wal()")
        segment.unlink()
        broken = [
            ("WalshipDestinationDown", remote),
            ("WalshipArchiveLagHigh", remote),
            ("WalshipArchiveStalled", remote),
            ("WalshipReadingFailed", remote),
            ("WalshipSyncDegraded", remote),
            ("WalshipWalGap", local),
            ("WalshipBackupTooOld", local),
            *([("WalshipSpoolNearFull", "")] if limited else []),
        ]
        watch.fires(*broken)
        assert not any(where == local for name, where in watch.firing() if name == "WalshipDestinationDown")

        # The slot is dropped, and there is no room for another one.
        _steal_the_slot(rig)
        watch.fires(("WalshipSlotInactive", ""))

        # All of it is mended.
        rig.sql("select pg_drop_replication_slot('thief')")
        proxy.turn(Mode.PASS)
        shutil.copy2(kept, segment)
        watch.resolves(*(alert for alert in broken if alert[0] != "WalshipBackupTooOld"), ("WalshipSlotInactive", ""))
        rig.json("backup")
        watch.resolves(("WalshipBackupTooOld", local), ("WalshipBackupTooOld", remote))

        # The service is killed; what it says after the next start is read from the repository.
        taken = watch.query("walship_last_backup_success_timestamp_seconds")
        rig.stop(service, signal.SIGKILL)
        watch.fires(("WalshipDown", ""), ("WalshipMetricsAbsent", ""))
        rig.serve()
        watch.resolves(("WalshipDown", ""), ("WalshipMetricsAbsent", ""))
        rig.wait(
            lambda: (
                sorted(value for _, value in watch.query("walship_last_backup_success_timestamp_seconds"))
                == sorted(value for _, value in taken)
            ),
            "the newest backup is known again",
        )
