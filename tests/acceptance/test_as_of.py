"""Somebody has deleted and replaced what is in the bucket, keys included; the bucket keeps versions."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.processes import give, run_as
from infra.postgres.throwaway import free_port
from tests.acceptance.conftest import Copy
from tests.rig import stop_started
from tests.stores import s3_client, versioned_bucket


def a_moment() -> str:
    """The next whole second, when it has come: what was stored until then is seen as of then."""
    moment = int(time.time()) + 1
    while time.time() < moment:
        time.sleep(0.02)
    return datetime.fromtimestamp(moment, UTC).isoformat()


@dataclass
class Bucket:
    """A bucket with versions: nothing in it as of ``empty``, a good repository as of ``before``, now what is left."""

    copy: Copy
    server: Seaweed
    name: str
    empty: str
    before: str

    def run(self, *words: str, expect: int = 0) -> Any:
        destination = {"WALSHIP_DESTINATIONS": self.server.url("pg", bucket=self.name)}
        return self.copy.run(*words, expect=expect, **destination, **self.server.environment)

    def content(self, prefix: str) -> dict[str, bytes]:
        """As ``content_of``."""
        client = s3_client(self.server)
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=self.name, Prefix=prefix)["Contents"]]
        return kept({key[len(prefix) :]: client.get_object(Bucket=self.name, Key=key)["Body"].read() for key in keys})

    def versions(self) -> int:
        answer = s3_client(self.server).list_object_versions(Bucket=self.name, Prefix="pg/")
        assert not answer["IsTruncated"]
        return len(answer["Versions"]) + len(answer["DeleteMarkers"])


@pytest.fixture
def bucket(copy: Copy, seaweed: Seaweed, s3_prefix: str) -> Bucket:
    """Of each kind the first object is replaced, and all others are deleted."""
    made = Bucket(copy, seaweed, versioned_bucket(seaweed, f"asof-{s3_prefix}", locked=True), a_moment(), "")
    client, names = s3_client(seaweed), content_of(copy.local)
    for name, content in names.items():
        client.put_object(Bucket=made.name, Key=f"pg/{name}", Body=content)
    made.before = a_moment()
    kinds: set[str] = set()
    for name in sorted(names):
        if (kind := re.sub("[0-9a-fA-F]{8,}", "", name)) in kinds:
            client.delete_object(Bucket=made.name, Key=f"pg/{name}")
        else:
            client.put_object(Bucket=made.name, Key=f"pg/{name}", Body=b"pay, or it is lost")
            kinds.add(kind)
    assert len(kinds) > 5, kinds
    return made


def content_of(folder: Path) -> dict[str, bytes]:
    """Names of objects below a local destination and what they hold; see ``kept``."""
    return kept({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()})


def kept(found: dict[str, bytes]) -> dict[str, bytes]:
    """Without what a copy adds or leaves behind."""
    return {name: content for name, content in found.items() if not re.search("/(log|use|lease|verified)/", name)}


def test_the_bucket_alone_brings_back_what_somebody_has_wrecked(bucket: Bucket, tmp_path: Path) -> None:
    copy, shipped = bucket.copy, bucket.copy.shipped
    left = bucket.versions()
    assert "repository.json" in bucket.run("list", expect=12).stderr
    as_of = ("--as-of", bucket.before)

    listing = json.loads(bucket.run("list", *as_of, "--json").stdout)
    assert listing == json.loads(copy.run("list", "--json").stdout)

    target = copy.local.parent / "target"
    target.mkdir(mode=0o700)
    give(target, run_as())
    words = ("restore", "--target-dir", str(target), *as_of)
    said = bucket.run(*words)
    assert "reading s3://" in said.stderr
    assert f"as of {bucket.before.replace('+00:00', 'Z')}" in said.stderr
    assert "mark" not in said.stderr
    assert "record" not in said.stderr
    # What a server would fetch by, if it were started by hand, is of the past as well.
    (context,) = target.rglob("context.json")
    segment = copy.segments()[-1].name
    for name, code in ((segment, 0), ("00000002.history", 44)):
        bucket.run("fetch-wal", name, str(tmp_path / name), "--context", str(context), expect=code)
    assert (tmp_path / segment).stat().st_size == 1 << 20

    port = str(free_port())
    try:
        bucket.run(*words, "--delta", "--yes", "--start", "--port", port)
        with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as connection:
            assert connection.execute("select count(*), max(n) from t").fetchone() == (shipped.rows, shipped.rows)
    finally:
        stop_started(target)

    assert json.loads(bucket.run("verify", *as_of, "--json").stdout)["ok"]
    assert "the past cannot be changed" in bucket.run("verify", *as_of, "--heal", expect=2).stderr
    assert "name a later moment" in bucket.run("list", "--as-of", bucket.empty, expect=2).stderr
    assert bucket.versions() == left, "nobody writes into what is looked at"

    mended = bucket.server.url("mended", bucket=bucket.name)
    bucket.run("copy", *as_of, "--from", bucket.server.url("pg", bucket=bucket.name), "--to", mended)
    assert bucket.content("mended/") == content_of(copy.local)

    # What expire says of such a bucket: the copy has left the object that it tried the target with, and its mark.
    changed: dict[str, Any] = {"WALSHIP_DESTINATIONS": mended, "WALSHIP_KEEP_LAST": "1", **bucket.server.environment}
    (found,) = json.loads(copy.run("expire", "--dry-run", "--json", **changed).stdout)["versions"].values()
    assert found["old_versions"] >= 1
    assert found["delete_markers"] >= 1
    assert (found["lock"], found["removed_by_lifecycle_rule"]) == ("COMPLIANCE", False)
    assert datetime.fromisoformat(found["locked_until"]) > datetime.now(UTC) + timedelta(hours=23)
    said = copy.run("expire", "--dry-run", **changed).stdout
    assert "mended keeps versions: " in said
    assert "the bucket's lock (COMPLIANCE) holds the last of them until 20" in said
    assert "no lifecycle rule ever removes them" in said


def test_a_folder_cannot_be_seen_as_it_was(copy: Copy) -> None:
    said = copy.run("list", "--as-of", "2 hours ago", expect=2).stderr
    assert f"keeps no versions: file://{copy.local} (a folder)" in said
    assert "2 hours ago was taken by the clock of this machine" in said
    standby = ("restore", "--target-dir", "/nowhere", "--standby", "--as-of", "2 hours ago")
    assert "--standby and --as-of contradict each other" in copy.run(*standby, expect=2).stderr
    assert "--as-of 'tomorrow' is not a time" in copy.run("list", "--as-of", "tomorrow", expect=2).stderr
