"""Copying a repository: only what is lacking, verbatim, in an order in which it may stop at any step."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import pytest

from handlers.copy import MOST_REFUSALS, Means, copy, estimate
from handlers.difference import Wanted
from infra.copying import Ends, _refuse_overlap, open_ends, run, select, url_of
from infra.repository import RepositoryFacts
from infra.settings import Settings
from infra.storage.memory import MemoryStore
from pipeline.catalog import REPOSITORY, data_key_name, info_key, part_key
from pipeline.contracts import Abilities, Body, ObjectInfo, Span, Store
from pipeline.errors import ConfigError, IntegrityError, StoreError
from pipeline.objects import MemoryBody, read_header
from pipeline.sizes import Sizes
from tests import keys
from tests.clock import FastClock
from tests.keys import SYSTEM_ID
from tests.stores import Faulty

T = TypeVar("T")
ALL = Wanted(beside=True, sizes=True)
BACKUPS = ("base_20260101_000000", "base_20260102_000000")
SEGMENTS = [f"wal/0000000100000000/0000000100000000000000{number:02X}" for number in range(1, 5)]
LACKING = [
    "wal/00000002.history", "wal/0000000100000000/000000010000000000000002.00000028.backup",
    "wal/0000000100000000/000000010000000000000005.partial", "conflict/00000003.history.0123456789abcdef",
    "tail/000000010000000000000006/00000001-00000000-00000400", f"pin/{BACKUPS[0]}",
    "log/20260102T000000Z-backup-ok-01234567",
]  # fmt: skip
#: Of no use at another place.
STAYS = ["tail/000000010000000000000001/00000001-00000000-00000400", "lease/00000001", "use/x/00000001", "log/check-1",
         "wal/0000000100000000/README", "verified/0123/00000001"]  # fmt: skip
TORSO = "base/base_20260103_000000/data/base/00000001"


def content(store: MemoryStore) -> dict[str, bytes]:
    return {name: held for name, (held, _) in store._objects.items()}


async def source(name: str = "a") -> MemoryStore:
    """A repository with one of everything."""
    store = MemoryStore(name)
    ring = keys.encrypting_keys()
    assert ring.key_object is not None
    chain = keys.chain(ring, cipher="aes-256-gcm")
    key_name, key_body = ring.key_object
    await store.put(key_name, key_body)
    await store.put(REPOSITORY, facts().encode())
    backups = [
        object_name
        for backup in BACKUPS
        for object_name in (part_key(backup, "base", 1), part_key(backup, "base", 2), f"base/{backup}/index/00000001",
                            f"base/{backup}/backup_manifest", info_key(backup))
    ]  # fmt: skip
    for object_name in [*SEGMENTS, *LACKING, *STAYS, TORSO, *backups]:
        await store.put(object_name, MemoryBody([keys.stored(chain, object_name, object_name.encode() * 20)]))
    return store


class Still(FastClock):
    """Nobody's heart beats again while a copy takes no time."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(3600 if seconds else 0)


def facts() -> RepositoryFacts:
    return RepositoryFacts(SYSTEM_ID, 17, 1 << 20, "2026-01-14T12:00:00+00:00")


def expected(from_store: MemoryStore) -> dict[str, bytes]:
    return {name: held for name, held in content(from_store).items() if name not in (*STAYS, TORSO, REPOSITORY)}


def ends(origin: object, target: object, *others: object) -> Ends:
    root = target if isinstance(target, MemoryStore) else MemoryStore("unused")
    no_key = ConfigError("there is no key")
    return Ends(facts(), (origin, *others), target, root, None, no_key, Still())  # type: ignore[arg-type]


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


def rooting(store: MemoryStore) -> Store:
    """What holds the cluster's folder, as far as ``repository.json`` is looked for there."""

    class Root(MemoryStore):
        async def get(self, key: str, span: Span | None = None) -> Body:
            return await store.get(key.removeprefix(f"{SYSTEM_ID}/"), span)

    return Root()


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


class Longest(FastClock):
    """Remembers how long somebody wanted to sleep: the pace counts real time, in which nothing passes here."""

    longest = 0.0

    async def sleep(self, seconds: float) -> None:
        self.longest = max(self.longest, seconds)
        await super().sleep(seconds)


