"""The frozen samples of format 1: every later walship reads them, and so does the rescue script, without walship."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from handlers.checksum import check_stored
from handlers.compress import CODECS
from handlers.encrypt import CIPHERS
from handlers.fetch import Fetcher
from infra.keys import RepositoryKeys, open_keyring
from infra.ring import open_ring
from infra.storage.memory import MemoryStore
from pipeline.backup import BackupInfo
from pipeline.chain import Expected
from pipeline.objects import MemoryBody
from pipeline.tail import TailName
from tests.clock import FastClock
from tests.keys import chain, plain_keys
from tests.vectors.make import BACKUP, ENCRYPTED, FOLDER, OPEN, OPEN_END, PLAIN, checksums, open_end

RESCUE = Path(__file__).parents[2] / "docs" / "rescue.py"
ABOUT: dict[str, Any] = json.loads((FOLDER / "samples.json").read_text("utf-8"))
OBJECTS: list[dict[str, Any]] = ABOUT["objects"]
PASSPHRASE: str = ABOUT["passphrases"][0]


def test_the_samples_are_the_ones_that_were_frozen() -> None:
    """A sample that is made anew is another sample: this fails, and then the format, or somebody, has changed."""
    assert (FOLDER / "SHA256SUMS").read_text("ascii").splitlines() == checksums().splitlines()


def test_there_is_a_sample_of_every_codec_and_cipher() -> None:
    assert {(o["codec"], "none") for o in OBJECTS if o["cipher"] == "none"} == {(codec, "none") for codec in CODECS}
    assert {o["cipher"] for o in OBJECTS if o["codec"] == "zstd"} == set(CIPHERS)


@functools.cache
def load(cluster: str) -> MemoryStore:
    store = MemoryStore(cluster)
    for path in (FOLDER / cluster).rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            name = path.relative_to(FOLDER / cluster).as_posix()
            store._objects[name] = (content, FastClock().now())
    return store


@pytest.fixture(scope="module")
def keys() -> RepositoryKeys:
    """The encrypted repository, opened by what a restored server has: so that scrypt runs once, in its own test."""
    secrets = {ABOUT["data_key"]["id"]: ABOUT["data_key"]["secret"]}
    policy = {"wal": True, "base": True}
    document = {"walship_restore_keys": 1, "system_id": ENCRYPTED, "policy": policy, "keys": secrets,
                "ring": "", "number": 0, "identity": ""}  # fmt: skip
    return RepositoryKeys.from_restore_keys(json.dumps(document).encode())


@pytest.mark.parametrize("sample", OBJECTS, ids=lambda o: f"{o['codec']}-{o['cipher']}-{o['plain_size']}")
def test_walship_reads_every_sample(sample: dict[str, Any], keys: RepositoryKeys) -> None:
    stored = (FOLDER / sample["cluster"] / sample["name"]).read_bytes()
    chosen = chain(keys if sample["cluster"] == ENCRYPTED else plain_keys(), system_id=sample["cluster"])
    expected = Expected(sample["name"], sample["cluster"], sample["backup"])
    header, plain = chosen.decode(expected, [stored])
    assert (header.codec, header.cipher) == (sample["codec"], sample["cipher"])
    assert hashlib.sha256(plain).hexdigest() == sample["plain_sha256"]
    assert check_stored(sample["name"], [stored])[1] == sample["digest"]


async def test_the_tails_are_joined_as_they_were(keys: RepositoryKeys) -> None:
    fetch = Fetcher([load(ENCRYPTED)], chain(keys, system_id=ENCRYPTED), ENCRYPTED)
    made = await fetch.tail(OPEN, 1 << 24)
    assert made is not None
    assert (made.reach, made.notices) == (OPEN_END, ())
    assert made.content == open_end().ljust(1 << 24, b"\0")


@pytest.mark.parametrize("passphrase", ABOUT["passphrases"])
async def test_each_passphrase_opens_the_ring(passphrase: str) -> None:
    keys = await open_keyring(load(ENCRYPTED), ENCRYPTED, passphrase, clock=FastClock())
    assert keys.find(ABOUT["data_key"]["id"]).secret.hex() == ABOUT["data_key"]["secret"]
    assert (keys.policy.wal, keys.policy.base) == (True, True)


async def test_the_recipient_opens_the_ring() -> None:
    name = "keys/ring-00000001"
    stored = (FOLDER / ENCRYPTED / name).read_bytes()
    plain = chain(plain_keys(), system_id=ENCRYPTED).decode(Expected(name, ENCRYPTED), [stored])[1]
    ring = open_ring(name, 1, ENCRYPTED, bytes(plain), identity=bytes.fromhex(ABOUT["recipient"]))
    assert ring is not None
    assert ring.policy.base


async def test_backup_info_is_still_understood(keys: RepositoryKeys) -> None:
    name = f"base/{BACKUP}/backup_info"
    stored = (FOLDER / ENCRYPTED / name).read_bytes()
    plain = chain(keys, system_id=ENCRYPTED).decode(Expected(name, ENCRYPTED, None), [stored])[1]
    info = BackupInfo.decode(name, plain)
    assert [(a.name, a.size, len(a.parts)) for a in info.archives] == [("base", 2600, 2), ("16384", 180, 1)]
    assert str(info.start_lsn) == "0/2000028"


def rescue(folder: Path, *args: str | Path, passphrase: str = PASSPHRASE) -> subprocess.CompletedProcess[str]:
    """Run the script as a person would who has no walship: nothing of the project can be imported."""
    environment = {"PATH": os.environ["PATH"], "BACKUP_ENCRYPTION_PASSWORD": passphrase, "PYTHONUTF8": "1"}
    command = [sys.executable, "-P", RESCUE, folder, *args]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=60)


def test_rescue_imports_nothing_of_walship() -> None:
    text = RESCUE.read_text("utf-8")
    assert not any(
        f"{word} {room}" in text for word in ("import", "from") for room in ("pipeline", "handlers", "infra")
    )


@pytest.mark.parametrize("cluster", [ENCRYPTED, PLAIN])
def test_rescue_reads_all_wal(cluster: str, tmp_path: Path) -> None:
    done = rescue(FOLDER / cluster, "wal", tmp_path / "out")
    told = f"{OPEN}: {OPEN_END} bytes from tails\n" if cluster == ENCRYPTED else ""
    assert (done.returncode, done.stderr) == (0, told)
    samples = {
        o["name"].rsplit("/", 1)[1]: o["plain_sha256"]
        for o in OBJECTS
        if o["cluster"] == cluster and o["name"].startswith("wal/")
    }
    if cluster == ENCRYPTED:
        samples[OPEN.name] = hashlib.sha256(open_end().ljust(16 << 20, b"\0")).hexdigest()
    assert {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (tmp_path / "out").iterdir()} == samples


def test_rescue_lists_joins_and_decodes(tmp_path: Path) -> None:
    folder = FOLDER / ENCRYPTED
    listed = rescue(folder, "list")
    assert listed.returncode == 0
    for words in ("keys/ring-00000001", "full backup from 0/2000028 to 0/2000120", "archive base: 2600 bytes of tar"):
        assert words in listed.stdout
    joined = rescue(folder, "archive", BACKUP, "base", tmp_path / "base.tar", passphrase=ABOUT["passphrases"][1])
    assert (joined.returncode, joined.stderr) == (0, "")
    assert (tmp_path / "base.tar").read_bytes() == b"tar of the data directory " * 100
    got = rescue(folder, "get", f"base/{BACKUP}/backup_manifest", tmp_path / "manifest")
    assert got.returncode == 0
    assert (tmp_path / "manifest").read_bytes() == b"{}\n"


def test_rescue_joins_tails_up_to_what_is_lost_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / ENCRYPTED
    shutil.copytree(FOLDER / ENCRYPTED, folder)
    about = {"segment_size": 1 << 20, "format": 1, "system_id": ENCRYPTED}
    (folder / "repository.json").write_text(json.dumps(about))
    middle = TailName(OPEN, 1, 4096, 10_000).key
    damaged(folder, middle)
    done = rescue(folder, "wal", tmp_path / "out")
    assert done.returncode == 0
    assert f"{OPEN}: 5000 bytes from tails" in done.stderr
    assert f"passed over: {middle}: damaged" in done.stderr
    assert f"{TailName(OPEN, 2, 9000, OPEN_END).key} and 0 others lie behind a hole at offset 5000" in done.stderr
    assert (tmp_path / "out" / OPEN.name).read_bytes() == open_end()[:5000].ljust(1 << 20, b"\0")


def damaged(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-40] ^= 1
    (folder / name).write_bytes(content)


def test_rescue_refuses_what_walship_refuses(tmp_path: Path) -> None:
    folder = tmp_path / ENCRYPTED
    shutil.copytree(FOLDER / ENCRYPTED, folder)
    wrong = rescue(folder, "list", passphrase="wrong")
    assert wrong.returncode == 1
    assert "the passphrase does not open keys/ring-00000001" in wrong.stderr
    first, second = (f"base/{BACKUP}/data/base/0000000{n}" for n in (1, 2))
    damaged(folder, first)
    refused = rescue(folder, "archive", BACKUP, "base", tmp_path / "base.tar")
    assert refused.returncode == 1
    assert f"{first}: damaged" in refused.stderr
    shutil.copy(folder / second, folder / first)
    assert "it is another object" in rescue(folder, "get", first, tmp_path / "x").stderr
    name = next(o["name"] for o in OBJECTS if o["cluster"] == PLAIN)
    forged = chain(plain_keys(), "zstd", system_id=ENCRYPTED).encode(name, b"forged", created=FastClock().now())
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"".join(bytes(piece) for piece in forged))
    assert "it is not encrypted, and this repository encrypts" in rescue(folder, "get", name, tmp_path / "y").stderr


def test_what_rescue_joins_is_a_tar(tmp_path: Path) -> None:
    """On a repository with a real tar in two parts, stored plain."""
    tar = tmp_path / "made.tar"
    (tmp_path / "PG_VERSION").write_text("17\n")
    with tarfile.open(tar, "w") as made:
        made.add(tmp_path / "PG_VERSION", "PG_VERSION")
    content = tar.read_bytes()
    keys = plain_keys()
    folder = tmp_path / "copy" / keys._system_id
    digests = []
    for number, part in enumerate((content[:700], content[700:]), 1):
        digests.append(store(keys, folder, f"base/b/data/base/{number:08d}", part))
    info = {"id": "aa", "archives": [{"name": "base", "size": len(content), "parts": digests}]}
    store(keys, folder, "base/b/backup_info", json.dumps(info).encode())
    done = rescue(tmp_path / "copy", "archive", "b", "base", tmp_path / "joined.tar")
    assert (done.returncode, done.stderr) == (0, "")
    with tarfile.open(tmp_path / "joined.tar") as joined:
        assert joined.getnames() == ["PG_VERSION"]


def store(keys: RepositoryKeys, folder: Path, name: str, plain: bytes) -> str:
    body = MemoryBody([bytes(p) for p in chain(keys).encode(name, plain, backup="aa", created=FastClock().now())])
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"".join(body.chunks()))
    return (folder / name).read_bytes()[-32:].hex()
