"""Python's own tarfile writes; our reader must see the same, however the bytes are cut."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import IntegrityError
from pipeline.tar import BLOCK, Content, Entry, EntryKind, TarReader, header

NAMES = st.from_regex(r"[a-z]{1,8}(/[a-z0-9_.]{1,8}x)?", fullmatch=True)


def build(files: list[tuple[str, bytes]], *, padded: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime, info.uid, info.uname = len(content), 0o600, 1_700_000_000, 26, "postgres"
            archive.addfile(info, io.BytesIO(content))
    whole = buffer.getvalue()
    if padded:
        return whole
    return whole[: sum(BLOCK + len(c) + -len(c) % BLOCK for _, c in files) + 2 * BLOCK]


def read(data: bytes, step: int) -> list[tuple[Entry, bytes]]:
    reader = TarReader("base")
    found: list[tuple[Entry, bytearray]] = []
    for start in range(0, len(data), step):
        for item in reader.feed(data[start : start + step]):
            if isinstance(item, Entry):
                found.append((item, bytearray()))
            else:
                assert item.offset == len(found[-1][1])
                found[-1][1].extend(item.data)
    reader.finish()
    return [(entry, bytes(content)) for entry, content in found]


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=3000)), max_size=5),
    st.integers(1, 4000),
    st.booleans(),
)  # fmt: skip
def test_any_cut_gives_the_same_files(files: list[tuple[str, bytes]], step: int, padded: bool) -> None:
    data = build(files, padded=padded)
    found = read(data, step)
    assert [(entry.path, content) for entry, content in found] == files
    for entry, content in found:
        assert data[entry.offset : entry.offset + entry.size] == content
        assert (entry.kind, entry.mode, entry.uid, entry.uname) == (EntryKind.FILE, 0o600, 26, "postgres")


def test_directories_and_links_have_no_content() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        folder = tarfile.TarInfo("./pg_wal/archive_status")
        folder.type = tarfile.DIRTYPE
        folder.mode = 0o700
        archive.addfile(folder)
        link = tarfile.TarInfo("pg_tblspc/16384")
        link.type, link.linkname = tarfile.SYMTYPE, "/srv/fast"
        archive.addfile(link)
    (one, _), (two, _) = read(buffer.getvalue(), 100)
    assert (one.path, one.kind, one.mode, one.size) == ("pg_wal/archive_status", EntryKind.DIRECTORY, 0o700, 0)
    assert (two.path, two.kind, two.linkname) == ("pg_tblspc/16384", EntryKind.SYMLINK, "/srv/fast")


def test_a_size_above_8_gib_stands_in_base_256() -> None:
    info = tarfile.TarInfo("base/1/2")
    info.size = 9 << 30
    (entry,) = TarReader("base").feed(info.tobuf(tarfile.GNU_FORMAT))
    assert isinstance(entry, Entry)
    assert entry.size == 9 << 30


@pytest.mark.parametrize(
    "unusual",
    [
        {"uid": 1_000_660_000, "gid": 1_000_660_000},  # OpenShift
        {"uid": (1 << 32) - 2},
        {"gid": 1 << 21},
        {"mtime": -86_400},
        {"mtime": 1 << 40},
        {"size": 9 << 30},
    ],
)
def test_owners_times_and_sizes_of_all_kinds_are_written(unusual: dict[str, int]) -> None:
    members: dict[str, Any] = {"size": 0, "mode": 0o600, "mtime": 1_700_000_000, "uid": 26, "gid": 26} | unusual
    block = header("base/1/16384", EntryKind.FILE, **members)
    (entry,) = TarReader("base").feed(block)
    assert isinstance(entry, Entry)
    assert {name: getattr(entry, name) for name in members} == members
    assert entry.path == "base/1/16384"


def test_content_is_a_view_and_no_copy() -> None:
    data = build([("a", b"x" * 1000)])
    items = list(TarReader("base").feed(data))
    assert isinstance(items[1], Content)
    assert items[1].data.obj is data


@pytest.mark.parametrize("at", [0, 130, 150, 300])
def test_a_flipped_bit_in_a_header_is_noticed(at: int) -> None:
    data = bytearray(build([("base/1/1259", b"x" * 700)]))
    data[at] ^= 4
    with pytest.raises(IntegrityError, match="damaged header at byte 0"):
        read(bytes(data), 512)


@pytest.mark.parametrize("keep", [0, 100, 512, 800, 1024 + 512, 1024 + 512 + 512])
def test_a_cut_archive_is_noticed(keep: int) -> None:
    with pytest.raises(IntegrityError, match=f"cut after {keep} bytes"):
        read(build([("base/1/1259", b"x" * 700)])[:keep], 512)


def test_what_follows_the_end_is_refused() -> None:
    data = build([("a", b"1")], padded=False)
    with pytest.raises(IntegrityError, match="behind its end"):
        read(data + build([("b", b"2")]), 512)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "base/../../x"])
def test_a_name_that_leads_out_is_refused(name: str) -> None:
    with pytest.raises(IntegrityError, match="leads out of its folder"):
        read(build([(name, b"1")]), 512)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.XHDTYPE])
def test_what_postgres_does_not_write_is_refused(kind: bytes) -> None:
    info = tarfile.TarInfo("odd")
    info.type = kind
    with pytest.raises(IntegrityError, match="which PostgreSQL does not write"):
        list(TarReader("base").feed(info.tobuf(tarfile.USTAR_FORMAT)))
