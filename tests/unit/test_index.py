"""The slices of a file cover it exactly, each within its part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import IntegrityError
from pipeline.index import Slice, slices
from pipeline.tar import Entry, EntryKind


def entry(offset: int, size: int, kind: EntryKind = EntryKind.FILE, path: str = "base/1/2") -> Entry:
    return Entry(path, kind, size, 0o600, 0, 0, 0, "", "", "", offset)


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(100, 3000))
def test_slices_cover_a_file(offset: int, size: int, part_size: int) -> None:
    found = list(slices("base", entry(offset, size), part_size))
    done = 0
    for piece in found:
        assert piece.offset == done
        assert (piece.part - 1) * part_size + piece.part_offset == offset + done
        assert piece.part_offset + piece.length <= part_size
        assert piece.length > 0 or size == 0
        assert Slice.decode("index", piece.encode()) == piece
        done += piece.length
    assert done == size
    assert found


def test_folders_and_links_have_no_line() -> None:
    assert not list(slices("base", entry(0, 0, EntryKind.DIRECTORY)))
    assert not list(slices("base", entry(0, 0, EntryKind.SYMLINK)))


def test_a_line_is_what_the_format_says() -> None:
    (piece,) = slices("base", entry(512, 3, path="a"), 1024)
    assert piece.encode() == LINE + b"\n"


def test_a_name_that_is_no_utf8_comes_back() -> None:
    (piece,) = slices("base", entry(512, 3, path="a\udcff"), 1024)
    assert Slice.decode("index", piece.encode()) == piece


LINE = b'{"archive":"base","path":"a","size":3,"offset":0,"part":1,"part_offset":512,"length":3}'


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{", b"[]", b'{"archive":"base"}', LINE.replace(b'"base"', b"1"), LINE.replace(b":3,", b":true,"),
        LINE.replace(b'"part":1', b'"part":0'), LINE.replace(b":512", b":-1"), LINE.replace(b":512", b":16777214"),
        LINE.replace(b'"base"', b'"../1"'), LINE.replace(b'"offset":0', b'"offset":1'),
        LINE.replace(b'"path":"a"', b'"path":"b","path":"a"'),
    ],
)  # fmt: skip
def test_a_line_that_is_none_is_an_integrity_error(line: bytes) -> None:
    with pytest.raises(IntegrityError, match="index has a line that cannot be read"):
        Slice.decode("index", line)
