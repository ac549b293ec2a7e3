"""What each alert is tested with: series as ``promtool test rules`` wants them, and what is to be told at which minute.

The names and labels of these series are compared with those of a running service: ``tests/acceptance/test_alerts.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FAR = "s3://bucket/pg"
NEAR = "file:///backups"
#: Promtool counts its time from 1970 on: what has never been was long before.
NEVER = "-4000000x300"
ALL = 'job="walship",instance="db:9432"'


@dataclass(frozen=True)
class Case:
    """Series that make one alert fire: none at the minute ``quiet``, and it at the minute ``fires``."""

    alert: str
    #: selector → values, one a minute, in promtool's notation.
    series: Mapping[str, str]
    quiet: int
    fires: int
    summary: str
    #: Besides job, instance and severity.
    labels: Mapping[str, str] = field(default_factory=dict)


def _at(name: str, destination: str = FAR, **more: str) -> str:
    labels = "".join(f',{key}="{value}"' for key, value in more.items())
    return f'{name}{{destination="{destination}"{labels},{ALL}}}'


def _own(name: str, **more: str) -> str:
    labels = "".join(f'{key}="{value}",' for key, value in more.items())
    return f"{name}{{{labels}{ALL}}}"


#: A service with nothing wrong. The clock of promtool begins in 1970: a moment is the time since the first sample.
WELL: dict[str, str] = {
    _own("up"): "1x300",
    _own("walship_build_info", version="1"): "1x300",
    _own("walship_shipping"): "1x300",
    _own("walship_files_set_aside_total"): "3x300",
    _own("walship_slot_active"): "1x300",
    _own("walship_slot_retained_bytes"): "1000000x300",
    _own("walship_slot_safe_bytes"): "9000000x300",
    _own("walship_spool_bytes"): "1000x300",
    _own("walship_spool_files"): "1x300",
    _own("walship_spool_free_bytes"): "500x300",
    _own("walship_spool_volume_bytes"): "1000x300",
    **{_own("walship_full_seconds", kind=kind): "1e12x300" for kind in ("slot", "spool", "wal_volume")},
    **{
        series: "0+60x300"
        for kind in ("verify", "drill", "expire")
        for series in (_own(f"walship_last_{kind}_success_timestamp_seconds"),)
    },
    **{_own(f"walship_last_{kind}_failure_timestamp_seconds"): NEVER for kind in ("verify", "drill", "expire")},
    **{_own("walship_reading_up", kind=kind): "1x300" for kind in ("server", "spool", "verify", "drill", "expire")},
    **{
        series: values
        for destination, required in ((NEAR, "1x300"), (FAR, "0x300"))
        for series, values in {
            _at("walship_reading_up", destination, kind="repository"): "1x300",
            _at("walship_reading_up", destination, kind="last_commit"): "1x300",
            _at("walship_destination_up", destination): "1x300",
            _at("walship_destination_required", destination): required,
            _at("walship_sync_degraded", destination): "0x300",
            # An idle database: nothing moves, and nothing waits.
            _at("walship_wal_lag_seconds", destination): "0x300",
            _at("walship_wal_durable_lsn_bytes", destination): "5000x300",
            _at("walship_wal_gaps", destination, kind="current"): "0x300",
            _at("walship_wal_gaps", destination, kind="old"): "7x300",
            _at("walship_backlog_objects", destination): "0x300",
            _at("walship_last_backup_success_timestamp_seconds", destination): "0+60x300",
            _at("walship_last_backup_failure_timestamp_seconds", destination): NEVER,
        }.items()
    },
}

CASES = (
    Case(
        "WalshipBacklogStalled",
        {_at("walship_backlog_objects"): "100-1x60 40x300"},
        115,
        125,
        f"{FAR} lacks 40 objects that other destinations have, and they are not being copied",
        {"destination": FAR},
    ),
    Case(
        "WalshipDown",
        {_own("up"): "1x5 0x300"},
        6,
        8,
        "The walship service at db:9432 does not answer: nothing is shipped",
    ),
    Case(
        "WalshipMetricsAbsent",
        {_own("walship_build_info", version="1"): "1x5 stale"},
        9,
        12,
        "Prometheus has no metrics of any walship service: nobody knows whether anything is shipped",
    ),
    Case(
        "WalshipNotShipping",
        {_own("walship_shipping"): "1x5 0x300"},
        7,
        9,
        "The service at db:9432 runs and ships nothing: it waits for a store, or another writer ships",
    ),
    Case(
        "WalshipReadingFailed",
        {_at("walship_reading_up", kind="repository"): "1x5 0x300"},
        15,
        17,
        f"The repository {FAR} cannot be read: what the metrics say of it is old",
        {"destination": FAR, "kind": "repository"},
    ),
    Case(
        "WalshipReadingFailed",
        {_own("walship_reading_up", kind="server"): "1x5 0x300"},
        15,
        17,
        "The server  cannot be read: what the metrics say of it is old",
        {"kind": "server"},
    ),
    Case(
        "WalshipArchiveLagHigh",
        {_at("walship_wal_lag_seconds"): "0x5 0+60x300", _at("walship_wal_durable_lsn_bytes"): "0+16x300"},
        11,
        14,
        f"{FAR} lacks the WAL of the last 8m 0s",
        {"destination": FAR},
    ),
    Case(
        "WalshipWalGap",
        {_at("walship_wal_gaps", kind="current"): "0x5 3x300"},
        6,
        8,
        f"3 WAL segments are missing at {FAR}: nothing behind them can be restored from there",
        {"destination": FAR, "kind": "current"},
    ),
    Case(
        "WalshipFilesSetAside",
        {_own("walship_files_set_aside_total"): "3x5 4x300"},
        5,
        7,
        "1 files of another server lie below conflict/: two servers have used one timeline number",
    ),
    Case(
        "WalshipDestinationDown",
        {_at("walship_destination_up", NEAR): "1x5 0x300"},
        7,
        9,
        f"{NEAR} does not take what it is given or cannot be listed, and is required: WAL piles up",
        {"destination": NEAR},
    ),
    Case(
        "WalshipOptionalDestinationDown",
        {_at("walship_destination_up"): "1x5 0x300"},
        20,
        22,
        f"{FAR} does not take what it is given or cannot be listed; the required ones go on without it",
        {"destination": FAR},
    ),
    Case(
        "WalshipSyncDegraded",
        {_at("walship_sync_degraded"): "0x5 1x300"},
        5,
        6,
        f"Commits no longer wait for {FAR}: they are acknowledged with fewer copies than required",
        {"destination": FAR},
    ),
    Case(
        "WalshipSlotInactive",
        # While the server does not answer, the slot is not known: that is told by WalshipReadingFailed.
        {_own("walship_slot_active"): "1x5 0x300", _own("walship_slot_retained_bytes"): "_x300"},
        7,
        9,
        "Nothing streams from the replication slot at db:9432, or it is gone: WAL piles up on the server, or is lost",
    ),
    Case(
        "WalshipSlotNearLimit",
        {
            _own("walship_slot_safe_bytes"): "9000000x5 2000000x300",
            _own("walship_slot_retained_bytes"): "1000000x5 8000000x300",
        },
        6,
        8,
        "The slot at db:9432 is about to reach max_slot_wal_keep_size: then its WAL is gone, and there is a gap",
    ),
    Case(
        "WalshipSlotNearLimit",
        {_own("walship_full_seconds", kind="slot"): "1e12x5 3000x300"},
        6,
        8,
        "The slot at db:9432 is about to reach max_slot_wal_keep_size: then its WAL is gone, and there is a gap",
        {"kind": "slot"},
    ),
    Case(
        "WalshipWalVolumeFilling",
        {_own("walship_full_seconds", kind="wal_volume"): "1e12x5 7200x300"},
        20,
        22,
        "The disk of pg_wal is full in 2h 0m 0s at the present pace: then PostgreSQL stops",
        {"kind": "wal_volume"},
    ),
    Case(
        "WalshipSpoolNearFull",
        {_own("walship_spool_free_bytes"): "500x5 140x300"},
        6,
        8,
        "The disk of the spool at db:9432 is nearly full: then PostgreSQL cannot archive, and pg_wal fills",
    ),
    Case(
        "WalshipSpoolNearFull",
        {
            # That others fill the disk for a moment is no alert: files wait.
            _own("walship_full_seconds", kind="spool"): "3000x300",
            _own("walship_spool_files"): "1x5 40x300",
        },
        6,
        8,
        "The disk of the spool at db:9432 is nearly full: then PostgreSQL cannot archive, and pg_wal fills",
        {"kind": "spool"},
    ),
    Case(
        "WalshipSpoolGrows",
        {_own("walship_spool_bytes"): "0x5 6442450944x300"},
        10,
        12,
        "6GiB of WAL wait in the spool at db:9432",
    ),
    Case(
        "WalshipBackupTooOld",
        {_at("walship_last_backup_success_timestamp_seconds"): "-93480x5 -95000x300"},
        1,
        11,
        f"The newest base backup at {FAR} is 1d 2h 34m 20s old (56 years: there is none)",
        {"destination": FAR},
    ),
    Case(
        "WalshipBackupFailed",
        {_at("walship_last_backup_failure_timestamp_seconds"): "0x5 86400x300"},
        5,
        6,
        f"The last base backup for {FAR} was given up at 1970-01-02 00:00:00 +0000 UTC",
        {"destination": FAR},
    ),
    Case(
        "WalshipVerifyOverdue",
        {_own("walship_last_verify_success_timestamp_seconds"): "0x5 -777600x300"},
        60,
        70,
        "The stored bytes were last verified 9d 1h 10m 0s ago (56 years: never)",
    ),
    Case(
        "WalshipVerifyFailed",
        {_own("walship_last_verify_failure_timestamp_seconds"): "0x5 86400x300"},
        5,
        6,
        "The verification at 1970-01-02 00:00:00 +0000 UTC failed: stored bytes are wrong, or cannot be read",
    ),
    Case(
        "WalshipDrillOverdue",
        {_own("walship_last_drill_success_timestamp_seconds"): "0x5 -3024000x300"},
        60,
        70,
        "A restore was last rehearsed 35d 1h 10m 0s ago (56 years: never)",
    ),
    Case(
        "WalshipDrillFailed",
        {_own("walship_last_drill_failure_timestamp_seconds"): "0x5 86400x300"},
        5,
        6,
        "The rehearsal of a restore at 1970-01-02 00:00:00 +0000 UTC failed: a real one would as well",
    ),
    Case(
        "WalshipExpireFailed",
        {_own("walship_last_expire_failure_timestamp_seconds"): "0x5 86400x300"},
        5,
        6,
        "Deleting what retention lets go failed at 1970-01-02 00:00:00 +0000 UTC: the store goes on growing",
    ),
    Case(
        "WalshipOperationUnknown",
        {_own("walship_reading_up", kind="drill"): "1x5 0x300"},
        60,
        68,
        "Nobody knows when walship drill last went well: no destination lets its records be listed",
        {"kind": "drill"},
    ),
)

#: A stall is a lag as well: two alerts at once.
#: A new destination that is being filled: it lags, has holes and no backup, and nobody has to be told.
FILLED: dict[str, str] = {
    _at("walship_backlog_objects"): "100000-5x300",
    _at("walship_wal_lag_seconds"): "0+60x300",
    _at("walship_wal_gaps", kind="current"): "70x300",
    _at("walship_last_backup_success_timestamp_seconds"): NEVER,
}

STALLED = Case(
    "WalshipArchiveStalled",
    {_at("walship_wal_lag_seconds"): "0x5 0+60x300"},
    10,
    19,
    f"{FAR} has got no WAL for 13m 0s: commits since then are not there",
    {"destination": FAR},
)
