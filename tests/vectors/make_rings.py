"""Write the frozen samples of key rings anew: ``python -m tests.vectors.make_rings``.

STOP, for the same reasons as in ``make``. They are of format 1, and stand beside its first samples because these are
never made again: a repository whose key was replaced. Ring 1 has a passphrase. Ring 2 is of a new repository key and
holds the former one; two passphrases, a recipient and the label of it open it, and a kind of wrap that nobody knows.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from infra.key_objects import key_object
from infra.keyring import RepositoryKeys
from infra.recipients import make_identity, parse_identity, show_recipient
from infra.ring import Former, Policy, Ring, fresh_ring, ring_name, seal_ring
from infra.sealing import public_of
from infra.wraps import label_of
from pipeline.catalog import wal_key
from pipeline.wal import WalFile
from tests.keys import chain, stored

FOLDER = Path(__file__).parent / "format-1-rings"
CLUSTER = "7590000000000000003"
FIRST, SECOND, THIRD = "the passphrase of the first ring", "the passphrase of the sécond ring", "another of the second"
LABEL = "the safe in Bern"
NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
#: What opening a wrap of these samples costs: nobody's secrets are in them.
SCRYPT_N = 1024
#: Segment → what it holds, by the repository key that it was written under.
BEFORE, AFTER = (WalFile.segment(1, number << 24, 1 << 24) for number in (1, 2))


def text(file: WalFile) -> bytes:
    return f"the content of {file}\n".encode() * 50


async def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    public = make_identity(FOLDER / "recipient.key", NOW)
    first = fresh_ring(CLUSTER, Policy(wal=True, base=True))
    write_ring(first, seal_ring(first, [FIRST], [], NOW, scrypt_n=SCRYPT_N))
    old = write_segment(first, BEFORE)
    former = Former(first.private_key, first.writer_secret, frozenset([old]))
    second = replace(fresh_ring(CLUSTER, first.policy), number=2, former=(former,))
    carried = [label_of(public, LABEL), {"kind": "of a walship to come", "slot": 9}]
    write_ring(second, seal_ring(second, [SECOND, THIRD], [public], NOW, carried=carried, scrypt_n=SCRYPT_N))
    new = write_segment(second, AFTER)
    identity = parse_identity((FOLDER / "recipient.key").read_text("utf-8"), "")
    assert public_of(identity) == public
    about = {
        "passphrases": {"1": [FIRST], "2": [SECOND, THIRD]},
        "recipient": show_recipient(public),
        "label": LABEL,
        "data_keys": {"1": old, "2": new},
        "segments": {wal_key(file): hashlib.sha256(text(file)).hexdigest() for file in (BEFORE, AFTER)},
    }
    (FOLDER / "samples.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (FOLDER / "SHA256SUMS").write_text(checksums(), "ascii")


def checksums() -> str:
    """One line for each sample, as sha256sum writes and reads them."""
    files = sorted(f for f in FOLDER.rglob("*") if f.is_file() and f.name != "SHA256SUMS")
    return "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(FOLDER).as_posix()}\n" for f in files)


def write_ring(ring: Ring, content: bytes) -> None:
    name = ring_name(ring.number)
    write(name, b"".join(key_object(name, CLUSTER, content, NOW).chunks()))


def write_segment(ring: Ring, file: WalFile) -> str:
    """A segment, and the data key that it is encrypted under; the id of that."""
    keys = RepositoryKeys(CLUSTER, ring, ring.policy, store=None, allow_unencrypted=False)
    keys._begin_writing(ring, NOW)
    assert keys.key_object is not None
    name, body = keys.key_object
    write(name, b"".join(body.chunks()))
    write(wal_key(file), stored(chain(keys, "zstd", "aes-256-gcm", CLUSTER), wal_key(file), text(file)))
    return keys.current().id


def write(name: str, content: bytes) -> None:
    path = FOLDER / CLUSTER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


if __name__ == "__main__":
    asyncio.run(main())
