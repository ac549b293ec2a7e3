"""A repository that is made by hand: no server, and yet a base backup and WAL of two timelines, small and complete."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from handlers.base_backup import Cluster, take
from handlers.fetch import Fetcher
from infra.keys import Policy, RepositoryKeys
from infra.restore import Repository
from infra.settings import Settings
from infra.storage.retry import AT_ONCE, Retrying
from pipeline.backup import ArchiveBegan, ArchiveData, BackupMessage, BackupStarted, BackupStopped, ManifestData
from pipeline.backup import Tablespace as Space
from pipeline.catalog import wal_key
from pipeline.contracts import Store
from pipeline.wal import Lsn, WalFile
from tests.clock import FastClock
from tests.parts import Shelf
from tests.tails import lay
from tests.waldata import SEGMENT_SIZE, SYSTEM_ID, Writer


@dataclass
class Made:
    """Two timelines, a backup in five archives on the first, and every WAL file as the server has to get it.

    The last segment is still open: what is stored of it are tails.
    """

    shelf: Shelf
    #: Path in the data directory → content.
    files: dict[str, bytes]
    wal: dict[str, bytes] = field(default_factory=dict)

    def repository(self, *stores: Store) -> Repository:
        """At these destinations, the first is read first."""
        patient = tuple(Retrying(store, FastClock(), AT_ONCE) for store in stores)
        fetch = Fetcher(patient, self.shelf.chain, self.shelf.system_id)
        keys = RepositoryKeys(self.shelf.system_id, None, Policy(wal=False, base=False), store=None,
                              allow_unencrypted=False)  # fmt: skip
        names = tuple(store.name for store in stores)
        return Repository(Settings(), names, patient, self.shelf.system_id, keys, fetch, FastClock(), False)


#: As ``fetch-wal``, which only a feed that is gone makes the script call: the answer that ends a recovery.
NO_FETCH = ("/bin/sh", "-c", "exit 44")
SPACES = tuple(Space(oid, f"pg_tblspc/{oid}") for oid in range(16384, 16388))


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o600
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def manifest(files: dict[str, bytes], start: Lsn, stop: Lsn) -> bytes:
    """As PostgreSQL 17 writes it."""
    lines = [
        json.dumps({
            "Path": path, "Size": len(content), "Last-Modified": "2026-01-14 12:00:00 GMT",
            "Checksum-Algorithm": "SHA256", "Checksum": hashlib.sha256(content).hexdigest(),
        })
        for path, content in files.items()
    ]  # fmt: skip
    text = (
        f'{{ "PostgreSQL-Backup-Manifest-Version": 2,\n"System-Identifier": {SYSTEM_ID},\n"Files": [\n'
        + ",\n".join(lines)
        + f'\n],\n"WAL-Ranges": [\n{{ "Timeline": 1, "Start-LSN": "{start}", "End-LSN": "{stop}" }}\n],\n'
    ).encode()
    return text + f'"Manifest-Checksum": "{hashlib.sha256(text).hexdigest()}"}}\n'.encode()


def segment(number: int, timeline: int = 1) -> WalFile:
    return WalFile.segment(timeline, Lsn(number * SEGMENT_SIZE), SEGMENT_SIZE)


#: Its name; only tails of it are stored.
OPEN = segment(6, 2)


async def build(relation: bytes = bytes(range(256)) * 400) -> Made:
    """``relation``: what the one table of each archive holds."""
    shelf = Shelf(str(SYSTEM_ID))
    writers = {number: Writer(number * SEGMENT_SIZE) for number in (2, 3, 4)}
    start = Lsn(writers[2].add(b"the backup begins"))
    writers[2].add(b"the backup ends")
    stop = Lsn(writers[2].position)
    for number, writer in writers.items():
        writer.add(b"on both timelines %d" % number)
    fork = Lsn(writers[4].position)
    after = copy.deepcopy(writers[4])
    after.timeline = 2
    later, still_open = (Writer(number * SEGMENT_SIZE, timeline=2) for number in (5, 6))
    for writer, data in ((writers[4], b"left behind"), (after, b"on timeline 2"), (later, b"the last whole one")):
        writer.add(data)
    content = {segment(number): writer for number, writer in writers.items()}
    content |= {segment(4, 2): after, segment(5, 2): later}
    made = Made(shelf, {})
    for file, writer in content.items():
        writer.add(rmid=0, info=0x40)
        made.wal[file.name] = writer.segment()
    made.wal["00000002.history"] = f"1\t{fork}\tno recovery target specified\n".encode()
    base = {"PG_VERSION": b"17\n", "base/1/1259": relation, "global/pg_control": b"c" * 8192}
    archives = {"base": base} | {
        str(space.oid): {"PG_17_202406281/5/1": str(space.oid).encode() + relation} for space in SPACES
    }
    for name, files in archives.items():
        made.files |= {path if name == "base" else f"pg_tblspc/{name}/{path}": c for path, c in files.items()}

    async def messages() -> AsyncIterator[BackupMessage]:
        yield BackupStarted(start, 1, SPACES, 1000)
        for name, files in archives.items():
            yield ArchiveBegan(name)
            yield ArchiveData(tar(files))
        yield ManifestData(manifest(made.files, start, stop))
        yield BackupStopped(stop, 1)

    async def safe(_start: Lsn, _stop: Lsn, _timeline: int) -> None:
        pass

    cluster = Cluster(shelf.system_id, 170011, SEGMENT_SIZE)
    await take(messages(), ship=shelf, cluster=cluster, wal_safe=safe, clock=FastClock())
    for name, data in made.wal.items():
        parsed = WalFile.parse(name)
        assert parsed is not None
        await shelf(wal_key(parsed), data)
    for data in (b"in the first tail" * 100, b"in the second" * 100, b"in the third" * 100):
        still_open.add(data)
    size, whole = len(still_open.bytes), still_open.segment()
    await lay(shelf.store, shelf.chain, OPEN, whole, [(0, 1500), (1500, 2500), (2500, size)])
    made.wal[OPEN.name] = whole
    return made
