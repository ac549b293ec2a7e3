"""The frozen samples of key rings: whoever opens the newest one reads what was written under the former key as well."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.at_hand import AtHand
from infra.key_report import look_at_keys
from infra.keys import open_keyring
from infra.recipients import make_identity, parse_identity, parse_recipient, show_recipient
from infra.sealing import public_of
from infra.storage.memory import MemoryStore
from pipeline.errors import ConfigError
from tests.clock import FastClock
from tests.keys import chain, read
from tests.vectors.make_rings import CLUSTER, FOLDER, checksums
from tests.vectors.test_format_1 import RESCUE

ABOUT: dict[str, Any] = json.loads((FOLDER / "samples.json").read_text("utf-8"))
KEY_FILE = FOLDER / "recipient.key"
IDENTITY = parse_identity(KEY_FILE.read_text("utf-8"), "")
FIRST, (SECOND, THIRD) = ABOUT["passphrases"]["1"][0], ABOUT["passphrases"]["2"]


def load() -> MemoryStore:
    store = MemoryStore("frozen")
    for path in (FOLDER / CLUSTER).rglob("*"):
        if path.is_file():
            store._objects[path.relative_to(FOLDER / CLUSTER).as_posix()] = (path.read_bytes(), FastClock().now())
    return store


def test_the_samples_are_the_ones_that_were_frozen() -> None:
    assert (FOLDER / "SHA256SUMS").read_text("ascii").splitlines() == checksums().splitlines()


@pytest.mark.parametrize("at_hand", [AtHand(SECOND), AtHand(THIRD), AtHand(identity=IDENTITY)])
async def test_whoever_opens_the_newest_ring_reads_all(at_hand: AtHand) -> None:
    store = load()
    keys = await open_keyring(store, CLUSTER, at_hand, clock=FastClock())
    for name, digest in ABOUT["segments"].items():
        plain = read(chain(keys, system_id=CLUSTER), name, store._objects[name][0], system_id=CLUSTER)
        assert hashlib.sha256(plain).hexdigest() == digest
    assert keys.data_keys == {ABOUT["data_keys"]["1"]: 1, ABOUT["data_keys"]["2"]: 2}


async def test_the_first_passphrase_opens_the_first_ring_alone() -> None:
    store = load()
    with pytest.raises(ConfigError, match="does not open the key ring keys/ring-00000002"):
        await open_keyring(store, CLUSTER, FIRST, clock=FastClock())
    await store.delete(["keys/ring-00000002", f"keys/data-{ABOUT['data_keys']['2']}"])
    assert (await open_keyring(store, CLUSTER, FIRST, clock=FastClock())).encrypted


async def test_the_recipient_and_its_label() -> None:
    assert show_recipient(public_of(IDENTITY)) == ABOUT["recipient"]
    report = await look_at_keys([load()], CLUSTER, AtHand(identity=IDENTITY))
    assert report.newest is not None
    assert report.newest.recipients == {parse_recipient(ABOUT["recipient"]): ABOUT["label"]}
    assert (report.newest.passphrases, report.newest.strange, report.former) == (2, 1, 1)
    assert report.problems == []


def rescue(*args: str | Path, passphrase: str = "") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "BACKUP_ENCRYPTION_PASSWORD": passphrase, "PYTHONUTF8": "1"}
    command = [sys.executable, "-P", RESCUE, FOLDER / CLUSTER, *args]
    return subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize("with_identity", [True, False])
def test_rescue_reads_all_with_a_passphrase_or_a_private_key(tmp_path: Path, with_identity: bool) -> None:
    options = ("--identity-file", KEY_FILE) if with_identity else ()
    done = rescue("wal", tmp_path / "out", *options, passphrase="" if with_identity else THIRD)
    assert (done.returncode, done.stderr) == (0, "")
    found = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (tmp_path / "out").iterdir()}
    assert found == {name.rsplit("/", 1)[1]: digest for name, digest in ABOUT["segments"].items()}


def test_rescue_says_what_does_not_open(tmp_path: Path) -> None:
    assert "the passphrase does not open keys/ring-00000002" in rescue("list", passphrase=FIRST).stderr
    other = tmp_path / "other.key"
    make_identity(other, FastClock().now())
    assert "the private key opens no wrap of keys/ring-00000002" in rescue("list", "--identity-file", other).stderr
    other.write_text(KEY_FILE.read_text("utf-8").replace("walship-identity-1-", "walship-identity-1-a"))
    assert "holds no private key of a recipient" in rescue("list", "--identity-file", other).stderr
