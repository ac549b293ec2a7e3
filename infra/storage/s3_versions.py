"""The versions that a bucket keeps: listed page by page, and what they cost that were replaced or deleted.

Asked beside what ``s3`` asks: GetBucketVersioning, ListObjectVersions, and where it is there, the bucket's rules
(GetObjectLockConfiguration, GetBucketLifecycleConfiguration).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from infra.storage.remains import Remains
from infra.storage.s3 import S3Store
from infra.storage.s3_client import STALL
from pipeline.errors import StoreError

#: Versions that are asked for at a time: as many as Amazon gives.
PAGE = 1000


@dataclass(frozen=True, slots=True)
class Version:
    """One line of a listing of versions."""

    key: str
    #: Empty: a delete marker.
    id: str
    size: int
    modified: datetime
    latest: bool

    @property
    def rank(self) -> tuple[datetime, bool, bool]:
        """What is higher came later. Within one second: the latest of all; else rather an object than its deletion."""
        return self.modified, self.latest, bool(self.id)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing. Of each key the newest in front, but for delete markers, which stand behind."""

    versions: list[Version]
    folders: list[str]
    #: Last key and version, if there is another page.
    key: str = ""
    version: str = ""


class S3Versions(S3Store):
    """A bucket, and the versions in it."""

    async def versioning(self) -> str:
        """``Enabled``, ``Suspended`` or empty: never enabled. Raises StoreError."""
        client = await self._open()
        async with self._explained("ask whether the bucket keeps versions", ""), asyncio.timeout(STALL):
            answer = await client.get_bucket_versioning(Bucket=self._options.bucket)
        return str(answer.get("Status", ""))

    async def pages(
        self, prefix: str, *, after: str = "", shallow: bool = False, size: int = PAGE
    ) -> AsyncIterator[Page]:
        """All versions of what begins with ``prefix`` and sorts behind ``after``; ``size``: most of a page."""
        client = await self._open()
        request: dict[str, Any] = {"Bucket": self._options.bucket, "Prefix": prefix, "MaxKeys": size}
        if after:
            request["KeyMarker"] = after
        if shallow:
            request["Delimiter"] = "/"
        while True:
            async with self._explained(f"list versions of {prefix}", ""), asyncio.timeout(STALL):
                answer = await client.list_object_versions(**request)
            versions = [
                Version(v["Key"], v["VersionId"], v["Size"], v["LastModified"].astimezone(UTC), v["IsLatest"])
                for v in answer.get("Versions", ())
            ]
            markers = [
                Version(m["Key"], "", 0, m["LastModified"].astimezone(UTC), m["IsLatest"])
                for m in answer.get("DeleteMarkers", ())
            ]
            folders = [folder["Prefix"] for folder in answer.get("CommonPrefixes", ())]
            if not answer.get("IsTruncated"):
                yield Page(versions + markers, folders)
                return
            key, version = answer.get("NextKeyMarker", ""), answer.get("NextVersionIdMarker", "")
            if not key or (key, version) == (request.get("KeyMarker"), request.get("VersionIdMarker")):
                raise StoreError(
                    f"{self.name} at {self._endpoint}: a listing of versions of {prefix!r} is cut and cannot go on"
                )
            yield Page(versions + markers, folders, key, version)
            request["KeyMarker"] = key
            request.pop("VersionIdMarker", None)
            if version:
                request["VersionIdMarker"] = version

    async def remains(self, prefix: str, *, seconds: float) -> Remains:
        """Count what was replaced or deleted below a prefix, for at most so many seconds. Raises StoreError."""
        found = await self.rules()
        try:
            async with asyncio.timeout(seconds):
                async for page in self.pages(prefix):
                    _count(found, page)
        except TimeoutError:
            found.counted = False
        return found

    async def rules(self) -> Remains:
        """What the bucket does by itself; nothing is counted. Not every server has rules, nor may everybody ask."""
        found = Remains()
        client = await self._open()
        try:
            async with self._explained("ask for the bucket's lock", ""), asyncio.timeout(STALL):
                answer = await client.get_object_lock_configuration(Bucket=self._options.bucket)
            retention = answer.get("ObjectLockConfiguration", {}).get("Rule", {}).get("DefaultRetention", {})
            found.lock = str(retention.get("Mode", ""))
            found.locked_for = timedelta(days=retention.get("Days", 0) + 365 * retention.get("Years", 0))
        except StoreError:
            pass  # no lock, or none that may be asked for: nothing is said of it
        try:
            async with self._explained("ask for the bucket's lifecycle rules", ""), asyncio.timeout(STALL):
                rules = (await client.get_bucket_lifecycle_configuration(Bucket=self._options.bucket)).get("Rules", [])
            found.rule = any("NoncurrentVersionExpiration" in r and r.get("Status") == "Enabled" for r in rules)
        except StoreError as error:
            found.rule = False if "NoSuchLifecycleConfiguration" in error.fact else None
        return found


def _count(found: Remains, page: Page) -> None:
    for version in page.versions:
        if not version.id:
            found.markers += 1
        elif not version.latest:
            found.versions += 1
            found.size += version.size
            found.newest = max(found.newest or version.modified, version.modified)
