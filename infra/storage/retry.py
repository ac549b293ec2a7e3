"""Patience, as a store around a store: what may pass is tried again, within bounds; what will not is told at once.

The delay after n failed attempts is drawn from 0 to ``first * 2**(n-1)`` seconds, at most ``most``: full jitter, so
that many who failed together do not come back together (Brooker, "Exponential Backoff And Jitter", AWS Architecture
Blog, 2015).
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from pipeline.contracts import Abilities, Body, Clock, ObjectInfo, Span, Store
from pipeline.errors import StoreError

T = TypeVar("T")

#: Told after each attempt: the store's name, the operation, and the error if it failed.
Observer = Callable[[str, str, StoreError | None], None]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long an operation is tried."""

    #: Attempts in all, the first one included.
    attempts: int = 6
    #: Seconds after which no further attempt begins.
    total: float = 60.0
    #: Upper end in seconds of the first delay; it doubles with each attempt.
    first: float = 0.25
    #: No delay is longer, in seconds.
    most: float = 15.0
    #: Seconds for which a store that has accepted a call and not answered is left alone: whatever is asked meanwhile
    #: fails at once, and nobody else waits for it. 0: each call waits by itself, and is tried again.
    rest: float = 0.0

    def delay(self, failed: int, draw: float) -> float:
        """Seconds to wait after so many failed attempts; ``draw`` is random, from 0 to 1."""
        return draw * min(self.most, self.first * 2.0 ** min(failed - 1, 30))


#: For a service, which has other destinations to look after: who does not answer holds nobody up for long.
SERVICE = RetryPolicy(rest=10.0)

#: For a command that looks how things are: that a store does not answer is what it is to find out, soon.
LOOK = RetryPolicy(attempts=2, total=10.0, rest=60.0)

#: An attempt that took so many seconds and failed was not answered at all.
_STALLED = 5.0
#: Nor was a question that somebody gave up after so many seconds: a little less than whoever gives up waits.
_GIVEN_UP = 4.0

#: As many attempts as usual and no waiting, for tests.
AT_ONCE = RetryPolicy(first=0.0, most=0.0)


class Retrying:
    """See ``pipeline.contracts.Store``."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        policy: RetryPolicy | None = None,
        *,
        draw: Callable[[], float] = random.random,
        observe: Observer | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._policy = policy or RetryPolicy()
        self._draw = draw
        self._observe = observe or (lambda *_: None)
        #: Until when the store is left alone, in monotonic seconds, and why.
        self._resting: tuple[float, str] | None = None

    @property
    def name(self) -> str:
        return self._store.name

    async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
        """As the contract says. A create whose answer got lost may meet its own object: that is an ObjectConflict."""
        await self._try("put", lambda: self._store.put(key, body, replace=replace, keep_until=keep_until))

    async def get(self, key: str, span: Span | None = None) -> Body:
        return await self._ask("get", lambda: self._store.get(key, span))

    async def head(self, key: str) -> ObjectInfo:
        return await self._ask("head", lambda: self._store.head(key))

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        """As the contract says. A listing that breaks goes on behind its last key, if its keys came in order."""
        self._refuse_resting()
        attempts: _Attempts | None = None
        last, ordered = after, True
        while True:
            asked = self._clock.monotonic()
            try:
                async for info in self._store.list(prefix, after=last, shallow=shallow):
                    ordered = ordered and info.key > last
                    last, attempts = info.key, None
                    yield info
                    asked = self._clock.monotonic()
            except asyncio.CancelledError:
                self._given_up(asked)
                raise
            except StoreError as error:
                if not ordered:
                    self._observe(self.name, "list", error)
                    raise
                attempts = attempts or self._begin("list", asked)
                await attempts.failed(error)
            else:
                self._observe(self.name, "list", None)
                return

    async def delete(self, keys: Collection[str]) -> None:
        await self._try("delete", lambda: self._store.delete(keys))

    async def probe(self, key: str, body: Body) -> Abilities:
        return await self._try("probe", lambda: self._store.probe(key, body))

    async def close(self) -> None:
        await self._store.close()

    def _refuse_resting(self) -> None:
        if self._resting and self._clock.monotonic() < self._resting[0]:
            hint = f"it did not answer, and is left alone for {self._policy.rest:g} s"
            raise StoreError(self._resting[1], hint=hint, passing=True)

    def _rest(self, error: StoreError) -> None:
        self._resting = self._clock.monotonic() + self._policy.rest, error.fact

    def _given_up(self, asked: float) -> None:
        """Nobody else shall wait for what somebody has given up: each in turn would."""
        if self._policy.rest and (silent := self._clock.monotonic() - asked) >= _GIVEN_UP:
            self._rest(StoreError(f"{self.name} has not answered for {silent:.0f} seconds", passing=True))

    async def _ask(self, operation: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """A question, whose answer is short: to be slow with it is to be silent. An object on its way may be slow."""

        async def noticed() -> T:
            asked = self._clock.monotonic()
            try:
                return await attempt()
            except asyncio.CancelledError:
                self._given_up(asked)
                raise

        return await self._try(operation, noticed)

    async def _try(self, operation: str, attempt: Callable[[], Awaitable[T]]) -> T:
        self._refuse_resting()
        attempts = self._begin(operation)
        while True:
            try:
                result = await attempt()
            except StoreError as error:
                await attempts.failed(error)
            else:
                self._observe(self.name, operation, None)
                return result

    def _begin(self, operation: str, asked: float | None = None) -> _Attempts:
        """``asked``: when the first attempt began, in monotonic seconds; None for now."""
        observe = functools.partial(self._observe, self.name, operation)
        return _Attempts(self._clock, self._policy, self._draw, observe, self._rest, asked)


class _Attempts:
    """The attempts of one operation: waits before the next one, or raises the last error."""

    def __init__(
        self,
        clock: Clock,
        policy: RetryPolicy,
        draw: Callable[[], float],
        observe: Callable[[StoreError], None],
        rest: Callable[[StoreError], None],
        asked: float | None = None,
    ) -> None:
        self._rest = rest
        self._clock = clock
        self._policy = policy
        self._draw = draw
        self._observe = observe
        self._began = self._attempted = clock.monotonic() if asked is None else asked
        self._count = 0

    async def failed(self, error: StoreError) -> None:
        """Wait until the next attempt may begin, or raise: the error itself, or that it did not pass."""
        self._count += 1
        self._observe(error)
        if not error.passing:
            raise error
        now = self._clock.monotonic()
        if self._policy.rest and now - self._attempted >= _STALLED:
            self._rest(error)
            raise error
        spent = now - self._began
        delay = self._policy.delay(self._count, self._draw())
        if self._count >= self._policy.attempts or spent + delay > self._policy.total:
            tries = "1 attempt" if self._count == 1 else f"{self._count} attempts"
            raise StoreError(f"{error.fact} ({tries} in {spent:.1f} s)", hint=error.hint, passing=True) from error
        await self._clock.sleep(delay)
        self._attempted = self._clock.monotonic()
