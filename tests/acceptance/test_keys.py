"""The database host writes what it cannot read, is restarted, is lost; and whoever has the private key restores.

And keys that are lost or leaked: what opens the repository then, and what does not any more.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from infra.postgres.throwaway import free_port, make_folder
from tests.acceptance.conftest import Copy
from tests.rig import PASSPHRASE, Rig, stop_started
from tests.servers import NEWEST

CONTENT = "select count(*), md5(string_agg(t::text, ',' order by n)) from t"


@pytest.fixture
def rig() -> Iterator[Rig]:
    folder = make_folder("walship-keys-")
    places = [f"file://{folder}/near", f"file://{folder}/far"]
    with Rig(
        folder, NEWEST, places, sources="watch,stream", server_settings={"summarize_wal": "on"},
        settings={"WALSHIP_TAIL_INTERVAL": "0.2"},
    ) as made:  # fmt: skip
        yield made
    shutil.rmtree(folder)


def test_a_host_that_only_writes(rig: Rig) -> None:
    rig.server.start()
    rig.run("init")
    identity, writer = rig.folder / "restore.key", rig.folder / "writer.json"
    recipient = rig.run("key", "new-identity", str(identity)).stdout.strip()
    rig.run("key", "add", "--recipient", recipient, "--label", "the safe")
    rig.run("key", "export-writer", str(writer))
    whole = dict(rig.extra)
    del rig.extra["BACKUP_ENCRYPTION_PASSWORD"]
    rig.extra["WALSHIP_WRITER_FILE"] = str(writer)

    # It ships, backs up, and goes on where it was after a restart, in the middle of a segment.
    service = rig.serve()
    rig.sql("create table t (n int primary key, filler text)")
    rig.json("backup")
    for number in range(3):
        rig.sql(f"insert into t select n, md5(n::text) from generate_series({number * 500}, {number * 500 + 499}) n")
        rig.caught_up()
        if number == 1:
            rig.stop(service)
            service = rig.serve()
    rig.json("switch")
    rig.sql("insert into t select n, md5(n::text) from generate_series(5000, 5099) n")
    rig.caught_up()
    assert "tails_passed_over" not in rig.service_log()
    assert '"level": "error"' not in rig.service_log()

    # What it can tell without reading, it does; the rest it refuses, and says who could.
    findings = rig.json("check")["findings"]
    assert "the writer file fits the key ring" in " ".join(finding["fact"] for finding in findings)
    status = rig.json("status")
    assert (status["reads"], status["recoverable"], status["unknown"]) == (False, None, [])
    assert status["healthy"], status["sentence"]
    assert all(place["last_backup"].startswith("base_") for place in status["destinations"])
    listed = rig.json("list")
    assert len(listed["sealed"]) == 1
    assert (listed["backups"], listed["problems"]) == ([], [])
    verified = rig.run("verify")
    assert not verified.stdout.startswith("0 objects")
    assert "this host can only write" in verified.stderr
    keys = rig.json("key", "list")
    assert keys["at_hand"] == {"passphrase": False, "identity": False, "writer": True}
    reading = [("restore", "--target-dir", str(rig.target())), ("backup", "--incremental"), ("key", "accept", "0")]
    for words in reading:
        refused = rig.run(*words, expect=2).stderr
        assert "this host can only write" in refused
        assert f"the private key of {recipient} (the safe)" in refused

    # The host is lost, and with it the destination on it. What is left of the keys is the private one.
    rows = rig.sql(CONTENT)
    rig.extra = whole
    rig.destinations = (f"file://{rig.folder}/near",)
    rig.destroy(service)
    writer.unlink()
    rig.extra |= {"WALSHIP_DESTINATIONS": f"file://{rig.folder}/far", "WALSHIP_IDENTITY_FILE": str(identity)}
    del rig.extra["BACKUP_ENCRYPTION_PASSWORD"]
    target, port = rig.target(), free_port()
    rig.run("restore", "--target-dir", str(target), "--start", "--port", str(port))
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
        assert connection.execute(CONTENT.encode()).fetchall() == rows
    stop_started(target)


def keys(copy: Copy, *words: str, expect: int = 0, **changed: str) -> Any:
    done = copy.run("key", *words, "--json", expect=expect, **changed)
    return json.loads(done.stdout)


def secret(folder: Path, text: str) -> str:
    path = folder / f"passphrase{len(list(folder.iterdir()))}"
    path.write_text(f"{text}\n")
    path.chmod(0o600)
    return str(path)


def test_a_passphrase_that_leaked(copy: Copy, tmp_path: Path) -> None:
    """All that is stored stays readable, for its owner; what is told is what that does not mend."""
    new, third = "a new passphrase, not told to anybody", "another passphrase of another day"
    done = keys(copy, "rotate", "--passphrase-file", secret(tmp_path, new))
    assert done["ring"] == 2
    assert "the rings before stay in the bucket" in " ".join(done["remarks"])
    refused = copy.run("list", expect=2).stderr
    assert "BACKUP_ENCRYPTION_PASSWORD does not open the key ring keys/ring-00000002" in refused
    done = keys(copy, "rotate", "--new-repository-key", "--passphrase-file", secret(tmp_path, third),
                BACKUP_ENCRYPTION_PASSWORD=new)  # fmt: skip
    assert done["ring"] == 3
    assert "what was stored before stays readable for whoever has the former key" in " ".join(done["remarks"])
    copy.run("verify", BACKUP_ENCRYPTION_PASSWORD=third)
    seen = keys(copy, "list", BACKUP_ENCRYPTION_PASSWORD=third)
    assert ([ring["ring"] for ring in seen["rings"]], seen["newest"]["former_keys"]) == ([1, 2, 3], 1)
    assert (seen["problems"], seen["refused_data_keys"]) == ([], [])
    history = json.loads(copy.run("history", "--verb", "key", "--json", BACKUP_ENCRYPTION_PASSWORD=third).stdout)
    assert [record["ok"] for record in history] == [True, True]
    assert not {new, third, PASSPHRASE} & set(json.dumps(history).split('"'))
    target = copy.rig.target()
    copy.run("restore", "--target-dir", str(target), "--dry-run", BACKUP_ENCRYPTION_PASSWORD=third)


def test_the_passphrase_is_lost_and_a_recipient_is_there(copy: Copy, tmp_path: Path) -> None:
    recipient = keys(copy, "new-identity", str(tmp_path / "safe.key"))["recipient"]
    keys(copy, "add", "--recipient", recipient)
    at_hand: Any = {"BACKUP_ENCRYPTION_PASSWORD": "", "WALSHIP_IDENTITY_FILE": str(tmp_path / "safe.key")}
    for nothing in ("", "forgotten"):
        lost = keys(copy, "list", BACKUP_ENCRYPTION_PASSWORD=nothing)
        assert not lost["opened"]
    assert [each["public_key"] for each in lost["newest"]["recipients"]] == [recipient]
    keys(copy, "add", "--passphrase-file", secret(tmp_path, "one that is written down"), **at_hand)
    copy.run("verify", BACKUP_ENCRYPTION_PASSWORD="one that is written down")
    refused = copy.run("key", "rotate", "--new-repository-key", expect=2,
                       **(at_hand | {"BACKUP_ENCRYPTION_PASSWORD": "mistyped, and to be none"}))  # fmt: skip
    assert "BACKUP_ENCRYPTION_PASSWORD does not open keys/ring-00000003" in refused.stderr
    # And the other way round: the private key is lost.
    keys(copy, "remove", "--recipient", recipient, BACKUP_ENCRYPTION_PASSWORD="one that is written down")
    assert "WALSHIP_IDENTITY_FILE does not open" in copy.run("list", expect=2, **at_hand).stderr
    at_hand = {"BACKUP_ENCRYPTION_PASSWORD": "one that is written down"}
    mistyped = copy.run("key", "add", "--recipient", recipient[:-1], expect=2, **at_hand)
    assert "the recipient's public key is mistyped" in mistyped.stderr
