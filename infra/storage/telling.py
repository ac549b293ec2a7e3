"""A store around a store that says so when somebody has to wait for it: for commands that a person looks at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime

from pipeline.contracts import Abilities, Body, ObjectInfo, Span, Store

#: Seconds without an answer after which it is told.
PATIENCE = 3.0


class Telling:
    """See ``pipeline.contracts.Store``. ``tell`` is given one line, once: a store that is slow stays slow."""

    def __init__(self, store: Store, tell: Callable[[str], None], *, patience: float = PATIENCE) -> None:
        self._store = store
        self._tell: Callable[[str], None] | None = tell
        self._patience = patience

    @property
    def name(self) -> str:
        return self._store.name

    async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
        with self._watched():
            await self._store.put(key, body, replace=replace, keep_until=keep_until)

    async def get(self, key: str, span: Span | None = None) -> Body:
        with self._watched():
            return await self._store.get(key, span)

    async def head(self, key: str) -> ObjectInfo:
        with self._watched():
            return await self._store.head(key)

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        entries = self._store.list(prefix, after=after, shallow=shallow)
        while True:
            with self._watched():
                info = await anext(entries, None)
            if info is None:
                return
            yield info

    async def delete(self, keys: Collection[str]) -> None:
        with self._watched():
            await self._store.delete(keys)

    async def probe(self, key: str, body: Body) -> Abilities:
        with self._watched():
            return await self._store.probe(key, body)

    async def close(self) -> None:
        await self._store.close()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        if self._tell is None:
            yield
            return
        timer = asyncio.get_running_loop().call_later(self._patience, self._say)
        try:
            yield
        finally:
            timer.cancel()

    def _say(self) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(f"waiting for {self.name}")
