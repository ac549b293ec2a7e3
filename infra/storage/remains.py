"""What a bucket with versions still holds of what was deleted or replaced, and until when: somebody pays for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from infra.settings import Settings
from infra.storage import display_name, open_versions
from pipeline.errors import StoreError


@dataclass(slots=True)
class Remains:
    """What a bucket still holds below a prefix although nobody sees it any more."""

    #: Versions that were replaced or deleted, their bytes, and delete markers.
    versions: int = 0
    size: int = 0
    markers: int = 0
    #: When the newest of those versions was stored.
    newest: datetime | None = None
    #: False: there are more, there was no time to count them.
    counted: bool = True
    #: The bucket's own object lock, like ``COMPLIANCE``, and for how long it locks what is stored; none: empty.
    lock: str = ""
    locked_for: timedelta = timedelta()
    #: Whether a lifecycle rule of the bucket removes old versions; None: it could not be asked.
    rule: bool | None = None

    @property
    def locked_until(self) -> datetime | None:
        """When the last of them can be removed at the earliest, by the bucket's own lock; None: it has none."""
        return self.newest + self.locked_for if self.newest and self.lock else None


#: Seconds that counting may take: nobody waits long for what is only good to know.
PATIENCE = 20.0


async def remaining(
    urls: Sequence[str], settings: Settings, system_id: str, *, patience: float = PATIENCE
) -> dict[str, Remains | StoreError]:
    """Destination → what its bucket still holds of a cluster, or why that is not known; buckets with versions only."""
    buckets = [url for url in urls if urlsplit(url).scheme == "s3"]
    found = await asyncio.gather(*(_remaining(url, settings, system_id, patience) for url in buckets))
    named = zip(map(display_name, buckets), found, strict=True)
    return {name: each for name, each in named if each is not None}


async def _remaining(url: str, settings: Settings, system_id: str, patience: float) -> Remains | StoreError | None:
    store, prefix = open_versions(url, settings)
    try:
        if not await store.versioning():
            return None
        return await store.remains(f"{prefix}{system_id}/", seconds=patience)
    except StoreError as error:
        return error
    finally:
        await store.close()


def facts(found: Remains | StoreError) -> dict[str, Any]:
    """For ``--json``."""
    if isinstance(found, StoreError):
        return {"error": found.fact}
    until = found.locked_until
    return {
        "old_versions": found.versions,
        "bytes": found.size,
        "delete_markers": found.markers,
        "counted_all": found.counted,
        "lock": found.lock or None,
        "locked_until": until.isoformat() if until else None,
        "removed_by_lifecycle_rule": found.rule,
    }


async def rules(url: str, settings: Settings) -> tuple[str, Remains]:
    """Whether an ``s3:`` destination keeps versions, as ``S3Versions.versioning`` says it, and its bucket's rules."""
    store, _ = open_versions(url, settings)
    try:
        status = await store.versioning()
        return status, await store.rules() if status else Remains()
    finally:
        await store.close()
