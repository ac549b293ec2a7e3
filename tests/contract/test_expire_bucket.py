"""Expire where deleting is not the end: a bucket with versions, and one whose objects are locked for a day."""

from __future__ import annotations

import pytest

from infra.demo.seaweed import Seaweed
from infra.storage.memory import MemoryStore
from infra.storage.rooted import Rooted
from pipeline.policy import Policy
from tests.expiring import expired, names, small
from tests.stores import s3_client, s3_store, versioned_bucket


@pytest.mark.parametrize("locked", [False, True], ids=["versions", "locked"])
async def test_only_logical_deletes_are_made_and_they_are_enough(
    seaweed: Seaweed, s3_prefix: str, *, locked: bool
) -> None:
    bucket = versioned_bucket(seaweed, f"expire-{s3_prefix}-{'locked' if locked else 'versions'}", locked=locked)
    store = s3_store(seaweed, bucket=bucket)
    try:
        site, backups = await small(Rooted(store, s3_prefix), MemoryStore())
        _, outcome = await expired(site, Policy(last=1))
        assert len(outcome.gone) == 4
        assert outcome.refusals == []
        listed = [[name for name in await names(each) if not name.startswith(("use/", "log/"))] for each in site.stores]
        assert listed[0] == listed[1]
        # What went is still there for whoever asks for versions, until a lifecycle rule removes it.
        prefix = f"{s3_prefix}/base/{backups[0].name}/backup_info"
        versions = s3_client(seaweed).list_object_versions(Bucket=bucket, Prefix=prefix)
        assert len(versions["Versions"]) == 1
        assert len(versions["DeleteMarkers"]) == 1
    finally:
        await store.close()
