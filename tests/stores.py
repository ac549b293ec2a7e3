"""Stores for tests: options of a real S3 server, and a store around a store that fails where it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from handlers.body import joined
from infra.demo.seaweed import Seaweed
from infra.storage.s3 import S3Store
from infra.storage.s3_client import S3Options
from pipeline.contracts import Abilities, Body, ObjectInfo, Span, Store
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody


def s3_client(server: Seaweed) -> Any:
    """The client of botocore, for what a store never does: buckets, versions, policies."""
    import botocore.session

    return botocore.session.get_session().create_client(
        "s3", region_name="us-east-1", endpoint_url=server.endpoint, aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )  # fmt: skip


def versioned_bucket(server: Seaweed, name: str, *, locked: bool = False) -> str:
    """A bucket that keeps every version; ``locked``: for a day at least, whoever wants to delete it. Made if absent."""
    client = s3_client(server)
    with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
        client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=locked)
    client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    if locked:
        retention = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
        client.put_object_lock_configuration(
            Bucket=name, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": retention}
        )
    return name


def s3_store(server: Seaweed, *, bucket: str | None = None) -> S3Store:
    """The server's bucket without patience and prefix."""
    return S3Store(
        S3Options(
            bucket=bucket or server.bucket,
            endpoint=server.endpoint,
            region="us-east-1",
            access_key=server.access_key,
            secret_key=server.secret_key,
        )
    )


@dataclass
class Faulty:
    """A real store, and the faults that it is told to have. Calls count from 1, per operation."""

    store: Store
    #: (operation, number of the call) → raised instead of the call.
    fail: dict[tuple[str, int], StoreError] = field(default_factory=dict)
    #: The same, raised after the call was done: its answer gets lost.
    lose: dict[tuple[str, int], StoreError] = field(default_factory=dict)
    #: operation → raised at every call until it is taken away: the store is down.
    down: dict[str, StoreError] = field(default_factory=dict)
    #: operation → seconds before each call.
    delay: dict[str, float] = field(default_factory=dict)
    #: key → bit of it that ``get`` delivers flipped.
    flip: dict[str, int] = field(default_factory=dict)
    #: What was called: operation and key (or prefix).
    calls: list[tuple[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.store.name

    def count(self, operation: str) -> int:
        """How often the operation was called so far."""
        return sum(1 for called, _ in self.calls if called == operation)

    async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
        number = await self._begin("put", key)
        await self.store.put(key, body, replace=replace, keep_until=keep_until)
        self._end("put", number)

    async def get(self, key: str, span: Span | None = None) -> Body:
        number = await self._begin("get", key)
        body = await self.store.get(key, span)
        self._end("get", number)
        if key in self.flip:
            content = bytearray(joined(body))
            content[self.flip[key] // 8] ^= 1 << self.flip[key] % 8
            return MemoryBody((bytes(content),))
        return body

    async def head(self, key: str) -> ObjectInfo:
        number = await self._begin("head", key)
        info = await self.store.head(key)
        self._end("head", number)
        return info

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        """A lost answer is a listing that breaks after its first line."""
        number = await self._begin("list", prefix)
        async for info in self.store.list(prefix, after=after, shallow=shallow):
            yield info
            self._end("list", number)

    async def delete(self, keys: Collection[str]) -> None:
        number = await self._begin("delete", " ".join(keys))
        await self.store.delete(keys)
        self._end("delete", number)

    async def probe(self, key: str, body: Body) -> Abilities:
        await self._begin("probe", key)
        return await self.store.probe(key, body)

    async def close(self) -> None:
        await self.store.close()

    async def _begin(self, operation: str, key: str) -> int:
        self.calls.append((operation, key))
        number = self.count(operation)
        await asyncio.sleep(self.delay.get(operation, 0))
        if error := self.down.get(operation) or self.fail.get((operation, number)):
            raise error
        return number

    def _end(self, operation: str, number: int) -> None:
        if error := self.lose.get((operation, number)):
            raise error
