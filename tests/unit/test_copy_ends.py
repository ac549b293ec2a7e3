"""Between which places is copied, and how fast: what may not be, and what has to be told before."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from handlers.copy import estimate
from infra.copying import Ends, _refuse_overlap, open_ends, run, select, url_of
from infra.repository import RepositoryFacts
from infra.settings import Settings
from infra.storage.memory import MemoryStore
from pipeline.catalog import REPOSITORY
from pipeline.errors import ConfigError, IntegrityError
from pipeline.sizes import Sizes
from tests.clock import FastClock
from tests.copying import content, ends, facts, rooting, source
from tests.keys import SYSTEM_ID


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
