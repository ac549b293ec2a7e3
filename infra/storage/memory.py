"""A store in memory: complete, atomic, and gone with the process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterable
from datetime import UTC, datetime

from handlers.body import joined
from infra.storage.naming import check_key
from pipeline.contracts import Abilities, Body, ObjectInfo, Span
from pipeline.errors import ObjectConflict, ObjectMissing, StoreError
from pipeline.objects import MemoryBody


class MemoryStore:
    """See ``pipeline.contracts.Store``."""

    def __init__(self, name: str = "memory") -> None:
        self._name = name
        self._objects: dict[str, tuple[bytes, datetime]] = {}

    @property
    def name(self) -> str:
        return self._name

    async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
        check_key(self._name, key)
        if keep_until is not None:
            raise StoreError(f"{self._name} has no object lock, so {key} cannot be kept until {keep_until.isoformat()}")
        # Everybody else gets a turn here, as with a store that is far away; then check and write are one step.
        content = await asyncio.to_thread(joined, body)
        if not replace and key in self._objects:
            raise ObjectConflict(f"{self._name} has an object {key} already")
        self._objects[key] = (content, datetime.now(UTC))

    async def get(self, key: str, span: Span | None = None) -> Body:
        content, _ = self._find(key)
        await asyncio.sleep(0)
        return MemoryBody((content if span is None else content[span[0] : span[1]],))

    async def head(self, key: str) -> ObjectInfo:
        content, modified = self._find(key)
        return ObjectInfo(key, len(content), modified)

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        infos = (ObjectInfo(key, len(content), modified) for key, (content, modified) in sorted(self._objects.items()))
        for info in [*select(infos, prefix, after, shallow=shallow)]:
            yield info

    async def delete(self, keys: Collection[str]) -> None:
        for key in keys:
            check_key(self._name, key)
            self._objects.pop(key, None)

    async def probe(self, key: str, body: Body) -> Abilities:
        with contextlib.suppress(ObjectConflict):
            await self.put(key, body)
        return Abilities(conditional_put=True, remark="kept in memory: gone with the process")

    async def close(self) -> None:
        """Nothing to free: what is stored stays readable, as in any store that is closed and opened again."""

    def _find(self, key: str) -> tuple[bytes, datetime]:
        check_key(self._name, key)
        try:
            return self._objects[key]
        except KeyError:
            raise ObjectMissing(f"{key} is missing from {self._name}") from None


def select(infos: Iterable[ObjectInfo], prefix: str, after: str, *, shallow: bool) -> Iterable[ObjectInfo]:
    """Of all objects in the order of their keys, those that a listing shows."""
    folder = ""
    for info in infos:
        key = info.key
        if not key.startswith(prefix):
            continue
        slash = key.find("/", len(prefix)) if shallow else -1
        if slash < 0:
            if key > after:
                yield info
        elif key[: slash + 1] != folder:
            folder = key[: slash + 1]
            if folder > after:
                yield ObjectInfo(folder, 0)
