"""Write the frozen samples of format 1 anew: ``python -m tests.vectors.make``.

STOP. Running this means that the stored format has changed, and that repositories which exist cannot be read any more.
The samples are made once per format, with fresh random keys, and committed; every later version has to read them. A
change of the format is a new format number and a folder of samples *beside* this one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from handlers.checksum import Checksum
from handlers.compress import CODECS, Compress
from handlers.encrypt import CIPHERS, Encrypt
from infra.keys import Policy, RepositoryKeys, open_keyring
from infra.ring import fresh_ring, ring_name, seal_ring
from infra.storage.memory import MemoryStore
from pipeline.backup import ArchiveInfo, BackupInfo, Tablespace
from pipeline.catalog import index_key, info_key, manifest_key, part_key, wal_key
from pipeline.chain import Chain
from pipeline.objects import MemoryBody
from pipeline.tail import TailName
from pipeline.wal import Lsn, WalFile
from tests.clock import FastClock

FOLDER = Path(__file__).parent / "format-1"
#: A letter outside ASCII on purpose: both ways to write it have to open the ring.
PASSPHRASE = "correct horse battery stäple"
SECOND = "another passphrase of the same ring"
NOW = datetime(2026, 1, 14, 12, 0, 0, tzinfo=UTC)
BACKUP = "base_20260114_120000"
BACKUP_ID = "5f" * 16
ENCRYPTED = "7590000000000000001"
PLAIN = "7590000000000000002"


def samples(codec: str, cipher: str) -> dict[str, bytes]:
    """Plaintexts by name. Two ciphers also get one of two chunks, which must be incompressible and so is large."""
    chosen = {"empty": b"", "text": b"walship ships WAL\n" * 400}
    if codec != "none" and cipher == "none":
        chosen["expands"] = bytes(3 << 20)
    if cipher in ("chacha20-poly1305", "aes-192-cbc"):
        chosen["two chunks"] = random.Random(1).randbytes((1 << 20) + 1000)
    return chosen


async def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    clock = FastClock()
    store = MemoryStore()
    recipient = X25519PrivateKey.generate()
    ring = fresh_ring(ENCRYPTED, Policy(wal=True, base=True))
    sealed = seal_ring(ring, [PASSPHRASE, SECOND], [recipient.public_key().public_bytes_raw()], NOW)
    nobody = await open_keyring(MemoryStore(), ENCRYPTED, "", clock=clock)
    encode(nobody, ENCRYPTED, "none", "none", ring_name(1), sealed)
    await store.put(ring_name(1), MemoryBody([(FOLDER / ENCRYPTED / ring_name(1)).read_bytes()]))
    keys = await open_keyring(store, ENCRYPTED, PASSPHRASE, writer=True, clock=clock)
    assert keys.key_object is not None
    await store.put(*keys.key_object)
    async for info in store.list(""):
        write(ENCRYPTED, info.key, b"".join((await store.get(info.key)).chunks()))
    plain = await open_keyring(MemoryStore(), PLAIN, "", clock=clock)
    objects = [
        *[sample for cipher in CIPHERS if cipher != "none" for sample in wal(keys, ENCRYPTED, "zstd", cipher)],
        *[sample for codec in CODECS for sample in wal(plain, PLAIN, codec, "none")],
        *backup(keys),
        *tails(keys),
    ]
    about = {
        "passphrases": [PASSPHRASE, SECOND],
        "recipient": recipient.private_bytes_raw().hex(),
        "data_key": {"id": keys.current().id, "secret": keys.current().secret.hex()},
        "objects": objects,
    }
    (FOLDER / "samples.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (FOLDER / "SHA256SUMS").write_text(checksums(), "ascii")


def checksums() -> str:
    """One line for each sample, as sha256sum writes and reads them."""
    files = sorted(f for f in FOLDER.rglob("*") if f.is_file() and f.name != "SHA256SUMS")
    return "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(FOLDER).as_posix()}\n" for f in files)


def wal(keys: RepositoryKeys, cluster: str, codec: str, cipher: str) -> Iterator[dict[str, str | int]]:
    for sample, plain in samples(codec, cipher).items():
        number = (CODECS.index(codec) << 8) + (CIPHERS.index(cipher) << 4) + len(sample)
        file = WalFile.segment(1, number << 24, 1 << 24)
        yield encode(keys, cluster, codec, cipher, wal_key(file), plain) | {"sample": sample}


def backup(keys: RepositoryKeys) -> Iterator[dict[str, str | int]]:
    """A base backup of two archives, the first of them in two parts."""
    archives: list[ArchiveInfo] = []
    for archive, content in (("base", b"tar of the data directory " * 100), ("16384", b"tar of a tablespace " * 9)):
        parts = [content[:1000], content[1000:]] if len(content) > 1000 else [content]
        made = [
            encode(keys, ENCRYPTED, "zstd", "aes-256-gcm", part_key(BACKUP, archive, number), part, BACKUP_ID)
            for number, part in enumerate(parts, 1)
        ]
        yield from made
        archives.append(ArchiveInfo(archive, len(content), tuple(str(part["digest"]) for part in made)))
    line = {"archive": "base", "path": "PG_VERSION", "size": 3, "offset": 0, "part": 1, "part_offset": 512, "length": 3}
    index = encode(
        keys, ENCRYPTED, "zstd", "aes-256-gcm", index_key(BACKUP, 1), json.dumps(line).encode() + b"\n", BACKUP_ID
    )
    manifest = encode(keys, ENCRYPTED, "zstd", "aes-256-gcm", manifest_key(BACKUP), b"{}\n", BACKUP_ID)
    info = BackupInfo(
        name=BACKUP, id=BACKUP_ID, kind="full", system_id=ENCRYPTED, server_version=170011, segment_size=1 << 24,
        timeline=1, start_lsn=Lsn(0x2000028), stop_lsn=Lsn(0x2000120), started=NOW, stopped=NOW,
        tablespaces=(Tablespace(16384, "/srv/fast"),), archives=tuple(archives), index=(str(index["digest"]),),
        manifest=str(manifest["digest"]), stored_size=5000, label="START WAL LOCATION: 0/2000028\n",
    )  # fmt: skip
    yield index
    yield manifest
    yield encode(keys, ENCRYPTED, "zstd", "aes-256-gcm", info_key(BACKUP), info.encode(), BACKUP_ID)


#: Of an open segment: the first bytes, and the ranges that two writers stored of them.
OPEN = WalFile.segment(2, 0x51 << 24, 1 << 24)
OPEN_END = 12_000
RANGES = ((1, 0, 4096), (1, 4096, 10_000), (2, 0, 5000), (2, 9000, OPEN_END))


def open_end() -> bytes:
    """What the tails hold together."""
    return random.Random(2).randbytes(OPEN_END)


def tails(keys: RepositoryKeys) -> Iterator[dict[str, str | int]]:
    """The open end of the WAL, in overlapping tails of two epochs."""
    for epoch, start, end in RANGES:
        plain = hashlib.sha256(open_end()[:start]).digest() + open_end()[start:end]
        yield encode(keys, ENCRYPTED, "zstd", "aes-256-gcm", TailName(OPEN, epoch, start, end).key, plain)


def encode(
    keys: RepositoryKeys, cluster: str, codec: str, cipher: str, name: str, plain: bytes, backup: str = ""
) -> dict[str, str | int]:
    """Store one sample; the line about it."""
    chain = Chain([Compress(codec), Encrypt(keys, lambda _name: cipher), Checksum()], keys, cluster)
    stored = b"".join(bytes(piece) for piece in chain.encode(name, plain, backup=backup, created=NOW))
    write(cluster, name, stored)
    return {
        "cluster": cluster,
        "name": name,
        "backup": backup,
        "codec": codec,
        "cipher": cipher,
        "plain_size": len(plain),
        "plain_sha256": hashlib.sha256(plain).hexdigest(),
        "digest": stored[-32:].hex(),
    }


def write(cluster: str, name: str, stored: bytes) -> None:
    path = FOLDER / cluster / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(stored)


if __name__ == "__main__":
    asyncio.run(main())
