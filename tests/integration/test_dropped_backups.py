"""What ``pg_basebackup -Ft`` leaves in the spool, read from real servers: like a stream, and whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from infra.clock import SystemClock
from infra.postgres.processes import give, run_as
from infra.sources.dropped import dropped_messages, dropped_wal, open_dropped
from infra.sources.watcher import SpoolWatcher
from pipeline.backup import ArchiveBegan, ArchiveData, BackupStarted, BackupStopped, ManifestData
from pipeline.errors import SourceError
from pipeline.events import BackupReady, FileRefused, Notice
from pipeline.manifest import check_manifest
from pipeline.tar import TarReader
from pipeline.wal import WalKind
from tests.integration.test_archiving import (
    MB,
    archiving,
    system_id,
)
from tests.servers import StartServer, server_folder, start_server

__all__ = ["server_folder", "start_server"]  # fixtures


@pytest.mark.parametrize(("major", "compressed"), [(15, True), (16, False), (17, True), (18, False)])
async def test_a_dropped_base_backup_is_read_like_a_streamed_one(
    server_folder: Path, start_server: StartServer, major: int, *, compressed: bool
) -> None:
    spool = server_folder / "spool"
    server = start_server(major, settings=archiving(spool, "cp"), segment_mb=1)
    place = server_folder / "space with \\ in it"
    place.mkdir()
    give(place, run_as())
    server.query(f"create tablespace far location '{place}'")
    server.query("create table t tablespace far as select g from generate_series(1, 1000) g")
    cluster, folder = system_id(server), spool / "monday"
    server.run("pg_basebackup", "-Ft", "-D", str(folder), "-d", server.dsn(), "-c", "fast", "-l", "by hand",
               *(["-z"] if compressed else []))  # fmt: skip
    notices: list[Notice] = []
    watcher = SpoolWatcher(
        spool, system_id=cluster, segment_size=MB, clock=SystemClock(), notify=notices.append, once=True
    )
    (event,) = [event async for event in watcher.events() if isinstance(event, BackupReady)]
    backup = await asyncio.to_thread(open_dropped, Path(event.folder), system_id=cluster, segment_size=MB)
    assert (backup.major, backup.label, backup.segment_size, backup.system_id) == (major, "by hand", MB, cluster)
    assert [space.location for space in backup.tablespaces] == [str(place)]
    reader, files, manifest, order = TarReader("none"), 0, bytearray(), []
    async for message in dropped_messages(backup):
        match message:
            case ArchiveBegan():
                order.append(message.archive)
                reader = TarReader(message.archive)
            case ArchiveData():
                files += sum(1 for _ in reader.feed(message.data))
            case ManifestData():
                manifest += message.data
            case BackupStarted() | BackupStopped():
                order.append(str(message.timeline))
    reader.finish()
    assert order == ["1", str(backup.tablespaces[0].oid), "base", "1"]
    assert files > 900
    check_manifest(manifest, system_id=cluster, start=backup.start_lsn, stop=backup.stop_lsn, timeline=1)
    wal = dict(dropped_wal(backup))
    assert any(file.start(MB) < backup.stop_lsn <= file.end(MB) for file in wal)
    assert all(file.kind is WalKind.SEGMENT and len(data) == MB for file, data in wal.items())
    with pytest.raises(SourceError, match=f"belongs to the cluster {cluster}, not to 5"):
        await asyncio.to_thread(open_dropped, folder, system_id="5", segment_size=MB)
    await watcher.done(event)
    assert not folder.exists()
    assert [notice for notice in notices if isinstance(notice, FileRefused)] == []


def test_a_broken_dropped_backup_names_what_is_wrong(server_folder: Path, start_server: StartServer) -> None:
    server = start_server(segment_mb=1, settings={"wal_level": "replica"})
    folder, cluster = server_folder / "monday", system_id(server)
    server.run("pg_basebackup", "-Ft", "-D", str(folder), "-d", server.dsn(), "-c", "fast")
    whole = (folder / "backup_manifest").read_bytes()
    (folder / "backup_manifest").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="bytes is cut, or none"):
        open_dropped(folder, system_id=cluster, segment_size=MB)
    (folder / "backup_manifest").write_bytes(whole.replace(b'"Size": 3', b'"Size": 4', 1))
    with pytest.raises(SourceError, match="does not match its own checksum"):
        open_dropped(folder, system_id=cluster, segment_size=MB)
    # Without a word of the cluster in the manifest, as before 17: by its WAL, and without WAL by pg_control.
    older = re.sub(rb'Version": 2,\n"System-Identifier": \d+,\n', b'Version": 1,\n', whole)
    (folder / "backup_manifest").write_bytes(signed(older))
    assert open_dropped(folder, system_id=cluster, segment_size=MB).system_id == cluster
    (folder / "pg_wal.tar").unlink()
    assert open_dropped(folder, system_id=cluster, segment_size=MB).system_id == cluster
    with pytest.raises(SourceError, match=f"belongs to the cluster {cluster}, not to 5"):
        open_dropped(folder, system_id="5", segment_size=MB)
    (folder / "backup_manifest").write_bytes(whole)
    for position in (-1024, -2000):  # without its end; within the last file
        with pytest.raises(SourceError, match=r"the archive base\.tar is cut after"):
            cut_and_look(folder, "base.tar", position, cluster)
    (folder / "backup_manifest").write_bytes(signed(older))
    with tarfile.open(folder / "base.tar", "w"):
        pass
    with pytest.raises(SourceError, match="holds no global/pg_control"):
        open_dropped(folder, system_id=cluster, segment_size=MB)
    (folder / "base.tar").unlink()
    with pytest.raises(SourceError, match=r"has no base\.tar"):
        open_dropped(folder, system_id=cluster, segment_size=MB)


def signed(manifest: bytes) -> bytes:
    """A changed manifest, with a checksum that fits again."""
    lines = manifest[: manifest.rindex(b'"Manifest-Checksum"')]
    return lines + b'"Manifest-Checksum": "' + hashlib.sha256(lines).hexdigest().encode() + b'"}\n'


def cut_and_look(folder: Path, name: str, position: int, cluster: str) -> None:
    whole = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(whole[:position])
        open_dropped(folder, system_id=cluster, segment_size=MB)
    finally:
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("method", ["gzip", "lz4", "zstd"])
def test_an_archive_that_is_cut_is_found_before_anything_is_shipped(
    server_folder: Path, start_server: StartServer, method: str
) -> None:
    server = start_server(segment_mb=1, settings={"wal_level": "replica"})
    folder, cluster = server_folder / "monday", system_id(server)
    server.run("pg_basebackup", "-Ft", "-D", str(folder), "-d", server.dsn(), "-c", "fast", "-Z", f"client-{method}")
    assert open_dropped(folder, system_id=cluster, segment_size=MB).system_id == cluster
    for path in folder.glob("*.tar*"):
        with pytest.raises(SourceError, match=r"the base backup in .* cannot be read: "):
            cut_and_look(folder, path.name, path.stat().st_size * 9 // 10, cluster)


def test_a_dropped_backup_is_dated_when_it_was_taken(server_folder: Path, start_server: StartServer) -> None:
    """By the server's clock where it can be, and never as if it had ended earlier than it did."""
    # A zone whose abbreviation means several: the START TIME in the label must not be what is read.
    server = start_server(segment_mb=1, settings={"wal_level": "replica", "log_timezone": "Asia/Kolkata"})
    folder, cluster = server_folder / "monday", system_id(server)
    before = datetime.now(UTC).replace(microsecond=0)
    server.run("pg_basebackup", "-Ft", "-D", str(folder), "-d", server.dsn(), "-c", "fast", "-z")
    after = datetime.now(UTC)
    backup = open_dropped(folder, system_id=cluster, segment_size=MB)
    assert backup.started
    assert backup.stopped
    assert before <= backup.started <= backup.stopped <= after
    # A copy that was made later, file by file: the latest counts.
    late = (folder / "base.tar.gz").stat().st_mtime + 50
    os.utime(folder / "base.tar.gz", (late, late))
    again = open_dropped(folder, system_id=cluster, segment_size=MB)
    assert again.started == backup.started
    assert again.stopped == datetime.fromtimestamp(late, UTC)
    for path in folder.iterdir():
        os.utime(path, (1_000_000, 1_000_000))
    assert open_dropped(folder, system_id=cluster, segment_size=MB).stopped is None, "the clock of the reader, then"
