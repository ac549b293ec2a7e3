"""A store below a prefix of another one. Keys go in and come out without the prefix."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from datetime import datetime

from infra.storage.naming import check_key
from pipeline.contracts import Abilities, Body, ObjectInfo, Span, Store


class Rooted:
    """See ``pipeline.contracts.Store``. ``close`` closes the store below, too."""

    def __init__(self, store: Store, prefix: str, *, name: str | None = None) -> None:
        """``prefix`` is a path without ``/`` at its ends, and not empty."""
        check_key(store.name, prefix)
        self._store = store
        self._name = name
        self._prefix = prefix + "/"

    @property
    def name(self) -> str:
        """Unless given, that of the store below: a destination is one, whichever of its folders is meant."""
        return self._name or self._store.name

    async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
        await self._store.put(self._key(key), body, replace=replace, keep_until=keep_until)

    async def get(self, key: str, span: Span | None = None) -> Body:
        return await self._store.get(self._key(key), span)

    async def head(self, key: str) -> ObjectInfo:
        return self._stripped(await self._store.head(self._key(key)))

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        # Without ``after`` nothing is left out, also not what sorts before our own prefix: there is nothing.
        behind = self._prefix + after if after else ""
        async for info in self._store.list(self._prefix + prefix, after=behind, shallow=shallow):
            yield self._stripped(info)

    async def delete(self, keys: Collection[str]) -> None:
        await self._store.delete([self._key(key) for key in keys])

    async def probe(self, key: str, body: Body) -> Abilities:
        return await self._store.probe(self._key(key), body)

    async def close(self) -> None:
        await self._store.close()

    def _key(self, key: str) -> str:
        check_key(self.name, key)  # here, while it is still to be seen that a key is absolute
        return self._prefix + key

    def _stripped(self, info: ObjectInfo) -> ObjectInfo:
        return ObjectInfo(info.key.removeprefix(self._prefix), info.size, info.modified)
