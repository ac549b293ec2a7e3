"""A bucket as it was, at a real server that keeps versions, and at one that answers as Amazon's does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from handlers.body import joined
from handlers.fetch import read_catalog
from infra.demo.seaweed import Seaweed
from infra.settings import Settings
from infra.storage import display_name, is_past, open_store
from infra.storage.as_of import as_it_was
from infra.storage.s3 import S3Store
from infra.storage.s3_past import S3Past
from infra.storage.s3_versions import S3Versions
from pipeline.catalog import wal_key
from pipeline.contracts import Store
from pipeline.errors import ConfigError, ObjectMissing, ReadOnly
from pipeline.objects import MemoryBody
from pipeline.wal import WalFile
from tests.acceptance.made_repository import OPEN, build
from tests.contract.versions import Versions, versions
from tests.stores import s3_client, s3_store, versioned_bucket
from tests.waldata import SEGMENT_SIZE

BUCKET = "past"


async def a_moment() -> datetime:
    """The next whole second: what was written before is seen as of then, and what is written from now on is not."""
    moment = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1)
    while datetime.now(UTC) < moment:
        await asyncio.sleep(0.02)
    return moment


@pytest.fixture
async def now(seaweed: Seaweed, s3_prefix: str) -> AsyncIterator[S3Store]:
    """The bucket as it is."""
    store = s3_store(seaweed, bucket=versioned_bucket(seaweed, f"{BUCKET}-{s3_prefix}"))
    yield store
    await store.close()


async def put(store: Store, **objects: str) -> None:
    """Names are keys, with __ for / and _ for a dot."""
    for name, content in objects.items():
        key = name.replace("__", "/").replace("_", ".")
        await store.put(key, MemoryBody([content.encode()]), replace=True)


async def listed(store: Store, prefix: str = "", after: str = "") -> dict[str, int]:
    """Key → size; each has to be listed once."""
    infos = [info async for info in store.list(prefix, after=after)]
    found = {info.key: info.size for info in infos}
    assert len(found) == len(infos)
    return found


async def seen(store: Store) -> dict[str, str]:
    """Key → content, of what is listed; each has to be as large as is said."""
    found: dict[str, str] = {}
    for key, size in (await listed(store)).items():
        content = joined(await store.get(key))
        assert len(content) == size == (await store.head(key)).size
        found[key] = content.decode()
    return found


async def test_each_key_shows_what_it_was(now: S3Store, seaweed: Seaweed) -> None:
    """Whatever the pages are: SeaweedFS by itself passes over A where A.partial ends a page."""
    bucket, client = now._options.bucket, s3_client(seaweed)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Suspended"})
    await put(now, w__A1="null", w__A2="null", w__A5="null, for good")
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    await put(now, w__A3="0", w__A4="gone")
    await a_moment()
    await put(now, w__A1_partial="p", w__A1_00000028_backup="b", w__A2="2", w__A2_partial="q", w__A3="3")
    await put(now, top="1", in__folder="x", w__A6="6")
    await now.delete(["w/A4"])
    before = {
        "top": "1", "in/folder": "x", "w/A1": "null", "w/A1.partial": "p", "w/A1.00000028.backup": "b",
        "w/A2": "2", "w/A2.partial": "q", "w/A3": "3", "w/A5": "null, for good", "w/A6": "6",
    }  # fmt: skip
    past = S3Past(now._options, await a_moment())
    await put(now, w__A1="other", w__A2="other", w__A2_partial="other", w__A3="x", w__A4="again", w__A7="new", top="y")
    await put(now, w__A3="xx", later__x="new")
    await now.delete(["w/A3", "w/A6", "w/A1.partial", "in/folder"])
    try:
        assert await seen(past) == before
        sizes = {key: len(content) for key, content in before.items()}
        for page in (1, 2, 3, 4, 1000):
            past.page = page
            assert await listed(past) == sizes, f"{page} versions to a page"
            assert await listed(past, "w/", "w/A2") == {key: size for key, size in sizes.items() if key > "w/A2"}
            assert await listed(past, "w/A2") == {"w/A2": 1, "w/A2.partial": 1}
            shallow = {info.key async for info in past.list("", shallow=True)}
            assert shallow - {"later/"} == {"top", "in/", "w/"}, "an empty folder may be shown"
        for key in ("w/A4", "w/A7", "later/x", "never"):
            with pytest.raises(ObjectMissing, match=f"{key} is missing from s3://{BUCKET}-.* as of 20"):
                await past.get(key)
            with pytest.raises(ObjectMissing):
                await past.head(key)
        assert joined(await past.get("w/A5", (0, 4))) == b"null"
        assert joined(await past.get("w/A3", (0, 4))) == b"3"
        assert joined(await past.get("w/A3", (5, 9))) == b""
    finally:
        await past.close()


async def test_nothing_is_written_into_the_past(now: S3Store) -> None:
    past = S3Past(now._options, datetime.now(UTC))
    for refused in (past.put("a", MemoryBody([b"x"])), past.delete(["a"]), past.probe("a", MemoryBody([b"x"]))):
        with pytest.raises(ReadOnly, match=r"past-.* as of .*Z: \w+ a: the past cannot be changed"):
            await refused
    assert [info async for info in now.list("")] == []


async def test_wal_tails_and_parts_are_what_they_were(now: S3Store) -> None:
    """Everything is replaced or deleted, in turn; tails as well, of which a fold would leave none."""
    made = await build()
    objects = {info.key: joined(await made.shelf.store.get(info.key)) async for info in made.shelf.store.list("")}
    assert sum(key.startswith("tail/") for key in objects) == 3
    await asyncio.gather(*(now.put(key, MemoryBody([content])) for key, content in objects.items()))
    moment, names = await a_moment(), sorted(objects)
    await now.delete(names[::2])
    await asyncio.gather(*(now.put(key, MemoryBody([b"lost"]), replace=True) for key in names[1::2]))
    past = S3Past(now._options, moment)
    try:
        repository = made.repository(past)
        catalog = await read_catalog(repository.stores, repository.fetch, repository.system_id)
        (backup,) = catalog.backups
        assert backup.archives
        for name, content in made.wal.items():
            file = WalFile.parse(name)
            assert file is not None
            if name == OPEN.name:
                joint = await repository.fetch.tail(file, SEGMENT_SIZE)
                assert joint is not None
                assert joint.reach > 2500
                assert bytes(joint.content) == content
            else:
                assert bytes((await repository.fetch(wal_key(file))).plain) == content
        assert {key: joined(await past.get(key)) for key in objects} == objects
    finally:
        await past.close()


NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


@pytest.fixture
async def amazon() -> AsyncIterator[Versions]:
    async with versions() as bucket:
        yield bucket


async def test_more_versions_than_a_page_holds(amazon: Versions) -> None:
    amazon.add("w/A", "before", NOON)
    amazon.add("w/gone", "x", NOON)
    amazon.add("w/gone", None, NOON + SECOND)
    for number in range(1100):
        amazon.add("w/A", str(number), NOON + (number + 5) * SECOND)
        if number % 2:
            amazon.add(f"w/N{number}", "new", NOON + 5 * SECOND)
    amazon.add("w/Z", "behind", NOON)
    past = S3Past(amazon.options, NOON + 2 * SECOND)
    try:
        assert await seen(past) == {"w/A": "before", "w/Z": "behind"}
        counted = await past.remains("w/", seconds=60)
        assert (counted.versions, counted.markers, counted.counted) == (1101, 1, True)
        assert counted.size == len("before") + len("x") + sum(len(str(n)) for n in range(1099))
        assert counted.rule is None, "it cannot be asked"
        assert counted.locked_until is None
        assert not (await past.remains("w/", seconds=0)).counted
    finally:
        await past.close()


async def test_what_happened_in_one_second_is_rather_shown_than_lost(amazon: Versions) -> None:
    """Listings tell whole seconds, and objects apart from delete markers: which of two came first is not known then."""
    for content in ("1", "2", None, "other"):
        amazon.add("a", content, NOON if content != "other" else NOON + 9 * SECOND)
    for content in ("1", None):
        amazon.add("b", content, NOON)
    past = S3Past(amazon.options, NOON + SECOND)
    try:
        assert await seen(past) == {"a": "2"}, "of b it is known: its marker is the latest"
    finally:
        await past.close()


async def test_what_is_as_it_was_is_asked_for_once(amazon: Versions) -> None:
    amazon.add("old", "1", NOON)
    past = S3Past(amazon.options, NOON + SECOND)
    try:
        assert joined(await past.get("old")) == b"1"
        assert amazon.asked == ["old"]
    finally:
        await past.close()
    sooner = S3Past(amazon.options, NOON + timedelta(microseconds=999_999))
    try:
        with pytest.raises(ObjectMissing):  # it was written in that very second, or after it
            await sooner.get("old")
    finally:
        await sooner.close()


async def past_of(*urls: str, moment: datetime = NOON) -> tuple[tuple[str, ...], list[str]]:
    said: list[str] = []
    settings = Settings(_env_file=None, AWS_ACCESS_KEY_ID="me", AWS_SECRET_ACCESS_KEY="very-secret")
    return await as_it_was(urls, moment, settings, tell=said.append), said


async def test_who_keeps_no_versions_is_refused_by_name_or_left_out(amazon: Versions) -> None:
    bucket = f"s3://bucket/pg?endpoint={amazon.endpoint}"
    urls, said = await past_of("file:///backups", bucket, moment=NOON.replace(microsecond=5))
    assert urls == (f"{bucket}&as_of=2026-11-23T12:00:00Z",)
    assert said == [
        "left out, because it keeps no versions: file:///backups (a folder)",
        "reading s3://bucket/pg as it was before 2026-11-23 12:00:00 UTC",
    ]
    amazon.status = ""
    never = r"keeps no versions: s3://bucket/pg \(versions were never enabled for the bucket\)"
    with pytest.raises(ConfigError, match=never) as caught:
        await past_of(bucket)
    assert "--to-time, without --as-of" in caught.value.hint
    with pytest.raises(ConfigError, match=r"keeps no versions: file:///backups \(a folder\), s3://bucket/pg"):
        await past_of("file:///backups", bucket)
    amazon.status = "Suspended"
    assert "what was replaced since they were is lost" in (await past_of(bucket))[1][0]
    amazon.refused.add("versioning")
    assert "access is denied" in (await past_of(bucket))[1][0], "it may keep versions: that is found out by reading"
    with pytest.raises(ConfigError, match=r"--as-of .* lies in the future"):
        await past_of(bucket, moment=datetime.now(UTC) + timedelta(hours=1))
    with pytest.raises(ConfigError, match="says already as of when"):
        await past_of(urls[0])


async def test_a_url_says_as_of_when(amazon: Versions) -> None:
    amazon.add("pg/a", "1", NOON)
    amazon.add("pg/a", "2", NOON + SECOND)
    url = f"s3://bucket/pg?endpoint={amazon.endpoint}&as_of=2026-11-23T13:00:01%2B01:00"
    settings = Settings(_env_file=None, AWS_ACCESS_KEY_ID="me", AWS_SECRET_ACCESS_KEY="very-secret")
    store = open_store(url, settings)
    try:
        assert joined(await store.get("a")) == b"1"
        assert is_past(url)
        assert store.name == display_name(url) == "s3://bucket/pg as of 2026-11-23T13:00:01+01:00"
    finally:
        await store.close()
    for wrong in ("yesterday", "2026-11-23T12:00:00", "2 hours ago"):
        with pytest.raises(ConfigError, match=r"the option as_of of s3://bucket/pg as of .* is "):
            open_store(f"s3://bucket/pg?as_of={wrong}", settings)


async def test_a_lock_is_told_with_what_it_holds(seaweed: Seaweed, s3_prefix: str) -> None:
    bucket = versioned_bucket(seaweed, f"remains-{s3_prefix}", locked=True)
    store = S3Versions(s3_store(seaweed, bucket=bucket)._options)
    try:
        assert await store.versioning() == "Enabled"
        await put(store, c__a="12345", c__b="1", other="1")
        await put(store, c__b="22")
        await store.delete(["c/a", "c/b"])
        found = await store.remains("c/", seconds=60)
        assert (found.versions, found.size, found.markers) == (3, 8, 2)
        assert (found.lock, found.locked_for, found.rule) == ("COMPLIANCE", timedelta(days=1), False)
        assert found.locked_until is not None
        assert abs(found.locked_until - datetime.now(UTC) - timedelta(days=1)) < timedelta(minutes=2)
    finally:
        await store.close()
