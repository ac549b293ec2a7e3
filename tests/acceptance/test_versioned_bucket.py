"""A bucket that keeps every version and lets nobody delete any: tails come and go there as everywhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.demo.seaweed import Seaweed
from infra.postgres.throwaway import make_folder
from tests.acceptance.test_stream_bad_days import restored
from tests.acceptance.test_two_writers import events
from tests.rig import Rig
from tests.servers import NEWEST
from tests.stores import s3_client, versioned_bucket


@pytest.fixture
def folder() -> Iterator[Path]:
    made = make_folder("walship-v-")
    yield made
    shutil.rmtree(made)


def test_a_bucket_that_keeps_every_version(folder: Path, seaweed: Seaweed, s3_prefix: str) -> None:
    bucket = versioned_bucket(seaweed, "locked", locked=True)
    client = s3_client(seaweed)

    def listed(kind: str) -> list[str]:
        """Keys of tails: those that are there, or ``Versions`` and ``DeleteMarkers`` of all that ever were."""
        asked = {"Bucket": bucket, "Prefix": f"{s3_prefix}/"}
        answer = client.list_objects_v2(**asked) if kind == "Contents" else client.list_object_versions(**asked)
        return sorted(entry["Key"] for entry in answer.get(kind, []) if "/tail/" in entry["Key"])

    settings = {**seaweed.environment, "WALSHIP_TAIL_INTERVAL": "0.1"}
    url = seaweed.url(s3_prefix, bucket=bucket)
    with Rig(folder, NEWEST, [url], settings=settings, sources="stream") as rig:
        rig.server.start()
        rig.sql("create table t (n int)")
        rig.run("init")
        service = rig.serve()
        rig.json("backup")
        for n in range(3):
            rig.sql(f"insert into t values ({n})")
            rig.caught_up()
            rig.sql("select pg_switch_wal()")
        rig.sql("insert into t values (3)")
        rig.caught_up()
        ((open_segment,),) = rig.sql("select pg_walfile_name(pg_current_wal_lsn())")
        rig.wait(lambda: all(f"/tail/{open_segment}/" in key for key in listed("Contents")), "finished ones are gone")
        # The deletes were logical: what they cost there is what docs/durability.md says.
        kept = {key for key in listed("Versions") if f"/tail/{open_segment}/" not in key}
        assert kept
        assert kept == {key for key in listed("DeleteMarkers") if f"/tail/{open_segment}/" not in key}
        assert not events(rig, "delete_refused"), "a delete without a version is allowed under any lock"
        assert not events(rig, "destination_failed")
        assert not events(rig, "destination_hampered"), "put-if-absent holds there"
        check = rig.run("check").stdout
        assert "conditional put: the store itself" in check
        assert "the bucket keeps versions, each locked for 1 day (COMPLIANCE), and no lifecycle rule" in check
        rig.destroy(service)
        assert restored(rig, "select n from t order by n")[0] == [(0,), (1,), (2,), (3,)]
        listing = rig.json("list")
        assert len(listing["backups"]) == 1
        assert listing["windows"][-1]["tail_bytes"] > 0
        assert rig.json("verify")["ok"]
        version = next(
            entry
            for entry in client.list_object_versions(Bucket=bucket, Prefix=f"{s3_prefix}/")["Versions"]
            if "/wal/" in entry["Key"]
        )
        with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
            client.delete_object(Bucket=bucket, Key=version["Key"], VersionId=version["VersionId"])
