"""Copying a repository: only what is lacking, verbatim, in an order in which it may stop at any step."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TypeVar

import pytest

from handlers.copy import MOST_REFUSALS, Means, copy, estimate
from handlers.difference import Wanted
from infra.copying import Ends, run, select
from infra.storage.memory import MemoryStore
from pipeline.catalog import REPOSITORY, data_key_name, info_key, part_key
from pipeline.contracts import Abilities, Body, ObjectInfo, Span
from pipeline.errors import StoreError
from pipeline.objects import MemoryBody, read_header
from tests import keys
from tests.copying import (
    ALL,
    BACKUPS,
    SEGMENTS,
    Still,
    content,
    ends,
    expected,
    rooting,
    source,
)
from tests.keys import SYSTEM_ID
from tests.stores import Faulty

T = TypeVar("T")


async def test_all_that_matters_is_copied_verbatim_and_nothing_else() -> None:
    a, b = await source(), MemoryStore("b")
    before = await estimate(a, b, ALL)
    done = await copy([a], b, ALL, Means(system_id=SYSTEM_ID))
    assert content(b) == expected(a)
    assert (done.total, done.troubles, done.given_up) == (before.total, [], {})
    assert done.backups == before.backups == [*BACKUPS]
    assert done.strange.examples == ["wal/0000000100000000/README"]
    again = await copy([a], b, ALL, Means())
    assert again.total.objects == (await estimate(a, b, ALL)).total.objects == 0


async def test_the_order_lets_nobody_see_what_is_not_whole() -> None:
    a, b = await source(), Faulty(MemoryStore("b"))
    await copy([a], b, ALL, Means())
    puts = [key for operation, key in b.calls if operation == "put"]
    assert puts[0].startswith("keys/")
    assert puts.index("wal/00000002.history") > max(map(puts.index, SEGMENTS))
    for backup in BACKUPS:
        own = [key for key in puts if key.startswith(f"base/{backup}/")]
        assert own[-1] == info_key(backup)
        assert puts.index(own[0]) > puts.index("wal/00000002.history")


class KilledError(Exception):
    """What no handler foresees."""


class Dying:
    """A store that answers nothing more from a certain call on, of all that share ``clock``."""

    def __init__(self, store: MemoryStore, left: list[int], *, after: bool) -> None:
        self._store, self._left, self._after = store, left, after
        self.name = store.name

    async def _counted(self, call: Callable[[], Awaitable[T]]) -> T:
        self._left[0] -= 1
        if self._left[0] == 0 and self._after:
            await call()
        if self._left[0] <= 0:
            raise KilledError
        return await call()

    async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
        await self._counted(lambda: self._store.put(key, body, replace=replace, keep_until=keep_until))

    async def get(self, key: str, span: Span | None = None) -> Body:
        return await self._counted(lambda: self._store.get(key, span))

    async def head(self, key: str) -> ObjectInfo:
        return await self._counted(lambda: self._store.head(key))

    async def list(self, prefix: str, *, after: str = "", shallow: bool = False) -> AsyncIterator[ObjectInfo]:
        async def nothing() -> None:
            return

        await self._counted(nothing)
        async for info in self._store.list(prefix, after=after, shallow=shallow):
            yield info

    async def delete(self, names: Collection[str]) -> None:
        await self._counted(lambda: self._store.delete(names))

    async def probe(self, key: str, body: Body) -> Abilities:
        return await self._counted(lambda: self._store.probe(key, body))

    async def close(self) -> None:
        return


def assert_nothing_half(b: MemoryStore, a: MemoryStore) -> None:
    """Whatever is there is what the source has, can be read, and no backup is listed that is not whole."""
    there = content(b)
    for name, held in there.items():
        if name.startswith(("log/check-", "use/")):
            continue
        assert content(a)[name] == held
        if name != REPOSITORY and (key := read_header(name, held)[0].key):
            assert data_key_name(key) in there
    for backup in BACKUPS:
        if info_key(backup) in there:
            assert {n for n in content(a) if n.startswith(f"base/{backup}/")} <= there.keys()
    if REPOSITORY in there:
        assert expected(a).keys() <= there.keys()


@pytest.mark.parametrize("after", [False, True])
async def test_killed_at_any_call_it_goes_on_and_ends_as_if_nothing_had_been(after: bool) -> None:
    a = await source()
    calls = 0
    while True:
        calls += 1
        inner, left = MemoryStore("b"), [calls]
        dying = ends(Dying(a, left, after=after), Dying(inner, left, after=after))
        dying = Ends(dying.facts, dying.sources, dying.target, rooting(inner), None, dying.site, dying.clock)
        try:
            await run(dying, await select(dying), tell=print)
        except (KilledError, BaseExceptionGroup):
            assert_nothing_half(inner, a)
        else:
            break
        for store in (a, inner):  # expire removes what the killed one has left, a minute later
            await store.delete([name for name in content(store) if name.startswith("use/base_")])
        rest = Ends(dying.facts, (a,), inner, rooting(inner), None, dying.site, Still())
        await run(rest, await select(rest), tell=print)
        made = {name: held for name, held in content(inner).items() if not name.startswith("log/check-")}
        assert made == {**expected(a), REPOSITORY: content(a)[REPOSITORY]}
    assert calls > 100


async def test_damage_at_the_source_is_told_and_all_else_is_copied() -> None:
    a, b, told = await source(), MemoryStore("b"), list[str]()
    part = part_key(BACKUPS[0], "base", 2)
    for name in (part, SEGMENTS[1]):
        held = bytearray(content(a)[name])
        held[-40] ^= 1
        await a.put(name, MemoryBody([bytes(held)]), replace=True)
    done = await copy([a], b, ALL, Means(trouble=lambda trouble: told.append(trouble.name)))
    assert sorted(told) == sorted([part, SEGMENTS[1]])
    assert {trouble.kind for trouble in done.troubles} == {"damaged"}
    assert done.given_up == {BACKUPS[0]: f"{part} could not be copied: damaged"}
    assert content(b).keys() == expected(a).keys() - {part, SEGMENTS[1], info_key(BACKUPS[0])}
    other = MemoryStore("c")
    await other.put(part, MemoryBody([content(await source())[part]]))
    whole = await copy([a], MemoryStore("d"), ALL, Means(), others=[await source_like(a, part, SEGMENTS[1])])
    assert (whole.troubles, whole.given_up) == ([], {}), "another source has them whole"


async def source_like(a: MemoryStore, *damaged: str) -> MemoryStore:
    """The same objects, with those mended: only the damaged byte differs."""
    mended = MemoryStore("mended")
    for name, held in content(a).items():
        good = held[:-40] + bytes([held[-40] ^ 1]) + held[-39:] if name in damaged else held
        await mended.put(name, MemoryBody([good]))
    return mended


async def test_other_bytes_at_the_target_are_told_and_never_overwritten() -> None:
    a, b = await source(), MemoryStore("b")
    chain = keys.chain(keys.plain_keys())
    theirs = keys.stored(chain, SEGMENTS[0], b"another server's")
    await b.put(SEGMENTS[0], MemoryBody([theirs]))
    await b.put(SEGMENTS[1], MemoryBody([b"no object of walship"]))
    done = await copy([a], b, ALL, Means())
    assert {(trouble.name, trouble.kind) for trouble in done.troubles} == {
        (SEGMENTS[0], "conflict"), (SEGMENTS[1], "conflict"),
    }  # fmt: skip
    assert content(b)[SEGMENTS[0]] == theirs
    assert content(b).keys() == expected(a).keys()


async def test_the_same_segment_in_another_encoding_is_no_conflict() -> None:
    ring = keys.encrypting_keys()
    a, b = MemoryStore("a"), MemoryStore("b")
    for store, codec in ((a, "zstd"), (b, "none")):
        stored = keys.stored(keys.chain(ring, codec, "aes-256-gcm"), SEGMENTS[0], b"the same" * 100)
        await store.put(SEGMENTS[0], MemoryBody([stored]))
    assert (await copy([a], b, ALL, Means())).troubles == []


async def test_an_object_of_another_cluster_is_not_taken_along() -> None:
    a, b = await source(), MemoryStore("b")
    foreign = keys.stored(keys.chain(keys.plain_keys(), system_id="1"), SEGMENTS[0], b"x")
    await a.put(SEGMENTS[0], MemoryBody([foreign]), replace=True)
    done = await copy([a], b, ALL, Means(system_id=SYSTEM_ID))
    assert [trouble.fact for trouble in done.troubles] == [
        f"{SEGMENTS[0]} belongs to the cluster 1, not to {SYSTEM_ID}"
    ]


class Expiring(MemoryStore):
    """Loses what it is told to once an object is asked for."""

    gone: tuple[str, list[str]] = ("", [])

    async def get(self, key: str, span: Span | None = None) -> Body:
        if key == self.gone[0]:
            await self.delete(self.gone[1])
        return await super().get(key, span)


async def test_what_expire_deletes_meanwhile_is_no_damage_and_no_backup_is_left_without_its_parts() -> None:
    a = Expiring("a")
    a._objects = (await source())._objects
    first = BACKUPS[0]
    doomed = [info_key(first), part_key(first, "base", 2), SEGMENTS[0], SEGMENTS[1]]
    a.gone = (f"base/{first}/index/00000001", doomed)
    b = MemoryStore("b")
    wanted = expected(a).keys() - {info_key(first), part_key(first, "base", 2)}
    done = await copy([a], b, ALL, Means(at_once=1))
    assert done.troubles == []
    assert done.given_up == {first: "it was deleted at the source while it was copied"}
    assert info_key(first) not in content(b)
    assert info_key(BACKUPS[1]) in content(b)
    assert content(b).keys() <= wanted | {part_key(first, "base", 2)}


async def test_segments_that_go_while_they_are_copied_are_nobodys_loss() -> None:
    a = Expiring("a")
    a._objects = (await source())._objects
    a.gone = (SEGMENTS[0], SEGMENTS[1:3])
    done = await copy([a], MemoryStore("b"), ALL, Means(at_once=1))
    assert (done.troubles, done.vanished) == ([], 2)


async def test_a_backup_is_marked_while_it_is_copied_and_left_alone_if_it_is_being_deleted() -> None:
    a, b, marks = await source(), MemoryStore("b"), list[str]()

    @asynccontextmanager
    async def hold(backup: str) -> AsyncIterator[str]:
        marks.append(f"begin {backup}")
        yield "expire on db9" if backup == BACKUPS[0] else ""
        marks.append(f"end {backup} {info_key(backup) in content(b)}")

    done = await copy([a], b, ALL, Means(hold=hold))
    assert marks == [
        f"begin {BACKUPS[0]}", f"end {BACKUPS[0]} False", f"begin {BACKUPS[1]}", f"end {BACKUPS[1]} True",
    ]  # fmt: skip
    assert done.given_up == {BACKUPS[0]: "it is being deleted by expire on db9"}
    marks.clear()
    await copy([a], b, Wanted(backups=lambda name: name == BACKUPS[1]), Means(hold=hold))
    assert marks == [], "what is there already needs no mark"


async def test_parts_that_go_at_the_target_meanwhile_keep_the_backup_from_being_listed() -> None:
    a, b = await source(), MemoryStore("b")

    class Cleaned(Faulty):
        async def put(self, key: str, body: Body, *, replace: bool = False, keep_until: datetime | None = None) -> None:
            await super().put(key, body, replace=replace, keep_until=keep_until)
            if key.endswith("index/00000001"):
                await b.delete([part_key(BACKUPS[0], "base", 1)])

    done = await copy([a], Cleaned(b), ALL, Means(at_once=1))
    assert done.backups == [BACKUPS[1]]
    assert "went at the target" in done.given_up[BACKUPS[0]]
    assert info_key(BACKUPS[0]) not in content(b)
    await copy([a], b, ALL, Means())
    assert content(b) == expected(a)


@pytest.mark.parametrize("passing", [False, True], ids=["access denied", "full"])
async def test_a_target_that_takes_nothing_ends_it_and_the_next_run_goes_on(passing: bool) -> None:
    a, inner = await source(), MemoryStore("b")
    b = Faulty(inner)
    await copy([a], b, Wanted(backups=lambda _: False), Means())
    b.down["put"] = StoreError("b takes nothing", passing=passing)
    with pytest.raises(StoreError, match="b takes nothing"):
        await copy([a], b, ALL, Means(at_once=1))
    assert b.count("put") < 2 * MOST_REFUSALS + len(SEGMENTS) + 5
    b.down.clear()
    await copy([a], b, ALL, Means())
    assert content(inner) == expected(a)


async def test_one_object_that_is_refused_keeps_nobody_else_from_being_copied() -> None:
    a, b = await source(), MemoryStore("b")

    async def give(parcel: object) -> None:
        if parcel.name == SEGMENTS[0]:  # type: ignore[attr-defined]
            raise StoreError("too large")
        await b.put(parcel.name, parcel.body)  # type: ignore[attr-defined]

    done = await copy([a], b, ALL, Means(give=give))
    assert [(trouble.name, trouble.kind) for trouble in done.troubles] == [(SEGMENTS[0], "refused")]
    assert content(b).keys() == expected(a).keys() - {SEGMENTS[0]}


async def test_a_source_that_does_not_answer_ends_it() -> None:
    a = Faulty(await source())
    a.fail["get", 4] = StoreError("a does not answer", passing=True)
    with pytest.raises(StoreError, match="a does not answer"):
        await copy([a], MemoryStore("b"), ALL, Means())


async def test_what_is_encrypted_under_a_key_that_is_nowhere_is_not_copied() -> None:
    a, b = await source(), MemoryStore("b")
    (key,) = (name for name in content(a) if name.startswith("keys/"))
    await a.delete([key])
    done = await copy([a], b, Wanted(backups=lambda _: False), Means())
    assert content(b) == {}
    assert all("which no source has whole" in trouble.fact for trouble in done.troubles)
    assert {trouble.kind for trouble in done.troubles} == {"damaged"}
