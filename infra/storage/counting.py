"""A store around a store that counts what is read from it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection
from datetime import datetime

from pipeline.contracts import Abilities, Body, ObjectInfo, Span, Store


class Counting:
    """See ``pipeline.contracts.Store``. ``served`` is given the bytes of each object, or span of one, as stored."""

    def __init__(self, store: Store, served: Callable[[int], None]) -> None:
        self._store = store
        self._served = served

    @property
    def name(self) -> str:
        return self._store.name

    async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
        await self._store.put(key, body, replace=replace, keep_until=keep_until)

    async def get(self, key: str, span: Span | None = None) -> Body:
        body = await self._store.get(key, span)
        self._served(body.size)
        return body

    async def head(self, key: str) -> ObjectInfo:
        return await self._store.head(key)

    def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        return self._store.list(prefix, after=after, shallow=shallow)

    async def delete(self, keys: Collection[str]) -> None:
        await self._store.delete(keys)

    async def probe(self, key: str, body: Body) -> Abilities:
        return await self._store.probe(key, body)

    async def close(self) -> None:
        await self._store.close()
