"""Stores of a process that is killed: for tests of what deletes or replaces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from datetime import datetime

from pipeline.contracts import Abilities, Body, ObjectInfo, Span, Store


class Killed(BaseException):
    """The process is gone: nothing behind this happens."""


class Dying:
    """A store whose process ends after so many calls that change anything, all stores of it together."""

    def __init__(self, store: Store, calls: list[str], last: int) -> None:
        self._store = store
        self._calls = calls
        self._last = last

    @property
    def name(self) -> str:
        return self._store.name

    def _live(self, call: str) -> None:
        if len(self._calls) >= self._last:
            raise Killed
        self._calls.append(call)

    async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
        self._live(f"put {key}")
        await self._store.put(key, body, replace=replace, keep_until=keep_until)

    async def get(self, key: str, span: Span | None = None) -> Body:
        return await self._store.get(key, span)

    async def head(self, key: str) -> ObjectInfo:
        return await self._store.head(key)

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        async for info in self._store.list(prefix, after=after, shallow=shallow):
            yield info

    async def delete(self, keys: Collection[str]) -> None:
        # One after the other: it may die within a batch.
        for key in keys:
            self._live(f"delete {key}")
            await self._store.delete([key])

    async def probe(self, key: str, body: Body) -> Abilities:
        return await self._store.probe(key, body)

    async def close(self) -> None:
        await self._store.close()
