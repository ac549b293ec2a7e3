"""A store around a store that says so when somebody has to wait for it: for commands that a person looks at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime

from pipeline.contracts import Abilities, Body, ObjectInfo, Span, Store

#: Seconds without an answer after which it is told.
PATIENCE = 3.0
#: Seconds after which it is told again, if it is still the same answer that is waited for.
AGAIN = 10.0


class Telling:
    """See ``pipeline.contracts.Store``. ``tell`` is given one line, once: a store that is slow stays slow.

    But of one that still has not answered the same question it is told again, every ``again`` seconds.
    """

    def __init__(
        self, store: Store, tell: Callable[[str], None], *, patience: float = PATIENCE, again: float = AGAIN
    ) -> None:
        self._store = store
        self._tell = tell
        self._patience = patience
        self._again = again
        #: When it was told last, by the loop's clock.
        self._told: float | None = None

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
        loop = asyncio.get_running_loop()
        asked = loop.time()
        timer: asyncio.TimerHandle

        def say() -> None:
            nonlocal timer
            now = loop.time()
            if self._told is None:
                self._told = now
                self._tell(f"waiting for {self.name}")
            elif now - max(self._told, asked) >= self._again:  # else another call of several has said so just now
                self._told = now
                self._tell(f"still waiting for {self.name}: no answer for {now - asked:.0f} seconds")
            timer = loop.call_at(max(self._told, asked) + self._again, say)

        timer = loop.call_later(self._patience, say)
        try:
            yield
        finally:
            timer.cancel()