async def test_the_rate_is_kept() -> None:
    a, b, clock = await source(), MemoryStore("b"), Longest()
    given = ends(a, b)
    given = Ends(given.facts, (a,), b, rooting(b), None, given.site, clock)
    chosen = await select(given, wal=True)
    size = (await estimate(a, b, chosen.wanted)).total.size
    await run(given, chosen, rate=size // 10, tell=print)
    assert 8 < clock.longest < 11, "when the last object may go"


async def test_a_store_that_is_the_source_by_another_name_is_found_out() -> None:
    a = await source()
    before = content(a).keys()
    with pytest.raises(ConfigError, match="a is a: nothing can be copied there"):
        await run(ends(a, a), await select(ends(a, a)), tell=print)
    assert content(a).keys() == before


def test_one_destination_inside_the_other_is_refused_however_it_is_spelled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    s3 = "s3://bucket/pg?endpoint=http://store:9000"
    for one, other in (
        (f"file://{tmp_path}/a", f"file://{tmp_path}/link"),
        (f"file://{tmp_path}/a", f"file://{tmp_path}/a/"),
        (f"file://{tmp_path}/a", f"file://{tmp_path}/link/inside"),
        (f"file://{tmp_path}/a", f"file://localhost{tmp_path}/a"),
        (s3, "s3://bucket/pg/?endpoint=http://STORE:9000/&region=x"),
        (s3, "s3://bucket/pg/more?endpoint=http://store:9000"),
        (s3, "s3://bucket?endpoint=http://store:9000"),
        ("s3://bucket/pg", "s3://bucket/p%67"),
    ):
        with pytest.raises(ConfigError, match=r"nothing can be copied there|one inside the other"):
            _refuse_overlap(one, other)
        with pytest.raises(ConfigError):
            _refuse_overlap(other, one)
    for one, other in (
        (f"file://{tmp_path}/a", f"file://{tmp_path}/ab"),
        (s3, "s3://bucket/pg2?endpoint=http://store:9000"),
        (s3, "s3://bucket/pg?endpoint=http://other:9000"),
        (s3, f"file://{tmp_path}/a"),
    ):
        _refuse_overlap(one, other)


def test_a_destination_is_named_by_its_url_or_as_messages_name_it() -> None:
    url = "s3://bucket/pg?endpoint=http://store:9000"
    chosen = Settings(_env_file=None, WALSHIP_DESTINATIONS=url)
    assert url_of(chosen, "s3://bucket/pg") == url_of(chosen, url) == url
    assert url_of(chosen, "file:///elsewhere") == "file:///elsewhere"
    with pytest.raises(ConfigError, match="offsite is no destination") as caught:
        url_of(chosen, "offsite")
    assert "s3://bucket/pg" in caught.value.hint


def test_sizes_of_any_names_come_back_in_little_memory() -> None:
    names = {f"wal/00000001{log:08X}/00000001{log:08X}{seg:08X}": log + seg for log in range(80) for seg in range(256)}
    odd = {
        "wal/0000000100000000/0000000100000000FFFFFFFF": 7, "wal/00000002.history": 8, "keys/data-0": 0, "": 3,
        "base/b/data/base/99999999": 4, "base/b/data/base/٠٠٠٠٠٠٠١": 5, "base/b/data/base/00000001": 2**33,
        "12345678": 1,
    }  # fmt: skip
    tracemalloc.start()
    try:
        sizes = Sizes()
        for name, size in names.items():
            sizes.add(name, size)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < len(names) * 10
    for name, size in odd.items():
        sizes.add(name, size)
    assert sizes.count == len(names) + len(odd)
    assert all(sizes.find(name) == size for name, size in {**names, **odd}.items())
    assert sizes.find("wal/0000000100000000/000000010000000000000100") is None
    sizes.add("wal/00000002.history", 9)
    assert (sizes.find("wal/00000002.history"), sizes.count) == (9, len(names) + len(odd))


async def test_a_newer_format_and_another_segment_size_are_refused(tmp_path: Path) -> None:
    urls = [f"file://{tmp_path}/{name}" for name in ("a", "b")]
    for name, text in (("a", facts()), ("b", RepositoryFacts(SYSTEM_ID, 17, 16 << 20, "2026-01-14T12:00:00+00:00"))):
        (tmp_path / name / SYSTEM_ID).mkdir(parents=True)
        (tmp_path / name / SYSTEM_ID / REPOSITORY).write_bytes(b"".join(text.encode().chunks()))
    chosen = Settings(_env_file=None)
    with pytest.raises(ConfigError, match="were made apart"):
        async with open_ends(chosen, urls[:1], urls[1], dry=False):
            pass
    newer = tmp_path / "b" / SYSTEM_ID / REPOSITORY
    newer.write_text(newer.read_text("utf-8").replace('"format": 1', '"format": 2'), "utf-8")
    with pytest.raises(IntegrityError, match="is of format 2"):
        async with open_ends(chosen, urls[:1], urls[1], dry=False):
            pass
    with pytest.raises(ConfigError, match=f"no repository of cluster {SYSTEM_ID} at .*, and --existing asks for one"):
        async with open_ends(chosen, urls[:1], f"file://{tmp_path}/c", existing=True, dry=False):
            pass
    assert not (tmp_path / "c").exists()
    async with open_ends(chosen, urls[:1], f"file://{tmp_path}/c", dry=True) as opened:
        assert opened.there is None
    assert not (tmp_path / "c").exists()
    with pytest.raises(ConfigError, match="there is no repository of cluster 1 "):
        async with open_ends(chosen, urls[:1], urls[1], cluster="1", dry=False):
            pass


async def test_a_key_ring_of_the_target_that_is_newer_is_told(tmp_path: Path) -> None:
    """What its owner changed there alone, the source does not know: it goes on writing with the former key."""
    urls = [f"file://{tmp_path}/{name}" for name in ("a", "b")]
    for name, rings in (("a", (1,)), ("b", (1, 2))):
        folder = tmp_path / name / SYSTEM_ID
        (folder / "keys").mkdir(parents=True)
        (folder / REPOSITORY).write_bytes(b"".join(facts().encode().chunks()))
        for number in rings:
            (folder / "keys" / f"ring-{number:08d}").write_bytes(b"ring %d" % number)
    async with open_ends(Settings(_env_file=None), urls[:1], urls[1], dry=True) as opened:
        assert [note.partition(" at ")[0] for note in opened.notes] == ["keys/ring-00000002"]
    async with open_ends(Settings(_env_file=None), urls[1:], urls[0], dry=True) as opened:
        assert opened.notes == ()
