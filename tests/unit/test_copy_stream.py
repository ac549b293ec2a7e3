"""Files on their way into a local backup: read to their end, however little a read brings."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest

from handlers.pages import PAGE
from infra.postgres.copy_stream import Copy, Shared, Stream
from infra.postgres.datadir import Found, walk
from pipeline.catalog import PART_SIZE
from pipeline.make_manifest import ManifestMaker
from pipeline.manifest import WalRange, files_of
from pipeline.tar import BLOCK
from pipeline.wal import Lsn
from tests.unit.test_pages import page


def read(root: Path) -> tuple[dict[str, bytes], Copy]:
    """Every file of the tar stream."""
    copy = Copy(Lsn(1), ManifestMaker("7", 17), checksums=False, blocks=131072)
    stream: Any = Stream("base", Shared(walk(root, 17)), copy)
    tar = b""
    while taken := stream.next():  # bytes, or a message that holds them
        tar += getattr(taken, "data", taken)
    with tarfile.open(fileobj=io.BytesIO(tar + bytes(1024))) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive.getmembers() if m.isreg()}, copy  # type: ignore[union-attr]


def test_a_read_that_is_cut_short_is_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(3_000_001)
    (tmp_path / "base/1").mkdir(parents=True)
    (tmp_path / "base/1/16384").write_bytes(content)
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda handle, length, offset: pread(handle, min(length, 70_001), offset))
    monkeypatch.setattr(os, "preadv", lambda handle, rooms, offset: preadv(handle, [rooms[0][:70_001]], offset))
    files, _ = read(tmp_path)
    assert files["base/1/16384"] == content


def test_a_damaged_page_is_found_wherever_a_piece_ends(tmp_path: Path) -> None:
    pages = [page(number) for number in range(13)]
    for number in (0, 3, 4, 11, 12):
        pages[number][5000] ^= 1
    (tmp_path / "base/1").mkdir(parents=True)
    (tmp_path / "base/1/16384").write_bytes(b"".join(pages))
    copy = Copy(Lsn(1 << 33), ManifestMaker("7", 17), checksums=True, blocks=131072, piece=4 * PAGE, pieces=1)
    stream = Stream("base", Shared(walk(tmp_path, 17)), copy)
    tar, sizes = b"", []
    while (piece := stream.next()) is not None:
        tar += piece.data
        sizes.append(len(piece.data))
        assert piece.free is not None
        piece.free()  # the only room there is
    # Headers lie before the file, so every piece ends within a page.
    assert sizes[:-1] == [4 * PAGE] * (len(sizes) - 1)
    assert len(sizes) > 3
    assert b"".join(pages) in tar
    assert [found.blocks for found in copy.damaged] == [(0, 3, 4, 11, 12)]


@pytest.mark.parametrize(("blocks", "pieces"), [(20, 1), (5, 2)])
def test_what_comes_behind_the_files_lies_in_the_room_that_is_there(tmp_path: Path, blocks: int, pieces: int) -> None:
    """The label and the end of the tar, ten blocks: in the last piece, or in one more where only five are left."""
    (tmp_path / "base/1").mkdir(parents=True)
    folders = len(list(walk(tmp_path, 17)))
    (tmp_path / "base/1/16384").write_bytes(bytes((128 - blocks - folders - 1) * BLOCK))  # one is its own header
    copy = Copy(Lsn(1), ManifestMaker("7", 17), checksums=False, blocks=131072, piece=128 * BLOCK, pieces=2)
    stream = Stream("base", Shared(walk(tmp_path, 17)), copy, ends=False)
    assert stream.next() is None  # what is there is kept for the end
    label = b"label".ljust(8 * BLOCK, b".")
    found = []
    for piece in stream.end(label):
        found.append((bytes(piece.data), piece.last))
        assert piece.free is not None
        piece.free()
    assert [last for _, last in found] == [False] * (pieces - 1) + [True]
    tar = b"".join(data for data, _ in found)
    assert tar.endswith(label + bytes(2 * BLOCK))
    with tarfile.open(fileobj=io.BytesIO(tar.replace(label, b""))) as archive:
        assert "base/1/16384" in archive.getnames()


def test_a_piece_that_waits_for_the_end_takes_no_room_from_those_who_still_read(tmp_path: Path) -> None:
    (tmp_path / "base/1").mkdir(parents=True)
    (tmp_path / "base/1/16384").write_bytes(b"left over")
    copy = Copy(Lsn(1), ManifestMaker("7", 17), checksums=False, blocks=131072, piece=64 << 10, pieces=3)
    first = Stream("base.1", Shared(walk(tmp_path, 17)), copy, ends=False)
    assert first.next() is None
    copy.stop.set()  # who finds no room does not wait for it
    assert [copy.room() is not None for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(("files", "dropped"), [(60, "base/1/16420"), (150, "")])
def test_damaged_pages_of_many_small_files_are_told_apart(tmp_path: Path, files: int, dropped: str) -> None:
    """They are checked together, 128 at a time; a file that was dropped before that has no damage."""
    (tmp_path / "base/1").mkdir(parents=True)
    good, bad = b"".join(page(number) for number in range(2)), page(1)
    bad[5000] ^= 1
    wrong = set()
    for oid in range(16384, 16384 + files):
        if oid % 20 == 0:
            wrong.add(f"base/1/{oid}")
        (tmp_path / f"base/1/{oid}").write_bytes(good if oid % 20 else good[:PAGE] + bad)
    copy = Copy(Lsn(1 << 33), ManifestMaker("7", 17), checksums=True, blocks=131072, piece=4 * PAGE, pieces=1)
    stream = Stream("base", Shared(walk(tmp_path, 17)), copy, "pg_tblspc/1/")
    tar = b""
    while (piece := stream.next()) is not None:
        tar += piece.data
        if dropped and tar.count(b"ustar") > files:  # the headers of all have come
            (tmp_path / dropped).unlink(missing_ok=True)
        assert piece.free is not None
        piece.free()
    assert {found.path: found.blocks for found in copy.damaged} == {
        f"pg_tblspc/1/{path}": (1,) for path in wrong - {dropped}
    }


def test_whoever_waits_for_room_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "PG_VERSION").write_bytes(bytes(3 * PAGE))
    copy = Copy(Lsn(1), ManifestMaker("7", 17), checksums=False, blocks=131072, piece=PAGE, pieces=1)
    stream = Stream("base", Shared(walk(tmp_path, 17)), copy)
    assert stream.next() is not None
    threading.Timer(0.2, copy.stop.set).start()
    assert stream.next() is None


def test_the_wal_is_left_out_wherever_it_lies(tmp_path: Path) -> None:
    root, wal = tmp_path / "data", tmp_path / "wal"
    for folder in (root / "base", wal / "archive_status", wal / "own"):
        folder.mkdir(parents=True)
    (wal / "000000010000000000000001").write_bytes(b"wal")
    (root / "pg_wal").symlink_to(wal)
    (root / "pg_stat_tmp").symlink_to(wal)
    found = {each.path: each.folder for each in walk(root, 17)}
    emptied = ("base", "pg_stat_tmp", "pg_wal", "pg_wal/archive_status", "pg_wal/summaries")
    assert found == dict.fromkeys(emptied, True)


def test_the_segments_of_a_large_relation_are_files_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "base/1").mkdir(parents=True)
    names = ["16384", "16384.1", "16384.10", "16384_fsm", "16384_vm.1", "16385", "16385_init", "16385_init.1"]
    left_out = ["16385", "16385.1", "16385_fsm", "t3_16386", "t3_16386.1", "t3_16386_vm"]
    for name in {*names, *left_out}:
        (tmp_path / "base/1" / name).write_bytes(name.encode())
    found = {each.path: each.segment for each in walk(tmp_path, 17) if not each.folder}
    kept = [name for name in names if name not in left_out]
    assert found.keys() == {f"base/1/{name}" for name in kept}
    assert [found[f"base/1/{name}"] for name in ("16384", "16384.1", "16384.10", "16384_vm.1")] == [0, 1, 10, 1]
    files, copy = read(tmp_path)
    assert files == {f"base/1/{name}": name.encode() for name in kept}
    listed = copy.manifest.finish([WalRange(1, Lsn(1), Lsn(2))])
    assert {line.path for line in files_of(listed)} == set(files)


def test_one_worker_takes_large_files_first_and_all_get_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.postgres.copy_stream._PASSED_OVER", 3)

    def found(number: int) -> Found:
        size = PART_SIZE if number in (4, 5, 13) else 8192
        return Found(str(number), Path(str(number)), number == 0, 0o600, 0, 0, 0, size=size)

    def take(large: bool) -> str:
        one = files.take(large=large)
        return one.path if one else ""

    files = Shared(found(number) for number in range(15))
    # No more than three are passed over for a large one.
    assert [take(True) for _ in range(3)] == ["0", "1", "4"]
    assert [take(False), take(True), take(False), take(False)] == ["2", "5", "3", "6"]
    assert [take(number % 2 == 0) for number in range(8)] == ["7", "8", "9", "10", "13", "11", "12", "14"]
    assert [take(True), take(False)] == ["", ""]


def test_a_folder_comes_before_its_files_where_one_worker_reads_all() -> None:
    files = Shared(
        Found(path, Path(path), "/" not in path, 0o600, 0, 0, 0, size=size)
        for path, size in (("a", 0), ("a/1", PART_SIZE), ("a/2", 1), ("b", 0), ("b/1", PART_SIZE))
    )
    order = []
    while (each := files.take(large=False)) is not None:
        order.append(each.path)
    assert sorted(order) == ["a", "a/1", "a/2", "b", "b/1"]
    assert order.index("a") < order.index("a/1")
    assert order.index("b") < order.index("b/1")
