"""backup_info is read as if somebody else had written it: nothing that is in it is taken on trust."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from pipeline.backup import ArchiveInfo, BackupInfo, Tablespace
from pipeline.errors import IntegrityError
from pipeline.wal import Lsn

NOON = datetime(2026, 1, 14, 12, tzinfo=UTC)
DIGEST = "0a" * 32
INFO = BackupInfo(
    "base_20260114_120000", "b" * 32, "full", "7590000000000000007", 170011, 1 << 24, 1, Lsn(40), Lsn(80), NOON, NOON,
    (Tablespace(16384, "/fa\udcffst"),), (ArchiveInfo("16384", 0, ()), ArchiveInfo("base", 5, (DIGEST,))), (DIGEST,),
    "", 100, "by hand",
)  # fmt: skip


def change(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """``archives.0.name`` → value."""

    def apply(members: dict[str, Any]) -> None:
        *way, last = path.split(".")
        found: Any = members
        for step in way:
            found = found[int(step) if step.isdigit() else step]
        found[int(last) if last.isdigit() else last] = value

    return apply


def test_what_was_encoded_is_decoded() -> None:
    assert BackupInfo.decode("info", INFO.encode()) == INFO


@pytest.mark.parametrize(
    "spoil",
    [
        change("segment_size", 0), change("segment_size", 3 << 20), change("segment_size", 16777216.0),
        change("segment_size", True), change("timeline", 0), change("timeline", 1 << 32), change("timeline", "1"),
        change("kind", "incremental"), change("id", "B" * 32), change("id", ""), change("system_id", 7),
        change("system_id", "../7"), change("server_version", 0), change("start_lsn", "0/FFFFFF"),
        change("start_lsn", 40), change("stop_lsn", "x"), change("started", "2026-01-14T12:00:00"),
        change("stopped", 7), change("tablespaces", {}), change("tablespaces.0", [16384, "/fast"]),
        change("tablespaces.0.oid", 0), change("tablespaces.0.oid", "16384"), change("tablespaces.0.location", None),
        change("tablespaces.0.more", 1), change("archives.0.name", "../x"), change("archives.0.name", "16385"),
        change("archives.0.name", "base"), change("archives.0.name", 16384), change("archives.1.size", -1),
        change("archives.1.size", "5"), change("archives.1.parts", [1]), change("archives.1.parts", [DIGEST.upper()]),
        change("archives.1.parts", DIGEST), change("archives.1", 1), change("index", [1]), change("index", ["0a"]),
        change("manifest", "0a"), change("manifest", None), change("stored_size", -1), change("label", 1),
        change("more", 1),
    ],
)  # fmt: skip
def test_what_no_walship_writes_is_refused(spoil: Callable[[dict[str, Any]], None]) -> None:
    members = json.loads(INFO.encode())
    spoil(members)
    with pytest.raises(IntegrityError, match="info is no backup_info that this walship can read: "):
        BackupInfo.decode("info", json.dumps(members).encode())


@pytest.mark.parametrize("content", [b"", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"name":"a","name":"b"}'])
def test_what_is_no_object_is_refused(content: bytes) -> None:
    with pytest.raises(IntegrityError, match="info is no backup_info that this walship can read: "):
        BackupInfo.decode("info", content)
