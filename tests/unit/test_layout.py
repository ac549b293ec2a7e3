"""Which parts of an archive a restore needs, and where in a file each begins: whatever the files, whatever is kept."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.backup import ArchiveInfo
from pipeline.errors import IntegrityError
from pipeline.index import Slice, slices
from pipeline.layout import Layout, prefix_of
from pipeline.manifest import files_of
from pipeline.tar import BLOCK, Content, Entry, TarReader
from tests.laying import PART, manifest, tar

#: Files and folders, small beside a part or larger than it.
FILES = st.lists(
    st.one_of(st.none(), st.sampled_from([0, 1, 511, 512, 513, PART - BLOCK, PART, PART + 1, 3 * PART])), max_size=8
)


def lines(archive: str, data: bytes) -> list[Slice]:
    return [s for item in TarReader(archive).feed(data) if isinstance(item, Entry) for s in slices(archive, item, PART)]


def layout(data: bytes, kept: set[str], others: set[str] | None = None, archive: str = "base") -> Layout:
    parts = -(-len(data) // PART)
    made = Layout(
        [ArchiveInfo(archive, len(data), ("0" * 64,) * parts)], kept=kept, others=others or set(), part_size=PART
    )
    for line in lines(archive, data):
        made.add(line)
    made.end()
    return made


@given(FILES, st.sets(st.integers(0, 7)))
@example([PART - 2 * BLOCK, 513], set())  # a header ends the first part
def test_needed_parts_hold_all_that_is_not_kept_and_can_be_read_alone(
    sizes: list[int | None], chosen: set[int]
) -> None:
    files = {f"d{i}/" if size is None else f"f{i}": bytes([i]) * (size or 0) for i, size in enumerate(sizes)}
    kept = {f"f{i}" for i in chosen} & files.keys()
    data = tar(files)
    made = layout(data, kept)
    found: dict[str, bytearray] = {}
    for number, start in enumerate(range(0, len(data), PART), 1):
        inside = made.inside.get(("base", number))
        if ("base", number) not in made.needed:
            continue
        reader = TarReader("base", start=start, inside=inside)
        name = inside.path if inside else ""
        for item in reader.feed(data[start : start + PART]):
            if isinstance(item, Content):
                at = item.offset
                found.setdefault(name, bytearray(len(files[name])))[at : at + len(item.data)] = item.data
            else:
                name = item.path
                found.setdefault(name, bytearray(item.size))
        following = made.inside.get(("base", number + 1))
        assert reader.inside == following
        assert reader.between_blocks
    for name, content in files.items():
        if name.endswith("/"):
            assert name[:-1] in found
        elif name not in kept:
            assert found[name] == content
    skipped = sum(made.kept.values())
    assert skipped == sum(len(files[name]) for name in kept)


def test_parts_that_hold_nothing_but_kept_files_are_left_out() -> None:
    files = {"a": b"x" * 10, "large": b"y" * (6 * PART), "z": b"z"}
    others = {"large", "of_later"}
    made = layout(tar(files), {"large"}, others)
    assert made.needed == {("base", 1), ("base", 7)}
    assert made.others == {"of_later"}


def test_files_of_a_tablespace_have_their_oid_before_them() -> None:
    assert [prefix_of(name) for name in ("base", "base.2", "17", "17.1")] == ["", "", "pg_tblspc/17/", "pg_tblspc/17/"]
    made = layout(tar({"PG_17/1": b"x" * (3 * PART)}), {"pg_tblspc/17/PG_17/1"}, archive="17")
    assert not made.needed - {("17", 1), ("17", 4)}


@pytest.mark.parametrize("line", [Slice("17", "a", 1, 0, 1, 512, 1), Slice("base", "a", PART, 0, 9, 512, PART - 512)])
def test_an_index_that_leads_out_of_the_archive_is_refused(line: Slice) -> None:
    made = layout(tar({"a": b"x"}), set())
    with pytest.raises(IntegrityError, match="where the archive"):
        made.add(line)


def test_the_files_of_a_manifest() -> None:
    files = {"PG_VERSION": b"17\n", "base/1/2": b"", "odd\udcff": b"x", 'with "quotes"': b"y"}
    for algorithm in ("CRC32C", "SHA256"):
        found = list(files_of(manifest({"base": files, "17": {"PG/1": b"z"}}, algorithm)))
        assert [(line.path, line.size) for line in found] == [
            *((name, len(content)) for name, content in files.items()),
            ("pg_tblspc/17/PG/1", 1),
        ]
        assert {line.algorithm for line in found} == {algorithm}
    assert not list(files_of(manifest({"base": files}, "NONE")))
    damaged = manifest({"base": files}).replace(b'"Size": 3', b'"Size": x')
    assert [line.path for line in files_of(damaged)] == list(files)[1:]
    # RFC 3720's check value, lowest byte first.
    (line,) = files_of(manifest({"base": {"a": b"123456789"}}))
    assert line.checksum == "839206e3"
